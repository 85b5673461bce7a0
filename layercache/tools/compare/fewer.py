"""Fewer steps instead of a cache: as many full steps as a budget allows, the baseline of every method.

Source: docs/methods.md, Fewer steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layercache.errors import BudgetError, MethodError
from layercache.planning.front import quality
from layercache.planning.moved import given_call
from layercache.planning.noise_levels import GivenLevels, are_between, best_levels, descend
from layercache.planning.rollout import Rollouts
from layercache.planning.search import EFFORTS
from layercache.planning.surrogate import Answers, FullRuns
from layercache.planning.whole_steps import TAIL
from layercache.schedule.schedule import Schedule

if TYPE_CHECKING:
    from layercache.tools.compare.model import CalibratedModel

RUN_MOVES = (0.25, -0.25)
"""Shares of a gap by which a level is moved where every try is a run of the model."""


@dataclass(frozen=True)
class CallArguments:
    """A plan that is no cache: other arguments of the pipeline's call, such as fewer steps.

    Attributes:
        arguments: take the place of those of the full run's calls.
    """

    arguments: Mapping[str, Any]


def full_steps(pipe: Any, call: dict[str, Any], budget: float) -> int:
    """As many steps as a budget allows of those of the call.

    Raises:
        BudgetError: it allows none.
        MethodError: the call does not say how many steps it takes, or which.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    given = [name for name in ("sigmas", "timesteps") if call.get(name) is not None]
    if given:
        raise MethodError(
            f"the call gives its own {given[0]}, of which nobody knows what fewer would be; compare without {given[0]}="
        )
    parameter = accepted.get("num_inference_steps")
    steps = call.get("num_inference_steps", None if parameter is None else parameter.default)
    if parameter is None or not isinstance(steps, int):
        raise MethodError(
            f"{type(pipe).__name__} takes no num_inference_steps, or the call does not give it, so that nothing says "
            "how many steps a budget allows"
        )
    count = math.floor(budget * steps + 1e-9)
    if count < 1:
        raise BudgetError(f"a budget of {budget:g} is less than one of {steps} steps")
    return count


def fewer_steps(model: CalibratedModel, budget: float) -> tuple[CallArguments, str]:
    """The call with fewer steps of the sampler's own, and what was set.

    Raises:
        BudgetError, MethodError: as for `full_steps`.
    """
    count = full_steps(model.pipeline, dict(model.call), budget)
    return CallArguments({"num_inference_steps": count}), _named(count)


def fewer_steps_sigmas(model: CalibratedModel, budget: float) -> tuple[CallArguments, str]:
    """The call with as many steps at noise levels that come near to the full run's end, and what was set.

    Raises:
        ArgumentError, BudgetError, MethodError: as for `full_steps`, `GivenLevels.of` and `Rollouts.moved`.
    """
    count = full_steps(model.pipeline, dict(model.call), budget)
    first, call = model.prompts[0], dict(model.call)
    whole = GivenLevels.of_sample(model.pipeline, first, call)
    own = GivenLevels.of_sample(model.pipeline, first, {**call, "num_inference_steps": count})
    begin = (whole.own[0], *own.own[1:])
    search = LevelSearch(model.rollouts, own, EFFORTS[model.effort] / len(set(model.budgets)))
    found = search.found(begin)
    levels = " ".join(f"{sigma:.4g}" for sigma in found)
    return CallArguments(given_call(model.pipeline, found)), f"{_named(count)}, sigmas {levels}"


def _named(count: int) -> str:
    return f"{count} full step" + ("s" if count > 1 else "")


class LevelSearch:
    """Noise levels of a run of fewer steps without a cache, on calibration samples.

    Coordinate descent on simulated runs first; then on runs of the model, for as many full generations as the search of
    schedules may cost for each budget. Runs are compared with the full run's pictures.

    Args:
        rollouts: the samples, and their full runs.
        given: how the pipeline is given noise levels.
        generations: that may be run, of all pictures.

    Raises:
        MethodError: the noise levels are not those of flow matching.
    """

    def __init__(self, rollouts: Rollouts, given: GivenLevels, generations: float):
        self.rollouts, self.given, self.generations = rollouts, given, generations
        answers = Answers.usual(rollouts.sigmas, rollouts.num_pictures)
        if answers is None:
            raise MethodError(
                "noise levels are moved where they are those of flow matching, from 1 to 0, and this run begins with "
                f"{rollouts.sigmas[0]:.3g}"
            )
        self.answers = answers
        self._ran: dict[tuple[float, ...], float] = {}

    def found(self, own: Sequence[float]) -> tuple[float, ...]:
        """The best ``sigmas=``, from the sampler's own on; these where none are better."""
        share = len(own) / self.rollouts.num_steps
        tries = max(2, math.floor(self.generations / (share * self.rollouts.num_pictures)))
        rollouts = self.rollouts
        begin = best_levels(FullRuns.of(rollouts), self.answers, self.given.levels, own, TAIL)
        found = descend(
            rollouts.crew.agree(begin), self._run, moves=RUN_MOVES, tries=tries - 1
        )  # one is left for the sampler's own
        return max((tuple(own), found), key=self._run)

    def _run(self, sigmas: Sequence[float]) -> float:
        """Quality of a run of the model between levels; minus infinity where they cannot be."""
        levels, key = self.given.levels(sigmas), tuple(sigmas)
        if not are_between(levels, self.rollouts.sigmas):
            return float("-inf")
        if key not in self._ran:
            moved = self.rollouts.moved(levels, sigmas)
            self._ran[key] = quality(moved.run(Schedule.compute_all(moved.fingerprint)).psnr, TAIL)
        return self._ran[key]
