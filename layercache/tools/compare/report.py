"""A comparison as a table, a plot, a grid of pictures and a self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercache._utils.metrics import stills, summarise
from layercache._utils.text import shown
from layercache.tools.compare.categories import category_table, mean
from layercache.tools.compare.files import ComparisonFiles, Outcome
from layercache.tools.compare.rows import Row, number
from layercache.tools.report import pages
from layercache.tools.report.charts import CurvePoint, frames_chart, pareto_chart
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
    Column("worst", 5, about="the lowest PSNR of a picture"),
    Column("SSIM", 2),
    Column("LPIPS", 5),
    Column("CLIP", 5, about="score of the pictures themselves, 0 to 100"),
    Column("worst frame", 6, about="of all frames, the lowest PSNR"),
    Column("temporal", 5, about="PSNR of the changes from frame to frame, in dB"),
    Column("MiB", 7, about="memory of what is stored"),
    Column("operators", 8, about="of PyTorch, per step"),
    Column("reads", 8, about="values read by the host, per step"),
    Column("setting", 9, numeric=False, wraps=True),
)
READ_FRAMES = "Of every frame, the mean over the videos; a dip is a moment at which the cached video is another one."
CAPTION = (
    "PSNR in dB (mean, median, 10 % quantile, worst) and SSIM against the full run; speedup: median of the repeats, "
    "each beside a full run; operators of PyTorch and values read by the host, per step; a dash: not known."
)


def comparison_table(outcomes: Sequence[Outcome], title: str = "", width: int | None = None) -> FittingTable:
    """A row per method and budget; what failed is in `failures`. A ``width`` below the console's is kept to."""
    shown_if = {"LPIPS": "lpips", "CLIP": "clip", "worst frame": "frame_psnr", "temporal": "temporal_psnr"}
    absent = {head for head, name in shown_if.items() if not any(getattr(outcome, name) for outcome in outcomes)}
    columns = [column for column in COLUMNS if column.heading not in absent]
    table = FittingTable(columns, title=title, caption=CAPTION, width=width)
    for outcome in outcomes:
        if outcome.error:
            continue
        row, psnr = Row.of(outcome), summarise(outcome.psnr)
        figures = {
            "LPIPS": (row.lpips, ".4f"),
            "CLIP": (row.clip, ".2f"),
            "worst frame": (row.frame_psnr_worst, ".2f"),
            "temporal": (row.temporal_psnr, ".2f"),
        }
        table.add_row(
            outcome.method,
            "-" if outcome.is_fixed else f"{outcome.budget:g}",
            f"{outcome.used:.3f}",
            f"{outcome.speedup:.2f}x",
            "{:.2f}-{:.2f}".format(*outcome.speedup_range) if outcome.speedups else "-",
            *(f"{value:.2f}" for value in (psnr.mean, psnr.median, psnr.quantile10, row.psnr_worst)),
            f"{row.ssim:.4f}",
            *(number(value, form) for head, (value, form) in figures.items() if head not in absent),
            "-" if outcome.cache_bytes is None else f"{outcome.cache_bytes / 2**20:.1f}",
            f"{outcome.operators:.0f}",
            f"{outcome.reads:.2f}",
            origin_words(outcome.setting),
        )
    return table


def full_clip_line(files: ComparisonFiles) -> list[str]:
    """A sentence with the CLIP score of the full pictures, where there is one."""
    scores = files.full_clip
    return [f"CLIP score of the full run's pictures: {mean(scores):.2f} ({shown(files.clip_model)})."] if scores else []


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
    categories: Sequence[str] = (),
    full_clip: float | None = None,
) -> Path:
    """Plot, tables and pictures (of `pictures_block`) as one HTML file that refers to nothing outside itself.

    Args:
        path: of the file.
        outcomes: what is shown.
        title: of the page.
        pictures: blocks of them.
        commands, machine: see `layercache.tools.report.pages.save_page`.
        categories: of every picture's prompt; none where there are none.
        full_clip: mean CLIP score of the full run's pictures, where there is one.
    """
    good = [outcome for outcome in outcomes if not outcome.error]
    blocks: list[pages.Block] = []
    if good:
        points = [CurvePoint(o.method, o.used, o.psnr, o.speedup, origin_words(o.setting)) for o in good]
        blocks.append(pages.Chart(pareto_chart(points), "Quality per compute", READ_A_CURVE))
    clip = "" if full_clip is None else f"{CAPTION} CLIP of the full run's pictures: {full_clip:.2f}."
    blocks.append(pages.Table.of(comparison_table(outcomes), "Figures", clip))
    if (by_category := category_table(outcomes, categories)) is not None:
        blocks.append(pages.Table.of(by_category))
    if curves := frame_rows(outcomes):
        blocks.append(pages.Chart(frames_chart(curves), "Frame by frame", READ_FRAMES))
    blocks += pictures
    if failed := failures(outcomes):
        blocks.append(pages.Text(failed, "What could not be compared"))
    return pages.save_page(path, title, blocks, commands=commands, machine=machine)


def frame_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """PSNR and SSIM of every frame, mean over the videos, for `frames_chart`; none of pictures."""
    rows = []
    for outcome in outcomes:
        name = shown(outcome.method if outcome.is_fixed else f"{outcome.method} {outcome.budget:g}")
        frames = min(map(len, outcome.frame_psnr), default=0)
        for k in range(frames):
            psnr = summarise(curve[k] for curve in outcome.frame_psnr).mean
            ssim = mean([curve[k] for curve in outcome.frame_ssim])
            rows.append({"entry": name, "frame": k, "psnr": psnr, "ssim": ssim})
    return rows


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
    scores = comparison.full_clip
    return save_page(
        path,
        outcomes,
        title,
        pictures,
        commands=commands,
        machine=comparison.machine,
        categories=comparison.categories,
        full_clip=mean(scores) if scores else None,
    )


def folder_pictures(
    comparison: ComparisonFiles, outcomes: Sequence[Outcome], columns: Sequence[str], title: str = ""
) -> list[pages.Block]:
    """Of these outcomes, what the folder holds.

    Raises:
        FileFormatError: the pictures of the full run are missing or damaged.
    """
    return pictures_block(comparison.full_pictures(), _entries(comparison, outcomes), columns, title)


def pictures_block(
    full: Any, entries: Sequence[PictureEntry], prompts: Sequence[str], title: str = ""
) -> list[pages.Block]:
    """Full and cached pictures of entries under a slider; nothing where there are none."""
    if not entries:
        return []
    title = f"Full, cached, difference{': ' * bool(title)}{title}"
    return [pages.Pictures(page_pictures(full, entries, prompts), f"{GAIN:g}", title)]


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
