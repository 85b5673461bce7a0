"""What diffusers asks of each of its own caches, asked of ours through the same names.

Written down from the public behaviour of diffusers' caches (`enable_cache`, `disable_cache`, `is_cache_enabled`,
`cache_context`, the reset of their state), for what is nearest to each:

* FirstBlockCache, MagCache: a schedule that reuses all groups, and FBCache, DBCache, DiCache and TeaCache.
* TaylorSeer: a schedule with two anchors.
* PyramidAttentionBroadcast: a schedule of single modules that reuses the attention.

Not asked, because there is nothing of that kind here:

* FasterCache's guess of the unconditional branch, and its reuse that depends on ``current_timestep_callback``; the same
  argument of PyramidAttentionBroadcast: steps are those of a schedule.
* TextKVCache: keys and values of the text are not kept apart.
* A warning from ``disable_cache()`` where nothing is enabled: that is diffusers' own method, ours is not there then.
  ``layercache.disable`` raises.
* ``enable_cache`` with a configuration of ours: `layercache.enable` takes plans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import CacheMixin, FirstBlockCacheConfig
from torch import nn

import layercache
from layercache.errors import CacheStateError
from layercache.methods import DBCache, DiCache, FBCache, TeaCache
from layercache.models.registry import fingerprint_of, spec_for
from layercache.runtime.attachment import attachment_of
from layercache.runtime.modules import module_units
from layercache.runtime.router import RoutedModuleList
from layercache.schedule.module_schedule import ModuleSchedule
from support.forwards import call, schedule
from support.marks import slow
from support.zoo import build

CLASSES = (
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "MochiTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "CogView4Transformer2DModel",
    "Flux2Transformer2DModel",
)
OFTEN = CLASSES[:3]
DECIDING = (*CLASSES[:3], "CogView4Transformer2DModel")
STEPS = 3
FIRST: dict = {0: 1.0}
NEWEST: dict = {1: 1.5, 0: -0.5}


def groups_plan(model: nn.Module) -> Any:
    return schedule(model, (None,) * 3, (FIRST,) * 3, (FIRST,) * 3)


def taylor_plan(model: nn.Module) -> Any:
    return schedule(model, (None,) * 3, (None,) * 3, (NEWEST,) * 3)


def attention_plan(model: nn.Module) -> Any:
    units = tuple(unit.name for unit in module_units(model, spec_for(model)))
    attention = tuple("attn" in unit for unit in units)
    rows = tuple(tuple(step == 0 or not reused for reused in attention) for step in range(STEPS))
    return ModuleSchedule(fingerprint_of(model, (1.0, 0.8, 0.5, 0.0), ("all",)), units, rows)


PLANS: dict[str, Callable[[nn.Module], Any]] = {
    "groups": groups_plan,
    "taylor": taylor_plan,
    "attention": attention_plan,
    "fbcache": lambda model: FBCache(threshold=1e9, warmup=1),
    "dbcache": lambda model: DBCache(threshold=1.0, warmup=1, front=1, back=1),
    "dicache": lambda model: DiCache(threshold=1e9, retention=0.0),
    "teacache": lambda model: TeaCache(threshold=1e9, coefficients=(1.0, 0.0)),
}


class Adapter:
    """A model and a plan for it, with the names that diffusers' caches have."""

    def __init__(self, name: str, kind: str):
        self.model, self.inputs = build(name)
        self.plan = PLANS[kind](self.model)
        self.cache: Any = None
        self.step = 0
        moved = "x" if "x" in self.inputs else "hidden_states"
        self.other = self.inputs | {moved: self.inputs[moved] + 0.1 * torch.randn_like(self.inputs[moved])}

    def enable_cache(self) -> None:
        self.cache = layercache.enable(self.model, self.plan, num_steps=4)
        self.step = 0

    def reset_cache(self) -> None:
        self.cache.reset()
        self.step = 0

    def hooks(self) -> list[Any]:
        blocks = [child for child in self.model.children() if isinstance(child, RoutedModuleList)]
        return [*blocks, *self.model._forward_pre_hooks.values(), *self.model._forward_hooks.values()]

    def output(self, other: bool = False) -> torch.Tensor:
        """Of the next step, which the caller says: those of these tests share one timestep."""
        inputs = self.other if other else self.inputs
        if self.cache is None:
            return call(self.model, inputs)[0]
        with self.cache.step(self.step):
            self.step = (self.step + 1) % STEPS
            return call(self.model, inputs)[0]

    def reused(self) -> torch.Tensor:
        """What the last step gives for other inputs; the steps before are of the first ones."""
        for _ in range(STEPS - 1):
            self.output()
        return self.output(other=True)


@pytest.fixture(params=[("groups", name) for name in CLASSES], ids=lambda given: given[1])
def adapter(request):
    kind, name = request.param
    made = Adapter(name, kind)
    yield made
    if attachment_of(made.model) is not None:
        layercache.disable(made.model)


