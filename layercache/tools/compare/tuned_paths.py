"""Methods that plan which steps are computed (Spectrum, DPCache, ERTACache, ProCache), each tuned to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from layercache._utils.compat import takes_euler_steps
from layercache.errors import BudgetError, MethodError
from layercache.methods import DPCache, ProCache, Spectrum, dpcache, ertacache, procache
from layercache.planning.front import quality
from layercache.planning.rollout import Rollouts
from layercache.planning.whole_steps import TAIL
from layercache.schedule.schedule import Schedule
from layercache.tools.compare.tuning import FIRST_SHARES, LAST_SHARES, Maker, by_threshold

if TYPE_CHECKING:
    from layercache.tools.compare.model import CalibratedModel

SPECTRUM_BLENDS = (0.5, 1.0)
SPECTRUM_WARMUP = 0.1  # 5 of 50 steps
NEAR = 0.05  # of the budget: a share that windows of 2 steps may fall short by before they begin with 1


def tuned_spectrum(residuals: bool = False) -> Maker:
    """By the growth of windows that begin with 2 steps, as published, or with 1 where those compute too little.

    Of the two published blends the better one, on the calibration pictures.

    Args:
        residuals: those of all blocks are forecast instead of velocities.
    """

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        prints = model.fingerprint
        groups = ((0, prints.num_blocks),) if residuals else None
        method = Spectrum(growth=0.0, warmup=max(1, round(SPECTRUM_WARMUP * prints.num_steps)), groups=groups)
        if method.schedule(prints).used < budget - NEAR:
            method = replace(method, window=1.0)
        tried = []
        for blend in SPECTRUM_BLENDS:
            own = replace(method, blend=blend)
            plan, setting = by_threshold(_growing(own), 1e-3, 100.0, 12, "growth")(model, budget)
            tried.append((model.quality_of(plan), blend, plan, setting))
        _, blend, plan, setting = max(tried, key=lambda one: one[:2])
        return plan, f"blend {blend:g}, window {method.window:g}, {setting}"

    return make


def _growing(method: Spectrum) -> Callable[[CalibratedModel, float], Spectrum]:
    return lambda model, growth: replace(method, growth=growth)


def tuned_dpcache(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    """With the steps at both ends that are best; with longer ways from step to step where so few steps need them."""
    rollouts = model.rollouts
    steps, order = rollouts.num_steps, DPCache.order
    count = int(budget * steps + 1e-9)
    if count <= order:
        raise BudgetError(f"order {order} computes {order + 1} steps at the beginning, more than {budget:g} of {steps}")
    ways = max(1, count - order - 1)  # to choose, behind the first steps, where the last one is computed
    longest = max(int(dpcache.LONGEST * steps), math.ceil((steps - order) / ways))
    own = [dpcache.path_costs([trace.taken], longest=longest) for trace in rollouts.full]
    costs = np.mean(rollouts.crew.gather(own), axis=0)

    def planned(first: int, last: int) -> tuple[Schedule, str]:
        computed = dpcache.plan_steps(costs, count, first, last)
        return DPCache(tuple(computed)).schedule(rollouts.fingerprint), f"order {order}"

    return _best_ends(rollouts, planned, order + 1)


def tuned_ertacache(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    """By its threshold, with the steps at both ends that are best, between the run's own noise levels."""
    rollouts = model.rollouts
    if rollouts.samplers is None or not takes_euler_steps(model.pipeline.scheduler):
        raise MethodError(
            "ERTACache extends velocities along Euler steps, which the pipeline's scheduler does not take"
        )
    own = [ertacache.reuse_statistics(trace.latents, trace.taken) for trace in rollouts.full]
    table = np.mean(rollouts.crew.gather(own), axis=0)

    def planned(first: int, last: int) -> tuple[Schedule, str]:
        def build(_: CalibratedModel, threshold: float) -> Schedule:
            return ertacache.fit(table, threshold, first, last).schedule(rollouts.fingerprint)

        return by_threshold(build, 1e-3, 10.0, 12, has_ends=False)(model, budget)

    return _best_ends(rollouts, planned, 1)


def _best_ends(
    rollouts: Rollouts, planned: Callable[[int, int], tuple[Schedule, str]], least: int
) -> tuple[Schedule, str]:
    """The best of plans with other first steps, then of those with other last steps besides (as in `by_threshold`).

    Args:
        planned: the plan with so many first and last steps computed.
        least: first steps that are computed in any case.
    """
    tried: list[tuple[float, int, int, Schedule, str]] = []
    refused: list[BudgetError] = []

    def attempt(first: int, last: int) -> None:
        try:
            plan, text = planned(first, last)
        except BudgetError as error:
            refused.append(error)
        else:
            score = quality(rollouts.run(plan).psnr, TAIL)
            tried.append((score, first, last, plan, f"{text}, first {first}, last {last}"))

    for first in sorted({max(least, count) for count in _counts(FIRST_SHARES, rollouts.num_steps)}):
        attempt(first, 0)
    begin = max(tried, key=lambda one: one[0])[1] if tried else least
    for last in sorted({1, *_counts(LAST_SHARES, rollouts.num_steps)} - {0}):
        attempt(begin, last)
    if not tried:
        raise refused[0]
    best = max(tried, key=lambda one: one[0])
    return best[3], best[4]


def _counts(shares: tuple[float, ...], steps: int) -> Iterator[int]:
    return (round(share * steps) for share in shares)


def tuned_procache(taylor: bool = False) -> Maker:
    """The best, on the calibration pictures, of the candidates that compute most of what the budget allows.

    Args:
        taylor: the form for FLUX.1, without deep blocks.
    """

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        steps = model.fingerprint.num_steps
        form: dict[str, Any] = {"order": 2, "selective": False} if taylor else {}
        tried: list[tuple[float, int, int, Schedule, str]] = []

        def attempt(warmup: int, cooldown: int) -> None:
            for plan, count in _candidates(model, budget, {**form, "warmup": warmup, "cooldown": cooldown}):
                text = f"{count} intervals, warmup {warmup}, cooldown {cooldown}"
                tried.append((model.quality_of(plan), warmup, cooldown, plan, text))

        for warmup in sorted({max(1, count) for count in _counts(FIRST_SHARES, steps)}):
            attempt(warmup, 0)
        begin = max(tried, key=lambda one: one[0])[1] if tried else 1
        for cooldown in sorted(set(_counts(LAST_SHARES, steps)) - {0}):
            attempt(begin, cooldown)
        if not tried:
            raise BudgetError(f"no intervals of {steps} steps keep to a budget of {budget:g}")
        return max(tried, key=lambda one: one[0])[3:]

    return make


def _candidates(model: CalibratedModel, budget: float, settings: dict[str, Any]) -> list[tuple[Schedule, int]]:
    """With as many intervals as keep to the budget; their number."""
    steps = model.fingerprint.num_steps
    for count in range(steps, 0, -1):
        drawn = [ProCache(one, **settings) for one in procache.sample_intervals(steps, count)]
        plans = [method.schedule(model.fingerprint) for method in drawn]
        kept = [(plan, count) for plan in plans if plan.used <= budget + 1e-9]
        if kept:
            return kept
    return []
