"""Generations that end in any way: the next one is that of a cache enabled afresh."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.errors import LayerCacheWarning, ScheduleMismatchError
from layercache.methods.dicache import DiCache
from layercache.methods.easycache import EasyCache
from layercache.methods.fbcache import FBCache
from layercache.methods.teacache import TeaCache
from layercache.runtime import attachment, conditioning, identity, loop
from layercache.runtime.signature import Signature
from support.forwards import call, schedule
from support.tiny import generate, mixed_cells, schedule_for, tiny_pipeline
from support.zoo import build

FIRST_BLOCK = FBCache(threshold=1e9, warmup=1)


@pytest.fixture
def pipe():
    return tiny_pipeline()


class Stopped(Exception):
    pass


def stop_at_four(pipe, step, timestep, values):
    if step == 4:
        raise Stopped
    return values


def plan_of(pipe, kind):
    return schedule_for(pipe, mixed_cells()) if kind == "schedule" else kind


@pytest.mark.parametrize("kind", ["schedule", FIRST_BLOCK, EasyCache(threshold=1e9, warmup=2)], ids=str)
def test_a_scheduler_replaced_after_a_stopped_run(pipe, kind):
    def replaced(pipe):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

    plan = plan_of(pipe, kind)
    with layercache.enabled(pipe, plan) as cache:
        expected, reused = generate(pipe), cache.report().cached_cells
    with layercache.enabled(pipe, plan) as cache:
        with pytest.raises(Stopped):
            generate(pipe, callback_on_step_end=stop_at_four)
        before = cache.report().cached_cells
        replaced(pipe)
        assert torch.equal(generate(pipe), expected) and cache.report().cached_cells == before + reused
        assert cache.report().source == "scheduler"


@pytest.mark.parametrize("method", [DiCache(threshold=1e9), FIRST_BLOCK, EasyCache(threshold=1e9, warmup=2)], ids=str)
def test_a_run_that_begins_in_the_middle_decides_alone(method):
    """Img2img behind txt2img on one scheduler: noise levels, number of steps and decisions are its own."""
    model, inputs = build("FluxTransformer2DModel")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def loop(steps, begin=0):
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(begin)
        latents = inputs["hidden_states"]
        for now in scheduler.timesteps[begin:]:
            velocity = call(model, inputs | {"hidden_states": latents, "timestep": torch.full((2,), now / 1000)})[0]
            latents = scheduler.step(velocity, now, latents).prev_sample
        return latents

    with layercache.enabled(model, method, scheduler) as cache:
        expected, decisions = loop(8, 3), cache.decisions
    with layercache.enabled(model, method, scheduler) as cache:
        loop(12)
        assert torch.equal(loop(8, 3), expected) and cache.decisions == decisions


@pytest.mark.parametrize("kind", ["schedule", FIRST_BLOCK, EasyCache(threshold=1e9, warmup=2)], ids=str)
def test_inference_mode_and_then_no_grad(pipe, kind):
    latents = {"output_type": "latent"}
    with layercache.enabled(pipe, plan_of(pipe, kind)):
        with torch.inference_mode():
            expected = generate(pipe, **latents).clone()
        assert torch.equal(generate(pipe, **latents), expected)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_an_interruption_inside_a_block_holds_up_no_other_thread(error):
    model, inputs = build("QwenImageTransformer2DModel")
    armed = [error]

    def interrupt(*_):
        if armed:
            raise armed.pop()

    model.transformer_blocks[1].register_forward_pre_hook(interrupt)
    found = []
    with layercache.enabled(model, FIRST_BLOCK, num_steps=3):
        with pytest.raises(error):
            call(model, inputs)
        thread = threading.Thread(target=lambda: found.append(call(model, inputs)[0]), daemon=True)
        thread.start()
        thread.join(30)
    assert torch.equal(found[0], call(model, inputs)[0])


@pytest.mark.parametrize("folded", [False, True])
def test_a_thread_that_waits_looks_at_no_variables_of_the_one_that_runs(folded):
    """They would be held, and read while they are freed."""
    model, inputs = build("QwenImageTransformer2DModel")
    running, freed = threading.Event(), []

    def hold(*_):
        if not running.is_set():
            tensor = torch.ones(4)
            held = weakref.ref(tensor)
            running.set()
            time.sleep(2.5 * loop.PATIENCE)
            del tensor
            freed.append(held() is None)

    model.transformer_blocks[1].register_forward_pre_hook(hold)
    cache = layercache.fold_timesteps(model, 1) if folded else layercache.enabled(model, FIRST_BLOCK, num_steps=3)
    with cache:
        first = threading.Thread(target=call, args=(model, inputs), daemon=True)
        first.start()
        running.wait(30)
        call(model, inputs)
        first.join(30)
    assert freed == [True]


def test_a_transformer_that_is_freed_inside_the_block(pipe):
    held = weakref.ref(pipe.transformer)
    with layercache.enabled(pipe, FIRST_BLOCK) as cache:
        generate(pipe)
        pipe.transformer = None
    del cache
    gc.collect()
    assert held() is None


def test_a_disabled_cache_holds_nothing(pipe):
    with layercache.enabled(pipe, schedule_for(pipe, mixed_cells())) as cache:
        generate(pipe)
        stored = [weakref.ref(b.tensor) for s in cache.states.values() for b in s.images]
    assert stored and all(tensor() is None for tensor in stored) and cache.report().cache_bytes > 0


@pytest.mark.parametrize("kind", ["schedule", FIRST_BLOCK], ids=str)
def test_a_hook_that_looks_at_the_blocks_changes_nothing(pipe, kind):
    plan = plan_of(pipe, kind)
    with layercache.enabled(pipe, plan):
        expected = generate(pipe)
    seen = []

    def look(module, *_):
        seen.append(list(pipe.transformer.transformer_blocks))

    with layercache.enabled(pipe, plan) as cache:
        handles = [pipe.transformer.register_forward_pre_hook(look)]
        handles.append(pipe.transformer.transformer_blocks[0].register_forward_hook(look))
        assert torch.equal(generate(pipe), expected) and cache.report().cached_cells > 0
        for handle in handles:
            handle.remove()
    assert all(blocks == list(pipe.transformer.transformer_blocks) for blocks in seen)


def test_tasks_of_one_thread_have_contexts_of_their_own():
    model, inputs = build("QwenImageTransformer2DModel")
    plan = schedule(model, (None,) * 3, ({0: 1.0}, None, {0: 1.0}), (None, {1: 1.0}, None))
    given = {"cond": inputs, "uncond": inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] * 0.3}}

    def forward(branch, step):
        return call(model, given[branch] | {"timestep": torch.full_like(inputs["timestep"], (1.0, 0.8, 0.5)[step])})[0]

    def alone(branch):
        with layercache.enabled(model, plan), model.cache_context(branch):
            return [forward(branch, step) for step in range(3)]

    async def task(branch):
        found = []
        for step in range(3):
            with model.cache_context(branch):
                await asyncio.sleep(0)
                found.append(forward(branch, step))
                await asyncio.sleep(0)
        return found

    async def both():
        return await asyncio.gather(*map(task, given))

    expected = [alone(branch) for branch in given]
    with layercache.enabled(model, plan) as cache:
        found = asyncio.run(both())
        assert cache.report().cached_cells == 2 * 3 and set(cache.report().branches) == set(given)
    assert all(
        torch.equal(a, b) for own, right in zip(found, expected, strict=True) for a, b in zip(own, right, strict=True)
    )


def test_windows_are_distinguished_by_their_names_alone():
    """Two parts in one context: named, each reuses its own; unnamed, they are computed in full, with one warning."""
    model, inputs = build("FluxTransformer2DModel")
    other = inputs | {"hidden_states": inputs["hidden_states"] * 2}
    times = [torch.full_like(inputs["timestep"], t) for t in (1.0, 0.8, 0.5)]
    with layercache.enabled(model, FIRST_BLOCK, num_steps=3), model.cache_context("cond"):
        alone = [call(model, other | {"timestep": time})[0] for time in times]
    with layercache.enabled(model, FIRST_BLOCK, num_steps=3) as cache, model.cache_context("cond"):
        for step, time in enumerate(times):
            for part, window in (("left", inputs), ("right", other)):
                with cache.step(step, part=part):
                    found = call(model, window | {"timestep": time})[0]
            assert torch.equal(found, alone[step])
        assert cache.report().cached_cells == 4 and cache.report().source == "caller"
    full = [call(model, other | {"timestep": time})[0] for time in times]
    with layercache.enabled(model, FIRST_BLOCK, num_steps=3) as cache, model.cache_context("cond"):
        with pytest.warns(LayerCacheWarning, match="several times at one step") as caught:
            for step, time in enumerate(times):
                call(model, inputs | {"timestep": time})
                assert torch.equal(call(model, other | {"timestep": time})[0], full[step])
        assert len(caught) == 1 and cache.report().unidentified == 5 and cache.report().cached_cells == 0


def test_one_forward_at_a_time_behind_an_interrupted_one(monkeypatch):
    """Several threads wait for one that was interrupted: one of them takes its place, the others go on waiting."""
    fail = attachment.Attachment._fail

    def slowly(self):
        time.sleep(0.3)  # all that wait find it interrupted meanwhile
        fail(self)

    monkeypatch.setattr(attachment.Attachment, "_fail", slowly)
    model, inputs = build("QwenImageTransformer2DModel")
    armed, inside, together = [SystemExit], [], []

    def watch(*_):
        if armed:
            raise armed.pop()
        inside.append(1)
        together.append(len(inside))
        time.sleep(0.3)
        inside.pop()

    done = threading.Event()

    def interrupted():
        with contextlib.suppress(SystemExit):
            call(model, inputs)
        done.wait(60)  # it lives on: a new thread would be given the number of one that has ended

    model.transformer_blocks[1].register_forward_pre_hook(watch)
    plan = schedule(model, (None,) * 3, (None,) * 3, (None,) * 3)
    with layercache.enabled(model, plan):
        threading.Thread(target=interrupted, daemon=True).start()
        while armed:
            time.sleep(0.01)
        waiting = [threading.Thread(target=call, args=(model, inputs), daemon=True) for _ in range(4)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join(30)
        done.set()
    assert together == [1] * 4


@pytest.mark.parametrize(
    "method", [FIRST_BLOCK, TeaCache(threshold=1e9, coefficients=(1.0, 0.0)), DiCache(threshold=1e9)], ids=str
)
def test_no_stream_is_held_behind_a_forward(method):
    model, inputs = build("FluxTransformer2DModel")
    streams = []

    def watch(module, args, kwargs):
        streams.extend(map(weakref.ref, (*args, *(v for v in kwargs.values() if isinstance(v, torch.Tensor)))))

    model.transformer_blocks[0].register_forward_pre_hook(watch, with_kwargs=True)
    with layercache.enabled(model, method, num_steps=4):
        call(model, inputs)
        gc.collect()
        assert streams and all(stream() is None for stream in streams)


def test_a_timestep_is_read_once_a_call(monkeypatch):
    """On a GPU every reading waits for it."""
    reads = []
    read = identity.time_of
    monkeypatch.setattr(identity, "time_of", lambda *given: reads.append(1) or read(*given))
    model, inputs = build("FluxTransformer2DModel")
    plan = schedule(model, (None,) * 3, ({0: 1.0}, None, {0: 1.0}), (None,) * 3)
    with layercache.enabled(model, plan) as cache:
        for sigma in (1.0, 0.8, 0.5):
            call(model, inputs | {"timestep": torch.full_like(inputs["timestep"], sigma)})
        assert len(reads) == 3 and cache.report().source == "timestep" and cache.report().cached_cells == 2


def test_the_signature_knows_the_modes():
    signature, arguments = Signature(), {"hidden_states": torch.zeros(1, 2, 3)}
    assert signature.changes(arguments) and not signature.changes(arguments)
    for device in ("cpu", "cuda"):
        torch.set_autocast_enabled(device, True)
        try:
            assert signature.changes(arguments) and not signature.changes(arguments)
        finally:
            torch.set_autocast_enabled(device, False)
        assert signature.changes(arguments)
    with torch.inference_mode():
        assert signature.changes(arguments) and not signature.changes(arguments)
    assert signature.changes({"hidden_states": [torch.zeros(1, 2, 3)]})
    assert signature.changes({"hidden_states": [torch.zeros(1, 2, 3, dtype=torch.float64)]})


def test_the_signature_knows_what_comes_again():
    """A prompt that is the same object, latents that are others, a list that is filled anew, an argument that comes."""
    signature, tiles = Signature(), []
    prompt = torch.zeros(1, 4, 5)
    first = {"latents": torch.zeros(1, 2, 3), "prompt": prompt, "tiles": tiles, "mask": None, "scale": 2.0}
    assert signature.changes(first)
    assert not signature.changes({**first, "latents": torch.ones(1, 2, 3), "scale": 3.0})
    assert signature.changes({**first, "latents": torch.zeros(1, 3, 3)})
    assert signature.changes(first) and signature.changes({**first, "prompt": prompt[:, :3]})
    assert signature.changes(first) and signature.changes({**first, "mask": torch.ones(1, 4)})
    assert signature.changes(first)
    tiles.append(torch.zeros(1))
    assert signature.changes(first)


def test_a_loop_that_leaves_steps_out_begins_anew():
    """Nothing says that step 2 is of the loop whose step 0 was run: what that stored is not taken."""
    model, inputs = build("FluxTransformer2DModel")
    full = call(model, inputs)[0]
    plan = schedule(model, (None,) * 3, (None,) * 3, ({0: 1.0}, None, {0: 1.0}))
    with layercache.enabled(model, plan) as cache:
        for step in (0, 2):
            with cache.step(step):
                assert torch.equal(call(model, inputs)[0], full)
        assert cache.report().generations == 2 and cache.report().fallback_rows == 1


def test_a_branch_at_an_earlier_step_begins_a_generation():
    """Of decisions those of the new loop alone are given, also where another branch comes first in it."""
    model, inputs = build("FluxTransformer2DModel")
    with layercache.enabled(model, FIRST_BLOCK, num_steps=4) as cache:
        for step, branch in ((0, "cond"), (1, "cond"), (0, "uncond")):
            with cache.step(step, branch=branch):
                call(model, inputs)
        assert cache.decisions == {"uncond": (True,)}


def test_a_step_outside_the_schedule_is_refused():
    model, inputs = build("FluxTransformer2DModel")
    plan = schedule(model, (None,) * 3, ({0: 1.0},) * 3, (None,) * 3)
    with layercache.enabled(model, plan) as cache:
        with cache.step(3), pytest.raises(ScheduleMismatchError, match="step 3 lies outside the 3 steps"):
            call(model, inputs)
    counter = SimpleNamespace(timesteps=torch.arange(4.0), step_index=3)  # has no noise levels to compare
    with layercache.enabled(model, plan, counter):
        with pytest.raises(ScheduleMismatchError, match="step 3 lies outside the 3 steps"):
            call(model, inputs)


@pytest.mark.parametrize(("timestep", "is_near"), [(1.0059, True), (994.5, True), (0.9939, False), (1006.5, False)])
def test_a_timestep_is_a_sigma_or_a_thousand_times_as_large(timestep, is_near):
    """Within 0.006 of the first sigma, 1.0."""
    model, inputs = build("FluxTransformer2DModel")
    inputs["timestep"] = torch.full_like(inputs["timestep"], timestep, dtype=torch.float32)
    with layercache.enabled(model, schedule(model, (None,) * 3, ({0: 1.0},) * 3, (None,) * 3)) as cache:
        if is_near:
            call(model, inputs)
            assert cache.report().generations == 1
        else:
            with pytest.raises(ScheduleMismatchError, match="no step of the schedule"):
                call(model, inputs)


@pytest.mark.parametrize("anew", [False, True])
def test_prompts_on_an_accelerator_tell_unnamed_branches_apart(monkeypatch, anew):
    """Their values are read where no tensor is one that a branch had before: once a generation, or at every call."""
    reads = []
    equal = torch.equal
    monkeypatch.setattr(conditioning, "is_on_accelerator", lambda tensor: True)
    monkeypatch.setattr(conditioning.torch, "equal", lambda a, b: reads.append(1) or equal(a, b))
    model, inputs = build("FluxTransformer2DModel")
    prompts = [inputs["encoder_hidden_states"] * (1 + k) for k in range(2)]
    plan = schedule(model, (None,) * 3, ({0: 1.0}, None, {0: 1.0}), (None,) * 3)
    counter = SimpleNamespace(timesteps=torch.arange(3.0), step_index=0)
    with warnings.catch_warnings(record=True) as caught, layercache.enabled(model, plan, counter) as cache:
        warnings.simplefilter("always")
        for counter.step_index in range(3):
            for prompt in prompts:
                call(model, inputs | {"encoder_hidden_states": prompt.clone() if anew else prompt})
        assert cache.report().unidentified == 0 and cache.report().cached_cells == 4
    assert len(reads) == (1 + 2 * 4 if anew else 1)  # the second prompt of step 0; then each beside both branches
    assert ["compare its prompt" in str(one.message) for one in caught] == [True] * anew
