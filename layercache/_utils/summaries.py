"""Summaries of objects: a few lines at a prompt, the same as a small table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence

from layercache._utils.text import shown

MOST_ROWS = 4
"""Lines below the first."""

LONGEST = 160
"""Characters of a value; names in files may be anybody's."""

Rows = Sequence[tuple[str, str]]


class Summarised:
    """Mixin for classes whose `repr` is a summary of at most five lines."""

    def _summary(self) -> tuple[str, Rows]:
        """What it is, in a line, and up to `MOST_ROWS` facts, each with its name; empty ones are left out."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, rows = _cut(*self._summary())
        return "\n".join([title, *(f"  {name}: {value}" for name, value in rows)])

    def _repr_html_(self) -> str:
        title, rows = _cut(*self._summary())
        body = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(value)}</td></tr>'
            for name, value in rows
        )
        return f'<table><caption style="text-align:left">{html.escape(title)}</caption>{body}</table>'


def _cut(title: str, rows: Rows) -> tuple[str, list[tuple[str, str]]]:
    kept = [(name, _short(value)) for name, value in rows if value]
    return _short(title), kept[:MOST_ROWS]


def _short(text: str) -> str:
    line = shown(text)
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def joined(values: Sequence[object]) -> str:
    """``a, b, c``, or ``a, b and 7 more`` where there are many."""
    most = 6
    named = [str(value) for value in values[:most]]
    return ", ".join(named) + (f" and {len(values) - most} more" if len(values) > most else "")
