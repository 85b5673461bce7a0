"""Tables that fit a terminal without cutting a number, and that pages show too."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from layercache._utils.text import shown
from layercache.tools.report.console import PlainConsole

GAP = 2
# A name is folded, as a last resort, to no fewer characters than this.
NARROWEST_NAME = 12
LEFT_OUT = "Left out at this width: {}; a wider terminal or {} has them."


@dataclass(frozen=True)
class Column:
    """A column of a `FittingTable`.

    Attributes:
        heading: shown above.
        importance: 0 is always shown; of the others the highest is left out first where the width is short.
        numeric: aligned right, and sorted by value on a page.
        wraps: words may go to a next line; no word is broken.
        about: what the figures are, in a phrase, for pages.
    """

    heading: str
    importance: int = 0
    numeric: bool = True
    wraps: bool = False
    about: str = ""


class FittingTable:
    """Rows of short texts under headings; a width decides how many of the columns are shown.

    Columns keep their full width; where that is too much, those of least importance are left out and named below the
    table. With ``keys``, nothing is left out: columns that do not fit come again below, each part of the table led by
    its first ``keys`` columns.

    Args:
        columns: from left to right; the first one names the row.
        title, caption: above and below, as text.
        keys: number of leading columns that every part repeats; 0 leaves columns out instead.
        boxed: with a line under the headings.
        gap: spaces between columns.
        width: at most so many columns of the terminal, ``None`` for all it has.
        elsewhere: what else shows the columns that are left out.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        title: str = "",
        caption: str = "",
        keys: int = 0,
        boxed: bool = True,
        gap: int = GAP,
        width: int | None = None,
        elsewhere: str = "--json",
    ):
        self.columns, self.title, self.caption = tuple(columns), shown(title), caption
        self.keys, self.boxed, self.gap, self.width = keys, boxed, gap, width
        self.elsewhere = elsewhere
        self.rows: list[tuple[Text, ...]] = []
        self.styles: list[str] = []

    def add_row(self, *cells: str | Text, style: str = "") -> None:
        """A row with a cell for every column; ``style`` is one of rich's."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(self.columns)} columns, {len(cells)} cells")
        self.rows.append(tuple(cell if isinstance(cell, Text) else Text(shown(cell)) for cell in cells))
        self.styles.append(style)

    def headings(self, width: int) -> list[str]:
        """Of the columns that are shown at a width, in all parts together."""
        return [self.columns[k].heading for part in self._parts(width) for k in part]

    def text(self, width: int) -> str:
        """Without colours, at a width."""
        console = PlainConsole(width=width, file=io.StringIO(), color_system=None)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, self.width or options.max_width)
        parts = self._parts(width)
        for number, part in enumerate(parts):
            if number:
                yield Text("")
            yield self._drawn(part, width, self.title if not number else "")
        missing = [c.heading for k, c in enumerate(self.columns) if all(k not in part for part in parts)]
        notes = [self.caption] * bool(self.caption)
        notes += [LEFT_OUT.format(", ".join(missing), self.elsewhere)] * bool(missing)
        if notes:
            yield Group("", *(Text(note, style="italic") for note in notes))

    def _drawn(self, part: Sequence[int], width: int, title: str) -> Table:
        # a box has a divider between two columns
        box, padding = (SIMPLE_HEAD, self.gap - 1) if self.boxed else (None, self.gap)
        table = Table(title=Text(title) if title else None, title_justify="left", box=box, padding=(0, padding, 0, 0))
        table.pad_edge, table.show_edge, table.header_style = False, False, "bold"
        for k, size in zip(part, self._widths(part, width), strict=True):
            column = self.columns[k]
            table.add_column(
                Text(column.heading), justify="right" if column.numeric else "left", overflow="fold", width=size
            )
        for cells, row_style in zip(self.rows, self.styles, strict=True):
            table.add_row(*(cells[k] for k in part), style=row_style or None)
        return table

    # --- which columns, how wide -----------------------------------------------------------------------------------

    def _parts(self, width: int) -> list[list[int]]:
        if self.keys:
            return list(self._below(width))
        kept = list(range(len(self.columns)))
        while self._narrowest(kept) > width:
            least = max(kept, key=lambda k: (self.columns[k].importance, k))
            if not self.columns[least].importance:
                break
            kept.remove(least)
        return [kept]

    def _below(self, width: int) -> Iterator[list[int]]:
        keys = list(range(self.keys))
        part = list(keys)
        for k in range(self.keys, len(self.columns)):
            if len(part) > len(keys) and self._narrowest([*part, k]) > width:
                yield part
                part = list(keys)
            part.append(k)
        yield part

    def _narrowest(self, part: Sequence[int]) -> int:
        return sum(self._least(k) for k in part) + self.gap * (len(part) - 1)

    def _widths(self, part: Sequence[int], width: int) -> list[int]:
        """Of the columns of a part; those that wrap share what the others leave."""
        sizes = {k: self._least(k) for k in part}
        spare = width - self.gap * (len(part) - 1) - sum(sizes.values())
        if spare < 0 and not self.columns[part[0]].numeric:
            # a name alone may be folded, a figure never
            sizes[part[0]] = max(NARROWEST_NAME, sizes[part[0]] + spare)
        # whoever lacks little first, so that fewer columns wrap
        for k in sorted(part, key=lambda k: self._most(k) - sizes[k]):
            more = max(0, min(self._most(k) - sizes[k], spare))
            sizes[k] += more
            spare -= more
        return [sizes[k] for k in part]

    def _texts(self, k: int) -> list[str]:
        return [self.columns[k].heading, *(cells[k].plain for cells in self.rows)]

    def _most(self, k: int) -> int:
        return max(map(cell_len, self._texts(k)))

    def _least(self, k: int) -> int:
        if not self.columns[k].wraps:
            return self._most(k)
        return max(cell_len(word) for text in self._texts(k) for word in re.split(r"\s+", text))
