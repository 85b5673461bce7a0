"""Rows of a comparison, and how their figures are written."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from layercache._utils.metrics import summarise
from layercache._utils.text import shown
from layercache.errors import MissingExtraError
from layercache.tools.compare.categories import mean
from layercache.tools.compare.files import Outcome
from layercache.tools.compare.scores import Curves

NUMBERS = (
    *("budget", "used", "speedup", "range", "PSNR", "10 %", "worst", "SSIM", "LPIPS", "CLIP"),
    *("worst frame", "temporal", "MiB"),
)
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


def data_frame(rows: Sequence[Any], kind: type, left_out: Sequence[str] = ()) -> Any:
    """A `pandas.DataFrame` with a column per attribute of rows, which are dataclasses of this kind, but some.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError(
            'to_pandas needs pandas, which is not installed: pip install "layercache[compare]"'
        ) from error
    columns = [field.name for field in fields(kind) if field.name not in left_out]
    return pandas.DataFrame([[getattr(row, name) for name in columns] for row in rows], columns=columns)