def also(*kinds: str) -> Any:
    """Beside the schedule of groups on the nine classes: other plans, on one class daily."""
    often = [("groups", name) for name in OFTEN]
    seldom = [("groups", name) for name in CLASSES[len(OFTEN) :]]
    for kind in kinds:
        classes = DECIDING if "cache" in kind else CLASSES
        often.append((kind, classes[0]))
        seldom += [(kind, name) for name in classes[1:]]
    return pytest.mark.parametrize("adapter", [*often, *slow(*((given,) for given in seldom))], indirect=True)


ALL = ("taylor", "attention", "fbcache", "dbcache", "dicache", "teacache")


def test_a_class_of_diffusers_that_caches(adapter):
    assert isinstance(adapter.model, CacheMixin)


@also(*ALL)
def test_enabled_state(adapter):
    assert not adapter.model.is_cache_enabled
    adapter.enable_cache()
    assert adapter.model.is_cache_enabled
    adapter.model.disable_cache()
    assert not adapter.model.is_cache_enabled and attachment_of(adapter.model) is None
    assert "enable_cache" not in vars(adapter.model) and "_cache_config" not in vars(adapter.model)
    adapter.enable_cache()
    layercache.disable(adapter.model)
    assert not adapter.model.is_cache_enabled


@also(*ALL)
def test_enabling_twice(adapter):
    adapter.enable_cache()
    with pytest.raises(CacheStateError, match="already enabled"):
        adapter.enable_cache()
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        adapter.model.enable_cache(FirstBlockCacheConfig())
    assert adapter.model.is_cache_enabled
    adapter.model.disable_cache()
    with pytest.raises(CacheStateError, match="no layercache cache is enabled"):
        layercache.disable(adapter.model)
    adapter.model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(CacheStateError, match="diffusers cache is enabled"):
        adapter.enable_cache()
    adapter.model.disable_cache()


@also(*ALL)
def test_hooks_come_and_go(adapter):
    assert not adapter.hooks()
    adapter.enable_cache()
    assert len(adapter.hooks()) >= 3
    adapter.model.disable_cache()
    assert not adapter.hooks()


@also(*ALL)
def test_inference(adapter):
    """A reused step is finite and of the same shape, and another than the computed one; without the cache it is not."""
    full, before = adapter.output(other=True), adapter.output()
    adapter.enable_cache()
    with adapter.model.cache_context("cond"):
        assert torch.equal(adapter.output(), before)
        for _ in range(STEPS - 2):
            adapter.output()
        cached = adapter.output(other=True)
    assert torch.isfinite(cached).all() and cached.shape == full.shape and cached.dtype == full.dtype
    assert (cached - full).abs().max() > 1e-5 and adapter.cache.report().used < 1
    adapter.model.disable_cache()
    assert torch.equal(adapter.output(other=True), full)


@also(*ALL)
def test_the_same_inputs_again(adapter):
    """What is reused is what would be computed."""
    full = adapter.output()
    adapter.enable_cache()
    for _ in range(STEPS):
        torch.testing.assert_close(adapter.output(), full, rtol=1e-3, atol=1e-4)


@also(*ALL)
def test_reset_of_the_state(adapter):
    full = adapter.output(other=True)
    adapter.enable_cache()
    cached = adapter.reused()
    assert not torch.equal(cached, full)
    adapter.reset_cache()
    assert torch.equal(adapter.output(other=True), full), "computed, nothing of before is there"
    adapter.reset_cache()
    assert torch.equal(adapter.reused(), cached)


@also(*ALL)
def test_the_reset_of_diffusers_state_is_heard(adapter):
    """A pipeline calls it when it ends, where ours has still to be asked what it did."""
    adapter.enable_cache()
    with adapter.model.cache_context("cond"):
        cached = adapter.reused()
    adapter.model._reset_stateful_cache()
    assert adapter.cache.report().used < 1
    adapter.reset_cache()
    with adapter.model.cache_context("cond"):
        assert torch.equal(adapter.reused(), cached)


@also(*ALL)
def test_contexts_are_apart(adapter):
    """The same forward in another context is the first one of that context."""
    full, other = adapter.output(), adapter.output(other=True)
    adapter.enable_cache()
    with adapter.model.cache_context("context_1"):
        assert torch.equal(adapter.output(), full)
    with adapter.model.cache_context("context_2"):
        assert torch.equal(adapter.output(other=True), other)
    assert set(adapter.cache.report().branches) == {"context_1", "context_2"}


@pytest.mark.parametrize("adapter", [("groups", OFTEN[0]), ("fbcache", OFTEN[1])], indirect=True)
def test_output_classes_and_tuples(adapter):
    adapter.enable_cache()
    with torch.no_grad():
        first = adapter.model(**adapter.inputs, return_dict=True)
        again = adapter.model(**adapter.inputs, return_dict=False)
    assert type(first).__name__ == "Transformer2DModelOutput" and isinstance(again, tuple)
    torch.testing.assert_close(first.sample, again[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adapter", [("fbcache", name) for name in DECIDING], indirect=True)
def test_a_threshold_of_nothing_reuses_nothing(adapter):
    adapter.plan = FBCache(threshold=0.0)
    full = adapter.output(other=True)
    adapter.enable_cache()
    adapter.output()
    assert torch.equal(adapter.output(other=True), full) and adapter.cache.report().used == 1
