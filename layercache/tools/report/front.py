"""A front as a table, a plot and a self-contained page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layercache._utils.metrics import Summary, summarise
from layercache.planning.front import Front
from layercache.tools.report import pages
from layercache.tools.report.cells import READ_A_CELL, schedules_chart
from layercache.tools.report.charts import CurvePoint, pareto_chart
from layercache.tools.report.fitting import Column, FittingTable
from layercache.tools.report.plots import curve_label, curve_styles, math_free, new_figure, save_figure
from layercache.tools.report.words import origin_words

COLUMNS = (
    Column("method", numeric=False),
    Column("used", about="share of the block time computed"),
    Column("speedup", 1, about="of the denoising loop, by measured seconds"),
    Column("PSNR", about="mean, in dB, against the full run"),
    Column("median", 4, about="of the PSNR"),
    Column("10 %", 1, about="what nine pictures of ten exceed, in dB"),
    Column("expected", 3, about="mean and 10 % of pictures like the calibration's, in dB"),
    Column("found by", 5, numeric=False, wraps=True),
)
READ_A_CURVE = (
    "Point at a mark for its figures; its curve stands out. A click on the legend keeps a method, with shift several. "
    "Thick: layercache. Broken: caches of other packages."
)


@dataclass(frozen=True)
class FrontRow:
    """One method at one budget.

    Attributes:
        name: of the method; rows of one name make a curve.
        budget: what was asked for.
        used: share of the block time computed.
        origin: how the schedule was found.
        psnr: per calibration picture, in dB; may be empty.
        held_out: per picture that nothing was fitted to; may be empty.
        speedup: expected, by measured seconds; ``None`` if unknown.
        expected: per calibration picture, had nothing been fitted to it; may be empty.
    """

    name: str
    budget: float
    used: float
    origin: str
    psnr: tuple[float, ...]
    held_out: tuple[float, ...] = ()
    speedup: float | None = None
    expected: tuple[float, ...] = ()

    @property
    def judged(self) -> Summary:
        """On the held-out pictures, if there are any."""
        return summarise(self.held_out or self.likely)

    @property
    def likely(self) -> tuple[float, ...]:
        """Of pictures like the calibration's."""
        return self.expected or self.psnr

    def to_json(self) -> dict[str, Any]:
        held_out = asdict(summarise(self.held_out)) if self.held_out else None
        figures = {"calibration": asdict(summarise(self.psnr)) if self.psnr else None, "held_out": held_out}
        figures["expected"] = asdict(summarise(self.expected)) if self.expected else None
        return {
            "name": self.name,
            "budget": self.budget,
            "used": self.used,
            "speedup": self.speedup,
            "origin": self.origin,
            **figures,
            "held_out_psnr": list(self.held_out),
        }


def rows_from_json(rows: Sequence[Mapping[str, Any]]) -> list[FrontRow]:
    """Those that `FrontRow.to_json` gave, without the calibration's pictures, which it does not hold."""
    return [
        FrontRow(
            str(row["name"]),
            float(row["budget"]),
            float(row["used"]),
            str(row["origin"]),
            (),
            tuple(map(float, row["held_out_psnr"])),
            None if row.get("speedup") is None else float(row["speedup"]),
        )
        for row in rows
    ]


def rows_of(front: Front) -> list[FrontRow]:
    """The points of a front, most compute first."""
    return [
        FrontRow("layercache", p.used, p.used, p.origin, p.psnr, p.held_out, front.speedup(p), p.expected)
        for p in reversed(front.points)
    ]


def front_table(rows: Sequence[FrontRow], title: str = "") -> FittingTable:
    """PSNR of every method at every budget, on held-out pictures where there are some, else on the calibration's."""
    judged = "held-out" if any(row.held_out for row in rows) else "calibration"
    count = max((row.judged.count for row in rows), default=0)
    caption = (
        f"PSNR in dB of {count} {judged} pictures against the full run; 'expected': mean and 10 % from leaving each "
        "calibration picture out."
    )
    origins = {row.origin for row in rows}
    is_shared = len(origins) == 1 and len(rows) > 1
    if is_shared:
        caption += f" All were found by: {origin_words(origins.pop())}."
    table = FittingTable(COLUMNS[:-1] if is_shared else COLUMNS, title=title, caption=caption)
    for row in rows:
        summary = row.judged
        cells = (
            row.name,
            f"{row.used:.3f}",
            f"{row.speedup:.2f}x" if row.speedup else "-",
            f"{summary.mean:.2f}",
            f"{summary.median:.2f}",
            f"{summary.quantile10:.2f}",
            f"{summarise(row.expected).mean:.1f} / {summarise(row.expected).quantile10:.1f}" if row.expected else "-",
            origin_words(row.origin),
        )
        table.add_row(*cells[: len(table.columns)])
    return table


