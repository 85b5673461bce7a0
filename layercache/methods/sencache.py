"""SenCache: how strongly the model answers to its inputs says how far they may move before it is run again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from layercache import ops
from layercache.errors import MethodError
from layercache.runtime.policy import Decider, DynamicMethod, Observation, Run, by_name, check_range
from layercache.runtime.velocity import as_rows

Sensitivities = tuple[tuple[float, float, float], ...]


@by_name
@dataclass(frozen=True, kw_only=True)
class SenCache(DynamicMethod):
    """Reuses the residual of all blocks while ``J_x |x - x_a| + J_t |t - t_a|`` is below a threshold.

    x are the latents and t the timestep that the transformer is given, a the last computed step; norms are root mean
    squares over the latents. Source: docs/methods.md, SenCache.

    Attributes:
        threshold: of the predicted change of the output, per element.
        early_threshold: the same in the first share of the steps.
        early_share: that share.
        max_consecutive: most reused steps in a row; -1 for no limit.
        sensitivities: rows ``(t, J_x, J_t)``, t in the unit that the transformer is given; those whose t is nearest to
            that of the last computed step count. `fit` measures them.
        warmup, cooldown: steps at the beginning and at the end that are computed.
    """

    threshold: float = 0.1
    early_threshold: float = 0.01
    early_share: float = 0.2
    max_consecutive: int = 2
    sensitivities: Sensitivities = ()
    warmup: int = 1
    cooldown: int = 1
    per_branch: bool = False

    name: ClassVar[str] = "sencache"
    knob: ClassVar[tuple[str, float, float]] = ("threshold", 1e-4, 10.0)
    needs_num_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, 0)
        check_range("early_threshold", self.early_threshold, 0)
        check_range("early_share", self.early_share, 0, 1)
        check_range("max_consecutive", self.max_consecutive, -1)
        check_range("warmup", self.warmup, 0)
        check_range("cooldown", self.cooldown, 0)
        rows = tuple(tuple(map(float, row)) for row in self.sensitivities)
        if any(len(row) != 3 or not all(map(math.isfinite, row)) or min(row[1:]) < 0 for row in rows):
            raise MethodError(
                "sensitivities are rows (t, J_x, J_t) of finite numbers, J_x and J_t not below 0, as "
                "layercache.methods.sencache.fit gives them",
                argument="sensitivities",
            )
        object.__setattr__(self, "sensitivities", rows)

    def for_model(self, model_class: str) -> SenCache:
        """Itself; called before it is enabled on a model.

        Raises:
            MethodError: there are no sensitivities.
        """
        if not self.sensitivities:
            raise MethodError(
                f"how strongly {model_class} answers to its inputs must be measured: sensitivities = "
                "layercache.methods.sencache.fit(pipe, prompts, ...), and give SenCache(sensitivities=sensitivities)"
            )
        return self

    def sensitivity_at(self, time: float) -> tuple[float, float]:
        """J_x and J_t of the measured timestep nearest to this one."""
        _, latents, times = min(self.sensitivities, key=lambda row: abs(row[0] - time))
        return latents, times

    def threshold_at(self, step: int, num_steps: int) -> float:
        return self.early_threshold if step < round(self.early_share * num_steps) else self.threshold

    def decider(self, run: Run) -> Decider:
        return _SensitiveDecider(self, run)


class _SensitiveDecider(Decider):
    """Watches how far latents and timestep are from those of the last computed step."""

    method: SenCache

    def __init__(self, method: SenCache, run: Run):
        super().__init__(method, run)
        self.consecutive = 0
        self._elements = 1
        self._fresh_time: torch.Tensor | None = None
        self._time: torch.Tensor | None = None

    def must_compute(self, step: int) -> bool:
        method, steps = self.method, self.run.num_steps
        capped = 0 <= method.max_consecutive <= self.consecutive
        return steps is None or step < max(1, method.warmup) or step >= steps - method.cooldown or capped

    def observe(self, step: int, observation: Observation) -> torch.Tensor | None:
        assert observation.latents is not None
        if observation.timestep is None:
            raise MethodError("SenCache watches the timestep, and this transformer is given none; take EasyCache")
        latents = as_rows(observation.latents())
        self._elements = latents.numel()
        self._fresh_time = observation.timestep.detach().float().max().reshape(1)  # tokens of a picture may have none
        fresh = self.memory("fresh", latents)
        fresh.copy_(latents)
        if self._time is None:
            return None
        moved = ops.pair_statistics([fresh], [self._memory["reference"]]).flatten()
        return torch.cat([moved, self._fresh_time, self._time, torch.ones_like(self._time)])

    def may_reuse(self, step: int, numbers: Sequence[float]) -> bool:
        assert self.run.num_steps is not None
        count = numbers[10]  # of the processes that the sums are over
        moved = math.sqrt(max(0.0, numbers[3]) / (count * self._elements)) if numbers[3] == numbers[3] else math.nan
        now, before = numbers[8] / count, numbers[9] / count
        to_latents, to_time = self.method.sensitivity_at(before)
        change = to_latents * moved + to_time * abs(now - before)
        return change < self.method.threshold_at(step, self.run.num_steps)

    def record(self, step: int, computed: bool) -> None:
        self.consecutive = 0 if computed else self.consecutive + 1
        if computed:
            self.swap("fresh", "reference")
            self._time = self._fresh_time


def fit(pipe: Any, prompts: Sequence[Any], seeds: Sequence[int] | None = None, **call: Any) -> Sensitivities:
    """How strongly a model answers to its inputs, from full runs: rows ``(t, J_x, J_t)``, one per step but the last.

    By finite differences along the sampler's own steps, ``J_x = |f(x', t) - f(x, t)| / |x' - x|`` and
    ``J_t = |f(x, t') - f(x, t)| / |t' - t|``, with the latents and timestep of the step after; means over the
    prompts, of the branch that is run first. Each step takes two more forwards. Source: docs/methods.md, SenCache.

    Args:
        pipe: a diffusers pipeline.
        prompts, seeds, call: full runs, see `layercache.calibrate`; about 8 prompts are enough.

    Raises:
        MethodError: fewer than two steps, or the transformer is given no timestep.
        UnsupportedModelError: no pipeline.
    """
    from layercache.methods.full_runs import input_sensitivities

    rows = input_sensitivities(pipe, prompts, seeds, **call)
    if not len(rows):
        raise MethodError("sensitivities are measured between two steps: take more steps")
    return tuple((float(row[0]), float(row[1]), float(row[2])) for row in rows)
