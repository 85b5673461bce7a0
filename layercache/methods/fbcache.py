"""FBCache and DBCache: the change of the first blocks' residual stands for that of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from layercache import ops
from layercache.errors import MethodError
from layercache.runtime.policy import Decider, DynamicMethod, Observation, Run, by_name, check_range, ratio
from layercache.runtime.storage import check_alike

# cache-dit's presets for 28 steps: lengths of runs, computed and cached in turns
MASKS = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}


class _ProbeDecider(Decider):
    """``d = mean|p - p_ref| / mean|p_ref|``: p is the probe blocks' residual, p_ref that of the last computed step."""

    def __init__(self, method: FBCache, run: Run):
        super().__init__(method, run)
        self.cached = self.consecutive = 0
        self._has_reference = False

    def must_compute(self, step: int) -> bool:
        return step < self.method.warmup

    def observe(self, step: int, observation: Observation) -> torch.Tensor | None:
        check_alike(observation.start, observation.probe)
        fresh = self.memory("fresh", observation.probe)
        previous = [self.memory("reference", observation.probe)] if self._has_reference else None
        return ops.store([observation.probe], [observation.start], [fresh], None, previous)

    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        return ratio(numbers[2], numbers[4]) <= self.method.threshold

    def record(self, step: int, computed: bool) -> None:
        if computed:
            self.swap("fresh", "reference")
            self._has_reference = True
        self.consecutive = 0 if computed else self.consecutive + 1
        self.cached += not computed


@by_name
@dataclass(frozen=True, kw_only=True)
class FBCache(DynamicMethod):
    """First-block cache: reuses while the first block's residual has changed by at most ``threshold``.

    Source: docs/methods.md, FBCache and DBCache.

    Attributes:
        threshold: relative L1 change.
        warmup: steps at the beginning that are computed.
    """

    threshold: float = 0.05
    warmup: int = 0

    name: ClassVar[str] = "fbcache"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, 0)
        check_range("warmup", self.warmup, 0)

    @property
    def probe(self) -> int:
        return 1

    def decider(self, run: Run) -> Decider:
        return _ProbeDecider(self, run)


class _DualDecider(_ProbeDecider):
    method: DBCache

    def must_compute(self, step: int) -> bool:
        method = self.method
        if method.mask is not None and step < len(method.mask):
            return bool(method.mask[step])
        capped = 0 <= method.max_cached <= self.cached or 0 <= method.max_consecutive <= self.consecutive
        return step < method.warmup or capped or method.threshold <= 0

    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        method = self.method
        if method.threshold >= 1 or (method.mask is not None and step < len(method.mask) and not method.mask_tests):
            return True
        return ratio(numbers[2], numbers[4]) < method.threshold


@by_name
@dataclass(frozen=True, kw_only=True)
class DBCache(FBCache):
    """Dual-block cache: the first ``front`` blocks are the probe, the last ``back`` always run and repair.

    Source: docs/methods.md, FBCache and DBCache.

    Attributes:
        front, back: Fn and Bn.
        threshold: at or below 0 nothing is reused, at or above 1 everything is.
        max_cached, max_consecutive: most reused steps in all, and in a row; -1 for no limit.
        mask: per step 1 to compute and 0 to reuse (`steps_mask` makes one); steps behind it follow the threshold.
        mask_tests: whether a 0 of the mask is reused only if the threshold says so too.
    """

    threshold: float = 0.08
    warmup: int = 8
    front: int = 8
    back: int = 0
    max_cached: int = -1
    max_consecutive: int = -1
    mask: tuple[int, ...] | None = None
    mask_tests: bool = False

    name: ClassVar[str] = "dbcache"

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, -1)
        object.__setattr__(self, "threshold", float(self.threshold))
        DynamicMethod.__post_init__(self)
        check_range("warmup", self.warmup, 0)
        check_range("front", self.front, 1)
        check_range("back", self.back, 0)
        check_range("max_cached", self.max_cached, -1)
        check_range("max_consecutive", self.max_consecutive, -1)
        if self.mask is not None and (not self.mask or self.mask[0] != 1 or set(self.mask) - {0, 1}):
            raise MethodError(f"a mask holds 1 (compute) and 0 (reuse) and begins with 1, got {self.mask}")

    @property
    def probe(self) -> int:
        return self.front

    @property
    def tail(self) -> int:
        return self.back

    def decider(self, run: Run) -> Decider:
        return _DualDecider(self, run)


def steps_mask(computed: Sequence[int], cached: Sequence[int]) -> tuple[int, ...]:
    """The mask of runs of computed and cached steps in turns, beginning with a computed one.

    ``steps_mask(*MASKS["fast"])`` is cache-dit's preset of that name for 28 steps.
    """
    mask: list[int] = []
    for k, length in enumerate(computed):
        mask += [1] * length + [0] * (cached[k] if k < len(cached) else 0)
    return tuple(mask)
