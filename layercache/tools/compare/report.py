"""A comparison as a table, a plot, a grid of pictures and a self-contained page."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from layercache._utils.files import write_atomically
from layercache._utils.metrics import stills, summarise
from layercache._utils.text import shown
from layercache.tools.compare.run import Comparison, Outcome
from layercache.tools.report.console import table_html
from layercache.tools.report.plots import PictureRow, curve_label, math_free, new_figure, save_figure, save_pictures

WIDTH = 170


def comparison_table(outcomes: Sequence[Outcome], title: str = "", width: int = WIDTH) -> Table:
    """A row per method and budget; what failed is in `failures`. Below 150 columns the settings are left out."""
    with_lpips = any(outcome.lpips for outcome in outcomes)
    table = Table(title=shown(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.caption = (
        "PSNR in dB (mean, median, 10 % quantile) and SSIM against the full run; speedup against full runs before and "
        "after; operators of PyTorch and values read by the host, per step; a dash: not known."
    )
    table.add_column("method", no_wrap=True)
    headings = ["budget", "used", "speedup", "PSNR", "median", "10 %", "SSIM", *["LPIPS"] * with_lpips]
    for heading in (*headings, "MiB", "operators", "reads"):
        table.add_column(heading, justify="right", no_wrap=True)
    with_settings = width >= 150
    if with_settings:
        table.add_column("setting", no_wrap=True, overflow="ellipsis", max_width=width - 115)
    for outcome in outcomes:
        if outcome.error:
            continue
        psnr = summarise(outcome.psnr)
        table.add_row(
            shown(outcome.method),
            f"{outcome.budget:g}",
            f"{outcome.used:.3f}",
            f"{outcome.speedup:.2f}x",
            *(f"{value:.2f}" for value in (psnr.mean, psnr.median, psnr.quantile10)),
            f"{np.mean(outcome.ssim):.4f}",
            *([f"{np.mean(outcome.lpips):.4f}" if outcome.lpips else "-"] * with_lpips),
            "-" if outcome.cache_bytes is None else f"{outcome.cache_bytes / 2**20:.1f}",
            f"{outcome.operators:.0f}",
            f"{outcome.reads:.2f}",
            *([shown(outcome.setting)] * with_settings),
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
    comparison: Comparison, outcomes: Sequence[Outcome], columns: Sequence[str], title: str
) -> dict[str, Any]:
    """Writes ``compare.png``, ``pictures.png`` and ``compare.html`` beside ``compare.json``; their paths, by name."""
    folder = comparison.folder
    plot = save_figure(draw_curves(outcomes, title), folder / "compare.png")
    grid = _save_grid(comparison, outcomes, columns, title)
    page = save_page(folder / "compare.html", outcomes, title, [plot, *([grid] if grid else [])])
    return {"figures": comparison.file, "plot": plot, **({"pictures": grid} if grid else {}), "page": page}


def draw_curves(outcomes: Sequence[Outcome], title: str) -> Any:
    """Mean PSNR over the share of compute, a curve per method."""
    figure = new_figure(10.5, 5.6)
    axis = figure.subplots()
    good = [outcome for outcome in outcomes if not outcome.error]
    names = list(dict.fromkeys(outcome.method for outcome in good))
    for number, name in enumerate(names):
        own = sorted((outcome for outcome in good if outcome.method == name), key=lambda o: o.used)
        means = [summarise(outcome.psnr).mean for outcome in own]
        # ours first and strong; another package's cache is drawn broken
        look = {"color": f"C{number % 10}", "marker": "osv^D<>"[number // 10 % 7]}
        look["linestyle"] = "--" if ":" in name else "-"
        axis.plot(
            [o.used for o in own],
            means,
            markersize=4,
            linewidth=2.5 if number == 0 else 1.2,
            label=curve_label(name),
            **look,
        )
    axis.set(xlabel="share of the block time computed", ylabel="PSNR against the full run (dB)", title=math_free(title))
    axis.grid(alpha=0.3)
    if good:
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def save_page(path: Path, outcomes: Sequence[Outcome], title: str, pictures: Sequence[Path]) -> Path:
    """Table and pictures as one HTML file that refers to nothing outside itself."""
    table, title = table_html(comparison_table(outcomes), WIDTH), shown(title)
    images = "\n".join(
        f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    )
    notes = "\n".join(f"<p>{html.escape(line)}</p>" for line in failures(outcomes))
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body {{ font: 15px sans-serif; margin: 2em auto; max-width: 90em; color: #111; background: #fff }}
img {{ max-width: 100%; display: block; margin: 1em 0 }} pre {{ overflow-x: auto; font-size: 13px }}</style></head>
<body><h1>{html.escape(title)}</h1>
{images}
{table}
{notes}</body></html>
"""
    return write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _save_grid(comparison: Comparison, outcomes: Sequence[Outcome], columns: Sequence[str], title: str) -> Path | None:
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
