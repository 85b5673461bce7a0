"""The methods of `layercache.methods`, each tuned to a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

import layercache
from layercache.errors import BudgetError
from layercache.methods import (
    DBCache,
    DiCache,
    EasyCache,
    FBCache,
    MagCache,
    MeanCache,
    SmoothCache,
    SpectralCache,
    TaylorSeer,
    Uniform,
    Universal,
    meancache,
)
from layercache.runtime.policy import PlannedMethod
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.tools.compare.fewer import fewer_steps, fewer_steps_sigmas

if TYPE_CHECKING:
    from layercache.tools.compare.model import CalibratedModel

MEANCACHE_GAMMAS = (1.0, 2.0, 5.0)

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


METHODS: dict[str, Maker] = {
    "layercache": _layercache,
    "layercache-planned": _planned,
    "meancache": _meancache("recursive"),
    "meancache-paper": _meancache("one-shot"),
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
    "fewer-steps": fewer_steps,
    "fewer-steps-sigmas": fewer_steps_sigmas,
}

TOGETHER = ("layercache", "layercache-planned", "meancache", "meancache-paper", "fewer-steps-sigmas")
"""Methods that all processes of a crew plan together; others are tuned by one of them."""
