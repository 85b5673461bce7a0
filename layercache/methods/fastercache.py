"""FasterCache: attention extended from its last two outputs, and guidance branches derived from one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from layercache._utils.validate import expect
from layercache.runtime.policy import PlannedModules, by_name, check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.module_schedule import ModuleSchedule

ATTENTION = ("attn", "attn1", "attention", "self_attention")
"""Names of self-attention and joint attention in the descriptions of models; cross-attention is none of them."""


@by_name
@dataclass(frozen=True, kw_only=True)
class FasterCache(PlannedModules):
    """Self-attention every second step, the unconditional branch every fifth, once a first share of the steps is over.

    A reused attention gives ``F_a + w (F_a - F_b)`` of its last two computed outputs, ``w`` growing over the steps up
    to ``weight``. A branch that is not run is the conditional one's output plus the difference of the two at the last
    step that ran both, in a low and a high band of frequencies, each scaled by its factor once more at every step.
    Branches that a pipeline puts into one batch are not derived, but attention is reused there too.

    Source: docs/methods.md, FasterCache.

    Attributes:
        start: share of the steps before anything is reused.
        interval: attention is computed at every so-manieth step; 1 computes it always.
        weight: of the difference, at the last step.
        guidance_interval: both branches run at every so-manieth step, with attention computed; 1 runs them always (for
            models without a second branch).
        low_factor, high_factor: by which the bands of the difference grow at every step.
        low_until: share of the steps after which the low band does not grow any more.
        high_from: share of the steps from which the high band grows.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    start: float = 0.36
    interval: int = 2
    weight: float = 1.0
    guidance_interval: int = 5
    low_factor: float = 1.1
    high_factor: float = 1.1
    low_until: float = 0.8
    high_from: float = 0.6

    name: ClassVar[str] = "fastercache"

    def __post_init__(self) -> None:
        for share in ("start", "low_until", "high_from"):
            check_range(share, getattr(self, share), 0, 1)
        check_range("interval", self.interval, 1)
        check_range("guidance_interval", self.guidance_interval, 1)
        check_range("weight", self.weight, 0)
        check_range("low_factor", self.low_factor, 0)
        check_range("high_factor", self.high_factor, 0)

    def module_schedule(
        self, fingerprint: Fingerprint, units: Sequence[str], seconds: Sequence[float] = ()
    ) -> ModuleSchedule:
        """The schedule for this model and run; of a part of a run (img2img) counted from its first step.

        Args:
            fingerprint, units, seconds: as of `PlannedModules.module_schedule`.

        Raises:
            ArgumentError: no fingerprint.
        """
        expect("FasterCache.module_schedule", fingerprint, Fingerprint)
        attention = [unit.rsplit(".", 1)[-1] in ATTENTION for unit in units]
        rows: list[tuple[bool, ...]] = []
        weights: list[float] = []
        derived: list[tuple[float, float] | None] = []
        for step in range(fingerprint.num_steps):
            number = step - fingerprint.steps[0]
            reuses = self._reuses(number, len(fingerprint.steps))
            rows.append(tuple(not (reuses and own) for own in attention))
            weights.append(self._weight(number, len(fingerprint.steps)) if reuses else 0.0)
            derived.append(self._bands(number, len(fingerprint.steps), derived[-1] if derived else None))
        return ModuleSchedule(
            fingerprint,
            tuple(units),
            tuple(rows),
            seconds=tuple(seconds),
            made_by={"method": self.name, "settings": repr(self)},
            weights=tuple(weights) if any(weights) else (),
            derived=tuple(derived) if any(derived) else (),
        )

    def _first(self, steps: int) -> int:
        """The first step, counted from the run's own first, at which something may be reused."""
        return max(1, math.ceil(self.start * steps - 1e-9))

    def _reuses(self, number: int, steps: int) -> bool:
        """Whether attention is reused; never where all branches run again."""
        if number < self._first(steps) or number % self.interval == 0:
            return False
        return self.guidance_interval == 1 or number % self.guidance_interval != 0

    def _weight(self, number: int, steps: int) -> float:
        first = self._first(steps)
        return self.weight * (number - first + 1) / (steps - first)

    def _bands(self, number: int, steps: int, before: tuple[float, float] | None) -> tuple[float, float] | None:
        """Weights of the two bands of the stored difference; ``None`` where every branch runs."""
        if number < self._first(steps) or number % self.guidance_interval == 0:
            return None
        low, high = before or (1.0, 1.0)
        grows_low, grows_high = number + 1 <= self.low_until * steps, number + 1 >= self.high_from * steps
        return low * (self.low_factor if grows_low else 1.0), high * (self.high_factor if grows_high else 1.0)
