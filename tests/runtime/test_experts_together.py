"""Whole steps of pipelines with two transformers (Wan 2.2): one schedule over both, velocities held across the turn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import layercache
from layercache.errors import CacheStateError, LayerCacheWarning
from layercache.methods import EasyCache, Uniform
from layercache.planning.rollout import Rollouts, psnr_of, skipping
from layercache.planning.samples import pictures_in
from layercache.runtime.attachment import attachment_of
from layercache.schedule.schedule import Schedule
from support.zoo import build
from support.zoo_pipelines import _wan_two_experts, generate, make

TURN = 3  # of 8 steps; the second transformer runs from here on


@pytest.fixture
def made():
    return _wan_two_experts()


def samples_of(call):
    own = {name: value for name, value in call.items() if "embeds" in name}
    return [own, {name: 0.7 * value for name, value in own.items()}], {k: v for k, v in call.items() if k not in own}


def is_clean(pipe) -> bool:
    modules = [pipe.transformer, pipe.transformer_2]
    return all(
        attachment_of(one) is None and type(one.blocks) is nn.ModuleList and not one._forward_pre_hooks
        and not {"cache_context", "enable_cache"} & set(vars(one))
        for one in modules
    ) and "step" not in vars(pipe.scheduler)  # fmt: skip


def computed_steps(pipe, call) -> tuple[torch.Tensor, dict[str, set[int]]]:
    """A generation, and the steps at which each transformer's blocks ran."""
    seen, hooks = {}, []
    for name in ("transformer", "transformer_2"):
        steps = seen[name] = set()
        block = next(iter(getattr(pipe, name).blocks._modules.values()))
        hooks.append(block.register_forward_hook(lambda *_, steps=steps: steps.add(pipe.scheduler.step_index or 0)))
    try:
        return generate(pipe, call), seen
    finally:
        for hook in hooks:
            hook.remove()


def test_a_search_is_of_both(made):
    pipe, call = made
    call |= {"num_inference_steps": 4}
    prompts, rest = samples_of(call)
    front = layercache.search(pipe, prompts, effort="quick", budgets=(0.5,), progress=False, **rest)
    (point,) = front.points
    schedule = Schedule.from_json(point.schedule.to_json())
    assert schedule.used == 0.5 and schedule.fingerprint.settings["experts"] == ["boundary_ratio 0.6"]
    full = [generate(pipe, call | own, seed) for seed, own in enumerate(prompts)]
    for plan in (schedule, Schedule.compute_all(schedule.fingerprint)):
        with layercache.enabled(pipe, plan) as cache:
            found = [generate(pipe, call | own, seed) for seed, own in enumerate(prompts)]
            assert cache.report().fallback_rows == 0 and cache.report().used == plan.used
        if plan is schedule:
            pairs = zip(full, found, strict=True)
            psnr = [value for a, b in pairs for value in psnr_of(pictures_in(a), pictures_in(b))]
            assert psnr == pytest.approx(point.psnr, rel=1e-4)
        else:
            assert all(map(np.array_equal, full, found))
    assert is_clean(pipe)
    refitted = layercache.refit(pipe, schedule, prompts, progress=False, **rest)
    assert refitted.psnr == pytest.approx(point.psnr, rel=1e-3)


def test_a_velocity_is_held_across_the_turn(made):
    """Steps 2 and 6 are computed; 3 and 4, of the second transformer, take the first one's velocity of step 2."""
    pipe, call = made
    prompts, rest = samples_of(call)
    schedule = skipping(Rollouts(pipe, prompts[:1], **rest).fingerprint, [0, 2, 6])
    held, step = [], pipe.scheduler.step

    def holding(velocity, *args, **kwargs):
        held.append(velocity)
        place = len(held) - 1
        return step(held[6 if place >= 6 else 2 if place >= 2 else 0], *args, **kwargs)

    pipe.scheduler.step = holding
    expected = generate(pipe, call)
    del pipe.scheduler.step
    layercache.enable(pipe, schedule)
    found, computed = computed_steps(pipe, call)
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)
    assert computed == {"transformer": {0, 2}, "transformer_2": {6}}
    assert pipe.transformer_2.is_cache_enabled
    pipe.transformer_2.disable_cache()  # one cache
    assert is_clean(pipe)


