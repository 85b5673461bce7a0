"""Figures as PNG files: rows of pictures to compare, and maps of steps by layer groups."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layercache._utils.files import write_atomically
from layercache._utils.metrics import as_pictures
from layercache._utils.text import cleaned, shown
from layercache.errors import MissingExtraError
from layercache.schedule.schedule import Cell, Schedule
from layercache.tools.report.charts import MARKS, looks
from layercache.tools.report.tables import group_name

if TYPE_CHECKING:
    from layercache.schedule.module_schedule import ModuleSchedule

DPI = 100
# pixels of the page of pictures
SMALLEST_CELL, LARGEST_CELL = 96, 512
LABEL_WIDTH, TITLE_HEIGHT, COLUMN_HEIGHT, CAPTION_HEIGHT, GAP = 160, 28, 26, 16, 8
DIFFERENCE_GAIN = 4.0
MARKERS = dict(zip(MARKS, "os^DPv><", strict=True))  # as matplotlib calls the marks
COMPUTED, REUSED, FORECAST, SKIPPED = "#1b7837", "#c7dcef", "#d8c3e8", "#f3ead2"


@dataclass(frozen=True)
class PictureRow:
    """A labelled row of pictures.

    Attributes:
        label: shown at the left.
        pictures: see `layercache.metrics.as_pictures`.
        captions: shown below each picture, or nothing.
    """

    label: str
    pictures: Any
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class MapPanel:
    """A map of steps by groups: colours from a profile's stability, marks from a schedule; either may be missing.

    Attributes:
        title: shown above.
        groups: block ranges, one line of the map each.
        sigmas: noise level of every step (a final one more is ignored).
        stability: relative change per step and group, ``[N, G]``.
        schedule: drawn on top; without ``stability`` it gives the colours too.
    """

    title: str
    groups: Sequence[tuple[int, int]]
    sigmas: Sequence[float]
    stability: np.ndarray | None = None
    schedule: Schedule | None = None

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1


def check_installed() -> None:
    """Raises `MissingExtraError` when no figure could be drawn, for callers with a long job ahead."""
    _figure_class()


def difference(reference: Any, pictures: Any, gain: float = DIFFERENCE_GAIN) -> np.ndarray:
    """Absolute difference, amplified so that it can be seen and cut off at white."""
    return np.minimum(np.abs(as_pictures(reference) - as_pictures(pictures)) * gain, 1.0)


def save_pictures(
    path: str | os.PathLike[str],
    rows: Sequence[PictureRow],
    columns: Sequence[str],
    title: str = "",
    smallest: int = SMALLEST_CELL,
) -> Path:
    """Writes rows of pictures of one size as a PNG.

    Pictures under ``smallest`` pixels a side are enlarged by a whole factor with nearest-neighbour, so
    that every pixel stays a square; large ones are reduced to 512 pixels.
    """
    figure_class = _figure_class()
    height, width = as_pictures(rows[0].pictures).shape[1:3]
    scale = _scale(max(height, width), smallest)
    cell_width, cell_height = round(width * scale), round(height * scale)
    margin = LABEL_WIDTH if any(row.label for row in rows) else GAP
    top = TITLE_HEIGHT + COLUMN_HEIGHT if title else COLUMN_HEIGHT
    tops = []
    for row in rows:
        tops.append(top)
        top += cell_height + GAP + (CAPTION_HEIGHT if row.captions else 0)
    page = (margin + len(columns) * (cell_width + GAP), top)
    figure = figure_class(figsize=(page[0] / DPI, page[1] / DPI), dpi=DPI)
    if title:
        figure.text(
            GAP / page[0], 1 - TITLE_HEIGHT / 2 / page[1], math_free(title), fontsize=10, va="center", ha="left"
        )
    for row, row_top in zip(rows, tops, strict=True):
        middle = 1 - (row_top + cell_height / 2) / page[1]
        figure.text(GAP / page[0], middle, math_free(row.label), fontsize=9, va="center", ha="left")
        for column, picture in enumerate(as_pictures(row.pictures)):
            left, bottom = margin + column * (cell_width + GAP), page[1] - row_top - cell_height
            box = (left / page[0], bottom / page[1], cell_width / page[0], cell_height / page[1])
            axes = figure.add_axes(box)
            axes.imshow(picture, interpolation="nearest" if scale >= 1 else "antialiased", vmin=0, vmax=1, cmap="gray")
            axes.set_axis_off()
            if row_top == tops[0]:
                axes.set_title(math_free(columns[column]), fontsize=8, pad=4)
            if row.captions:
                axes.text(
                    0.5,
                    -0.03,
                    math_free(row.captions[column]),
                    transform=axes.transAxes,
                    fontsize=7,
                    va="top",
                    ha="center",
                )
    return save_figure(figure, path)


def _scale(side: int, smallest: int) -> float:
    if side > LARGEST_CELL:
        return LARGEST_CELL / side
    return math.ceil(smallest / side)


def save_maps(path: str | os.PathLike[str], panels: Sequence[MapPanel]) -> Path:
    """Writes one or several maps, below each other on a common colour scale, as a PNG."""
    figure_class = _figure_class()
    steps = max(panel.num_steps for panel in panels)
    lines = [0.36 * len(panel.groups) for panel in panels]
    height = max(1.6, sum(lines) + 0.55 * len(panels)) + 0.6
    figure = figure_class(figsize=(max(7.0, 0.36 * steps + 2.2), height), dpi=DPI)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=lines)[:, 0]
    limit = _colour_limit(panels)
    image = None
    for axis, panel in zip(axes, panels, strict=True):
        drawn = _draw_map(axis, panel, limit)
        image = drawn if panel.stability is not None else image
    axes[-1].set_xlabel("step")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="relative change", extend="max", pad=0.01, aspect=15)
    legend = _legend(panels)
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8, frameon=False)
    return save_figure(figure, path)


def _colour_limit(panels: Sequence[MapPanel]) -> float:
    """Top of the colour scale; one outlier, usual at the last step, must not make the rest look the same."""
    values = [panel.stability[np.isfinite(panel.stability)] for panel in panels if panel.stability is not None]
    joined = np.concatenate(values) if values else np.empty(0)
    return float(np.quantile(joined, 0.97)) if joined.size else 1.0


def _draw_map(axis: Any, panel: MapPanel, limit: float) -> Any:
    from matplotlib.colors import ListedColormap

    grid: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    if panel.stability is not None:
        image = axis.imshow(panel.stability.T, cmap="viridis", vmin=0, vmax=limit, **grid)
    else:
        kinds = np.array([[_kind(cell) for cell in row] for row in _cells(panel)], float).T
        kinds[:, [step for step in range(panel.num_steps) if step not in _steps(panel)]] = np.nan
        image = axis.imshow(kinds, cmap=ListedColormap([COMPUTED, REUSED, FORECAST, SKIPPED]), vmin=0, vmax=3, **grid)
    axis.set_facecolor("#d0d0d0")
    axis.set_title(math_free(panel.title), fontsize=9, loc="left")
    axis.set_yticks(range(len(panel.groups)), [group_name(group) for group in panel.groups], fontsize=8)
    stride = max(1, math.ceil(panel.num_steps / 30))
    axis.set_xticks(range(0, panel.num_steps, stride), range(0, panel.num_steps, stride), fontsize=7)
    for edge in np.arange(0.5, panel.num_steps - 1):
        axis.axvline(edge, color="white", linewidth=0.4)
    for edge in np.arange(0.5, len(panel.groups) - 1):
        axis.axhline(edge, color="white", linewidth=1)
    _draw_schedule(axis, panel)
    return image


def _cells(panel: MapPanel) -> Sequence[Sequence[Cell]]:
    return panel.schedule.cells if panel.schedule is not None else ()


def _steps(panel: MapPanel) -> Sequence[int]:
    """Those at which the transformer runs."""
    return panel.schedule.fingerprint.steps if panel.schedule is not None else ()


def _kind(cell: Cell) -> int:
    if cell is None:
        return 0
    return min(len(cell), 2) if cell else 3


def _draw_schedule(axis: Any, panel: MapPanel) -> None:
    """A filled square on every computed cell, the span K on every forecast."""
    on_colours = panel.stability is not None
    computed = [(step, group) for step, row in enumerate(_cells(panel)) for group, c in enumerate(row) if c is None]
    if computed and on_colours:
        steps, groups = zip(*computed, strict=True)
        axis.scatter(steps, groups, marker="s", s=42, c="white", edgecolors="black", linewidths=0.8)
    for step, row in enumerate(_cells(panel)):
        for group, cell in enumerate(row):
            if cell is not None and len(cell) > 1:
                colour = _readable_on(panel.stability, step, group, axis) if on_colours else "black"
                axis.text(step, group, str(_span(cell)), fontsize=8, ha="center", va="center", color=colour)


def _span(cell: Cell) -> int:
    anchors = sorted(cell or (), reverse=True)
    return anchors[0] - anchors[1]


def _readable_on(stability: np.ndarray | None, step: int, group: int, axis: Any) -> str:
    """Black on the light end of the colour scale, white on the dark end."""
    value = math.nan if stability is None else float(stability[step, group])
    return "black" if math.isnan(value) or value > 0.6 * axis.images[0].norm.vmax else "white"


def _legend(panels: Sequence[MapPanel]) -> list[Any]:
    from matplotlib.lines import Line2D

    if all(panel.schedule is None for panel in panels):
        return []
    square: dict[str, Any] = {"marker": "s", "linestyle": "none", "markeredgecolor": "black", "markersize": 8}
    kinds = {_kind(cell) for panel in panels for step in _steps(panel) for cell in _cells(panel)[step]}
    if any(panel.stability is not None for panel in panels):
        entries = [Line2D([], [], color="white", label="computed", **square)]
        entries.append(Line2D([], [], linestyle="none", label="unmarked: not computed"))
        number = [Line2D([], [], marker="$K$", linestyle="none", color="black", label="forecast over span K")]
        return entries + (number if 2 in kinds else [])
    labels = (
        (COMPUTED, "computed"),
        (REUSED, "reused"),
        (FORECAST, "forecast (number: span K)"),
        (SKIPPED, "skipped: velocity from earlier steps"),
    )
    return [Line2D([], [], color=labels[k][0], label=labels[k][1], **square) for k in sorted(kinds)]


def save_losses(path: str | os.PathLike[str], losses: Sequence[tuple[float, float]], units: int) -> Path:
    """Squared error and modules in use over the rounds of a router's training, as a PNG."""
    figure = new_figure(6.5, 3.8)
    axis = figure.subplots()
    rounds = range(1, len(losses) + 1)
    axis.plot(rounds, [error for error, _ in losses], color="tab:blue", marker="o", markersize=3)
    axis.set(xlabel="round", yscale="log")
    axis.set_ylabel("squared error of the output", color="tab:blue")
    other = axis.twinx()
    other.plot(rounds, [used for _, used in losses], color="tab:orange")
    other.set_ylabel(f"sum of the betas, of {units} modules", color="tab:orange")
    axis.grid(alpha=0.3)
    return save_figure(figure, path)


