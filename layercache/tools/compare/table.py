"""The table of a comparison: rows, and the forms they are read in."""

from __future__ import annotations

import html
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercache._utils.files import check_output
from layercache._utils.metrics import summarise
from layercache._utils.text import shown
from layercache.errors import ArgumentError, MissingExtraError
from layercache.tools.compare.categories import CategoryRow, category_rows, mean
from layercache.tools.compare.files import ComparisonFiles, Outcome, parsed_file
from layercache.tools.compare.scores import Curves
from layercache.tools.report import machine
from layercache.tools.report.fitting import Column, FittingTable

if TYPE_CHECKING:
    from layercache.tools.compare.transfer_table import TransferTable

MOST_LINES = 24
NUMBERS = (
    *("budget", "used", "speedup", "range", "PSNR", "10 %", "worst", "SSIM", "LPIPS", "CLIP"),
    *("worst frame", "temporal", "MiB"),
)
# Of those that a narrow terminal may leave out, the highest first.
IMPORTANCE = {"10 %": 1, "SSIM": 2, "budget": 3, "range": 4, "worst": 5, "LPIPS": 6, "CLIP": 6, "temporal": 6}
IMPORTANCE |= {"worst frame": 6, "MiB": 7}
DASH = "-"


@dataclass(frozen=True)
class Row:
    """A method at a budget.

    Attributes:
        method: its name.
        setting: what was set for the budget.
        budget: the share of the block time it was tuned to; ``None`` of a method that ran as it is.
        used: the share that was computed; of another package's cache the share of block calls.
        speedup: of whole calls against full runs beside them, the median of the repeats.
        speedup_low, speedup_high: the lowest and the highest of them.
        seconds: of a picture.
        psnr_mean, psnr_median, psnr_p10, psnr_worst: in dB against the full run of the same seed: mean of the finite
            ones, median, the value that nine pictures in ten exceed, and the lowest.
        ssim, lpips: means; ``lpips`` is ``None`` where its weights are not there.
        cache_bytes: of what is stored; ``None`` of another package's cache.
        error: why there are no figures (all are NaN); empty where there are.
        psnr: of every picture.
        speedups: of every repeat.
        clip: mean of the CLIP scores, 0 to 100; ``None`` where there is no CLIP model.
        frame_psnr_worst, frame_ssim_worst: of videos, the lowest of all frames; ``None`` of pictures.
        temporal_psnr: of videos, the mean over the finite ones (`layercache._utils.metrics.temporal_psnr`).
    """

    method: str
    setting: str
    budget: float | None
    used: float
    speedup: float
    speedup_low: float
    speedup_high: float
    seconds: float
    psnr_mean: float
    psnr_median: float
    psnr_p10: float
    psnr_worst: float
    ssim: float
    lpips: float | None
    cache_bytes: int | None
    error: str
    psnr: tuple[float, ...] = ()
    speedups: tuple[float, ...] = ()
    clip: float | None = None
    frame_psnr_worst: float | None = None
    frame_ssim_worst: float | None = None
    temporal_psnr: float | None = None

    @classmethod
    def of(cls, outcome: Outcome) -> Row:
        """The row of an outcome."""
        psnr = summarise(outcome.psnr or (math.nan,))
        low, high = outcome.speedup_range
        return cls(
            method=outcome.method,
            setting=outcome.setting,
            budget=None if outcome.is_fixed else outcome.budget,
            used=outcome.used,
            speedup=outcome.speedup,
            speedup_low=low,
            speedup_high=high,
            seconds=outcome.seconds / max(1, len(outcome.psnr)),
            psnr_mean=psnr.mean,
            psnr_median=psnr.median,
            psnr_p10=psnr.quantile10,
            psnr_worst=min(outcome.psnr, default=math.nan),
            ssim=mean(outcome.ssim),
            lpips=mean(outcome.lpips) if outcome.lpips else None,
            cache_bytes=outcome.cache_bytes,
            error=outcome.error,
            psnr=outcome.psnr,
            speedups=outcome.speedups,
            clip=mean(outcome.clip) if outcome.clip else None,
            frame_psnr_worst=_lowest(outcome.frame_psnr),
            frame_ssim_worst=_lowest(outcome.frame_ssim),
            temporal_psnr=summarise(outcome.temporal_psnr).mean if outcome.temporal_psnr else None,
        )

    @property
    def cells(self) -> list[str]:
        """Name, and the numbers of `NUMBERS`, as text."""
        if self.error:
            return [shown(self.method), number(self.budget, "g"), *[DASH] * (len(NUMBERS) - 1)]
        return [
            shown(self.method),
            number(self.budget, "g"),
            f"{self.used:.3f}",
            f"{self.speedup:.2f}x",
            f"{self.speedup_low:.2f}-{self.speedup_high:.2f}",
            *(f"{value:.2f}" for value in (self.psnr_mean, self.psnr_p10, self.psnr_worst)),
            f"{self.ssim:.4f}",
            number(self.lpips, ".4f"),
            *(number(value, ".2f") for value in (self.clip, self.frame_psnr_worst, self.temporal_psnr)),
            DASH if self.cache_bytes is None else f"{self.cache_bytes / 2**20:.1f}",
        ]


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
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError(
                'to_pandas needs pandas, which is not installed: pip install "layercache[compare]"'
            ) from error
        if by not in ("method", "category"):
            raise ArgumentError(f"by is 'method' or 'category', got {by!r}", argument="by")
        rows, kind = (self.categories, CategoryRow) if by == "category" else (self.rows, Row)
        columns = [field.name for field in fields(kind) if field.name not in ("psnr", "speedups")]
        return pandas.DataFrame([[getattr(row, name) for name in columns] for row in rows], columns=columns)

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


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A plain table for notebooks."""

    def cells(tag: str, row: Sequence[str]) -> str:
        side = ' style="text-align: left"', ' style="text-align: right"'
        return "".join(f"<{tag}{side[k > 0]}>{html.escape(cell)}</{tag}>" for k, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>{caption}<thead><tr>{cells('th', headings)}</tr></thead><tbody>{body}</tbody></table>"


def number(value: float | None, form: str) -> str:
    """A figure as text; a dash where it is not known."""
    return DASH if value is None or math.isnan(value) else f"{value:{form}}"


def _lowest(curves: Curves) -> float | None:
    """Of all frames of all videos."""
    return min((value for curve in curves for value in curve), default=None)