def order_sentence(rows: Sequence[FrontRow]) -> str:
    """Whether more compute gives a higher mean PSNR throughout, in the figures of `front_table`; why not, if not.

    A front is ordered by what its schedules gave on the calibration pictures, mean and 10 % quantile together; neither
    the mean alone nor other pictures need to follow.
    """
    if len(rows) < 2:
        return ""
    best, behind = -math.inf, list[FrontRow]()
    for row in sorted(rows, key=lambda row: row.used):
        shown = round(row.judged.mean, 2)
        if not shown > best:
            behind.append(row)
        best = max(best, shown)
    if not behind:
        return "Every schedule has a higher mean PSNR than all that use less."
    verb = "has" if len(behind) == 1 else "have"
    count = f"{len(behind)} of {len(rows)} schedules {verb} no higher mean PSNR than one that uses less"
    return f"{count}: {_why_behind(behind)}."


def _why_behind(rows: Sequence[FrontRow]) -> str:
    fitted, judged = max(len(row.psnr) for row in rows), max(len(row.held_out) for row in rows)
    if not judged:
        subject = "it was chosen for its" if len(rows) == 1 else "they were chosen for their"
        return f"{subject} worst pictures too, the 10 % quantile"
    held_out = "1 held-out picture is" if judged == 1 else f"{judged} held-out pictures are"
    return f"they were chosen on {fitted} other pictures, and {held_out} few to tell neighbours apart"


def save_front_plot(path: str | os.PathLike[str], rows: Sequence[FrontRow], title: str = "") -> Path:
    """Mean PSNR over the share of compute, the 10 % quantile dotted below it; a curve per method."""
    return save_figure(_draw(rows, title), path)


def save_front_page(
    path: str | os.PathLike[str],
    rows: Sequence[FrontRow],
    title: str = "",
    *,
    front: Front | None = None,
    notes: Sequence[str] = (),
    commands: Sequence[str] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> Path:
    """Plot, table and map of the schedules as one HTML file that refers to nothing outside itself.

    Args:
        path: of the file.
        rows: what is plotted and listed.
        title: its heading.
        front: whose schedules are shown step by step.
        notes: sentences below the heading; by default those of the front.
        commands, machine: see `layercache.tools.report.pages.save_page`.

    Raises:
        MissingExtraError: a package that pages need is missing.
        OutputError: it cannot be written.
    """
    points = [
        CurvePoint(row.name, row.used, row.held_out or row.likely, row.speedup, origin_words(row.origin))
        for row in rows
    ]
    blocks: list[pages.Block] = [
        pages.Chart(pareto_chart(points), "Quality per compute", READ_A_CURVE),
        pages.Table.of(front_table(rows), "Figures"),
    ]
    if front is not None and front.points:
        schedules = {f"used {point.used:.3f}": point.schedule for point in reversed(front.points)}
        blocks.append(pages.Chart(schedules_chart(schedules), "What each schedule computes", READ_A_CELL))
    lead = [order_sentence(rows)] if len({row.name for row in rows}) == 1 else []
    lead += notes or (front.notes if front is not None else ())
    heading = title or "Quality per compute"
    return pages.save_page(path, heading, blocks, lead=lead, commands=commands, machine=machine)


def _draw(rows: Sequence[FrontRow], title: str) -> Any:
    figure = new_figure(7.5, 4.6)
    axis = figure.subplots()
    for name, style in curve_styles(list(dict.fromkeys(row.name for row in rows))).items():
        own = sorted((row for row in rows if row.name == name), key=lambda row: row.used)
        used = [row.used for row in own]
        axis.plot(used, [row.judged.mean for row in own], markersize=5, label=curve_label(name), **style)
        axis.plot(used, [row.judged.quantile10 for row in own], linestyle=":", marker=".", color=style["color"])
    axis.set(xlabel="share of the block time computed", ylabel="PSNR against the full run (dB)", title=math_free(title))
    axis.plot([], [], linestyle=":", color="grey", label="10 % quantile")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
