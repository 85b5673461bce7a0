"""What `layercache compare` compares: every method here, and the caches of other packages that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import layercache
from layercache.errors import BudgetError, LayerCacheError, MethodError
from layercache.methods import (
    DBCache,
    DiCache,
    EasyCache,
    FBCache,
    InvarDiff,
    LearningToCache,
    MagCache,
    MeanCache,
    SmoothCache,
    SpectralCache,
    TaylorSeer,
    TeaCache,
    Uniform,
    Universal,
    installed,
    invardiff,
    l2c,
    meancache,
    teacache,
)
from layercache.methods.full_runs import generate_once, magnitude_ratios
from layercache.models.registry import spec_for
from layercache.planning.front import Front
from layercache.planning.profile import StabilityProfile
from layercache.planning.rollout import Rollouts
from layercache.runtime.policy import PlannedMethod
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.module_schedule import ModuleSchedule

MEANCACHE_GAMMAS = (1.0, 2.0, 5.0)


@dataclass
class CalibratedModel:
    """A model, and what is measured on calibration samples for the methods that need it; all of it made on demand.

    Attributes:
        pipeline: a diffusers pipeline.
        prompts, seeds: calibration samples, see `layercache.planning.rollout.Rollouts`.
        call: arguments of every call.
        budgets: shares of the block time.
        effort: of the search.
        search_files: folder of the search, so that it can go on.
        rounds: generations that Learning-to-Cache learns from.
    """

    pipeline: Any
    prompts: Sequence[Any]
    seeds: Sequence[int]
    call: Mapping[str, Any]
    budgets: Sequence[float]
    effort: str = "normal"
    search_files: Any = None
    rounds: int = 12
    _made: dict[tuple[str, float], tuple[Any, str]] = field(default_factory=dict, repr=False)

    @cached_property
    def profile(self) -> StabilityProfile:
        count = len(self.prompts[0]) if isinstance(self.prompts[0], (list, tuple)) else 1
        call = {k: v for k, v in self.call.items() if k != "output_type"}
        # one call measures; its first seed is that of its batch
        return layercache.calibrate(
            self.pipeline, self.prompts[:1], seeds=self.seeds[:count][:1], progress=False, **call
        )

    @property
    def fingerprint(self) -> Fingerprint:
        return self.profile.fingerprint

    @cached_property
    def rollouts(self) -> Rollouts:
        return Rollouts(self.pipeline, self.prompts, self.seeds, **self.call)

    @cached_property
    def front(self) -> Front:
        return layercache.search(
            self.pipeline,
            self.prompts,
            seeds=self.seeds,
            budgets=self.budgets,
            effort=self.effort,
            resume=self.search_files,
            progress=False,
            **self.call,
        )

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Mean over the branches, as the published ones: guidance amplifies what is computed for one branch alone."""
        ratios = magnitude_ratios(self.pipeline, self.prompts[0], self.seeds[0], **self._latent_call)
        return tuple(sum(values) / len(ratios) for values in zip(*ratios.values(), strict=True))

    @cached_property
    def teacache(self) -> TeaCache:
        """With the published coefficients of the model's class, else with fitted ones."""
        name = self.fingerprint.model_class
        if name in teacache.MODELS:
            return TeaCache().for_model(name)
        coefficients, _ = teacache.fit(self.pipeline, self.prompts, range(len(self.prompts)), **self._latent_call)
        return TeaCache(coefficients=coefficients)

    @cached_property
    def rates(self) -> invardiff.Rates:
        return invardiff.measure(self.pipeline, self.prompts, self._call_seeds, **self._latent_call)

    def invardiff(self, quantile: float) -> ModuleSchedule:
        """One quantile for steps and modules."""
        settings = InvarDiff(quantile, quantile)
        cached = invardiff.first_phase(self.rates, settings)
        again = invardiff.measure(self.pipeline, self.prompts, self._call_seeds, cached=cached, **self._latent_call)
        return invardiff.plan(self.rates, again, settings)

    @cached_property
    def router(self) -> l2c.LearnedRouter:
        settings = LearningToCache(rounds=self.rounds)
        return settings.train(self.pipeline, self.prompts, progress=False, **self._latent_call)

    @property
    def _call_seeds(self) -> list[int]:
        return list(self.seeds[: len(self.prompts)])

    @property
    def _latent_call(self) -> dict[str, Any]:
        return {k: v for k, v in self.call.items() if k != "output_type"}

    def made(self, name: str, budget: float) -> tuple[Any, str]:
        """A method's plan for a budget and what was set; made once, others of the same settings share it."""
        if (name, budget) not in self._made:
            self._made[name, budget] = known_methods()[name](self, budget)
        return self._made[name, budget]

    def used_by(self, plan: Any) -> float:
        """Share of the blocks that a plan computes on the first calibration sample."""
        from layercache.methods.full_runs import generate_once

        with layercache.enabled(self.pipeline, plan) as cache:
            generate_once(self.pipeline, self.prompts[0], self.seeds[0], self._latent_call)
            return float(cache.report().used)