def test_methods_that_decide(made):
    """A fixed interval and EasyCache skip steps of both; what was decided is the same as a schedule."""
    pipe, call = made
    full = generate(pipe, call)
    layercache.enable(pipe, Uniform(interval=2))
    found, computed = computed_steps(pipe, call)
    assert set.union(*computed.values()) == {0, 2, 4, 6} and computed["transformer"] == {0, 2}
    layercache.disable(pipe)
    with layercache.enabled(pipe, EasyCache(threshold=5.0, warmup=1)) as cache:
        found = generate(pipe, call)
        decided, plan = cache.decisions["cond"], cache.export_schedule()
    assert not all(decided[TURN:]) and not np.array_equal(found, full)
    with layercache.enabled(pipe, plan):
        assert np.array_equal(generate(pipe, call), found)
    assert is_clean(pipe) and np.array_equal(generate(pipe, call), full)


def test_learning_from_the_first_generations(made, monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERCACHE_HOME", str(tmp_path))
    pipe, call = made
    full = generate(pipe, call, 2)
    with layercache.enabled(pipe, budget=0.5, learn=2) as cache:
        for seed in range(2):
            generate(pipe, call, seed)
        third = generate(pipe, call, 2)
        (known,) = cache.known.values()
        assert known.cache.report().used == 0.5 and not np.array_equal(third, full)
        with torch.no_grad():  # another second transformer is another model
            next(pipe.transformer_2.parameters()).flatten()[0] += 1.0
        generate(pipe, call, 2)
        assert len(cache.known) == 2
    assert is_clean(pipe)


def test_another_boundary_and_other_caches(made):
    pipe, call = made
    prompts, rest = samples_of(call)
    schedule = skipping(Rollouts(pipe, prompts[:1], **rest).fingerprint, [0, 2, 4, 6])
    pipe.register_to_config(boundary_ratio=0.8)
    with pytest.warns(LayerCacheWarning, match="boundary_ratio 0.6, not boundary_ratio 0.8"):
        layercache.enable(pipe, schedule)
    assert torch.isfinite(torch.as_tensor(generate(pipe, call))).all()
    with pytest.raises(CacheStateError, match="already enabled"):
        layercache.enable(pipe.transformer_2, Schedule.compute_all(schedule.fingerprint), pipe.scheduler)
    layercache.disable(pipe)
    layercache.enable(pipe.transformer_2, Schedule.compute_all(schedule.fingerprint), pipe.scheduler)
    with pytest.raises(CacheStateError, match="already enabled"), pytest.warns(LayerCacheWarning):
        layercache.enable(pipe, schedule)
    layercache.disable(pipe.transformer_2)
    assert is_clean(pipe)


def test_a_second_pipeline_with_another_second_transformer(made):
    """It joins the cache with its own second transformer."""
    pipe, call = made
    prompts, rest = samples_of(call)
    schedule = skipping(Rollouts(pipe, prompts[:1], **rest).fingerprint, [0, 2, 4, 6])
    other = make(
        "WanPipeline", "WanTransformer3DModel", transformer_2=build("WanTransformer3DModel", seed=2)[0],
        boundary_ratio=0.6,
    )  # fmt: skip
    other.register_modules(transformer=pipe.transformer)
    cache = layercache.enable(pipe, schedule)
    assert layercache.enable(other, schedule) is cache
    for one in (pipe, other):
        _, computed = computed_steps(one, call)
        assert computed == {"transformer": {0, 2}, "transformer_2": {4, 6}}
    layercache.disable(other)
    assert is_clean(pipe) and is_clean(other)
