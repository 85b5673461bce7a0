"""The table of plans that were run with other settings, and the forms it is read in."""

from __future__ import annotations

import html
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from layercache._utils.files import check_output, write_atomically
from layercache._utils.text import shown
from layercache.errors import FileFormatError
from layercache.tools.compare.files import ComparisonFiles, Outcome
from layercache.tools.compare.rows import DASH, Row, data_frame, html_table, number
from layercache.tools.report import machine
from layercache.tools.report.fitting import Column, FittingTable

BASE = "as compared"
FIGURES = ("psnr_mean", "psnr_p10", "psnr_worst", "ssim", "change")
COLUMNS = (
    Column("setting", numeric=False),
    Column("method", numeric=False),
    Column("budget", 4),
    Column("used", 1, about="share of the block time computed"),
    Column("speedup", 2, about="median of the repeats, each beside a full run with the same setting"),
    Column("PSNR", about="mean, in dB, against the full run with the same setting"),
    Column("change", 1, about="of the mean PSNR, from the settings that were compared"),
    Column("10 %", 3, about="what nine pictures of ten exceed, in dB"),
    Column("worst", 3, about="the lowest PSNR of a picture"),
    Column("SSIM", 4),
    Column("LPIPS", 6),
    Column("CLIP", 6, about="score of the pictures themselves, 0 to 100"),
    Column("in full", 5, about="forwards that computed everything although more was to be reused"),
)
CAPTION = (
    "Plans as they were made for the settings that were compared; each row is measured against full runs with its own "
    "setting."
)


@dataclass(frozen=True)
class SettingRun:
    """What all methods gave with a setting.

    Attributes:
        name: of the setting; empty for those that were compared.
        outcomes: in the order of the methods.
        folder: with its pictures.
    """

    name: str
    outcomes: Sequence[Outcome]
    folder: Path


@dataclass(frozen=True)
class TransferRow:
    """A method's plan with a setting.

    Attributes:
        setting: its name, `BASE` for those that were compared.
        method, budget, used, speedup, psnr_mean, psnr_p10, psnr_worst, ssim, lpips, clip: as of the comparison's
            `Row`.
        change: of the mean PSNR in dB from the settings that were compared; NaN where either is not known.
        forwards: of the transformer, in a cached run of every picture.
        in_full: those that computed everything although more was to be reused, by the reason.
        warnings: of the library, while it ran.
        error: why there are no figures, a refusal for example; empty where there are.
    """

    setting: str
    method: str
    budget: float | None
    used: float
    speedup: float
    psnr_mean: float
    psnr_p10: float
    psnr_worst: float
    ssim: float
    lpips: float | None
    clip: float | None
    change: float
    forwards: int
    in_full: Mapping[str, int]
    warnings: tuple[str, ...]
    error: str

    @classmethod
    def of(cls, setting: str, outcome: Outcome, base: float) -> TransferRow:
        """The row of an outcome; ``base`` is the mean PSNR of the same plan with the settings that were compared."""
        row = Row.of(outcome)
        shared = [one.name for one in fields(cls) if hasattr(row, one.name) and one.name != "setting"]
        own: dict[str, Any] = {name: getattr(row, name) for name in shared}
        more: dict[str, Any] = {
            "forwards": outcome.forwards,
            "in_full": dict(outcome.in_full),
            "warnings": outcome.warnings,
        }
        change = row.psnr_mean - base if math.isfinite(base) and math.isfinite(row.psnr_mean) else math.nan
        return cls(setting=setting, change=change, **own, **more)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TransferRow:
        """A row as `TransferTable.to_json` writes it."""
        read: dict[str, Any] = {name: str(data[name]) for name in ("setting", "method", "error")}
        read |= {name: float(data[name]) for name in ("used", "speedup", *FIGURES)}
        for name in ("budget", "lpips", "clip"):
            read[name] = None if data[name] is None else float(data[name])
        read["in_full"] = {str(reason): int(count) for reason, count in dict(data["in_full"]).items()}
        return cls(**read, forwards=int(data["forwards"]), warnings=tuple(map(str, data["warnings"])))

    @property
    def cells(self) -> list[str]:
        """The columns of `COLUMNS`, as text."""
        if self.error:
            return [self.setting, self.method, number(self.budget, "g"), *[DASH] * (len(COLUMNS) - 3)]
        return [
            self.setting,
            self.method,
            number(self.budget, "g"),
            f"{self.used:.3f}",
            f"{self.speedup:.2f}x",
            f"{self.psnr_mean:.2f}",
            number(self.change, "+.2f"),
            f"{self.psnr_p10:.2f}",
            f"{self.psnr_worst:.2f}",
            f"{self.ssim:.4f}",
            number(self.lpips, ".4f"),
            number(self.clip, ".2f"),
            f"{sum(self.in_full.values())}/{self.forwards}" if self.forwards else DASH,
        ]


