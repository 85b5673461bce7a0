"""EasyCache: how fast the velocity has been turning with the latents says how far it has turned since."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from layercache import ops
from layercache.runtime.policy import Run, StepDecider, StepMethod, by_name, check_range, ratio
from layercache.runtime.velocity import as_rows
from layercache.schedule.schedule import Velocity


@by_name
@dataclass(frozen=True, kw_only=True)
class EasyCache(StepMethod):
    """Skips whole steps while ``E += k |x_i - x_{i-1}| / |v_a|`` stays below ``threshold``.

    ``k = |v_a - v_b| / |x_a - x_b|`` of the last two computed steps; a skipped step takes ``v = x + (v_a - x_a)``. With
    Euler steps that is ``v_a`` times the product of ``1 + sigma[j+1] - sigma[j]`` over the steps since, which is how it
    is done here: nothing but one velocity is stored. v is the velocity after guidance, so that one decision holds for
    all branches. Source: docs/methods.md, EasyCache.

    Attributes:
        threshold: tau.
        warmup: steps at the beginning that are computed.
        cooldown: steps at the end that are computed.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    threshold: float = 0.05
    warmup: int = 5
    cooldown: int = 1

    name: ClassVar[str] = "easycache"

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0)
        check_range("warmup", self.warmup, 1)
        check_range("cooldown", self.cooldown, 0)

    def decider(self, run: Run) -> StepDecider:
        return _Decider(self, run)


class _Decider(StepDecider):
    """Decisions about whole steps of one generation; the statistics stay on the device until one is due."""

    def __init__(self, method: EasyCache, run: Run):
        assert run.sigmas is not None
        self.method, self.sigmas = method, run.sigmas
        self.accumulated = 0.0
        self.computed: list[int] = []
        self._inputs: torch.Tensor | None = None
        self._moved: torch.Tensor | None = None
        # at the newest computed step: inputs, velocity, and how far both were from those of the one before
        self._anchor: tuple[torch.Tensor, torch.Tensor] | None = None
        self._turned: torch.Tensor | None = None

    def observe(self, inputs: torch.Tensor) -> None:
        fresh = as_rows(inputs)
        if self._inputs is None:
            self._inputs = fresh.clone()
            return
        self._moved = ops.pair_statistics([fresh], [self._inputs])
        self._inputs.copy_(fresh)

    def must_compute(self, step: int) -> bool:
        is_last = step >= len(self.sigmas) - 1 - self.method.cooldown
        return step < self.method.warmup or is_last or len(self.computed) < 2

    def numbers(self) -> list[float]:
        assert self._moved is not None and self._turned is not None
        return torch.cat([self._moved, self._turned]).flatten().tolist()

    def may_reuse(self, numbers: Sequence[float]) -> bool:
        """The published rule, on mean absolute values."""
        moved, turned, wandered, size = numbers[0], numbers[8], numbers[16], numbers[9]
        assert self._anchor is not None
        inputs, velocity = (t.numel() for t in self._anchor)
        rate = ratio(turned / velocity, wandered / inputs)
        self.accumulated += rate * ratio(moved / inputs, size / velocity)
        return self.accumulated < self.method.threshold

    def record(self, step: int, velocity: torch.Tensor) -> None:
        assert self._inputs is not None
        fresh = as_rows(velocity)
        self.accumulated = 0.0
        self.computed.append(step)
        if self._anchor is not None:
            inputs, older = self._anchor
            self._turned = torch.cat(
                [ops.pair_statistics([fresh], [older]), ops.pair_statistics([self._inputs], [inputs])]
            )
            inputs.copy_(self._inputs)
            older.copy_(fresh)
        else:
            self._anchor = self._inputs.clone(), fresh.clone()

    def velocity(self, step: int) -> Velocity:
        anchor = self.computed[-1]
        return Velocity({anchor: math.prod(1 + self.sigmas[j + 1] - self.sigmas[j] for j in range(anchor, step))})

    @property
    def nbytes(self) -> int:
        tensors = [self._inputs, *(self._anchor or ())]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
