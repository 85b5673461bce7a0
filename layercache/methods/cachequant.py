"""CacheQuant: steps for a quantised model by dynamic programming, corrected to the runs of the unquantised one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from layercache._utils.validate import expect, expect_table
from layercache.errors import BudgetError
from layercache.parallel.crew import Crew
from layercache.planning.fit import HOLD, Forecast
from layercache.planning.rollout import Rollouts, skipping
from layercache.runtime.policy import by_name
from layercache.schedule.schedule import Schedule

CORRECTION = Forecast("steer", terms=1, latents=False, free_sum=True)
"""One factor per step, of the newest velocity; computed steps have one too."""


def reuse_errors(velocities: Sequence[torch.Tensor], max_length: int) -> np.ndarray:
    """``sum over i < n of |v[t + i] - v[t]|`` of a full run, ``[N, max_length + 1]``; infinite beyond its end.

    Source: docs/methods.md, CacheQuant.

    Args:
        velocities: of every step.
        max_length: steps of the longest group.
    """
    table = np.full((len(velocities), max_length + 1), np.inf)
    for start, first in enumerate(velocities):
        total = 0.0
        for length in range(1, min(max_length, len(velocities) - start) + 1):
            total += float((velocities[start + length - 1].double() - first.double()).abs().sum())
            table[start, length] = total
    return table


def plan_steps(errors: np.ndarray, count: int) -> list[int]:
    """First steps of ``count`` groups of steps whose errors add up to least.

    Groups have from half to twice as many steps as they would all have alike.

    Args:
        errors: of `reuse_errors`, mean over the samples, ``[N, max_length + 1]``.
        count: steps that are computed.

    Raises:
        ArgumentError: no such table.
        BudgetError: the table holds no groups of these lengths.
    """
    errors = expect_table(
        "cachequant.plan_steps", errors, ("N", "max_length + 1"), "reuse_errors(velocities) makes one"
    )
    steps = len(errors)
    least, most = group_lengths(steps, count)
    lengths = range(least, min(most, errors.shape[1] - 1) + 1)
    costs = np.full((count + 1, steps + 1), np.inf)  # of so many groups that end in front of a step
    before = np.zeros((count + 1, steps + 1), dtype=int)
    costs[0, 0] = 0.0
    for groups in range(1, count + 1):
        for end in range(1, steps + 1):
            found = [(costs[groups - 1, end - n] + errors[end - n, n], end - n) for n in lengths if n <= end]
            costs[groups, end], before[groups, end] = min(found, default=(np.inf, 0))
    if not np.isfinite(costs[count, steps]):
        raise BudgetError(f"{steps} steps are not cut into {count} groups of {least} to {most} steps in this table")
    path = [steps]
    for groups in range(count, 0, -1):
        path.append(int(before[groups, path[-1]]))
    return path[:0:-1]


def group_lengths(steps: int, count: int) -> tuple[int, int]:
    """The least and the most steps of a group: half of what all would have alike, rounded up, and twice that."""
    interval = max(1, math.ceil(steps / max(1, count)))
    return math.ceil(interval / 2), min(steps, 2 * interval)


@by_name
@dataclass(frozen=True, kw_only=True)
class CacheQuant:
    """Whole steps reused in groups of least error, each step's velocity scaled towards the unquantised model's run.

    Steps are cut into groups by dynamic programming over the sum of the absolute differences to each group's first
    step, the only one that is computed. Then the quantised model runs by them, and as it runs one factor per step,
    computed or reused, is fitted so that its latents come next to where those of the unquantised model are, which
    corrects both errors and what has added up of them.

    Source: docs/methods.md, CacheQuant.

    Attributes:
        corrects: whether factors are fitted; else a group repeats its first velocity.
    """

    corrects: bool = True

    name: ClassVar[str] = "cachequant"

    def schedule(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        budget: float,
        *,
        reference: Any = None,
        seeds: Sequence[int] | None = None,
        crew: Crew | None = None,
        **call: Any,
    ) -> Schedule:
        """The schedule of a quantised pipeline, for a full run per picture of each pipeline and one cached run.

        Args:
            pipe: the pipeline with the quantised transformer.
            prompts, seeds, crew, call: the calibration samples, as of `layercache.planning.rollout.Rollouts`.
            budget: share of the steps that is computed.
            reference: the same pipeline with the unquantised transformer; without it ``pipe`` is its own reference, and
                only the error of reusing is corrected.

        Raises:
            BudgetError: the budget is less than a step.
            CalibrationError, CrewError, UnsupportedModelError: as for `Rollouts`.
        """
        return self.plan(Rollouts(pipe, prompts, seeds, crew=crew, reference=reference, **call), budget)

    def plan(self, rollouts: Rollouts, budget: float) -> Schedule:
        """The same on full runs that are known.

        Raises:
            ArgumentError: no rollouts.
            BudgetError: as for `schedule`.
        """
        expect("CacheQuant.plan", rollouts, Rollouts)
        steps = rollouts.num_steps
        count = int(budget * steps + 1e-9)
        if not 1 <= count <= steps:
            raise BudgetError(f"a budget of {budget:g} is not from one to all of {steps} steps", argument="budget")
        longest = group_lengths(steps, count)[1]
        own = [reuse_errors(trace.taken, longest) for trace in rollouts.full]
        computed = plan_steps(np.mean(rollouts.crew.gather(own), axis=0), count)
        schedule = skipping(rollouts.fingerprint, computed, rollouts.seconds[0])
        target = CORRECTION if rollouts.samplers is not None else replace(CORRECTION, target="teacher")
        found = rollouts.run(schedule, target if self.corrects else HOLD).schedule
        return replace(found, made_by={"method": self.name, "settings": repr(self)})
