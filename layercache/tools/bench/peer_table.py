"""What the caches of other packages do between the blocks, as a table and a plot; `peers` measures it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layercache.tools.report.fitting import Column, FittingTable
from layercache.tools.report.plots import math_free, new_figure, save_figure


@dataclass(frozen=True)
class Row:
    """Of one mode and kind of step, with or without our ops.

    Attributes:
        operators: with an operand as large as the image stream; ``ours`` of them from this package.
        passes: full-size tensors read and written by them.
        reads: times that the host read a value of a tensor.
        breaks: breaks of the graph when the model is compiled whole.
        seconds: of the step; nothing but the cache runs.
    """

    mode: str
    reuses: bool
    accelerated: bool
    operators: int
    ours: int
    passes: int
    reads: int
    breaks: int
    seconds: float


def table(rows: Sequence[Row]) -> FittingTable:
    """Both variants of every mode and kind of step; DBCache has one block in front, Taylor order 1 and one tensor."""
    caption = "Per step: as it is > on our ops, which is so many times as fast; breaks: of the graph, as it is."
    columns = [Column("cache", numeric=False), Column("step", numeric=False), Column("ms"), Column("times")]
    columns += [Column("operators", 1), Column("passes", 2), Column("reads", 3), Column("breaks", 4)]
    found = FittingTable(columns, caption=caption)
    for plain, fast in zip(rows[::2], rows[1::2], strict=True):
        found.add_row(
            plain.mode,
            "reusing" if plain.reuses else "computing",
            f"{plain.seconds * 1e3:.2f} > {fast.seconds * 1e3:.2f}",
            f"{plain.seconds / fast.seconds:.2f}x",
            *(f"{getattr(plain, name)} > {getattr(fast, name)}" for name in ("operators", "passes", "reads")),
            str(plain.breaks),
        )
    return found


def save_plot(path: str | os.PathLike[str], rows: Sequence[Row], title: str) -> Path:
    """Times side by side."""
    figure = new_figure(9, 0.55 * len(rows) + 1.2)
    axis = figure.subplots()
    labels = [f"{row.mode}, {'reusing' if row.reuses else 'computing'}" for row in rows[::2]]
    for offset, (label, own) in enumerate((("as it is", rows[::2]), ("on layercache's ops", rows[1::2]))):
        places = [k + 0.4 * offset - 0.2 for k in range(len(own))]
        axis.barh(places, [row.seconds * 1e3 for row in own], height=0.38, label=label)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds of the cache in a step", title=math_free(title))
    axis.legend()
    return save_figure(figure, path)
