"""The search over schedules of whole steps: paths found in the surrogate, the best of them run and fitted (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layercache.errors import BudgetError
from layercache.planning.fit import Forecast
from layercache.planning.front import Point, quality
from layercache.planning.rollout import Rollout, Rollouts, skipping
from layercache.planning.surrogate import Answers, deviations, full_grams, starts, surrogate_of

EFFORTS = {"quick": 32, "normal": 72, "thorough": 160}
"""Full generations that a search may cost in all, its full runs included."""

TERMS = 3
SIMULATIONS = 900
DIFFERENCE = 2  # exchanges between two paths that are both run
TAIL = 0.5
LOW, MIDDLE = 0.4, 0.55  # shares of computed steps up to which budgets are explored in other ways


def runs_per_budget(counts: Sequence[int], num_steps: int, pictures: int, generations: float) -> list[int]:
    """How many schedules of each budget are run, so that all of it costs at most so many full generations.

    Args:
        counts: computed steps of the budgets.
        num_steps: N.
        pictures: that are run in full and by each schedule.
        generations: the limit; ``pictures`` of them are the full runs.

    Raises:
        BudgetError: one schedule of each budget costs more.
    """
    wanted = [3 if count > LOW * num_steps else 5 if count > 0.25 * num_steps else 6 for count in counts]
    shares = [count / num_steps for count in counts]
    runs = [1] * len(counts)

    def cost() -> float:
        return pictures * (1 + sum(n * share for n, share in zip(runs, shares, strict=True)))

    if cost() > generations + 1e-9:
        raise BudgetError(
            f"{pictures} pictures and {len(counts)} budgets cost {cost():.1f} full generations at least, more than the "
            f"{generations:g} of this effort; give fewer pictures or budgets, or a higher effort",
            argument="effort",
        )
    open_ = set(range(len(counts)))
    while open_:
        k = min(open_, key=lambda k: (runs[k] / wanted[k], shares[k]))
        runs[k] += 1
        if cost() > generations + 1e-9 or runs[k] > 2 * wanted[k]:
            runs[k] -= 1
            open_.remove(k)
    return runs


@dataclass(frozen=True)
class Tried:
    """A path that was run with a forecast."""

    computed: np.ndarray
    forecast: Forecast
    origin: str
    rollout: Rollout

    @property
    def quality(self) -> float:
        return quality(self.rollout.psnr, TAIL)

    @property
    def point(self) -> Point:
        made_by = {"method": "layercache", "origin": self.origin, "forecast": self.forecast.name}
        schedule = replace(self.rollout.schedule, made_by={**self.rollout.schedule.made_by, **made_by})
        return Point(schedule, f"{self.origin}, {self.forecast.name}", self.rollout.psnr)


class WholeStepSearch:
    """Searches schedules of whole steps on the full runs of a few pictures.

    Budgets are taken upward, so that the cheapest runs measure how the model answers drift (`Answers`). Of every
    budget the first path of a low share is that of least velocity deviations; then the surrogate's best that differs
    from those run, with the answers renewed; at last the best so far with the other weighting of pictures.

    Args:
        rollouts: the pictures, and their full runs.
        seconds: of computing all blocks once, for the schedules.
        seed: of the order in which exchanges are tried in the surrogate.
    """

    def __init__(self, rollouts: Rollouts, seconds: float = 1.0, seed: int = 0):
        self.rollouts, self.seconds, self.seed = rollouts, seconds, seed
        self.grams = full_grams(rollouts)
        self.tried: list[Tried] = []

    def run(self, counts: Sequence[int], runs: Sequence[int]) -> Iterator[Tried]:
        """Runs so many schedules with so many computed steps each; yields every one as it is done."""
        lengths = max(9, *(2 * math.ceil(self.rollouts.num_steps / count) for count in counts))
        self.table = deviations(self.grams, self.rollouts.sigmas, min(lengths, self.rollouts.num_steps))
        for count, number in sorted(zip(counts, runs, strict=True)):
            own: list[Tried] = []
            for k in range(number):
                path, forecast, origin = self._next(count, k, number, own)
                schedule = skipping(self.rollouts.fingerprint, np.flatnonzero(path).tolist(), self.seconds)
                own.append(Tried(path, forecast, origin, self.rollouts.run(schedule, forecast)))
                self.tried.append(own[-1])
                yield own[-1]

    def _next(self, count: int, k: int, number: int, own: Sequence[Tried]) -> tuple[np.ndarray, Forecast, str]:
        """The path to run next, its forecast, and how it was found."""
        share = count / self.rollouts.num_steps
        weighting, other = (0.5, 1.0) if share <= LOW else (1.0, 0.5)
        forecast = Forecast("steer", terms=TERMS, weighting=weighting)
        if k == number - 1 and number > 2:
            best = max(own, key=lambda one: one.quality)
            if best.forecast.weighting == weighting:
                return best.computed, replace(forecast, weighting=other), best.origin
            return best.computed, forecast, best.origin
        dense = _dense_starts(count, share)
        answers = Answers.of(self.rollouts, [one.rollout for one in self.tried])
        if answers is None or (k == 0 and share <= LOW):
            name, path = starts(self.table, self.rollouts.sigmas, count, dense[0])[0]
            return path, forecast, f"whole steps, {name}"
        found = self._explore(answers, forecast, count, dense[k % len(dense)], own)
        return found, forecast, "whole steps, surrogate"

    def _explore(
        self, answers: Answers, forecast: Forecast, count: int, dense: int, own: Sequence[Tried]
    ) -> np.ndarray:
        """The surrogate's best path that differs from those of this budget that were run."""
        surrogate = surrogate_of(self.rollouts, self.grams, answers, forecast)
        begins: Any = [path for _, path in starts(self.table, self.rollouts.sigmas, count, dense)]
        begins += [one.computed for one in own if one.computed[:dense].all()]
        fixed = np.arange(self.rollouts.num_steps) < dense
        paths, _ = surrogate.explore(np.array(begins), fixed, SIMULATIONS, self.seed)
        for difference in (DIFFERENCE, 1):
            for path in paths:
                if all((path & ~one.computed).sum() >= difference for one in own):
                    return np.asarray(path)
        return np.asarray(paths[0])


def _dense_starts(count: int, share: float) -> list[int]:
    """How many steps from the first on a path may have to compute, by the share it computes."""
    if share > MIDDLE:
        return [count // 3, round(0.43 * count)]
    return [1, max(1, count // 3)] if share > LOW else [1]
