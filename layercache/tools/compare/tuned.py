"""The methods of `layercache.methods`, each tuned to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import layercache
from layercache._utils.compat import takes_euler_steps
from layercache.errors import BudgetError, MethodError
from layercache.methods import (
    DBCache,
    DiCache,
    DPCache,
    EasyCache,
    FBCache,
    MagCache,
    MeanCache,
    ProCache,
    SmoothCache,
    SpectralCache,
    Spectrum,
    TaylorSeer,
    Uniform,
    Universal,
    dpcache,
    ertacache,
    meancache,
    procache,
)
from layercache.runtime.policy import PlannedMethod
from layercache.schedule.module_schedule import ModuleSchedule

if TYPE_CHECKING:
    from layercache.schedule.fingerprint import Fingerprint
    from layercache.tools.compare.model import CalibratedModel

MEANCACHE_GAMMAS = (1.0, 2.0, 5.0)
SPECTRUM_BLENDS = (0.5, 1.0)

Maker = Callable[["CalibratedModel", float], tuple[Any, str]]


def _layercache(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    point = model.front.choose(budget)
    return point.schedule, point.origin


def _planned(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    schedule = layercache.plan(model.profile, budget)
    return schedule, f"{len(schedule.groups)} groups, {schedule.made_by.get('solver', 'best')}"


def _meancache(form: str) -> Maker:
    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        rollouts = model.rollouts
        own = [meancache.stability_deviation([trace.taken], rollouts.sigmas) for trace in rollouts.full]
        deviation = np.stack(rollouts.crew.gather(own), axis=-1).mean(axis=-1)
        tried = []
        for gamma in MEANCACHE_GAMMAS:
            computed, spans = meancache.plan_steps(deviation, int(budget * rollouts.num_steps + 1e-9), gamma=gamma)
            schedule = MeanCache(tuple(computed), tuple(spans), form).schedule(rollouts.fingerprint)
            tried.append((rollouts.run(schedule).quality, gamma, schedule))
        _, gamma, schedule = max(tried, key=lambda entry: entry[:2])
        return schedule, f"gamma {gamma:g}"

    return make


def _dpcache(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    """As published for FLUX.1 or, with the last step, for Wan 2.1; longer ways where so few steps need them."""
    rollouts = model.rollouts
    steps, order = rollouts.num_steps, DPCache.order
    count = int(budget * steps + 1e-9)
    if count <= order:
        raise BudgetError(f"order {order} computes {order + 1} steps at the beginning, more than {budget:g} of {steps}")
    ways = max(1, count - order - 1)  # to choose, behind the first steps, where the last one is computed
    longest = max(int(dpcache.LONGEST * steps), math.ceil((steps - order) / ways))
    own = [dpcache.path_costs([trace.taken], longest=longest) for trace in rollouts.full]
    costs = np.mean(rollouts.crew.gather(own), axis=0)
    tried = []
    for last in (0, 1) if count > order + 1 else (0,):
        computed = dpcache.plan_steps(costs, count, last=last)
        schedule = DPCache(tuple(computed)).schedule(rollouts.fingerprint)
        tried.append((rollouts.run(schedule).quality, last, schedule))
    _, last, schedule = max(tried, key=lambda entry: entry[:2])
    return schedule, f"order {order}, last {last}"


def _ertacache(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    rollouts = model.rollouts
    if rollouts.samplers is None or not takes_euler_steps(model.pipeline.scheduler):
        raise MethodError("ERTACache shortens Euler steps, which the pipeline's scheduler does not take")
    own = [ertacache.reuse_statistics(trace.latents, trace.taken) for trace in rollouts.full]
    table = np.mean(rollouts.crew.gather(own), axis=0)
    tuned = by_threshold(lambda _, value: ertacache.fit(table, value).schedule(rollouts.fingerprint), 1e-3, 10.0, 12)
    return tuned(model, budget)


def _procache(taylor: bool = False) -> Maker:
    """The best, on the calibration pictures, of the candidates that compute most of what the budget allows."""

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        rollouts = model.rollouts
        steps = rollouts.num_steps
        settings: dict[str, Any] = {"order": 2, "selective": False, "warmup": max(1, round(0.06 * steps))}
        for count in range(steps, 0, -1):
            drawn = [ProCache(one, **settings if taylor else {}) for one in procache.sample_intervals(steps, count)]
            schedules = [method.schedule(rollouts.fingerprint) for method in drawn]
            schedules = [one for one in schedules if one.used <= budget + 1e-9]
            if schedules:
                best = max(schedules, key=lambda one: rollouts.run(one).quality)
                return best, f"{count} intervals"
        raise BudgetError(f"no intervals of {steps} steps keep to a budget of {budget:g}")

    return make


def _interval(build: Callable[[CalibratedModel, int], PlannedMethod]) -> Maker:
    """The shortest interval between full steps that keeps to the budget."""

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        for interval in range(1, model.fingerprint.num_steps + 1):
            plan = build(model, interval).schedule(model.fingerprint)
            if plan.used <= budget + 1e-9:
                return plan, f"interval {interval}"
        raise BudgetError(f"no interval keeps to a budget of {budget:g}")

    return make


def by_threshold(
    build: Callable[[CalibratedModel, float], Any], low: float, high: float, rounds: int = 8, setting: str = "threshold"
) -> Maker:
    """The largest share within the budget, by bisection of a setting on one calibration sample.

    Args:
        build: the plan for a value of the setting; larger values compute less.
        low, high: its range.
        rounds: plans that are tried behind the one of ``high``, each for a generation where it decides as it runs.
        setting: its name, for people.
    """

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        def share_at(value: float) -> float:
            plan = _schedule_of(model, build(model, value))
            return plan.used if isinstance(plan, (layercache.Schedule, ModuleSchedule)) else model.used_by(plan)

        least, most, best = low, high, (share_at(high), high)
        if best[0] > budget + 1e-9:
            raise BudgetError(
                f"no {setting} up to {high:g} brings it down to {budget:g}: there it computes {best[0]:.3f} still"
            )
        for _ in range(rounds):
            value = (least * most) ** 0.5
            used = share_at(value)
            if used <= budget + 1e-9:
                most = value
                best = max(best, (used, value), key=lambda one: one[0])
            else:
                least = value
        return _schedule_of(model, build(model, best[1])), f"{setting} {best[1]:.4g}"

    return make


def _schedule_of(model: CalibratedModel, plan: Any) -> Any:
    """The schedule of a method that plans ahead; other plans as they are."""
    return plan.schedule(model.fingerprint) if isinstance(plan, PlannedMethod) else plan


def tuned_by_knob(method: type) -> Maker:
    """A config class of a method, tuned by its own knob (`layercache.methods.policy.DynamicMethod.knob`)."""
    setting, low, high = method.knob  # type: ignore[attr-defined]
    return by_threshold(lambda model, value: method(**{setting: value}), low, high, setting=setting)


def _dual(model: CalibratedModel, threshold: float) -> Any:
    """Of thresholds below 1, at which every step would be reused."""
    front = max(1, min(8, model.fingerprint.num_blocks // 8))
    return DBCache(front=front, warmup=min(8, model.fingerprint.num_steps // 6), threshold=threshold)


def _spectrum(residuals: bool = False) -> Maker:
    """By the growth of windows that begin with 2 steps, as published, or with 1 where those compute too little.

    Of the two published blends the better one, on the calibration pictures.
    """

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        rollouts = model.rollouts
        prints = rollouts.fingerprint
        groups = ((0, prints.num_blocks),) if residuals else None
        method = Spectrum(growth=0.0, warmup=max(1, round(0.1 * prints.num_steps)), groups=groups)
        if method.schedule(prints).used < budget - 0.05:
            method = replace(method, window=1.0)
        tried = []
        for blend in SPECTRUM_BLENDS:
            build = partial(_grown, replace(method, blend=blend), prints)
            plan, setting = by_threshold(build, 1e-3, 100.0, 12, "growth")(model, budget)
            tried.append((rollouts.run(plan).quality, blend, plan, setting))
        _, blend, plan, setting = max(tried, key=lambda entry: entry[:2])
        return plan, f"blend {blend:g}, window {method.window:g}, {setting}"

    return make


def _grown(method: Spectrum, prints: Fingerprint, model: CalibratedModel, growth: float) -> Any:
    return replace(method, growth=growth).schedule(prints)


METHODS: dict[str, Maker] = {
    "layercache": _layercache,
    "layercache-planned": _planned,
    "meancache": _meancache("recursive"),
    "meancache-paper": _meancache("one-shot"),
    "dpcache": _dpcache,
    "ertacache": _ertacache,
    "procache": _procache(),
    "procache-taylor": _procache(taylor=True),
    "universal": lambda model, budget: (
        Universal(budget=budget).schedule(model.fingerprint),
        "full runs of other models",
    ),
    "uniform": _interval(lambda model, n: Uniform(interval=n)),
    "taylorseer": _interval(lambda model, n: TaylorSeer(interval=n)),
    "taylorseer-2": _interval(lambda model, n: TaylorSeer(interval=n, order=2)),
    "taylorseer-blocks": _interval(
        lambda model, n: TaylorSeer(interval=n, groups=tuple((k, k + 1) for k in range(model.fingerprint.num_blocks)))
    ),
    "spectrum": _spectrum(),
    "spectrum-residual": _spectrum(residuals=True),
    "smoothcache": by_threshold(lambda model, a: SmoothCache(alpha=a).schedule(model.profile), 1e-3, 3.0, 12),
    "magcache": by_threshold(
        lambda model, t: MagCache(ratios=model.magnitudes, threshold=t, max_consecutive=5, retention=0.1),
        1e-3,
        3.0,
        12,
    ),
    "fbcache": by_threshold(lambda model, t: FBCache(threshold=t), 1e-3, 3.0),
    "fbcache-1": by_threshold(lambda model, t: FBCache(threshold=t, order=1), 1e-3, 3.0),
    "dbcache": by_threshold(_dual, 1e-3, 0.999),
    "teacache": by_threshold(lambda model, t: replace(model.teacache, threshold=t), 1e-3, 10.0),
    "spectralcache": by_threshold(
        lambda model, t: SpectralCache(coefficients=model.teacache.coefficients, threshold=t), 1e-3, 10.0
    ),
    "invardiff": by_threshold(lambda model, q: model.invardiff(min(q, 1.0)), 0.05, 1.0, 6),
    "l2c": lambda model, budget: (model.router.schedule(budget=budget), "learned"),
    "dicache": by_threshold(lambda model, t: DiCache(threshold=t, retention=0.1), 1e-3, 3.0),
    "easycache": by_threshold(lambda model, t: EasyCache(threshold=t, warmup=3), 1e-3, 3.0),
}

TOGETHER = (
    *("layercache", "layercache-planned", "meancache", "meancache-paper"),
    *("spectrum", "spectrum-residual", "dpcache", "ertacache", "procache", "procache-taylor"),
)
"""Methods that all processes of a crew plan together; others are tuned by one of them."""
