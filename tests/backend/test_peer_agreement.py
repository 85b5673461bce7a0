"""Our FBCache, MagCache and TaylorSeer against diffusers' own hooks on the bundled model: decisions and results."""

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)

import layercache
from layercache.methods.fbcache import FBCache
from layercache.methods.fixed import TaylorSeer
from layercache.methods.full_runs import magnitude_ratios
from layercache.methods.magcache import MagCache
from layercache.models.registry import fingerprint_of
from support.marks import slow
from support.peers import STEPS, TOLERANCE, full_size_counts, peer
from support.tiny import generate, shifted_sigmas


def prints(pipe):
    return fingerprint_of(pipe.transformer, shifted_sigmas(STEPS), ("cond", "uncond"))


def decided(schedule, group):
    return {
        name: tuple(row[group] is None for row in schedule.cells_of(name)) for name in schedule.fingerprint.branches
    }


@pytest.mark.slow
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


@pytest.mark.parametrize("threshold", [0.35, *slow(0.1, 0.2)])
def test_fbcache(pipe, threshold):
    theirs, decisions = peer(pipe, FirstBlockCacheConfig(threshold=threshold), 1)
    with layercache.enabled(pipe, FBCache(threshold=threshold)) as cache:
        ours = generate(pipe, steps=STEPS)
    assert cache.decisions == decisions
    assert {True, False} == set(decisions["cond"])
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize("threshold, longest, retention", [(0.24, 5, 0.1), *slow((0.06, 3, 0.2))])
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


@pytest.mark.parametrize("interval, order", [(2, 2), *slow((3, 1), (5, 1))])
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
