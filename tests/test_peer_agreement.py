"""Our FBCache, MagCache and TaylorSeer against diffusers' own hooks on the bundled model: decisions and results."""

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)

import layercache
from layercache.demo.pipeline import load_demo_pipeline
from layercache.methods.fbcache import FBCache
from layercache.methods.fixed import taylorseer
from layercache.methods.magcache import build_schedule
from layercache.methods.watching import magnitude_ratios
from layercache.models import fingerprint_of
from tiny import generate, shifted_sigmas

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
    schedule = build_schedule(prints(pipe), ratios, threshold, longest, retention)
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
    schedule = taylorseer(prints(pipe), interval, order)
    assert decided(schedule, 0) == decisions
    assert {True, False} == set(decisions["cond"])
    with layercache.enabled(pipe, schedule):
        ours = generate(pipe, steps=STEPS)
    assert (ours - theirs).abs().max() <= TOLERANCE * ours.abs().max().clamp(min=1)
