"""DiCache: a shallow probe says when to compute, and along which line to extend (arXiv 2508.17356)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from layercache import ops
from layercache.errors import MethodError
from layercache.runtime.policy import Decider, DynamicMethod, Observation, Run, by_name, check_range, ratio

MODES = ("delta_y", "delta_minus")


class _AlignedDecider(Decider):
    """Watches input and output of the probe, and the probe's residual against those of two computed steps."""

    def __init__(self, method: DiCache, run: Run):
        super().__init__(method, run)
        self.accumulated = 0.0
        self._seen = self._computed = 0
        self._gamma = 1.0
        self._spread: torch.Tensor | None = None

    def must_compute(self, step: int) -> bool:
        steps = self.run.num_steps or 0
        return step <= int(self.method.retention * steps) or self.is_last(step)

    def observe(self, step: int, observation: Observation) -> torch.Tensor | None:
        fresh = self.memory("fresh", observation.probe)
        older = [self.memory("older", observation.probe)] if self._computed > 1 else None
        aligned = ops.capture([observation.probe], [observation.start], [fresh], previous=older)
        start, probe = self.memory("start", observation.start), self.memory("probe", observation.probe)
        found = None
        if self._seen:
            found = ops.pair_statistics([observation.start, observation.probe], [start, probe]).flatten()
            if aligned is not None and self._spread is not None:
                found = torch.cat([found, aligned.flatten(), self._spread.flatten()])
        start.copy_(observation.start)
        probe.copy_(observation.probe)
        self._seen += 1
        return found

    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        moved, answered = ratio(numbers[0], numbers[2]), ratio(numbers[8], numbers[10])
        self.accumulated += answered if self.method.mode == "delta_y" else abs(answered - moved)
        # |p - p_b| over |p_a - p_b|; equal probes leave no line to extend along
        away = ratio(numbers[18], numbers[23]) if len(numbers) > 16 else 1.0
        self._gamma = min(max(away, 1.0), 1.5) if away < float("inf") else 1.0
        return self.accumulated < self.method.threshold

    def record(self, step: int, computed: bool) -> None:
        if not computed:
            return
        self.accumulated = 0.0
        self.swap("newest", "older") if "newest" in self._memory else None
        self.swap("fresh", "newest")
        self._computed += 1
        if self._computed > 1:
            self._spread = ops.pair_statistics([self._memory["newest"]], [self._memory["older"]])

    def terms(self, step: int, anchors: Sequence[int]) -> dict[int, float]:
        if len(anchors) < 2:
            return {anchors[0]: 1.0}
        return {anchors[0]: self._gamma, anchors[1]: 1.0 - self._gamma}


@by_name
@dataclass(frozen=True, kw_only=True)
class DiCache(DynamicMethod):
    """Runs ``probe_blocks`` blocks, decides by their change, and extends the residual by how far they have moved.

    ``h = h_0 + R_b + gamma (R_a - R_b)``, gamma = clip(|p - p_b| / |p_a - p_b|, 1, 1.5).
    Source: docs/methods.md, DiCache.

    Attributes:
        threshold: of the added-up change.
        retention: share of the steps at the beginning that is computed.
        mode: ``"delta_y"``: the change of the probe's output; ``"delta_minus"``: how far it differs from that of its
            input.
        probe_blocks: 1 to 5 are recommended.
    """

    threshold: float = 0.4
    retention: float = 0.2
    mode: str = "delta_y"
    probe_blocks: int = 1

    name: ClassVar[str] = "dicache"
    needs_num_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, 0)
        check_range("retention", self.retention, 0, 1)
        check_range("probe_blocks", self.probe_blocks, 1)
        if self.mode not in MODES:
            raise MethodError(f"unknown mode {self.mode!r} of DiCache; choose {' or '.join(MODES)}")
        if self.order:
            raise MethodError("DiCache has a forecast of its own; leave order at 0")

    @property
    def probe(self) -> int:
        return self.probe_blocks

    @property
    def skip_from(self) -> int:
        return 0

    @property
    def depth(self) -> int:
        return 2

    def decider(self, run: Run) -> Decider:
        return _AlignedDecider(self, run)
