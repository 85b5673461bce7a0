"""The table of a comparison: rows, and the forms they are read in."""

from __future__ import annotations

import html
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercache._utils.files import check_output
from layercache._utils.text import shown
from layercache.errors import ArgumentError
from layercache.tools.compare.categories import CategoryRow, category_rows, mean
from layercache.tools.compare.files import ComparisonFiles, Outcome, parsed_file
from layercache.tools.compare.rows import DASH, NUMBERS, data_frame, html_table
from layercache.tools.compare.rows import Row as Row
from layercache.tools.report import machine
from layercache.tools.report.fitting import Column, FittingTable

if TYPE_CHECKING:
    from layercache.tools.compare.transfer_table import TransferTable

MOST_LINES = 24
# Of those that a narrow terminal may leave out, the highest first.
IMPORTANCE = {"10 %": 1, "SSIM": 2, "budget": 3, "range": 4, "worst": 5, "LPIPS": 6, "CLIP": 6, "temporal": 6}
IMPORTANCE |= {"worst frame": 6, "MiB": 7}


class ComparisonTable(Sequence[Row]):
    """What `layercache.compare` found: a row per method and budget.

    Attributes:
        rows: in the order in which methods were given, each method's largest budget first.
        title: what was compared.
        full_seconds: of a picture of the full run; NaN where it is not known.
        files: the folder it was measured in.
        categories: a row per method, budget and category of prompts; empty where the prompts have none.
        transfer: what the same plans give with other settings; ``None`` where that was not asked for.
    """

    def __init__(
        self,
        files: ComparisonFiles,
        outcomes: Sequence[Outcome],
        title: str = "",
        owner: Any = None,
        transfer: TransferTable | None = None,
    ):
        self.files, self.outcomes, self.title = files, list(outcomes), title
        self.rows = tuple(Row.of(outcome) for outcome in outcomes)
        self.categories = tuple(category_rows(outcomes, files.categories))
        self.transfer = transfer
        self._owner = owner  # a temporary folder, which is gone when nobody has the table any more

    @property
    def full_seconds(self) -> float:
        return self.files.full_seconds

    @property
    def full_clip(self) -> float | None:
        """Mean of the CLIP scores of the full run's pictures; ``None`` where there is no CLIP model."""
        return mean(self.files.full_clip) if self.files.full_clip else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def of(self, method: str) -> list[Row]:
        """The rows of a method."""
        return [row for row in self.rows if row.method == method]

    def to_pandas(self, by: str = "method") -> Any:
        """A `pandas.DataFrame` with a column per attribute of `Row`, but those of single pictures and repeats.

        Args:
            by: ``"category"``: a row per method, budget and category instead, with those of `CategoryRow`.

        Raises:
            ArgumentError: ``by`` is something else.
            MissingExtraError: pandas is not installed.
        """
        if by not in ("method", "category"):
            raise ArgumentError(f"by is 'method' or 'category', got {by!r}", argument="by")
        rows, kind = (self.categories, CategoryRow) if by == "category" else (self.rows, Row)
        return data_frame(rows, kind, ("psnr", "speedups"))

    def to_json(self) -> str:
        """The rows as JSON, with the machine that their times are of; infinities and NaN are strings."""
        rows = [asdict(row) for row in self.rows]
        data = {"title": self.title, "full_seconds": self.full_seconds, "machine": self.files.machine, "rows": rows}
        data |= {"categories": [asdict(row) for row in self.categories]} if self.categories else {}
        data |= {"full_clip": self.full_clip} if self.full_clip is not None else {}
        return machine.json_text(data)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the figures, without the pictures, to a file that `load` reads.

        Raises:
            OutputError: it cannot be written.
        """
        return self.files.save_as(Path(path), self.outcomes, self.title)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ComparisonTable:
        """Reads what `save` wrote, or the folder of a comparison, of the command line too.

        Raises:
            FileFormatError: it is missing, damaged, or something else.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        files = ComparisonFiles(folder)
        data = parsed_file(folder / "compare.json" if path.is_dir() else path)
        files.take(data)
        return cls(files, list(files.outcomes.values()), str(data.get("title", "")))

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes a page with the table, a plot and the first pictures, which refers to nothing outside itself.

        Raises:
            MissingExtraError: a package that draws it is not installed.
            FileFormatError: the pictures are not there: the table was loaded from a file that lies apart from them.
            OutputError: it cannot be written.
        """
        from layercache.tools.compare.report import save_folder_page

        check_output(path)
        return save_folder_page(Path(path), self.files, self.outcomes, self.files.captions, self.title or "Comparison")

    def __repr__(self) -> str:
        used, cells = self._columns()
        columns = [Column("method", numeric=False), *(Column(name, IMPORTANCE.get(name, 0)) for name in used)]
        table = FittingTable(columns, boxed=False, elsewhere=".to_pandas()")
        for row in cells[:MOST_LINES]:
            table.add_row(*row)
        lines = [table.text(shutil.get_terminal_size().columns)]
        if len(cells) > MOST_LINES:
            lines.append(f"... and {len(cells) - MOST_LINES} rows more: .rows, .to_pandas(), .save_html(path)")
        return "\n".join([*([shown(self.title)] if self.title else []), *lines, *self._notes()])

    def _repr_html_(self) -> str:
        used, cells = self._columns()
        title = f"<caption>{html.escape(shown(self.title))}</caption>" if self.title else ""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        with_settings = [[*line, shown(row.setting)] for line, row in zip(cells, self.rows, strict=True)]
        return html_table(["method", *used, "setting"], with_settings, title) + notes

    def _columns(self) -> tuple[list[str], list[list[str]]]:
        """Headings of the columns that any row has something in, and the rows' cells."""
        cells = [row.cells for row in self.rows]
        kept = [k for k, _ in enumerate(NUMBERS, 1) if any(row[k] != DASH for row in cells)]
        return [NUMBERS[k - 1] for k in kept], [[row[0], *(row[k] for k in kept)] for row in cells]

    def _notes(self) -> list[str]:
        """What failed, a sentence each; the same reason at several budgets once; and what else there is."""
        reasons = dict.fromkeys((row.method, row.error) for row in self.rows if row.error)
        notes = [shown(f"{method} failed: {error}") for method, error in reasons]
        if self.full_clip is not None:
            notes.append(f"CLIP: {self.full_clip:.2f} of the full run's pictures")
        if self.categories:
            names = dict.fromkeys(row.category for row in self.categories)
            notes.append(f"by category ({shown(', '.join(names))}): .categories, .to_pandas(by='category')")
        if self.transfer is not None:
            notes.append(f"with other settings ({len(self.transfer.settings)}): .transfer")
        return notes
