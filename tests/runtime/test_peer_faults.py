"""Situations in which other caches were found wrong (a survey of peers): ours in the same ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import layercache
from layercache.methods.fbcache import DBCache, FBCache
from layercache.methods.teacache import TeaCache
from layercache.models import registry
from support.forwards import CONTROLS, call, controls, stepping
from support.tiny import generate, mixed_cells, schedule_for, tiny_pipeline
from support.zoo import build

FIRST_BLOCK = FBCache(threshold=1e9, warmup=1)
METHODS = [
    FBCache(threshold=0.3, warmup=1),
    DBCache(threshold=0.3, front=1, back=1, warmup=1),
    TeaCache(threshold=0.5, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0)),
]


@pytest.fixture
def unclocked(monkeypatch):
    for name, spec in list(registry._REGISTRY.items()):
        monkeypatch.setitem(registry._REGISTRY, name, replace(spec, timestep=None))


def test_another_pipeline_of_the_class_knows_nothing_of_it():
    """A cache that marks the class: a second instance takes itself for cached, and is never restored."""
    first, second = tiny_pipeline(seed=0), tiny_pipeline(seed=5)
    cls, before = type(first), dict(vars(type(first)))
    full = generate(first), generate(second)
    layercache.enable(first, schedule_for(first, mixed_cells()))
    assert torch.equal(generate(second), full[1])
    layercache.enable(second, schedule_for(second, mixed_cells()))
    layercache.disable(first)
    assert torch.equal(generate(first), full[0]) and not torch.equal(generate(second), full[1])
    layercache.disable(second)
    assert torch.equal(generate(second), full[1]) and dict(vars(cls)) == before


def test_enabling_after_contexts_were_used(unclocked):
    """Hooks that a list of hooks made earlier does not hold never hear of a context."""
    model, inputs = build("FluxTransformer2DModel")
    with model.cache_context("cond"):
        expected = call(model, inputs)
    with layercache.enabled(model, FIRST_BLOCK, num_steps=4) as cache:
        for step in range(2):
            with cache.step(step), model.cache_context("cond"):
                found = call(model, inputs)
        assert cache.decisions == {"cond": (True, False)}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*sorted(CONTROLS), "Flux2Transformer2DModel"])
def test_a_skipped_step_with_the_same_input_and_controlnet_is_the_full_step(name, unclocked):
    """Residuals added once more behind every skipped block; and a class on which the first call fails."""
    model, inputs = build(name)
    if name in CONTROLS:
        inputs = inputs | controls(name, model, inputs)
    expected = call(model, inputs)
    with layercache.enabled(model, FIRST_BLOCK, num_steps=4) as cache:
        step = stepping(cache, 2)
        step(call, model, inputs)
        torch.testing.assert_close(step(call, model, inputs), expected, rtol=1e-3, atol=5e-5)
        assert list(cache.decisions.values()) == [(True, False)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_an_error_or_another_size_leaves_nothing_stale(method):
    pipe = tiny_pipeline()
    with layercache.enabled(pipe, method):
        expected = generate(pipe)
        large = generate(pipe, height=48, width=48)

    def fail(pipe, step, timestep, values):
        if step == 4:
            raise ValueError("out of memory")
        return values

    with layercache.enabled(pipe, method):
        with pytest.raises(ValueError, match="out of memory"):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(generate(pipe), expected)
        assert torch.equal(generate(pipe, height=48, width=48), large)
        assert torch.equal(generate(pipe), expected)


def test_a_branch_that_is_left_out_at_some_steps_shifts_nothing(unclocked):
    """Branches distinguished by counting calls change places when one call is missing."""
    model, inputs = build("QwenImageTransformer2DModel")
    times = torch.linspace(1.0, 0.1, 8)

    def run(omits) -> list[torch.Tensor]:
        outputs = []
        for step, time in enumerate(times):
            arguments = inputs | {"timestep": inputs["timestep"] * time}
            with model.cache_context("cond"):
                outputs.append(call(model, arguments)[0])
            if not omits(step):
                with model.cache_context("uncond"):
                    call(model, arguments | {"encoder_hidden_states": inputs["encoder_hidden_states"] * 0.2})
        return outputs

    found = []
    for omits in (lambda step: True, lambda step: step % 3 == 1, lambda step: False):
        with layercache.enabled(model, FIRST_BLOCK, num_steps=8) as cache:
            found.append(run(omits))
            assert set(cache.decisions["cond"]) == {True, False}
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_forecast_has_its_slope_as_soon_as_there_are_two_anchors():
    """State that is made after the step was counted: the first extrapolations are plain reuse."""
    pipe = tiny_pipeline()
    with layercache.enabled(pipe, FBCache(threshold=1e9, warmup=3, order=1)) as cache:
        generate(pipe)
        terms = cache.export_schedule().cells[3][-1]
    assert set(terms) == {2, 1} and terms[2] == pytest.approx(2.0) and terms[1] == pytest.approx(-1.0)


@pytest.mark.slow
def test_blocks_stay_compiled_under_a_dynamic_method(unclocked):
    """Blocks that are called from a function kept out of compilation are no longer compiled themselves."""
    model, inputs = build("FluxTransformer2DModel")
    with layercache.enabled(model, FIRST_BLOCK, num_steps=6) as cache:
        step = stepping(cache, 6)
        eager = [step(call, model, inputs) for _ in range(4)]
    torch._dynamo.reset()
    counters.clear()
    plain, cached = CompileCounter(), CompileCounter()
    model.compile_repeated_blocks(backend=plain, fullgraph=True)
    call(model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=cached, fullgraph=True)
    with layercache.enabled(model, FIRST_BLOCK, num_steps=6) as cache:
        step = stepping(cache, 6)
        for expected in eager:
            assert all(torch.equal(a, b) for a, b in zip(step(call, model, inputs), expected, strict=True))
    assert cached.op_count >= plain.op_count > 0 and not counters["graph_break"]
    torch._dynamo.reset()


def test_instances_share_no_state(unclocked):
    """State on the class: two models of it add each other's residuals."""
    (one, inputs), (two, _) = build("FluxTransformer2DModel", seed=0), build("FluxTransformer2DModel", seed=3)
    expected = call(one, inputs), call(two, inputs)
    with layercache.enabled(one, FIRST_BLOCK, num_steps=4), layercache.enabled(two, FIRST_BLOCK, num_steps=4):
        for _ in range(2):
            found = call(one, inputs), call(two, inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
