"""Our FBCache, MagCache and TaylorSeer against diffusers' own hooks on the bundled model: decisions and results."""

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import layercache
from layercache.demo.pipeline import load_demo_pipeline
from layercache.methods.fbcache import FBCache
from layercache.methods.fixed import TaylorSeer
from layercache.methods.full_runs import magnitude_ratios
from layercache.methods.magcache import MagCache
from layercache.models.registry import fingerprint_of
from support.tiny import generate, shifted_sigmas

STEPS = 14
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prints(pipe):
    return fingerprint_of(pipe.transformer, shifted_sigmas(STEPS), ("cond", "uncond"))


def peer(pipe, config, block):
    """Result and decisions of a diffusers hook: whether ``block`` ran, per call of the transformer."""
    ran = []
    module = pipe.transformer.transformer_blocks[block].attn
    hooks = [
        pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(False)),
        module.register_forward_pre_hook(lambda *_: ran.__setitem__(-1, True)),
    ]
    pipe.transformer.enable_cache(config)
    try:
        result = generate(pipe, steps=STEPS)
    finally:
        pipe.transformer.disable_cache()
        for hook in hooks:
            hook.remove()
    return result, {"cond": tuple(ran[0::2]), "uncond": tuple(ran[1::2])}


def decided(schedule, group):
    return {
        name: tuple(row[group] is None for row in schedule.cells_of(name)) for name in schedule.fingerprint.branches
    }


class FullSize(TorchDispatchMode):
    """Operators that read or write a tensor as large as the image stream, per call of the transformer."""

    def __init__(self, size):
        super().__init__()
        self.size, self.calls, self.ours = size, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in function._schema.returns]
        is_view = any(info is not None and not info.is_write for info in aliases)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if not is_view and "empty" not in str(function) and any(t.numel() >= self.size for t in tensors) and self.calls:
            self.calls[-1] += 1
            self.ours[-1] += function.namespace == "layercache"
        return result


def full_size_counts(pipe):
    config = pipe.transformer.config
    mode = FullSize(64 * config.num_attention_heads * config.attention_head_dim)

    def begin(*_):
        mode.calls.append(0)
        mode.ours.append(0)

    hook = pipe.transformer.register_forward_pre_hook(begin, prepend=True)
    try:
        with mode:
            generate(pipe, prompts=["cat"], steps=STEPS)
    finally:
        hook.remove()
    return mode.calls, mode.ours


def test_a_cached_step_of_fbcache_takes_two_full_size_operators_instead_of_seven(pipe):
    with layercache.enabled(pipe, FBCache(threshold=0.35)) as cache:
        calls, ours = full_size_counts(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.35))
    try:
        theirs, _ = full_size_counts(pipe)
    finally:
        pipe.transformer.disable_cache()
    cached = [2 * step for step, computed in enumerate(cache.decisions["cond"]) if not computed]
    assert cached
    for call in cached:
        of_the_model = calls[call] - ours[call]
        assert ours[call] == 2 and theirs[call] - of_the_model == 7


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.35])
def test_fbcache(pipe, threshold):
    theirs, decisions = peer(pipe, FirstBlockCacheConfig(threshold=threshold), 1)
    with layercache.enabled(pipe, FBCache(threshold=threshold)) as cache:
        ours = generate(pipe, steps=STEPS)
    assert cache.decisions == decisions
    assert {True, False} == set(decisions["cond"])
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("threshold, longest, retention", [(0.06, 3, 0.2), (0.24, 5, 0.1)])
def test_magcache(pipe, threshold, longest, retention):
    call = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    ratios = magnitude_ratios(pipe, "cat", **call)["cond"]
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=longest,
        retention_ratio=retention,
        num_inference_steps=STEPS,
        mag_ratios=list(ratios),
    )
    theirs, decisions = peer(pipe, config, 1)
    schedule = MagCache(ratios=ratios, threshold=threshold, max_consecutive=longest, retention=retention).schedule(
        prints(pipe)
    )
    assert decided(schedule, 0) == decisions
    assert {True, False} == set(decisions["cond"])
    with layercache.enabled(pipe, schedule):
        ours = generate(pipe, steps=STEPS)
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("interval, order", [(3, 1), (2, 2), (5, 1)])
def test_taylorseer(pipe, interval, order):
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=3,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )
    theirs, decisions = peer(pipe, config, 0)
    schedule = TaylorSeer(interval=interval, order=order).schedule(prints(pipe))
    assert decided(schedule, 0) == decisions
    assert {True, False} == set(decisions["cond"])
    with layercache.enabled(pipe, schedule):
        ours = generate(pipe, steps=STEPS)
    assert (ours - theirs).abs().max() <= TOLERANCE * ours.abs().max().clamp(min=1)