def save_modules(path: str | os.PathLike[str], schedule: ModuleSchedule, title: str = "") -> Path:
    """Steps by modules: dark where a module is computed, light where its last output is taken, as a PNG."""
    cells = np.array(schedule.computed, dtype=float).T
    for step in schedule.reused_steps:
        cells[:, step] = 0.5
    cells[:, [step for step in range(schedule.num_steps) if step not in schedule.fingerprint.steps]] = np.nan
    figure = new_figure(max(5.0, 0.16 * schedule.num_steps + 2.5), max(3.0, 0.07 * len(schedule.units) + 1.2))
    axis = figure.subplots()
    axis.imshow(cells, cmap="Blues", vmin=0, vmax=1.2, aspect="auto", interpolation="nearest")
    axis.set(xlabel="step (half dark: the step before is reused whole)", ylabel="module", title=math_free(title))
    every = max(1, len(schedule.units) // 16)
    axis.set_yticks(
        range(0, len(schedule.units), every), [math_free(unit) for unit in schedule.units[::every]], fontsize=6
    )
    return save_figure(figure, path)


def math_free(text: str) -> str:
    """Text for a figure: a ``$`` begins no formula, and control characters are written as escapes."""
    return cleaned(text).replace("$", r"\$")


def curve_label(name: str) -> str:
    """A name for a legend, which leaves out names that begin with an underscore."""
    label = math_free(shown(name))
    return f" {label}" if label.startswith("_") else label


def curve_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, mark and line of each name's curve, as on a page: ours thick, caches of other packages broken."""
    return {
        name: {
            "color": colour,
            "marker": MARKERS[mark],
            "linewidth": 2.5 if name.startswith("layercache") else 1.2,
            "linestyle": "--" if ":" in name else "-",
        }
        for name, (colour, mark) in looks(names).items()
    }


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    figure = _figure_class()(figsize=(width, height), dpi=DPI)
    figure.set_layout_engine("constrained")
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG, whole or not at all."""
    return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))


def _figure_class() -> Any:
    """A figure that draws with Agg and stays out of pyplot, whose state belongs to the caller."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            'figures need matplotlib, which is not installed: pip install "layercache[figures]"'
        ) from error

    class AggFigure(Figure):
        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs)
            FigureCanvasAgg(self)

    return AggFigure
