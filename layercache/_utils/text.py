"""Names and notes as text: nothing in them moves a cursor, begins a line, or turns the direction of writing."""

from __future__ import annotations

import re

# Control characters, separators of lines, marks of direction, and halves of pairs, which no encoding takes.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_HIDDEN_BUT_LINES = re.compile(f"(?!\n){_HIDDEN.pattern}")


def shown(name: object) -> str:
    r"""A name on one line: what would not be seen is written as an escape such as ``\x1b``."""
    text = str(name)
    return text if text.isprintable() else _HIDDEN.sub(_escape, text)


def cleaned(text: str) -> str:
    """As `shown`, of a text whose lines stay apart."""
    return text if text.isprintable() else _HIDDEN_BUT_LINES.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