@dataclass(frozen=True)
class Entry:
    """A method with its settings for one budget.

    Attributes:
        method: its name.
        setting: what was set, for people to read.
        budget: what it was set for.
        attach: a context manager around the generations, which gives the cache or, of another package's, ``None``.
    """

    method: str
    setting: str
    budget: float
    attach: Callable[[], AbstractContextManager[Any]] = field(repr=False)


Maker = Callable[[CalibratedModel, float], tuple[Any, str]]


def _layercache(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    point = model.front.choose(budget)
    return point.schedule, point.origin


def _planned(model: CalibratedModel, budget: float) -> tuple[Any, str]:
    schedule = layercache.plan(model.profile, budget)
    return schedule, f"{len(schedule.groups)} groups, {schedule.made_by.get('solver', 'best')}"


def _meancache(form: str) -> Maker:
    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        rollouts = model.rollouts
        deviation = meancache.stability_deviation([t.taken for t in rollouts.full], rollouts.sigmas)
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


def _threshold(build: Callable[[CalibratedModel, float], Any], low: float, high: float, rounds: int = 8) -> Maker:
    """The largest share within the budget, by bisection of the threshold on one calibration sample."""

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        least, most, best = low, high, None
        for _ in range(rounds):
            value = (least * most) ** 0.5
            plan = _schedule_of(model, build(model, value))
            used = plan.used if isinstance(plan, (layercache.Schedule, ModuleSchedule)) else model.used_by(plan)
            if used <= budget + 1e-9:
                most = value
                best = (used, value) if best is None or used > best[0] else best
            else:
                least = value
        if best is None:
            raise BudgetError(f"no threshold up to {high:g} brings it down to {budget:g}")
        return _schedule_of(model, build(model, best[1])), f"threshold {best[1]:.4g}"

    return make


def _schedule_of(model: CalibratedModel, plan: Any) -> Any:
    """The schedule of a method that plans ahead; other plans as they are."""
    return plan.schedule(model.fingerprint) if isinstance(plan, PlannedMethod) else plan


def _tuned(method: type) -> Maker:
    """A method of another package, tuned by its own knob."""
    setting, low, high = method.knob  # type: ignore[attr-defined]
    return _threshold(lambda model, value: method(**{setting: value}), low, high)


def _dual(model: CalibratedModel, threshold: float) -> Any:
    # at or above 1 every step would be reused
    front = max(1, min(8, model.fingerprint.num_blocks // 8))
    return DBCache(front=front, warmup=min(8, model.fingerprint.num_steps // 6), threshold=min(threshold, 0.999))


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
    "smoothcache": _threshold(lambda model, a: SmoothCache(alpha=a).schedule(model.profile), 1e-3, 3.0, 12),
    "magcache": _threshold(
        lambda model, t: MagCache(ratios=model.magnitudes, threshold=t, max_consecutive=5, retention=0.1),
        1e-3,
        3.0,
        12,
    ),
    "fbcache": _threshold(lambda model, t: FBCache(threshold=t), 1e-3, 3.0),
    "fbcache-1": _threshold(lambda model, t: FBCache(threshold=t, order=1), 1e-3, 3.0),
    "dbcache": _threshold(_dual, 1e-3, 1.0),
    "teacache": _threshold(lambda model, t: replace(model.teacache, threshold=t), 1e-3, 10.0),
    "spectralcache": _threshold(
        lambda model, t: SpectralCache(coefficients=model.teacache.coefficients, threshold=t), 1e-3, 10.0
    ),
    "invardiff": _threshold(lambda model, q: model.invardiff(min(q, 1.0)), 0.05, 1.0, 6),
    "l2c": lambda model, budget: (model.router.schedule(budget=budget), "learned"),
    "dicache": _threshold(lambda model, t: DiCache(threshold=t, retention=0.1), 1e-3, 3.0),
    "easycache": _threshold(lambda model, t: EasyCache(threshold=t, warmup=3), 1e-3, 3.0),
}


def known_methods() -> dict[str, Maker]:
    """Ours, and those that other packages have registered."""
    return METHODS | {name: _tuned(method) for name, method in installed().items()}


def check_methods(names: Sequence[str]) -> None:
    """Raises `MethodError` where a name is unknown, or there is none."""
    known = {**known_methods(), **PEERS}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise MethodError(
            f"unknown method {', '.join(unknown) or '(none given)'}; choose from {', '.join(known)}", argument="methods"
        )


def entries(model: CalibratedModel, names: Sequence[str]) -> Iterator[tuple[str, float, Callable[[], Entry]]]:
    """``(method, budget, make)`` of everything asked for; ``make`` plans and tunes, and may raise `LayerCacheError`.

    Raises:
        MethodError: a name is unknown.
    """
    check_methods(names)
    for name in names:
        for budget in sorted(model.budgets, reverse=True):
            yield name, budget, lambda name=name, budget=budget: _made(model, name, budget)  # type: ignore[misc]


def _made(model: CalibratedModel, name: str, budget: float) -> Entry:
    if name in PEERS:
        return PEERS[name](model, budget)
    plan, setting = model.made(name, budget)
    return Entry(name, setting, budget, lambda: layercache.enabled(model.pipeline, plan))


# --- caches of other packages, through their public interfaces ----------------------------------------------


def _diffusers(make_config: Callable[[CalibratedModel, Any], Any], ours: str) -> Callable[..., Entry]:
    """A hook of diffusers with the setting that ours was tuned to: both take the same decisions."""

    def make(model: CalibratedModel, budget: float) -> Entry:
        plan, setting = model.made(ours, budget)

        @contextmanager
        def attach() -> Iterator[None]:
            transformer = model.pipeline.transformer
            transformer.enable_cache(make_config(model, plan))
            try:
                yield None
            finally:
                transformer.disable_cache()

        return Entry(f"diffusers:{ours}", setting, budget, attach)

    return make


def _first_block(model: CalibratedModel, plan: Any) -> Any:
    from diffusers.hooks import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=plan.threshold)


def _taylor(model: CalibratedModel, plan: Any) -> Any:
    from diffusers.hooks import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(cache_interval=plan.made_by["interval"], max_order=1, use_lite_mode=True)


def _mag(model: CalibratedModel, plan: Any) -> Any:
    from diffusers.hooks import MagCacheConfig

    metadata = plan.made_by
    return MagCacheConfig(
        threshold=metadata["threshold"],
        max_skip_steps=metadata["max_consecutive"],
        retention_ratio=metadata["retention"],
        num_inference_steps=plan.num_steps,
        mag_ratios=list(model.magnitudes),
    )


def _cache_dit(taylor: bool, name: str) -> Callable[..., Entry]:
    def make(model: CalibratedModel, budget: float) -> Entry:
        if importlib.util.find_spec("cache_dit") is None:
            raise LayerCacheError("cache-dit is not installed: pip install cache-dit")
        plan, setting = model.made("dbcache", budget)
        assert isinstance(plan, DBCache)

        @contextmanager
        def attach() -> Iterator[None]:
            import cache_dit

            pipeline = model.pipeline
            adapter = cache_dit.BlockAdapter(
                pipe=pipeline,
                transformer=pipeline.transformer,
                blocks=pipeline.transformer.transformer_blocks,
                forward_pattern=cache_dit.ForwardPattern.Pattern_1,
                has_separate_cfg=len(model.fingerprint.branches) > 1,
            )
            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=plan.front,
                Bn_compute_blocks=plan.back,
                residual_diff_threshold=plan.threshold,
                max_warmup_steps=plan.warmup,
                enable_separate_cfg=len(model.fingerprint.branches) > 1,
                num_inference_steps=model.fingerprint.num_steps,
            )
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
            cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
            try:
                yield None
            finally:
                cache_dit.disable_cache(adapter)

        return Entry(name, f"F{plan.front}B0 {setting}", budget, attach)

    return make


SEACACHE_CLASSES = ("WanTransformer3DModel", "Cosmos3OmniTransformer")


def _seacache(model: CalibratedModel, budget: float) -> Entry:
    """Threshold by bisection: none of ours takes its decisions."""
    transformer = model.pipeline.transformer
    if type(transformer).__name__ not in SEACACHE_CLASSES:
        raise MethodError(f"SeaCache of diffusers covers {' and '.join(SEACACHE_CLASSES)} only")

    def entry(threshold: float) -> Entry:
        @contextmanager
        def attach() -> Iterator[None]:
            from diffusers import SeaCacheConfig

            transformer.enable_cache(SeaCacheConfig(threshold=threshold))
            try:
                yield None
            finally:
                transformer.disable_cache()

        return Entry("diffusers:seacache", f"threshold {threshold:.3g}", budget, attach)

    def used(threshold: float) -> float:
        with block_calls(transformer) as full:
            generate_once(model.pipeline, model.prompts[0], model.seeds[0], model.call)
        with entry(threshold).attach(), block_calls(transformer) as calls:
            generate_once(model.pipeline, model.prompts[0], model.seeds[0], model.call)
        return calls[0] / full[0]

    low, high = 1e-3, 4.0
    for _ in range(8):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if used(middle) <= budget else (middle, high)
    return entry(high)


@contextmanager
def block_calls(transformer: Any) -> Iterator[list[int]]:
    """Counts forwards of the attention modules of the blocks, which every cache passes by when it skips a block."""
    calls = [0]

    def count(module: Any, args: Any) -> None:
        calls[0] += 1

    hooks = [
        (getattr(block, "attn", None) or block).register_forward_pre_hook(count)
        for blocks in spec_for(transformer).block_modules(transformer)
        for block in blocks._modules.values()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


PEERS: dict[str, Callable[..., Entry]] = {
    "diffusers:fbcache": _diffusers(_first_block, "fbcache"),
    "diffusers:taylorseer": _diffusers(_taylor, "taylorseer"),
    "diffusers:magcache": _diffusers(_mag, "magcache"),
    "diffusers:seacache": _seacache,
    "cache-dit:dbcache": _cache_dit(False, "cache-dit:dbcache"),
    "cache-dit:dbcache-taylor": _cache_dit(True, "cache-dit:dbcache-taylor"),
}
