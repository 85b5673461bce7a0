"""Caches of other packages, through their public interfaces."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from layercache.errors import MethodError, MissingExtraError
from layercache.methods import DBCache, FBCache
from layercache.methods.full_runs import generate_once
from layercache.models.registry import spec_for
from layercache.parallel.crew import Crew
from layercache.tools.compare.model import CalibratedModel, Entry
from layercache.tools.compare.tuning import ENOUGH, Maker, largest_share, tuned_by_knob


def _diffusers(
    make_config: Callable[[CalibratedModel, Any], Any], ours: str, tune: Maker | None = None
) -> Callable[..., Entry]:
    """A hook of diffusers with the setting that ours was tuned to, or to which ``tune`` does: decisions are ours."""

    def make(model: CalibratedModel, budget: float) -> Entry:
        plan, setting = tune(model, budget) if tune else model.made(ours, budget)

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

    made_by = plan.made_by
    return TaylorSeerCacheConfig(
        cache_interval=made_by["interval"],
        disable_cache_before_step=made_by["warmup"],
        disable_cache_after_step=made_by.get("stop"),
        max_order=1,
        use_lite_mode=True,
    )


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
            raise MissingExtraError("cache-dit is not installed: pip install cache-dit")
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
            with _deciding_alone(model.crew):
                cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
                try:
                    yield None
                finally:
                    cache_dit.disable_cache(adapter)

        return Entry(name, f"F{plan.front}B0 {setting}", budget, attach)

    return make


@contextmanager
def _deciding_alone(crew: Crew) -> Iterator[None]:
    """cache-dit's decisions are those of this process while the others run other pictures.

    Wherever torch.distributed has several processes it averages what it measures over all of them, as if they ran one
    generation together: decisions would mix, and processes wait for forwards that never come.
    """
    if crew.world == 1:
        yield
        return
    from cache_dit.caching.cache_blocks.pattern_base import CachedBlocks_Pattern_Base

    def is_parallelized(blocks: Any) -> bool:
        return bool(getattr(blocks.transformer, "_is_parallelized", False))

    averaging = CachedBlocks_Pattern_Base._is_parallelized
    CachedBlocks_Pattern_Base._is_parallelized = is_parallelized
    try:
        yield
    finally:
        CachedBlocks_Pattern_Base._is_parallelized = averaging


SEACACHE_CLASSES = ("WanTransformer3DModel", "Cosmos3OmniTransformer")


def _seacache(model: CalibratedModel, budget: float) -> Entry:
    """Threshold by bisection; `SeaCache(indicator="latents", order=1, max_consecutive=2)` decides as it does."""
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

    near = budget - ENOUGH / model.fingerprint.num_steps
    return entry(largest_share(used, (near, budget), 1e-3, 4.0, 8, "threshold"))


@contextmanager
def block_calls(transformer: Any) -> Iterator[list[int]]:
    """Counts forwards of the attention modules of the blocks, which every cache passes by when it skips a block."""
    calls = [0]

    def count(module: Any, args: Any) -> None:
        calls[0] += 1

    hooks = [
        _attention_of(block).register_forward_pre_hook(count)
        for blocks in spec_for(transformer).block_modules(transformer)
        for block in blocks._modules.values()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _attention_of(block: torch.nn.Module) -> torch.nn.Module:
    """The first attention in a block: caches replace the block's own forward, which is called all the same."""
    return next((module for name, module in block.named_modules() if "att" in name.rpartition(".")[2]), block)


PEERS: dict[str, Callable[..., Entry]] = {
    "diffusers:fbcache": _diffusers(_first_block, "fbcache", tuned_by_knob(FBCache, has_ends=False)),
    "diffusers:taylorseer": _diffusers(_taylor, "taylorseer"),
    "diffusers:magcache": _diffusers(_mag, "magcache"),
    "diffusers:seacache": _seacache,
    "cache-dit:dbcache": _cache_dit(False, "cache-dit:dbcache"),
    "cache-dit:dbcache-taylor": _cache_dit(True, "cache-dit:dbcache-taylor"),
}
