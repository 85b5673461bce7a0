"""The search over schedules of whole steps: paths found in the surrogate, the best of them run and fitted (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layercache._utils.metrics import summarise
from layercache.errors import BudgetError, CalibrationError
from layercache.planning.fit import Forecast
from layercache.planning.front import Point, quality
from layercache.planning.rollout import Products, Rollout, Rollouts, skipping
from layercache.planning.search_files import KeptRun
from layercache.planning.simulated import Simulated
from layercache.planning.surrogate import (
    Answers,
    FullRuns,
    Measured,
    answers_of,
    deviations,
    expected_psnr,
    explored,
    regular_paths,
    starts,
    surrogate_of,
)
from layercache.schedule.schedule import EXPECTED_PSNR, Schedule

TERMS = 3
SIMULATIONS, SIMULATIONS_FREE = 900, 2500  # the latter of paths whose first steps need not be computed
DIFFERENCE = 2  # exchanges between two paths that are both run
TAIL = 0.5
STRESS, STRESS_LOW = (1.0, 2.0, 4.0), (1.0, 2.0)  # factors of the answer to drift, the latter up to a share of LOW
WEIGHTINGS = 0.5, 1.0  # of pictures in the fits, up to a share of LOW and above
FREELY = 3  # runs of a budget above LOW, of which the last begins however it likes
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
    runs = [1] * len(counts)
    least = cost_of(counts, runs, num_steps, pictures)
    if least > generations + 1e-9:
        raise BudgetError(
            f"{pictures} pictures and {len(counts)} budgets cost {least:.1f} full generations at least, more than the "
            f"{generations:g} of this effort; give fewer pictures or budgets, or a higher effort",
            argument="effort",
        )
    open_ = set(range(len(counts)))
    while open_:
        k = min(open_, key=lambda k: (runs[k] / wanted[k], counts[k]))
        runs[k] += 1
        if cost_of(counts, runs, num_steps, pictures) > generations + 1e-9 or runs[k] > 2 * wanted[k]:
            runs[k] -= 1
            open_.remove(k)
    return runs


@dataclass(frozen=True)
class Tried:
    """A path that was run with a forecast.

    Attributes:
        rollout: without its traces, which would fill the memory.
        answers: that it showed to its drift.
        expected: of other pictures, from leaving each one out (`expected_psnr`); empty of a single picture.
        quality: of these.
    """

    computed: np.ndarray
    forecast: Forecast
    origin: str
    rollout: Rollout
    answers: Measured | None
    expected: tuple[float, ...]
    quality: float

    @property
    def point(self) -> Point:
        likely = summarise(self.expected or self.rollout.psnr)
        made_by: dict[str, Any] = {
            "method": "layercache",
            "origin": self.origin,
            "forecast": self.forecast.name,
        }
        if math.isfinite(likely.mean + likely.quantile10):
            made_by[EXPECTED_PSNR] = [likely.mean, likely.quantile10]
        schedule = replace(self.rollout.schedule, made_by={**self.rollout.schedule.made_by, **made_by})
        return Point(schedule, f"{self.origin}, {self.forecast.name}", self.rollout.psnr, expected=self.expected)


class WholeStepSearch:
    """Searches schedules of whole steps on the full runs of a few pictures.

    Budgets are taken upward, so that the cheapest runs measure how the model answers drift (`Answers`). Of every
    budget the surrogate's best path with other models' answers is run first, or with the model's own, however the path
    begins, where these have been measured and fewer than `FREELY` runs leave no later one to begin so. Up to `LOW`,
    with runs enough, follows the path of least velocity deviations; then the surrogate's best that differs from those
    run, with the answers measured so far; at last, with runs enough, the best of them with the other weighting of
    pictures.

    Args:
        rollouts: the pictures, and their full runs.
        seconds: of computing all blocks once, for the schedules.
        seed: of the order in which exchanges are tried in the surrogate.
        terms: velocities that a forecast combines.
        tail: weight of the 10 % quantile beside the mean.
        answers: to drift, that are taken for the model's own until it has shown some; by default those that other
            models have shown, where noise levels are those of flow matching.
        others: full runs of further pictures, which are simulated as those of the rollouts run, and count as much. They
            need ``answers``, or noise levels of flow matching.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        seconds: float = 1.0,
        seed: int = 0,
        terms: int = TERMS,
        tail: float = TAIL,
        answers: Answers | None = None,
        others: FullRuns | None = None,
    ):
        self.rollouts, self.seconds, self.seed, self.tail, self.others = rollouts, seconds, seed, tail, others
        own = FullRuns.of(rollouts)
        self.full_runs = own if others is None else own.joined(others)
        self.assumed = answers or Answers.usual(rollouts.sigmas, len(self.full_runs))
        self.base = (
            Forecast("steer", terms=terms)
            if rollouts.samplers
            else Forecast("teacher", terms=terms, everywhere=False)  # what steering would take is not known
        )
        self.tried: list[Tried] = []

    def run(self, counts: Sequence[int], runs: Sequence[int]) -> Iterator[Tried]:
        """Runs so many schedules with so many computed steps each; yields every one as it is done."""
        self.prepare(min(counts))
        for count, number in sorted(zip(counts, runs, strict=True)):
            own: list[Tried] = []
            for k in range(number):
                path, forecast, origin = self.rollouts.crew.agree(self._next(count, k, number, own))
                if any(one.forecast == forecast and (one.computed == path).all() for one in own):
                    self.note_cost(count)  # there is no other path
                    continue
                own.append(self.run_path(path, forecast, origin))
                self.tried.append(own[-1])
                yield own[-1]

    def prepare(self, least: int) -> None:
        """Makes ready for paths of so many computed steps at least."""
        self.table = deviations_for(self.full_runs, least)

    def predicted(self, count: int) -> tuple[np.ndarray, tuple[float, ...]]:
        """The surrogate's best path of so many computed steps, and what other pictures are expected to have."""
        answers, forecast = self.answers, self.forecast_of(count)
        if answers is None:
            raise CalibrationError("how the model answers drift is not known before a run")
        path = self._explore(answers, forecast, count, safe_start(count, count / self.rollouts.num_steps), ())
        surrogate = surrogate_of(self.full_runs, answers, forecast)
        return path, tuple(surrogate.simulate(path[None], leave_out=len(self.full_runs) > 1)[0].tolist())

    def free_path(self, count: int) -> np.ndarray:
        """The surrogate's best path of so many computed steps, with other models' answers, however it begins.

        Where the model answers drift in its first steps more than those did, it is worse than one that computes these.
        """
        assert self.assumed is not None
        forecast = self.forecast_of(count)
        surrogate = surrogate_of(self.full_runs, self.assumed, forecast, self._stress(count, self.assumed))
        begins = [path for _, path in starts(self.table, self.rollouts.sigmas, count, 1)]
        begins += regular_paths(self.rollouts.num_steps, count)
        return np.asarray(explored(surrogate, self.full_runs, begins, 1, SIMULATIONS_FREE, self.seed, self.tail)[0])

    def _stress(self, count: int, answers: Answers) -> tuple[float, ...]:
        stress = stress_of(count / self.rollouts.num_steps)
        # the model's own answers may as well be smaller than those assumed
        return (0.5, *stress) if answers is self.assumed else stress

    def note_cost(self, count: int) -> None:
        for _ in range(count):
            self.rollouts.note_cost()

    def forecast_of(self, count: int) -> Forecast:
        """What is fitted to a path of so many computed steps."""
        return replace(self.base, weighting=weighting_of(count / self.rollouts.num_steps))

    def run_path(self, path: np.ndarray, forecast: Forecast, origin: str, more: Products | None = None) -> Tried:
        """Runs a path, ``[N]``, with its forecasts fitted on the way, also to ``more`` pictures (`Rollouts.run`)."""
        schedule = skipping(self.rollouts.fingerprint, np.flatnonzero(path).tolist(), self.seconds)
        rollout, shown = self._kept(schedule, forecast) or self._made(schedule, forecast, more)
        answers = self._answers(shown)
        expected: tuple[float, ...] = ()
        if answers is not None:
            surrogate = surrogate_of(self.full_runs, answers, forecast)
            expected = expected_psnr(surrogate, path, rollout.psnr)
        score = quality(expected or rollout.psnr, self.tail)
        return Tried(path, forecast, origin, rollout, shown, expected, score)

    def _made(self, schedule: Schedule, forecast: Forecast, more: Products | None) -> tuple[Rollout, Measured | None]:
        """A run of the schedule, without its traces, and the answers to drift that it showed."""
        rollout = self.rollouts.run(schedule, forecast, more, self._beside())
        shown = answers_of(self.rollouts, rollout)
        if self.rollouts.files is not None:
            velocities = tuple(map(rollout.schedule.velocity, range(schedule.num_steps)))
            further = rollout.schedule.further_velocities
            self.rollouts.files.add(
                KeptRun(_steps_of(schedule), forecast.name, rollout.psnr, velocities, shown, further)
            )
        return replace(rollout, traces=()), shown

    def _beside(self) -> Simulated | None:
        """The pictures that are simulated."""
        answers, own = self.answers, self.rollouts.num_pictures
        if self.others is None or answers is None:
            return None
        return Simulated(self.others, Answers(answers.kappa[own:], answers.eta[own:]))

    def _kept(self, schedule: Schedule, forecast: Forecast) -> tuple[Rollout, Measured | None] | None:
        """What the same run gave in a search that was stopped."""
        steps = _steps_of(schedule)
        kept = self.rollouts.files and self.rollouts.files.run(steps, forecast.name)
        if not kept:
            return None
        self.note_cost(len(steps))
        fitted = replace(schedule, velocities=kept.velocities, further_velocities=kept.further)
        return Rollout(fitted, kept.psnr), kept.answers

    @property
    def answers(self) -> Answers | None:
        """To drift, of all runs so far, those that are assumed counting as one; ``None`` where there are neither."""
        return self._answers() or self.assumed

    def _answers(self, *more: Measured | None) -> Answers | None:
        """To drift, of all runs so far and these; ``None`` where none has shown any."""
        shown = [one for one in (*(one.answers for one in self.tried), *more) if one is not None]
        simulated = len(self.full_runs) - self.rollouts.num_pictures
        if simulated:  # what the others have shown in the middle
            middle = [[np.tile(np.median(v, axis=0), (simulated, 1)) for v in one] for one in shown]
            pairs = zip(shown, middle, strict=True)
            shown = [(np.concatenate([k, a]), np.concatenate([e, b])) for (k, e), (a, b) in pairs]
        if shown and self.assumed is not None:
            shown.append((self.assumed.kappa, np.log(self.assumed.eta)))
        return Answers.of(shown)

    def _next(self, count: int, k: int, number: int, own: Sequence[Tried]) -> tuple[np.ndarray, Forecast, str]:
        """The path to run next, its forecast, and how it was found."""
        share = count / self.rollouts.num_steps
        forecast = self.forecast_of(count)
        if k == number - 1 and number > (2 if share <= LOW else 3):
            best = max(own, key=lambda one: one.quality)
            if best.forecast.weighting == forecast.weighting:
                return best.computed, replace(forecast, weighting=sum(WEIGHTINGS) - forecast.weighting), best.origin
            return best.computed, forecast, best.origin
        dense = dense_starts(count, share)
        is_known = share > LOW and number < FREELY and self._answers() is not None
        answers = self.assumed if k == 0 and self.assumed is not None and not is_known else self.answers
        if answers is None or (k == 1 and share <= LOW and number > 3):
            for name, path in starts(self.table, self.rollouts.sigmas, count, dense[0]):
                if not any((path == one.computed).all() for one in own):
                    return path, forecast, f"whole steps, {name}"
        if answers is None:
            return own[0].computed, forecast, own[0].origin  # there is no other path
        begin = safe_start(count, share) if answers is self.assumed else dense[k % len(dense)]
        found = self._explore(answers, forecast, count, begin, own)
        return found, forecast, "whole steps, surrogate"

    def _explore(
        self, answers: Answers, forecast: Forecast, count: int, dense: int, own: Sequence[Tried]
    ) -> np.ndarray:
        """The surrogate's best path that differs from those of this budget that were run."""
        surrogate = surrogate_of(self.full_runs, answers, forecast, self._stress(count, answers))
        begins = [path for _, path in starts(self.table, self.rollouts.sigmas, count, dense)]
        begins += [one.computed for one in own if one.computed[:dense].all()]
        paths = explored(surrogate, self.full_runs, begins, dense, SIMULATIONS, self.seed, self.tail)
        for difference in (DIFFERENCE, 1):
            for path in paths:
                if all((path & ~one.computed).sum() >= difference for one in own):
                    return np.asarray(path)
        return np.asarray(paths[0])


