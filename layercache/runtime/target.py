"""`Target`: how much compute or which quality is wanted, where no schedule is given."""

from __future__ import annotations

from dataclasses import dataclass

from layercache.errors import ArgumentError, BudgetError

MORE = "more"
GENERATIONS = 4
SPEEDUP = 1.5
"""Of the denoising loop, where nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is wanted of a schedule that is yet to be found; at most one of the first three is given.

    Attributes:
        budget: share of the block time, above 0 and below 1.
        speedup: of the denoising loop, above 1; `SPEEDUP` where nothing is said.
        min_psnr: mean PSNR in dB against the full run that other pictures are expected to have.
        learn: generations that are recorded to find it, or ``"more"``: four further ones. 0: none, what was learnt
            before is taken, or what needs no calibration (`layercache.methods.automatic`). ``None``: 4 for a PSNR,
            which nothing else can promise, and else 0.

    Raises:
        BudgetError: on construction, for several targets, or one that is out of range.
        ArgumentError: on construction, for another ``learn``.
    """

    budget: float | None = None
    speedup: float | None = None
    min_psnr: float | None = None
    learn: int | str | None = None

    def __post_init__(self) -> None:
        wanted = {"budget": self.budget, "speedup": self.speedup, "min_psnr": self.min_psnr}
        given = [name for name, value in wanted.items() if value is not None]
        if len(given) > 1:
            raise BudgetError(f"give one of speedup=1.8, budget=0.5 and min_psnr=40; got {' and '.join(given)}")
        if not given:
            object.__setattr__(self, "speedup", SPEEDUP)
        if self.learn is None:
            object.__setattr__(self, "learn", 0 if self.min_psnr is None else GENERATIONS)
        if self.budget is not None and not 0 < self.budget < 1:
            raise BudgetError(f"a budget is a share above 0 and below 1, got {self.budget}", argument="budget")
        if self.speedup is not None and not self.speedup > 1:
            raise BudgetError(f"a speedup is above 1, got {self.speedup}", argument="speedup")
        if self.min_psnr is not None and not 0 < self.min_psnr < 100:
            raise BudgetError(f"min_psnr is above 0 and below 100 dB, got {self.min_psnr}", argument="min_psnr")
        is_count = isinstance(self.learn, int) and not isinstance(self.learn, bool) and self.learn >= 0
        if self.learn != MORE and not is_count:
            raise ArgumentError(
                f'learn is a number of generations from 0 on, or "{MORE}", got {self.learn!r}', argument="learn"
            )
        if self.min_psnr is not None and self.learn == 0:
            raise BudgetError(
                "what a model gives is not known before it has run: min_psnr needs learn=1 or more", argument="min_psnr"
            )

    @property
    def share(self) -> float:
        """Share of the steps that is computed, as if all time were spent in the blocks; 1 where a PSNR is wanted."""
        return 1 / self.speedup if self.speedup is not None else self.budget or 1.0

    @property
    def generations(self) -> int:
        """How many are recorded."""
        return self.learn if isinstance(self.learn, int) else GENERATIONS
