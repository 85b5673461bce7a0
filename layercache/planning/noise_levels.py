"""Noise levels of one's own: how a pipeline is given them, and coordinate descent on them (ours)."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from layercache._utils.compat import call_parameters, scheduler_sigmas
from layercache.errors import ArgumentError, MethodError
from layercache.planning.front import quality
from layercache.planning.moved import check_moves, mean_velocities
from layercache.planning.rollout import PSNR_LIMIT
from layercache.planning.sampler import LinearSampler
from layercache.planning.samples import call_of, count_of
from layercache.planning.simulated import Simulated
from layercache.planning.stepper import clones
from layercache.planning.surrogate import Answers, FullRuns

MOVES = (0.5, -0.5, 0.25, -0.25, 0.1, -0.1)
"""Shares of the gap to a neighbour by which a level is moved, towards the next one or the one before."""

SWEEPS = 12
DIGITS = 6
"""Of the levels that a call is given."""

NEIGHBOURS = 4  # noise levels between which velocities are interpolated
BISECTIONS = 40
LEVEL_TOLERANCE = 1e-4
LEAST_GAP = 1e-4
"""Between two noise levels."""


class _Reached(BaseException):
    """Ends a call of the pipeline where it sets its timesteps."""


@dataclass(frozen=True, eq=False)
class GivenLevels:
    """The noise levels that a pipeline runs through, by the ``sigmas=`` of its call.

    Attributes:
        scheduler: a copy of its own.
        arguments: that the pipeline sets its timesteps with, besides ``sigmas``: what a shift depends on.
        own: the ``sigmas=`` that give the noise levels of the call as it is, N values.
    """

    scheduler: Any
    arguments: Mapping[str, Any]
    own: tuple[float, ...]

    @classmethod
    def of_sample(cls, pipe: Any, prompt: Any, call: Mapping[str, Any]) -> GivenLevels:
        """Of the call for a calibration sample, see `layercache.planning.samples.call_of`; raises as `of` does."""
        return cls.of(pipe, call_of(prompt, [0] * count_of(prompt, call), call))

    @classmethod
    def of(cls, pipe: Any, call: Mapping[str, Any]) -> GivenLevels:
        """Of a call, which is made up to where it sets its timesteps.

        Args:
            pipe: a diffusers pipeline with no cache enabled.
            call: all arguments of the call.

        Raises:
            ArgumentError: the call gives its timesteps.
            MethodError: the pipeline or its scheduler takes no noise levels, or the scheduler makes others of them.
        """
        check_takes_levels(pipe)
        if call.get("timesteps") is not None:
            raise ArgumentError(
                "noise levels are chosen here, and this call gives its timesteps; leave timesteps= out",
                argument="timesteps",
            )
        (clone,) = clones(pipe, 1)
        given = _timesteps_set_by(clone, call)
        scheduler = copy.deepcopy(clone.scheduler)  # which a call may have set up on its way
        arguments = {name: value for name, value in given.items() if name not in ("sigmas", "num_inference_steps")}
        found = cls(scheduler, arguments, ())
        scheduler.set_timesteps(**given)
        levels = scheduler_sigmas(scheduler) or ()
        sigmas = given.get("sigmas")
        check_moves([LinearSampler.of(scheduler, len(levels) - 1)], levels)
        own = found.inverse(levels) if sigmas is None else tuple(float(sigma) for sigma in sigmas)
        found = replace(found, own=own)
        found._check(levels)
        return found

    def levels(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """The N + 1 noise levels of a run that is given these N."""
        self.scheduler.set_timesteps(sigmas=list(sigmas), **self.arguments)
        return scheduler_sigmas(self.scheduler) or ()

    def inverse(self, levels: Sequence[float]) -> tuple[float, ...]:
        """What gives these N + 1 noise levels, by bisection; nothing like them where each depends on others."""
        low, high = np.zeros(len(levels) - 1), np.full(len(levels) - 1, max(1.0, *levels))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = np.asarray(self.levels(middle.tolist())[:-1]) > levels[:-1]
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return tuple(((low + high) / 2).tolist())

    def _check(self, levels: Sequence[float]) -> None:
        """Refuses where the run's own levels are not what it is given, or one that is moved stays where it is."""
        name = type(self.scheduler).__name__
        if "timesteps" in self.arguments:
            raise MethodError(
                "the noise levels of this run cannot be moved: its pipeline gives timesteps of its own beside them"
            )
        falls = all(b < a for a, b in pairwise(levels))
        again = self.levels(self.own)
        is_same = len(again) == len(levels) and np.allclose(again, levels, atol=LEVEL_TOLERANCE)
        if not (falls and is_same) or not all(map(self._is_free, range(1, len(self.own) - 1))):
            raise MethodError(
                f"the noise levels of this run cannot be moved: {name} makes others of those that it is given (Karras, "
                "exponential or beta levels, or rising ones); take FlowMatchEulerDiscreteScheduler without them"
            )

    def _is_free(self, step: int) -> bool:
        moved = list(self.own)
        moved[step] = (moved[step] + moved[step + 1]) / 2
        return abs(self.levels(moved)[step] - self.levels(self.own)[step]) > 1e-6


def check_takes_levels(pipe: Any) -> None:
    """Raises `MethodError` where a pipeline, or its scheduler, cannot be given noise levels."""
    accepted = call_parameters(pipe)
    if "strength" in accepted:
        raise MethodError(
            f"{type(pipe).__name__} begins its runs in the middle (strength=), and noise levels are moved in whole runs"
        )
    if "sigmas" not in accepted:
        raise MethodError(
            f"{type(pipe).__name__} takes no `sigmas`, so that its noise levels are its scheduler's own and cannot be "
            "moved"
        )
    scheduler: Any = getattr(pipe, "scheduler", None)
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise MethodError(
            f"{type(scheduler).__name__} cannot be given noise levels (its set_timesteps takes no `sigmas`); take "
            "FlowMatchEulerDiscreteScheduler"
        )


