"""A comparison as a table, a plot, a grid of pictures and a self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layercache._utils.metrics import stills, summarise
from layercache._utils.text import shown
from layercache.tools.compare.files import ComparisonFiles, Outcome
from layercache.tools.report import pages
from layercache.tools.report.charts import CurvePoint, pareto_chart
from layercache.tools.report.fitting import Column, FittingTable
from layercache.tools.report.front import READ_A_CURVE
from layercache.tools.report.pictures import GAIN, PictureEntry, page_pictures
from layercache.tools.report.plots import (
    PictureRow,
    curve_label,
    curve_styles,
    math_free,
    new_figure,
    save_figure,
    save_pictures,
)
from layercache.tools.report.words import origin_words

COLUMNS = (
    Column("method", numeric=False),
    Column("budget", 3),
    Column("used", about="share of the block time computed"),
    Column("speedup", about="median of the repeats, each beside a full run"),
    Column("range", 4, about="the lowest and the highest speedup of the repeats"),
    Column("PSNR", about="mean, in dB, against the full run"),
    Column("median", 6, about="of the PSNR"),
    Column("10 %", 1, about="what nine pictures of ten exceed, in dB"),
    Column("SSIM", 2),
    Column("LPIPS", 5),
    Column("MiB", 7, about="memory of what is stored"),
    Column("operators", 8, about="of PyTorch, per step"),
    Column("reads", 8, about="values read by the host, per step"),
    Column("setting", 9, numeric=False, wraps=True),
)
CAPTION = (
    "PSNR in dB (mean, median, 10 % quantile) and SSIM against the full run; speedup: median of the repeats, each "
    "beside a full run; operators of PyTorch and values read by the host, per step; a dash: not known."
)


def comparison_table(outcomes: Sequence[Outcome], title: str = "", width: int | None = None) -> FittingTable:
    """A row per method and budget; what failed is in `failures`. A ``width`` below the console's is kept to."""
    with_lpips = any(outcome.lpips for outcome in outcomes)
    columns = [column for column in COLUMNS if with_lpips or column.heading != "LPIPS"]
    table = FittingTable(columns, title=title, caption=CAPTION, width=width)
    for outcome in outcomes:
        if outcome.error:
            continue
        psnr = summarise(outcome.psnr)
        table.add_row(
            outcome.method,
            "-" if outcome.is_fixed else f"{outcome.budget:g}",
            f"{outcome.used:.3f}",
            f"{outcome.speedup:.2f}x",
            "{:.2f}-{:.2f}".format(*outcome.speedup_range) if outcome.speedups else "-",
            *(f"{value:.2f}" for value in (psnr.mean, psnr.median, psnr.quantile10)),
            f"{np.mean(outcome.ssim):.4f}",
            *([f"{np.mean(outcome.lpips):.4f}" if outcome.lpips else "-"] * with_lpips),
            "-" if outcome.cache_bytes is None else f"{outcome.cache_bytes / 2**20:.1f}",
            f"{outcome.operators:.0f}",
            f"{outcome.reads:.2f}",
            origin_words(outcome.setting),
        )
    return table


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for everything that could not be compared; budgets that failed for the same reason share one."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.error:
            # a budget named in the reason is named in front already
            reason = outcome.error.split(": ", 1)[-1]
            reasons.setdefault((outcome.method, reason), []).append(f"{outcome.budget:g}")
    return [shown(f"{method} at {', '.join(budgets)}: {reason}") for (method, reason), budgets in reasons.items()]


