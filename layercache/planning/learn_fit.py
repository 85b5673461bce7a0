"""Fitting a schedule to recorded generations, within a fixed number of full generations (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercache.errors import BudgetError, CalibrationError
from layercache.planning.front import Front
from layercache.planning.full_run import FullSample
from layercache.planning.learnt_files import Learnt
from layercache.planning.refit import path_of
from layercache.planning.rollout import Rollouts
from layercache.planning.surrogate import Answers, FullRuns
from layercache.planning.whole_steps import LOW, Tried, WholeStepSearch
from layercache.runtime.target import Target

COST = 3.0
"""Full generations that a fit may cost in all."""

MOST_RUNS = 4

TAIL = 0.2
"""Weight of the 10 % quantile beside the mean: of four pictures it is nearly the worst one."""


@dataclass(frozen=True)
class Recorded:
    """A call of the pipeline that ran in full: its arguments, with generators as they were, and what it gave."""

    arguments: Mapping[str, Any]
    full: FullSample


class Fit:
    """Finds a schedule for a target on recorded calls, for at most `COST` full generations a picture of a call.

    Args:
        pipe: the pipeline, with nothing enabled on it.
        calls: recorded.
        target: what is wanted.
        bar: told what it costs, in full generations.
        kept: what was learnt before and is refined.
    """

    def __init__(self, pipe: Any, calls: list[Recorded], target: Target, bar: Any, kept: Learnt | None = None):
        self.pipe, self.calls, self.target, self.bar, self.kept = pipe, calls, target, bar, kept
        self.seconds = self.calls[0].full.seconds
        self.num_steps = self.calls[0].full.num_steps
        self.left = COST

    def run(self) -> Learnt:
        """The schedule.

        Raises:
            BudgetError, CalibrationError: no schedule reaches the target, or runs are not finite.
        """
        if self.target.min_psnr is not None:
            return self._learnt([self._for_quality(self.target.min_psnr)])
        return self._learnt(self._at(self._count()))

    def _count(self) -> int:
        """Computed steps for the budget or speedup."""
        budget, (blocks, rest) = self.target.budget, self.seconds
        if self.target.speedup is not None:
            budget = ((rest + blocks) / self.target.speedup - rest) / blocks
        count = min(math.floor((budget or 0.0) * self.num_steps + 1e-9), self.num_steps - 1)
        if count < 1:
            most = (rest + blocks) / (rest + blocks / self.num_steps)
            raise BudgetError(
                f"with {self.num_steps} steps a budget is at least {1 / self.num_steps:.2f}, and a speedup of the loop "
                f"at most {most:.1f}"
            )
        return count

    def _rollouts(self, calls: list[Recorded]) -> Rollouts:
        full = [call.full for call in calls]
        return Rollouts(self.pipe, [call.arguments for call in calls], on_cost=self.bar.update, full=full)

    def _search(self, cost: float, answers: Answers | None = None, simulates: bool = False) -> WholeStepSearch:
        """On as many of the calls as can be run for this cost each; the others may be simulated beside them."""
        most = max(1, math.floor(self.left / cost + 1e-9))
        calls, rest = self.calls[:most], self.calls[most:]
        rollouts = self._rollouts(calls)
        if simulates and rest:
            others = FullRuns.of(self._rollouts(rest))
            return WholeStepSearch(rollouts, self.seconds[0], tail=TAIL, others=others)
        if answers is not None:
            pictures = rollouts.num_pictures
            answers = Answers(answers.kappa[:pictures], answers.eta[:pictures])
        return WholeStepSearch(rollouts, self.seconds[0], tail=TAIL, answers=answers)

    def _spend(self, search: WholeStepSearch, count: int, runs: int = 1) -> None:
        """Notes what runs will cost."""
        calls, pictures = len(search.rollouts.prompts), search.rollouts.num_pictures
        self.left -= runs * calls * count / self.num_steps
        self.bar.total = self.bar.n + runs * pictures * count / self.num_steps
        self.bar.refresh()

    def _at(self, count: int) -> list[Tried]:
        """Schedules with so many computed steps."""
        share = count / self.num_steps
        if self.kept is None and LOW < share <= self.left / 2 and self._can_simulate():
            return self._of_two(count)
        search = self._search(share)
        if self.kept is not None and (path := path_of(self.kept.point.schedule, search.rollouts.sigmas)).sum() == count:
            self._spend(search, count)
            origin = self.kept.point.origin.split(",")[0] + ", learnt from more"
            return [search.run_path(path, search.forecast_of(count), origin, self.kept.products)]
        runs = min(MOST_RUNS, max(1, math.floor(self.left / (len(search.rollouts.prompts) * share) + 1e-9)))
        self._spend(search, count, runs)
        return list(search.run([count], [runs]))

    def _can_simulate(self) -> bool:
        """Whether pictures can be simulated as others run: of one output, with answers of other models."""
        full = self.calls[0].full
        return not full.further and full.sampler is not None and Answers.usual(full.sigmas, 1) is not None

    def _of_two(self, count: int) -> list[Tried]:
        """A path that computes the first steps and one that need not: which is better, only the model tells."""
        search = self._search(2 * count / self.num_steps, simulates=True)
        self._spend(search, count, 2)
        found = list(search.run([count], [1]))
        path = search.free_path(count)
        if (path == found[0].computed).all():
            return found
        return [*found, search.run_path(path, search.forecast_of(count), "whole steps, surrogate from any start")]

    def _for_quality(self, least: float) -> Tried:
        """The schedule of least compute that other pictures are expected to have this mean PSNR with."""
        search = self._search(self.left / len(self.calls))  # all of them
        search.prepare(1)
        tried: list[Tried] = []
        shortfall = 0.0
        while True:
            count, path = self._least(search, least + shortfall)
            if any(count <= int(one.computed.sum()) for one in tried if _mean(one) < least):
                break
            share = count / self.num_steps
            if share > self.left:
                break
            if len(search.rollouts.prompts) * share > self.left:
                search = self._search(share, search.answers)
                search.prepare(1)
            self._spend(search, count)
            tried.append(search.run_path(path, search.forecast_of(count), "whole steps, surrogate"))
            search.tried.append(tried[-1])
            if _mean(tried[-1]) >= least:
                return tried[-1]
            shortfall += least - _mean(tried[-1])
        best = max(tried, key=_mean, default=None)
        found = "none was run" if best is None else f"{_mean(best):.1f} dB with {best.computed.mean():.2f} of the steps"
        raise CalibrationError(
            f"min_psnr={least:g} was not reached on the recorded generations ({found}); ask for less, or search "
            "(layercache.search)",
            argument="min_psnr",
        )

    def _least(self, search: WholeStepSearch, least: float) -> tuple[int, np.ndarray]:
        """The fewest computed steps that the surrogate gives this mean PSNR, and its path."""
        low, high = 1, self.num_steps - 1
        paths: dict[int, np.ndarray] = {}
        while low < high:
            middle = (low + high) // 2
            paths[middle], psnr = search.predicted(middle)
            low, high = (low, middle) if np.mean(psnr) >= least else (middle + 1, high)
        return low, paths[low] if low in paths else search.predicted(low)[0]

    def _learnt(self, tried: list[Tried]) -> Learnt:
        best = max(tried, key=lambda one: one.quality)
        blocks, rest = self.seconds
        front = Front((best.point,), (blocks, rest, 0.0), len(tried), (f"learnt from {len(self.calls)} generations",))
        return Learnt(front, best.rollout.products)


def _mean(tried: Tried) -> float:
    return float(np.mean(tried.expected or tried.rollout.psnr))