def _timesteps_set_by(clone: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a call sets its timesteps with; it goes no further."""
    scheduler, found = clone.scheduler, dict[str, Any]()
    original = scheduler.set_timesteps
    signature = inspect.signature(original)

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        found.update(signature.bind(*args, **kwargs).arguments)
        raise _Reached

    scheduler.__dict__["set_timesteps"] = set_timesteps
    try:
        clone(**call)
    except _Reached:
        pass
    finally:
        del scheduler.__dict__["set_timesteps"]
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return {name: value for name, value in found.items() if value is not None and name != "device"}


# --- runs between other levels, simulated ---------------------------------------------------------------------------


def moved_runs(runs: FullRuns, levels: Sequence[float]) -> FullRuns:
    """Full runs as Euler runs between other levels that pass through the same latents (`mean_velocities`)."""
    first = np.zeros((1, len(runs.sigmas)))
    first[0, 0] = 1.0
    rows = np.concatenate([first, mean_velocities(runs.sigmas, levels)])
    samplers = (LinearSampler.euler(levels),) * len(runs)
    return replace(runs, sigmas=tuple(levels), vectors=rows @ runs.vectors, samplers=samplers)


def interpolation(nodes: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Weights of cubic interpolation from falling nodes, ``[L, G]``; levels outside take the nearest node."""
    found = np.zeros((len(levels), len(nodes)))
    count = min(NEIGHBOURS, len(nodes))
    for row, level in zip(found, np.clip(levels, nodes[-1], nodes[0]), strict=True):
        before = int(np.searchsorted(-nodes, -level)) - count // 2
        lo = min(max(before, 0), len(nodes) - count)
        near = nodes[lo : lo + count]
        for k, node in enumerate(near):
            others = np.delete(near, k)
            row[lo + k] = np.prod((level - others) / (node - others))
    return found


def simulated(runs: FullRuns, answers: Answers, levels: Sequence[float]) -> np.ndarray:
    """PSNR in dB, of the last latents, of runs of full steps between other levels, simulated, per picture, ``[P]``.

    The model gives the full run's velocity at a level, interpolated, and its answer to the drift from the polygon.

    Args:
        runs: full runs, of Euler steps.
        answers: at their levels, to drift.
        levels: falling, from the first of the full runs' to their last, any number.
    """
    nodes, at = np.asarray(runs.sigmas[:-1], float), np.asarray(levels[:-1], float)
    kappa, eta = (np.stack([np.interp(-at, -nodes, row) for row in one]) for one in (answers.kappa, answers.eta))
    given = np.einsum("ln,pnr->plr", interpolation(nodes, at), runs.vectors[:, 1:])
    run = Simulated(moved_runs(runs, levels), Answers(kappa, eta), given)
    for step in range(len(at)):
        run.compute(step)
        run.take(step, None)
    missed = ((run.latents - run.full) ** 2).sum(axis=1)
    return np.asarray(-10 * np.log10(np.maximum(missed, 10 ** (-PSNR_LIMIT / 10))))


def are_between(levels: Sequence[float], sigmas: Sequence[float]) -> bool:
    """Whether levels fall from the first of a full run's to its last, with a gap between each two."""
    ends = np.allclose([levels[0], levels[-1]], [sigmas[0], sigmas[-1]], atol=LEVEL_TOLERANCE)
    return bool(ends) and all(a - b > LEAST_GAP for a, b in pairwise(levels))


# --- coordinate descent --------------------------------------------------------------------------------------------


def best_levels(
    runs: FullRuns,
    answers: Answers,
    levels_of: Callable[[Sequence[float]], Sequence[float]],
    begin: Sequence[float],
    tail: float,
) -> tuple[float, ...]:
    """What gives the noise levels of full steps whose simulated runs end nearest to the full runs.

    Args:
        runs, answers: see `simulated`.
        levels_of: noise levels, and the last one, of what is moved, as a call is given it.
        begin: to begin with.
        tail: weight of the 10 % quantile of the PSNR beside its mean.
    """

    def score(sigmas: Sequence[float]) -> float:
        levels = levels_of(sigmas)
        if not are_between(levels, runs.sigmas):
            return float("-inf")
        return quality(simulated(runs, answers, levels).tolist(), tail)

    return descend(begin, score)


def descend(
    sigmas: Sequence[float],
    score: Callable[[Sequence[float]], float],
    moves: Sequence[float] = MOVES,
    tries: int | None = None,
) -> tuple[float, ...]:
    """Moves one level after the other as long as the score rises.

    Args:
        sigmas: falling levels to begin with, as a call is given them; the first one stays.
        score: of levels; minus infinity where they cannot be.
        moves: shares of the gap to a neighbour, the next one where they are above 0.
        tries: scores that may be asked for at most, the first one's included.
    """
    found = [round(float(sigma), DIGITS) for sigma in sigmas]
    best, left = score(found), (tries or SWEEPS * len(found) * len(moves) + 1) - 1
    for _ in range(SWEEPS):
        before = best
        for step, share in itertools.product(range(1, len(found)), moves):
            if left <= 0:
                return tuple(found)
            ends = [*found, 0.0]
            other = ends[step + 1] if share > 0 else ends[step - 1]
            moved = list(found)
            moved[step] = round(found[step] + abs(share) * (other - found[step]), DIGITS)
            value, left = score(moved), left - 1
            if value > best:
                found, best = moved, value
        if not best > before:
            break
    return tuple(found)