def save_comparison(
    comparison: ComparisonFiles,
    outcomes: Sequence[Outcome],
    columns: Sequence[str],
    title: str,
    commands: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Writes ``compare.png``, ``pictures.png`` and ``compare.html`` beside ``compare.json``; their paths, by name.

    Args:
        comparison: what was compared.
        outcomes: of it, those that are shown.
        columns: names of the first pictures.
        title: of the page and the plots.
        commands: that give it again, see `layercache.tools.report.pages.save_page`.
    """
    folder = comparison.folder
    plot = save_figure(draw_curves(outcomes, title), folder / "compare.png")
    grid = _save_grid(comparison, outcomes, columns, title)
    page = save_folder_page(folder / "compare.html", comparison, outcomes, columns, title, commands)
    return {"figures": comparison.file, "plot": plot, **({"pictures": grid} if grid else {}), "page": page}


def draw_curves(outcomes: Sequence[Outcome], title: str) -> Any:
    """Mean PSNR over the share of compute, a curve per method."""
    figure = new_figure(10.5, 5.6)
    axis = figure.subplots()
    good = [outcome for outcome in outcomes if not outcome.error]
    names = list(dict.fromkeys(outcome.method for outcome in good))
    for name, style in curve_styles(names).items():
        own = sorted((outcome for outcome in good if outcome.method == name), key=lambda o: o.used)
        means = [summarise(outcome.psnr).mean for outcome in own]
        axis.plot([o.used for o in own], means, markersize=4, label=curve_label(name), **style)
    axis.set(xlabel="share of the block time computed", ylabel="PSNR against the full run (dB)", title=math_free(title))
    axis.grid(alpha=0.3)
    if good:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def save_page(
    path: Path,
    outcomes: Sequence[Outcome],
    title: str,
    pictures: Sequence[pages.Block] = (),
    *,
    commands: Sequence[str] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> Path:
    """Plot, table and pictures (of `pictures_block`) as one HTML file that refers to nothing outside itself."""
    good = [outcome for outcome in outcomes if not outcome.error]
    blocks: list[pages.Block] = []
    if good:
        points = [CurvePoint(o.method, o.used, o.psnr, o.speedup, origin_words(o.setting)) for o in good]
        blocks.append(pages.Chart(pareto_chart(points), "Quality per compute", READ_A_CURVE))
    blocks += [pages.Table.of(comparison_table(outcomes), "Figures"), *pictures]
    if failed := failures(outcomes):
        blocks.append(pages.Text(failed, "What could not be compared"))
    return pages.save_page(path, title, blocks, commands=commands, machine=machine)


def save_folder_page(
    path: Path,
    comparison: ComparisonFiles,
    outcomes: Sequence[Outcome],
    columns: Sequence[str],
    title: str,
    commands: Sequence[str] | None = None,
) -> Path:
    """The page of `save_comparison` alone.

    Raises:
        FileFormatError: the pictures of the full run are missing or damaged.
    """
    pictures = folder_pictures(comparison, outcomes, columns)
    return save_page(path, outcomes, title, pictures, commands=commands, machine=comparison.machine)


def folder_pictures(
    comparison: ComparisonFiles, outcomes: Sequence[Outcome], columns: Sequence[str]
) -> list[pages.Block]:
    """Of these outcomes, what the folder holds.

    Raises:
        FileFormatError: the pictures of the full run are missing or damaged.
    """
    return pictures_block(comparison.full_pictures(), _entries(comparison, outcomes), columns)


def pictures_block(full: Any, entries: Sequence[PictureEntry], prompts: Sequence[str]) -> list[pages.Block]:
    """Full and cached pictures of entries under a slider; nothing where there are none."""
    if not entries:
        return []
    return [pages.Pictures(page_pictures(full, entries, prompts), f"{GAIN:g}", "Full, cached, difference")]


def _entries(comparison: ComparisonFiles, outcomes: Sequence[Outcome]) -> list[PictureEntry]:
    """What was kept of every outcome."""
    found = []
    for outcome in outcomes:
        pictures = None if outcome.error else comparison.pictures(outcome)
        if pictures is not None:
            entry = (outcome.method, outcome.budget, outcome.used, pictures, outcome.psnr, outcome.ssim)
            found.append(PictureEntry(*entry))
    return found


def _save_grid(
    comparison: ComparisonFiles, outcomes: Sequence[Outcome], columns: Sequence[str], title: str
) -> Path | None:
    """The first pictures of every method at its smallest share of compute that was reached."""
    rows = [PictureRow("full", stills(comparison.full_pictures()[: len(columns)]))]
    for name in dict.fromkeys(outcome.method for outcome in outcomes):
        own = [o for o in outcomes if o.method == name and not o.error and math.isfinite(o.used)]
        if not own:
            continue
        least = min(own, key=lambda o: o.used)
        pictures = comparison.pictures(least)
        if pictures is not None:
            captions = [f"{value:.1f} dB" for value in least.psnr[: len(columns)]]
            rows.append(PictureRow(f"{name}\nused {least.used:.2f}", stills(pictures[: len(columns)]), captions))
    if len(rows) == 1:
        return None
    return save_pictures(comparison.folder / "pictures.png", rows, list(columns), title)