def cost_of(counts: Sequence[int], runs: Sequence[int], num_steps: int, pictures: int) -> float:
    """Full generations that the full runs and so many runs of each budget cost."""
    return pictures * (1 + sum(n * count for n, count in zip(runs, counts, strict=True)) / num_steps)


def counts_of(budgets: Sequence[float], num_steps: int) -> list[int]:
    """Computed steps of every budget, each number once.

    Raises:
        BudgetError: a budget is less than a step.
    """
    counts = sorted({math.floor(budget * num_steps + 1e-9) for budget in budgets if budget < 1}, reverse=True)
    if not counts or counts[-1] < 1:
        least = math.ceil(100 / num_steps) / 100
        raise BudgetError(
            f"budgets of a run of {num_steps} steps lie from {least:g}, which leaves one step to compute, to below 1",
            argument="budgets",
        )
    return counts


def _steps_of(schedule: Schedule) -> tuple[int, ...]:
    """Those that are computed."""
    return tuple(step for step in range(schedule.num_steps) if not schedule.is_skipped(step))


def dense_starts(count: int, share: float) -> list[int]:
    """How many steps from the first on a path may have to compute, by the share it computes."""
    if share > MIDDLE:
        return [1, round(0.43 * count)]
    return [1, max(1, count // 3)] if share > LOW else [1]


def deviations_for(runs: FullRuns, least: int) -> np.ndarray:
    """`deviations` up to the intervals of paths of so many computed steps at least."""
    return deviations(runs, min(max(9, 2 * math.ceil(runs.num_steps / least)), runs.num_steps))


def weighting_of(share: float) -> float:
    """How pictures are weighted in the fits of paths that compute such a share of the steps."""
    return WEIGHTINGS[share > LOW]


def stress_of(share: float) -> tuple[float, ...]:
    """Factors of eta (`Answers`) with which paths that compute such a share of the steps are simulated."""
    return STRESS_LOW if share <= LOW else STRESS


def safe_start(count: int, share: float) -> int:
    """How many steps from the first on are computed where the model's own answers to drift are not known."""
    return max(1, count // 3) if share > LOW else 1
