"""Figures of a comparison by category of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layercache._utils.metrics import summarise
from layercache.errors import ArgumentError
from layercache.tools.compare.files import Outcome
from layercache.tools.report.fitting import Column, FittingTable

NONE = "(none)"  # of pictures whose prompts have no category, beside others that have one

COLUMNS = (
    Column("method", numeric=False),
    Column("budget", 3),
    Column("used", 5),
    Column("category", numeric=False),
    Column("pictures", 4),
    Column("PSNR", about="mean, in dB, against the full run"),
    Column("10 %", 1, about="what nine pictures of ten exceed, in dB"),
    Column("worst", 2, about="the lowest PSNR of a picture"),
    Column("SSIM", 3),
    Column("LPIPS", 6),
    Column("CLIP", 6, about="score of the pictures themselves, 0 to 100"),
)


@dataclass(frozen=True)
class CategoryRow:
    """A method at a budget, on the prompts of one category.

    Attributes:
        method, budget, used: as of the table's `Row`; ``used`` is over all categories.
        category: of the prompts.
        pictures: how many are of it.
        psnr_mean, psnr_median, psnr_p10, psnr_worst, ssim, lpips, clip: as of the table's `Row`.
    """

    method: str
    budget: float | None
    used: float
    category: str
    pictures: int
    psnr_mean: float
    psnr_median: float
    psnr_p10: float
    psnr_worst: float
    ssim: float
    lpips: float | None
    clip: float | None

    @property
    def cells(self) -> list[str]:
        """The columns of `COLUMNS`, as text."""
        psnr = (self.psnr_mean, self.psnr_p10, self.psnr_worst)
        return [
            self.method,
            "-" if self.budget is None else f"{self.budget:g}",
            f"{self.used:.3f}",
            self.category,
            str(self.pictures),
            *(f"{value:.2f}" for value in psnr),
            f"{self.ssim:.4f}",
            "-" if self.lpips is None else f"{self.lpips:.4f}",
            "-" if self.clip is None else f"{self.clip:.2f}",
        ]


def category_rows(outcomes: Sequence[Outcome], categories: Sequence[str]) -> Iterator[CategoryRow]:
    """A row per outcome and category, in the order in which categories come first; none where there are none.

    Args:
        outcomes: those that failed are left out.
        categories: of every picture.
    """
    for outcome in outcomes:
        if outcome.error or len(outcome.psnr) != len(categories):
            continue
        for category in dict.fromkeys(categories):
            own = [k for k, one in enumerate(categories) if one == category]
            psnr = summarise(outcome.psnr[k] for k in own)
            yield CategoryRow(
                method=outcome.method,
                budget=None if outcome.is_fixed else outcome.budget,
                used=outcome.used,
                category=category or NONE,
                pictures=len(own),
                psnr_mean=psnr.mean,
                psnr_median=psnr.median,
                psnr_p10=psnr.quantile10,
                psnr_worst=min(outcome.psnr[k] for k in own),
                ssim=mean([outcome.ssim[k] for k in own]),
                lpips=mean([outcome.lpips[k] for k in own]) if outcome.lpips else None,
                clip=mean([outcome.clip[k] for k in own]) if outcome.clip else None,
            )


def category_table(
    outcomes: Sequence[Outcome], categories: Sequence[str], width: int | None = None
) -> FittingTable | None:
    """The rows as a table; ``None`` where the prompts have no categories."""
    rows = list(category_rows(outcomes, categories))
    if not rows:
        return None
    cells = [row.cells for row in rows]
    kept = [k for k in range(len(COLUMNS)) if any(line[k] != "-" for line in cells)]
    table = FittingTable([COLUMNS[k] for k in kept], title="By category of prompts", width=width)
    for line in cells:
        table.add_row(*(line[k] for k in kept))
    return table


def split_categories(prompts: Any) -> tuple[Any, list[str]]:
    """Prompts without what names their category, and the category of every one, in their order.

    Args:
        prompts: see `layercache.tools.compare.calls.samples_of`; the category is what a mapping has as ``"category"``.

    Raises:
        ArgumentError: a category is no text.
    """
    categories: list[str] = []

    def without(prompt: Any) -> Any:
        if isinstance(prompt, (list, tuple)):
            return [without(one) for one in prompt]
        category = prompt.get("category", "") if isinstance(prompt, Mapping) else ""
        if not isinstance(category, str):
            raise ArgumentError(f"the category of a prompt is a text, got {category!r}", argument="prompts")
        categories.append(category)
        if not isinstance(prompt, Mapping) or "category" not in prompt:
            return prompt
        left = {name: value for name, value in prompt.items() if name != "category"}
        return left["prompt"] if set(left) == {"prompt"} else left  # texts go into one call

    is_one = isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence)
    return without(prompts) if is_one else [without(prompt) for prompt in prompts], categories


def in_turn(categories: Sequence[str], count: int) -> list[str]:
    """The category of so many pictures, whose prompts come in turn; none where no prompt has one."""
    return [categories[k % len(categories)] for k in range(count)] if any(categories) else []


def mean(values: Sequence[float]) -> float:
    """Of all values; NaN where there is none."""
    return math.fsum(values) / len(values) if values else math.nan