class TransferTable(Sequence[TransferRow]):
    """Plans of a comparison with other settings: a row per setting, method and budget, those compared first.

    Attributes:
        rows: in their order.
        title: what was compared.
        runs: of the settings, with their folders; none of a table that was read from a file.
        request: what was asked for, in the words of whoever asked.
    """

    def __init__(self, rows: Sequence[TransferRow], title: str = "", runs: Sequence[SettingRun] = ()):
        self.rows, self.title, self.runs = tuple(rows), title, list(runs)
        self.request: dict[str, Any] = {}

    @classmethod
    def of_runs(cls, runs: Sequence[SettingRun], title: str = "") -> TransferTable:
        """The table of settings that were run, those that were compared first."""
        base = [Row.of(outcome).psnr_mean for outcome in runs[0].outcomes]
        rows = [
            TransferRow.of(run.name or BASE, outcome, before)
            for run in runs
            for before, outcome in zip(base, run.outcomes, strict=True)
        ]
        return cls(rows, title, runs)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TransferTable:
        """Reads what `save` wrote.

        Raises:
            FileFormatError: it is missing, damaged, or something else.
        """
        try:
            data = json.loads(Path(path).read_bytes())
            table = cls([TransferRow.from_json(row) for row in data["rows"]], str(data["title"]))
            table.request = dict(data.get("request", {}))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise FileFormatError(
                f"{shown(path)} is missing, or holds no plans with other settings; compare again, which writes it"
            ) from error
        return table

    @property
    def settings(self) -> list[str]:
        """Names of the settings, without the one that was compared."""
        return [name for name in dict.fromkeys(row.setting for row in self.rows) if name != BASE]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[TransferRow]:
        return iter(self.rows)

    def of(self, setting: str) -> list[TransferRow]:
        """The rows of a setting."""
        return [row for row in self.rows if row.setting == setting]

    @property
    def notes(self) -> list[str]:
        """What was refused, computed in full, or warned of, and why; a sentence for all methods that share one."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            at = row.method if row.budget is None else f"{row.method} at {row.budget:g}"
            about = [f"refused: {row.error}"] if row.error else []
            about += [f"{count} of {row.forwards} forwards in full: {why}" for why, count in row.in_full.items()]
            about += row.warnings if row.setting != BASE else ()
            for text in about:
                found.setdefault((row.setting, text.replace("\n", " ")), []).append(at)
        return [shown(f"{setting}: {', '.join(methods)}: {text}") for (setting, text), methods in found.items()]

    def table(self, width: int | None = None, elsewhere: str = "--json") -> FittingTable:
        """As a table for terminals and pages."""
        cells = [row.cells for row in self.rows]
        kept = [k for k in range(len(COLUMNS)) if k < 2 or any(line[k] != DASH for line in cells)]
        columns = [COLUMNS[k] for k in kept]
        table = FittingTable(columns, title=self.title, caption=CAPTION, width=width, elsewhere=elsewhere)
        for row, line in zip(self.rows, cells, strict=True):
            table.add_row(*(line[k] for k in kept), style="red" if row.error else "")
        return table

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a column per attribute of `TransferRow`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return data_frame(self.rows, TransferRow)

    def to_json(self) -> str:
        """The rows as JSON, with the machine that their times are of; infinities and NaN are strings."""
        rows = [asdict(row) for row in self.rows]
        data = {"kind": "transfer", "title": self.title, "machine": machine.machine_info(), "rows": rows}
        return machine.json_text(data | ({"request": self.request} if self.request else {}))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes `to_json` to a file.

        Raises:
            OutputError: it cannot be written.
        """
        text = self.to_json()
        return write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes a page with the table, what was refused, and the first pictures of every setting.

        Raises:
            MissingExtraError: a package that draws it is not installed.
            OutputError: it cannot be written.
        """
        from layercache.tools.compare.report import folder_pictures
        from layercache.tools.report import pages

        check_output(path)
        blocks: list[pages.Block] = [pages.Table.of(self.table(), "Figures")]
        if self.notes:
            blocks.append(pages.Text(self.notes, "What was refused, computed in full, or to know"))
        for run in self.runs:
            try:
                files = ComparisonFiles.read(run.folder)
                found = folder_pictures(files, run.outcomes, files.captions, run.name or BASE)
            except FileFormatError:  # of a setting that was refused, or of another process's folder
                continue
            blocks += found
        return pages.save_page(Path(path), self.title or "Plans with other settings", blocks)

    def __repr__(self) -> str:
        return "\n".join([self.table(elsewhere=".to_pandas()").text(shutil.get_terminal_size().columns), *self.notes])

    def _repr_html_(self) -> str:
        cells = [row.cells for row in self.rows]
        kept = [k for k in range(len(COLUMNS)) if k < 2 or any(line[k] != DASH for line in cells)]
        title = f"<caption>{html.escape(shown(self.title))}</caption>" if self.title else ""
        lines = [[shown(line[k]) for k in kept] for line in cells]
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return html_table([COLUMNS[k].heading for k in kept], lines, title) + notes
