"""Others that take hold of a model's modules while a module schedule is enabled: adapters, hooks, wrappers."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

import layercache
from layercache.models.registry import fingerprint_of, spec_for
from layercache.runtime.modules import module_units
from layercache.schedule.module_schedule import ModuleSchedule
from support.marks import slow
from support.tiny import shifted_sigmas
from support.zoo import build
from support.zoo_pipelines import generate

STEPS = 6
TARGETS = ["proj_mlp", "to_q", "ff.net.2"]


@pytest.fixture(scope="module")
def made():
    model, _ = build("FluxTransformer2DModel")
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), *[None] * 5, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    call = {"prompt_embeds": text, "pooled_prompt_embeds": text.mean(1), "height": 64, "width": 64}
    return pipe, call | {"output_type": "latent", "num_inference_steps": STEPS}


@pytest.fixture
def pipe(made):
    return copy.deepcopy(made[0])


@pytest.fixture
def call(made):
    return made[1]


def plan_of(pipe, seed=0):
    """A random schedule of modules, with a reused step."""
    model = pipe.transformer
    units = tuple(unit.name for unit in module_units(model, spec_for(model)))
    computed = np.random.default_rng(seed).random((STEPS, len(units))) < 0.5
    computed[0], computed[4] = True, False
    rows = tuple(tuple(bool(c) for c in row) for row in computed)
    return ModuleSchedule(fingerprint_of(model, shifted_sigmas(STEPS), ("cond",)), units, rows, frozenset({4}))


def config(seed=0):
    torch.manual_seed(seed)
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)


def weights(pipe, seed=0):
    """A LoRA as a file holds it."""
    other = copy.deepcopy(pipe)
    other.transformer.add_adapter(config(seed))
    state = peft.get_peft_model_state_dict(other.transformer)
    return {f"transformer.{name}": value for name, value in state.items()}


def load(pipe, name="a", seed=0):
    pipe.load_lora_weights(weights(pipe, seed), adapter_name=name)


CHANGES = {
    "added": lambda pipe: (torch.manual_seed(1), pipe.transformer.add_adapter(config())),
    "injected by peft": lambda pipe: (torch.manual_seed(1), peft.inject_adapter_in_model(config(), pipe.transformer)),
    "loaded": load,
    "loaded and weighted": lambda pipe: (load(pipe), pipe.set_adapters(["a"], [0.3])),
    "two": lambda pipe: (load(pipe), load(pipe, "b", 1), pipe.set_adapters(["a", "b"], [1.0, 0.5])),
    "fused": lambda pipe: (load(pipe), pipe.fuse_lora()),
    "fused and unloaded": lambda pipe: (load(pipe), pipe.fuse_lora(), pipe.unload_lora_weights()),
    "fused and unfused": lambda pipe: (load(pipe), pipe.fuse_lora(), pipe.unfuse_lora()),
    "disabled": lambda pipe: (load(pipe), pipe.disable_lora()),
    "deleted": lambda pipe: (load(pipe), pipe.delete_adapters("a")),
    "unloaded": lambda pipe: (load(pipe), pipe.unload_lora_weights()),
}


@pytest.mark.parametrize(
    "change",
    [
        "added",
        "loaded and weighted",
        "unloaded",
        *slow(*sorted(set(CHANGES) - {"added", "loaded and weighted", "unloaded"})),
    ],
)
def test_adapters_that_come_after_the_cache(pipe, call, change):
    plan, other = plan_of(pipe), copy.deepcopy(pipe)
    CHANGES[change](other)
    full = generate(other, call)
    with layercache.enabled(other, plan):
        expected = generate(other, call)
    with layercache.enabled(pipe, plan) as cache:
        generate(pipe, call)
        CHANGES[change](pipe)
        torch.testing.assert_close(generate(pipe, call), expected, rtol=0, atol=0)
        assert cache.report().used < 1
    assert torch.equal(generate(pipe, call), full) and not torch.equal(full, expected)
    assert not any("forward" in module.__dict__ for module in pipe.transformer.modules())


@pytest.mark.parametrize("leaves", ["unloaded", "fused"])
def test_adapters_that_were_there_before_the_cache(pipe, call, leaves):
    plan, other = plan_of(pipe), copy.deepcopy(pipe)
    load(pipe)
    with layercache.enabled(pipe, plan):
        with_adapter = generate(pipe, call)
        if leaves == "fused":
            pipe.fuse_lora()
        pipe.unload_lora_weights()
        found = generate(pipe, call)
    with layercache.enabled(other, plan):
        without = generate(other, call)
    expected = with_adapter if leaves == "fused" else without
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(with_adapter, without, rtol=1e-3, atol=1e-3)


def test_a_forward_that_somebody_replaces_stays_replaced(pipe, call):
    """As hooks of accelerate and diffusers do: put there after the cache, taken away after it."""
    plan = plan_of(pipe)
    with layercache.enabled(pipe, plan):
        expected = generate(pipe, call)
    attention = pipe.transformer.transformer_blocks[0].attn
    own, calls = attention.forward, []

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    layercache.enable(pipe, plan)
    attention.forward = counted
    assert torch.equal(generate(pipe, call), expected)
    computed = sum(row[0] for row in plan.computed)
    assert len(calls) == computed < STEPS
    layercache.disable(pipe)
    assert attention.forward is counted
    generate(pipe, call)
    assert len(calls) == computed + STEPS
    del attention.forward
    assert not any("forward" in module.__dict__ for module in pipe.transformer.modules())


def test_another_model_of_the_same_modules_is_not_cached(pipe, call):
    """Two transformers that share their blocks; the cache is enabled on one."""
    other = copy.copy(pipe)
    shared = type(pipe.transformer).from_config(pipe.transformer.config).eval()
    shared._modules = dict(pipe.transformer._modules)
    shared._modules |= {name: torch.nn.ModuleList(getattr(shared, name)) for name in spec_for(shared).block_lists}
    other.__dict__["transformer"] = shared
    full = generate(pipe, call)
    with layercache.enabled(pipe, plan_of(pipe)):
        cached = generate(pipe, call)
        assert torch.equal(generate(other, call), full) and not torch.equal(cached, full)
        assert torch.equal(generate(pipe, call), cached)


def test_an_interrupted_forward_leaves_nothing_behind(pipe, call):
    block = pipe.transformer.transformer_blocks[1]

    def interrupt(*args):
        raise KeyboardInterrupt

    layercache.enable(pipe, plan_of(pipe))
    expected = generate(pipe, call)
    hook = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, call)
    hook.remove()
    assert torch.equal(generate(pipe, call), expected)
    hook = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, call)
    hook.remove()
    layercache.disable(pipe)
    assert not any("forward" in module.__dict__ for module in pipe.transformer.modules())
