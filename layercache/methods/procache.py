"""ProCache: intervals that only become shorter, drawn at random, and deep blocks computed in the middle of them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar

from layercache._utils.validate import expect
from layercache.errors import BudgetError, MethodError, ScheduleError
from layercache.runtime.policy import PlannedMethod, check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.forecast import taylor_forecast
from layercache.schedule.schedule import Cell, Schedule

CANDIDATES = 5
ATTEMPTS = 2000

# steps from every computed step to the next, of the released code (docs/methods.md, ProCache)
PRESETS: dict[str, dict[str, Any]] = {
    "dit-xl-2": {"intervals": (4,) * 6 + (3,) * 4 + (2,) * 7},
    "flux": {"intervals": (3,) * 8 + (2,) * 13, "warmup": 3},
    "flux-taylor": {"intervals": (6,) * 5 + (5,) * 4, "warmup": 3, "order": 2, "selective": False},
    "pixart-alpha": {"intervals": (3,) * 6 + (2,)},
}


@dataclass(frozen=True)
class ProCache(PlannedMethod):
    """Computes the first step of every interval, and the deep blocks at every second step that is skipped.

    Source: docs/methods.md, ProCache.

    Attributes:
        intervals: steps from each computed step to the next, which add up to those of the run; `sample_intervals`
            draws some.
        selective: whether deep blocks are computed at the second, fourth, ... skipped step in a row.
        depth: share of the blocks behind which they are deep.
        warmup: steps at the beginning that are computed.
        order: 0 reuses residuals, above they are forecast by a Taylor series (TaylorSeer).
        cooldown: steps at the end that are computed, whatever the intervals are.

    Raises:
        MethodError: on construction, when a setting is out of range.
        ScheduleError: on construction, for intervals that are none.
    """

    intervals: tuple[int, ...]
    selective: bool = True
    depth: float = 0.75
    warmup: int = 1
    order: int = 0
    cooldown: int = 0

    name: ClassVar[str] = "procache"

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(map(int, self.intervals)))
        check_range("depth", self.depth, 0, 1)
        check_range("warmup", self.warmup, 1)
        check_range("order", self.order, 0, 7)
        check_range("cooldown", self.cooldown, 0)
        if not self.intervals or min(self.intervals) < 1:
            raise ScheduleError(f"intervals are numbers of steps, 1 at least, got {list(self.intervals)}")

    @classmethod
    def preset(cls, name: str) -> ProCache:
        """A released pattern (`PRESETS`): of 50 steps, that of PixArt-alpha of 20. Source: docs/methods.md, ProCache.

        Raises:
            MethodError: unknown name.
        """
        if name not in PRESETS:
            raise MethodError(f"no ProCache pattern is released for {name!r}; there are {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @property
    def replaces_velocity(self) -> bool:
        return False

    def schedule_of_run(self, fingerprint: Fingerprint, scheduler: Any, first: int) -> Schedule:
        return self.schedule(fingerprint)  # intervals are those of a whole run

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        expect("ProCache.schedule", fingerprint, Fingerprint)
        steps, blocks = fingerprint.steps, fingerprint.num_blocks
        if sum(self.intervals) != len(steps):
            raise ScheduleError(
                f"the intervals are of {sum(self.intervals)} steps, this run has {len(steps)}; draw some with "
                f"layercache.methods.procache.sample_intervals({len(steps)}, computed=...)"
            )
        cut = round(self.depth * blocks)
        groups = ((0, cut), (cut, blocks)) if self.selective and 0 < cut < blocks else ((0, blocks),)
        computed = self._computed(len(groups), is_deep=cut < blocks)
        anchors: list[list[int]] = [[] for _ in groups]  # newest first
        rows: list[tuple[Cell, ...]] = [({},) * len(groups)] * fingerprint.num_steps
        for step, wanted in zip(steps, computed, strict=True):
            rows[step] = tuple(
                None if runs else taylor_forecast(step, own, self.order)
                for runs, own in zip(wanted, anchors, strict=True)
            )
            anchors = [[step, *own] if runs else own for runs, own in zip(wanted, anchors, strict=True)]
        seconds = tuple(float(hi - lo) for lo, hi in groups)
        metadata = {"method": self.name, "intervals": list(self.intervals), "order": self.order}
        return Schedule(fingerprint, groups, tuple(rows), seconds, metadata)

    def _computed(self, groups: int, is_deep: bool) -> list[tuple[bool, ...]]:
        """Whether each group is computed, per step."""
        found: list[tuple[bool, ...]] = []
        last = sum(self.intervals) - self.cooldown
        for interval in self.intervals:
            for place in range(interval):
                selects = self.selective and is_deep and place > 0 and place % 2 == 0
                full = place == 0 or not self.warmup <= len(found) < last
                found.append((*(full,) * (groups - 1), full or selects))
        return found


def sample_intervals(
    num_steps: int,
    computed: int,
    count: int = CANDIDATES,
    shortest: int | None = None,
    longest: int | None = None,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """Candidates for the intervals, which never become longer; the best is found by running them.

    Args:
        num_steps: of the run.
        computed: steps that are computed; as many intervals.
        count: of candidates; fewer where there are not so many.
        shortest, longest: steps of an interval; by default those next to the mean and one further, as published.
        seed: of the random numbers.

    Source: docs/methods.md, ProCache.

    Raises:
        BudgetError: no such intervals add up to the steps.
    """
    check_range("computed", computed, 1, num_steps)
    low = max(1, num_steps // computed - 1) if shortest is None else shortest
    high = math.ceil(num_steps / computed) + 1 if longest is None else longest
    free = num_steps - low * computed
    if not low <= high or not 0 <= free <= (high - low) * computed:
        raise BudgetError(
            f"{computed} intervals of {low} to {high} steps do not add up to {num_steps}", argument="computed"
        )
    drawn = random.Random(seed)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(ATTEMPTS):
        cuts = [0, *sorted(drawn.randint(0, free) for _ in range(computed - 1)), free]
        intervals = [low + b - a for a, b in zip(cuts, cuts[1:], strict=False)]
        if max(intervals) <= high:
            found[tuple(sorted(intervals, reverse=True))] = None
        if len(found) == count:
            break
    return list(found) or [_even(num_steps, computed)]


def _even(num_steps: int, computed: int) -> tuple[int, ...]:
    """Intervals that differ by one step at most, where chance found none within the bounds."""
    length, more = divmod(num_steps, computed)
    return (length + 1,) * more + (length,) * (computed - more)
