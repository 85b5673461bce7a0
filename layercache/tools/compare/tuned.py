"""The methods of `layercache.methods`, each tuned to a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

import layercache
from layercache.errors import BudgetError
from layercache.methods import (
    CacheQuant,
    DBCache,
    DiCache,
    EasyCache,
    FasterCache,
    FBCache,
    InvarDiff,
    MagCache,
    MeanCache,
    PreciseCache,
    SeaCache,
    SenCache,
    SmoothCache,
    SpectralCache,
    TaylorSeer,
    Uniform,
    Universal,
    meancache,
)
from layercache.models.registry import find_transformer, spec_for
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.tools.compare.fewer import fewer_steps, fewer_steps_sigmas
from layercache.tools.compare.tuned_paths import tuned_dpcache, tuned_ertacache, tuned_procache, tuned_spectrum
from layercache.tools.compare.tuning import Build, Maker, by_interval, by_threshold

if TYPE_CHECKING:
    from layercache.tools.compare.model import CalibratedModel

MEANCACHE_GAMMAS = (1.0, 2.0, 5.0)
SENCACHE_LONGEST = 10  # as many in a row as its code allows at most


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


def _learned(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    router = model.router(budget)
    return router.schedule(budget=budget), f"learned, period {router.period}"


def _dual(model: CalibratedModel, threshold: float) -> Any:
    """Of thresholds below 1, at which every step would be reused."""
    front = max(1, min(8, model.fingerprint.num_blocks // 8))
    return DBCache(front=front, warmup=min(8, model.fingerprint.num_steps // 6), threshold=threshold)


def _seacache(order: int) -> Build:
    """On the modulated input, where the model shows it."""

    def build(model: CalibratedModel, threshold: float) -> Any:
        shown = spec_for(find_transformer(model.pipeline)).modulation is not None
        return SeaCache(threshold=threshold, order=order, indicator="modulated" if shown else "latents")

    return build


def _sencache(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    """With both thresholds in the paper's proportion, and the fewest skips in a row that allow the budget."""
    for longest in range(2, SENCACHE_LONGEST + 1):

        def build(model: CalibratedModel, threshold: float, longest: int = longest) -> Any:
            early, rows = threshold / 10, model.sensitivities
            return SenCache(threshold=threshold, early_threshold=early, max_consecutive=longest, sensitivities=rows)

        try:
            plan, setting = by_threshold(build, 1e-4, 100.0)(model, budget)
        except BudgetError:
            continue
        return plan, f"{setting}, {longest} in a row"
    raise BudgetError(f"no threshold brings it down to {budget:g} with up to {SENCACHE_LONGEST} skips in a row")


def _fastercache(model: CalibratedModel, share: float) -> ModuleSchedule:
    """From this share before the end on; measured seconds of the modules say what it computes."""
    rates = model.rates
    return FasterCache(start=1.0 - share).module_schedule(model.fingerprint, rates.units, rates.seconds)


METHODS: dict[str, Maker] = {
    "layercache": _layercache,
    "layercache-planned": _planned,
    "meancache": _meancache("recursive"),
    "meancache-paper": _meancache("one-shot"),
    "dpcache": tuned_dpcache,
    "ertacache": tuned_ertacache,
    "procache": tuned_procache(),
    "procache-taylor": tuned_procache(taylor=True),
    "universal": lambda model, budget: (
        Universal(budget=budget).schedule(model.fingerprint),
        "full runs of other models",
    ),
    "uniform": by_interval(lambda model, n: Uniform(interval=n)),
    "taylorseer": by_interval(lambda model, n: TaylorSeer(interval=n)),
    "taylorseer-2": by_interval(lambda model, n: TaylorSeer(interval=n, order=2)),
    "taylorseer-blocks": by_interval(
        lambda model, n: TaylorSeer(interval=n, groups=tuple((k, k + 1) for k in range(model.fingerprint.num_blocks)))
    ),
    "spectrum": tuned_spectrum(),
    "spectrum-residual": tuned_spectrum(residuals=True),
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
    "seacache": by_threshold(_seacache(0), 1e-3, 10.0),
    "seacache-1": by_threshold(_seacache(1), 1e-3, 10.0),
    "sencache": _sencache,
    "precisecache": by_threshold(lambda model, a: PreciseCache(alpha=a), 1e-3, 100.0, setting="alpha"),
    "precisecache-steps": by_threshold(
        lambda model, a: PreciseCache(alpha=a, cached_blocks=0.0), 1e-3, 100.0, setting="alpha"
    ),
    "invardiff": by_threshold(lambda model, q: InvarDiff(min(q, 1.0), min(q, 1.0)), 0.05, 1.0, 6, "quantile"),
    "fastercache": by_threshold(_fastercache, 1e-2, 0.99, 12, setting="reused share of the steps"),
    "cachequant": lambda model, budget: (CacheQuant().plan(model.rollouts, budget), "as it runs"),
    "l2c": _learned,
    "dicache": by_threshold(lambda model, t: DiCache(threshold=t, retention=0.1), 1e-3, 3.0),
    "easycache": by_threshold(lambda model, t: EasyCache(threshold=t, warmup=3), 1e-3, 100.0),
    "fewer-steps": fewer_steps,
    "fewer-steps-sigmas": fewer_steps_sigmas,
}

TUNINGS = {"easycache": 1, "invardiff": 1, "procache": 1, "procache-taylor": 1}
"""How often the way in which a method is tuned, or its config with its defaults, has changed; raise it with a change.

Outcomes of an earlier way are no longer its own: a comparison that goes on in their folder runs them again.
"""

TOGETHER = (
    "layercache",
    "layercache-planned",
    "meancache",
    "meancache-paper",
    "dpcache",
    "ertacache",
    "cachequant",
    "fewer-steps-sigmas",
)
"""Methods that all processes of a crew plan together; others are tuned by one of them."""
