"""A front as a table, a plot and a self-contained page."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from layercache._utils.files import write_atomically
from layercache._utils.metrics import Summary, summarise
from layercache._utils.text import shown
from layercache.planning.front import Front
from layercache.tools.report.console import table_html
from layercache.tools.report.plots import curve_label, math_free, new_figure, save_figure


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


def rows_of(front: Front) -> list[FrontRow]:
    """The points of a front, most compute first."""
    return [
        FrontRow("layercache", p.used, p.used, p.origin, p.psnr, p.held_out, front.speedup(p), p.expected)
        for p in reversed(front.points)
    ]


def front_table(rows: Sequence[FrontRow], title: str = "") -> Table:
    """PSNR of every method at every budget, on held-out pictures where there are some, else on the calibration's."""
    judged = "held-out" if any(row.held_out for row in rows) else "calibration"
    count = max((row.judged.count for row in rows), default=0)
    table = Table(
        title=shown(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption=f"PSNR in dB of {count} {judged} pictures against the full run; 'expected': mean and 10 % from "
        "leaving each calibration picture out.",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for heading in ("used", "speedup", "PSNR", "median", "10 %", "expected"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("found by", overflow="fold")
    for row in rows:
        summary = row.judged
        table.add_row(
            shown(row.name),
            f"{row.used:.3f}",
            f"{row.speedup:.2f}x" if row.speedup else "-",
            f"{summary.mean:.2f}",
            f"{summary.median:.2f}",
            f"{summary.quantile10:.2f}",
            f"{summarise(row.expected).mean:.1f} / {summarise(row.expected).quantile10:.1f}" if row.expected else "-",
            shown(row.origin),
        )
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


def save_front_page(path: str | os.PathLike[str], rows: Sequence[FrontRow], title: str = "") -> Path:
    """Plot and table as one HTML file that refers to nothing outside itself."""
    picture = io.BytesIO()
    _draw(rows, title).savefig(picture, format="png", dpi=120)
    table = table_html(front_table(rows), 150)
    heading = html.escape(shown(title) or "Quality per compute")
    encoded = base64.b64encode(picture.getvalue()).decode()
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>
<style>body {{ font: 15px sans-serif; margin: 2em auto; max-width: 75em; color: #111; background: #fff }}
img {{ max-width: 100% }} pre {{ overflow-x: auto }}</style></head>
<body><h1>{heading}</h1><img alt="PSNR over the share of compute" src="data:image/png;base64,{encoded}">
{table}</body></html>
"""
    return write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _draw(rows: Sequence[FrontRow], title: str) -> Any:
    figure = new_figure(7.5, 4.6)
    axis = figure.subplots()
    for name in dict.fromkeys(row.name for row in rows):
        own = sorted((row for row in rows if row.name == name), key=lambda row: row.used)
        used = [row.used for row in own]
        (line,) = axis.plot(used, [row.judged.mean for row in own], marker="o", label=curve_label(name))
        axis.plot(used, [row.judged.quantile10 for row in own], linestyle=":", marker=".", color=line.get_color())
    axis.set(xlabel="share of the block time computed", ylabel="PSNR against the full run (dB)", title=math_free(title))
    axis.plot([], [], linestyle=":", color="grey", label="10 % quantile")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
