"""DPCache: the computed steps by a dynamic programme over what Taylor forecasts miss on full runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from layercache._utils.validate import expect, expect_table
from layercache.errors import ArgumentError, BudgetError, MethodError, ScheduleError
from layercache.methods.fixed import forecasts, schedule_of
from layercache.runtime.policy import PlannedMethod, check_length, check_range, warn_of_length
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.forecast import taylor_forecast
from layercache.schedule.schedule import Schedule

LONGEST = 0.3  # share of the steps from one computed step to the next, at most
EXTRAPOLATED = 0.8  # share of the forecast in what stands for the velocity behind the last step


@dataclass(frozen=True)
class DPCache(PlannedMethod):
    """Computes the steps of a planned path and forecasts by a Taylor series in the step number between.

    Source: docs/methods.md, DPCache.

    Attributes:
        computed: the steps that are computed, ascending, step 0 first; from `plan_steps`.
        order: of the series.
        groups: block ranges whose residuals are forecast; by default the velocity is.
        num_steps: of the runs that it is for; others are refused. ``None``: not known.

    Raises:
        MethodError: on construction, when the order is out of range.
        ScheduleError: on construction, for steps that do not ascend from 0.
    """

    computed: tuple[int, ...]
    order: int = 2
    groups: tuple[tuple[int, int], ...] | None = None
    num_steps: int | None = None

    name: ClassVar[str] = "dpcache"

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", tuple(map(int, self.computed)))
        _check_order(self.order)
        if self.computed[:1] != (0,) or list(self.computed) != sorted(set(self.computed)):
            raise ScheduleError(f"computed steps must ascend from 0, got {list(self.computed)}")

    @property
    def replaces_velocity(self) -> bool:
        return self.groups is None

    def schedule_of_run(self, fingerprint: Fingerprint, scheduler: Any, first: int) -> Schedule:
        warn_of_length("DPCache", self.num_steps)
        return self.schedule(fingerprint)  # computed steps are those of a whole run

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        expect("DPCache.schedule", fingerprint, Fingerprint)
        check_length("DPCache", self.computed, self.num_steps, len(fingerprint.steps))
        cells = list(forecasts(fingerprint, self.computed, self.order))
        return schedule_of(fingerprint, cells, {"method": self.name, "order": self.order}, self.groups)


def path_costs(velocities: Sequence[Sequence[torch.Tensor]], order: int = 2, longest: int | None = None) -> np.ndarray:
    """The path-aware cost tensor of full runs, ``[N, N + 1, N + 1]``.

    Entry ``[i, j, k]`` adds up the mean absolute error of the forecast from the computed steps j, i and those right
    before i at every step behind j up to k, which is computed next, or is N: the end, whose velocity is extrapolated.
    Infinite where there is no such path. Averaged over the samples. Source: docs/methods.md, DPCache.

    Args:
        velocities: per sample, of every step.
        order: of the series.
        longest: most steps from one computed step to the next; by default `LONGEST` of all.

    Raises:
        ArgumentError: no such velocities.
        MethodError: the order is out of range.
    """
    _check_order(order)
    samples = list(velocities) if isinstance(velocities, Sequence) else []
    lengths = {len(steps) if isinstance(steps, Sequence) else 0 for steps in samples}
    if len(lengths) != 1 or min(lengths) < order + 2:
        raise ArgumentError(
            f"dpcache.path_costs expects the velocities of all steps per sample, {order + 2} at least; rollouts has "
            "them: [trace.taken for trace in rollouts.full]"
        )
    return np.asarray(np.mean([_costs_of(steps, order, longest) for steps in samples], axis=0))


def _costs_of(velocities: Sequence[torch.Tensor], order: int, longest: int | None) -> np.ndarray:
    steps = len(velocities)
    reach = max(int(LONGEST * steps), 1) if longest is None else longest
    rows = torch.stack([v.detach().cpu().float().flatten() for v in velocities])
    (ahead,) = _forecast([steps], range(steps - 1, steps - order - 2, -1), rows)
    end = EXTRAPOLATED * ahead + (1 - EXTRAPOLATED) * rows[-order - 1 :].mean(0)
    rows = torch.cat([rows, end[None]])
    costs = np.full((steps, steps + 1, steps + 1), np.inf)
    for j in range(order):
        costs[: j + 1, j, j + 1] = 0.0  # what comes before the series can be made is computed
    for j in range(order, steps):
        targets = range(j + 1, min(j + reach, steps) + 1)
        for i in range(max(order - 1, j - reach), j):
            missed = _forecast(targets, [j, *range(i, i - order, -1)], rows) - rows[targets.start : targets.stop]
            costs[i, j, targets.start : targets.stop] = missed.abs().mean(1).double().cumsum(0)
    return costs


def _forecast(targets: Sequence[int], anchors: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
    """Forecasts from as many anchors as the series takes, newest first: a row per target."""
    terms = [taylor_forecast(k, anchors, len(anchors) - 1) for k in targets]
    return torch.tensor([[term[k] for k in anchors] for term in terms]) @ rows[list(anchors)]


def plan_steps(costs: np.ndarray, budget: int, first: int = 3, last: int = 0) -> list[int]:
    """The steps to compute: the path of least cost with so many of them, by the published dynamic programme.

    What a step costs depends on the two computed steps before it, of which the programme keeps for every step and
    number of computed steps the one on the best path to it. Source: docs/methods.md, DPCache.

    Args:
        costs: from `path_costs`.
        budget: steps that are computed.
        first, last: steps at the beginning and the end that are computed in any case.

    Raises:
        ArgumentError: no such table.
        BudgetError: no path has so few computed steps.
    """
    costs = expect_table("dpcache.plan_steps", costs, ("N", "N + 1", "N + 1"), "path_costs(velocities) makes one")
    steps = len(costs)
    fixed = np.zeros(steps + 1, bool)
    fixed[[0, steps]] = True
    fixed[:first] = True
    fixed[steps - last : steps] = True
    passed = np.concatenate([[0], np.cumsum(fixed)])  # fixed steps below each
    count = min(budget, steps)
    best, before = np.full((count + 1, steps + 1), np.inf), np.zeros((count + 1, steps + 1), int)
    best[0, 0] = 0.0
    for k in range(1, count + 1):
        for i in range(k, steps + 1):
            j = np.arange(k - 1, i)
            older = np.where(fixed[j] & fixed[j - 1] & (j > 0), j - 1, before[k - 1, j])
            cost = np.where(passed[i] == passed[j + 1], best[k - 1, j] + costs[older, j, i], np.inf)
            found = int(np.argmin(cost))
            if np.isfinite(cost[found]):
                best[k, i], before[k, i] = cost[found], j[found]
    if not np.isfinite(best[count, steps]):
        raise BudgetError(
            f"no path computes {count} of {steps} steps: with as few, give path_costs a larger longest",
            argument="budget",
        )
    path = [int(before[count, steps])]
    for k in range(count - 1, 0, -1):
        path.append(int(before[k, path[-1]]))
    return path[::-1]


def _check_order(order: Any) -> None:
    check_range("order", order, 1, 7)
    if not isinstance(order, int):
        raise MethodError(f"order must be a whole number, got {order!r}", argument="order")
