"""What else people do with a transformer: diffusers' own caches, copies, adapters, offload, casting, saving."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, MagCacheConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch import nn

import layercache
from layercache.errors import CacheStateError, ForeignCacheError, NonFiniteResidualError, NonFiniteWarning
from layercache.methods.easycache import EasyCache
from layercache.methods.fbcache import DBCache, FBCache
from layercache.runtime.attachment import attachment_of
from layercache.runtime.storage import Buffer, Storage, check_alike
from support.forwards import call, schedule, stepping
from support.marks import slow
from support.tiny import generate, mixed_cells, schedule_for, tiny_pipeline
from support.zoo import build
from support.zoo_pipelines import _qwen, _wan, schedule_of
from support.zoo_pipelines import generate as run_pipeline


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def plan(pipe):
    return schedule_for(pipe, mixed_cells())


# --- hooks and contexts of diffusers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after", "between two contexts"])
def test_hooks_of_others_hear_of_contexts(pipe, plan, when):
    """Whoever put them there, and also on a block; where there are none, no context is entered (it costs time)."""
    heard = []

    class State(BaseState):
        def reset(self) -> None: ...

    class Listener(ModelHook):
        _is_stateful = True

        def __init__(self):
            super().__init__()
            self.manager = StateManager(State)

        def pre_forward(self, module, *args, **kwargs):
            heard.append(getattr(self.manager.context, "name", self.manager.context))
            return args, kwargs

    def listen():
        HookRegistry.check_if_exists_or_initialize(pipe.transformer.transformer_blocks[1]).register_hook(
            Listener(), "listener"
        )
        # diffusers asks that of everybody who puts hooks into a model
        HookRegistry.check_if_exists_or_initialize(pipe.transformer).invalidate_child_registries_cache()

    model, image = pipe.transformer, torch.randn(1, 64, 48)
    inputs = {
        "encoder_hidden_states": torch.randn(1, 4, 64),
        "timestep": torch.full((1,), 1.0),
        "img_shapes": [(1, 8, 8)],
    }
    if when == "before":
        listen()
    with layercache.enabled(model, plan), torch.no_grad():
        if when == "between two contexts":
            with model.cache_context("first"):
                model(image, **inputs)
            listen()
        elif when == "after":
            listen()
        for name in ("cond", "uncond"):
            with model.cache_context(name):
                model(image, **inputs)
    assert heard == ["cond", "uncond"]


def test_a_context_with_other_fields_is_diffusers_own(pipe, plan):
    with layercache.enabled(pipe, plan):
        with pipe.transformer.cache_context("cond"):
            pass
        with pytest.raises(TypeError), pipe.transformer.cache_context("cond", stepindex=3):
            pass


def test_a_cache_of_diffusers_is_not_joined(pipe, plan):
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(CacheStateError, match="disable_cache"):
        layercache.enable(pipe, plan)
    pipe.transformer.disable_cache()
    with layercache.enabled(pipe, plan), pytest.raises(ForeignCacheError, match="layercache.disable"):
        pipe.transformer.enable_cache(MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8))
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    pipe.transformer.disable_cache()


# --- copies, files, processes ----------------------------------------------------------------------------------


def twin(pipe, transformer):
    other = type(pipe)(transformer, pipe.class_encoder, FlowMatchEulerDiscreteScheduler(shift=3.0))
    other.set_progress_bar_config(disable=True)
    return other


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("make", "dynamic"), [(copy.deepcopy, False), (pickled, True), *slow((copy.deepcopy, True), (pickled, False))]
)
def test_copies_are_uncached_models_of_their_own(pipe, plan, make, dynamic):
    method = FBCache(threshold=1.0, warmup=2) if dynamic else plan
    full = generate(pipe)
    with layercache.enabled(pipe, method):
        cached = generate(pipe)
        other = twin(pipe, make(pipe.transformer))
        assert not other.transformer.is_cache_enabled and type(other.transformer.transformer_blocks) is nn.ModuleList
        assert torch.equal(generate(other), full)
        with layercache.enabled(other, method):
            assert torch.equal(generate(other), cached)
        assert torch.equal(generate(other), full) and torch.equal(generate(pipe), cached)
    assert torch.equal(generate(pipe), full)


def test_a_cached_model_is_saved_as_it_is(pipe, plan, tmp_path):
    full = generate(pipe)
    with layercache.enabled(pipe, plan):
        generate(pipe)
        pipe.transformer.save_pretrained(tmp_path)
        names = set(pipe.transformer.state_dict())
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == names
    assert torch.equal(generate(twin(pipe, loaded)), full)


# --- other weights ---------------------------------------------------------------------------------------------


def lora(seed: int):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(seed)
    return config


def test_adapters_between_generations(pipe, plan):
    model = pipe.transformer
    model.add_adapter(lora(0), "a")
    model.add_adapter(lora(1), "b")
    expected = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        with layercache.enabled(pipe, plan):
            expected[name] = generate(pipe)
    assert not torch.equal(expected["a"], expected["b"])
    with layercache.enabled(pipe, plan) as cache:
        for name in ("b", "a", "a", "b"):
            model.set_adapter(name)
            assert torch.equal(generate(pipe), expected[name])
        model.fuse_lora()
        torch.testing.assert_close(generate(pipe), expected["b"], rtol=1e-3, atol=1e-3)
        model.unfuse_lora()
        assert cache.report().fallback_rows == 0


def test_an_adapter_switched_in_the_middle_makes_the_next_steps_compute(pipe, plan):
    """Nothing of the old weights is reused: the steps that would have are computed."""
    model = pipe.transformer
    model.add_adapter(lora(0), "a")
    model.add_adapter(lora(1), "b")

    def switching(pipe, step, timestep, values):
        model.set_adapter("b" if step >= 2 else "a")
        return values

    model.set_adapter("a")
    full = generate(pipe, callback_on_step_end=switching)
    model.set_adapter("a")
    assert [cell is None for cell in plan.cells[3]] == [False] * 3
    with layercache.enabled(pipe, plan) as cache:
        generate(pipe, callback_on_step_end=switching)
        assert cache.report().fallback_rows > 0
    model.set_adapter("a")
    cells = [(None,) * 3] * 3 + [({2: 1.0},) * 3] + [(None,) * 3] * 4
    with layercache.enabled(pipe, schedule_for(pipe, cells)):
        assert torch.equal(generate(pipe, callback_on_step_end=switching), full)


def test_layerwise_casting(pipe, plan):
    expected = cached_and_full(pipe, plan)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    cached, full = cached_and_full(pipe, plan)
    assert (cached - expected[0]).abs().mean() < 0.1 * expected[0].abs().mean()
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16
    assert not torch.equal(cached, full)


def cached_and_full(pipe, plan):
    full = generate(pipe)
    with layercache.enabled(pipe, plan) as cache:
        cached = generate(pipe)
        assert cache.report().fallback_rows == 0
    assert torch.equal(generate(pipe), full)
    return cached, full


@pytest.mark.parametrize(
    ("order", "kind"),
    [
        ("offload first", "sequential"),
        ("cache first", "group"),
        *slow(("cache first", "sequential"), ("offload first", "group")),
    ],
)
def test_offload(pipe, plan, order, kind):
    """Weights that come and go around every module: the hooks of blocks that do not run do not run either."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules
    from diffusers.hooks import apply_group_offloading

    expected = cached_and_full(pipe, plan)

    def offload():
        if kind == "sequential":
            cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        else:
            apply_group_offloading(
                pipe.transformer, torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=2
            )

    if order == "offload first":
        offload()
    with layercache.enabled(pipe, plan) as cache:
        if order == "cache first":
            offload()
        assert torch.equal(generate(pipe), expected[0])
        assert cache.report().fallback_rows == 0
    assert torch.equal(generate(pipe), expected[1])
    if kind == "sequential":
        remove_hook_from_submodules(pipe.transformer)


def test_quantised_weights(plan):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    pipe = tiny_pipeline()
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    cached, full = cached_and_full(pipe, plan)
    assert torch.isfinite(cached).all() and not torch.equal(cached, full)


def test_attention_backends(pipe, plan):
    expected = cached_and_full(pipe, plan)
    # Choosing a backend for one model chooses it for the whole process, and resetting the model leaves that as it is.
    with attention_backend("native"), layercache.enabled(pipe, plan):
        pipe.transformer.set_attention_backend("_native_math")
        torch.testing.assert_close(generate(pipe), expected[0], rtol=1e-3, atol=1e-3)
        pipe.transformer.reset_attention_backend()


def test_inference_mode(pipe, plan):
    expected = cached_and_full(pipe, plan)[0]
    with layercache.enabled(pipe, plan), torch.inference_mode():
        assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [_qwen, _wan])
def test_half_precision(make, dtype):
    pipe, arguments = make()
    pipe.transformer.to(dtype)
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    full = run_pipeline(pipe, arguments)
    with layercache.enabled(pipe, schedule_of(pipe, "ccr")) as cache:
        cached = run_pipeline(pipe, arguments)
        assert cache.report().fallback_rows == 0
        (state,) = list(cache.states.values())[:1]
        assert state.images[0].tensor.dtype == dtype
    assert torch.isfinite(cached.float()).all() and not torch.equal(cached, full)


# --- how residuals are stored ----------------------------------------------------------------------------------


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(b.float().abs().max() ** 2 / (a.float() - b.float()).pow(2).mean()))


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "Flux2Transformer2DModel", "WanTransformer3DModel"])
@pytest.mark.parametrize("storage", ["float32", "compact"])
def test_storage_of_residuals(name, storage, monkeypatch):
    """Half-precision models with residuals unrounded, or in one byte a number: bytes and errors as documented."""
    from dataclasses import replace

    from layercache.models import registry

    monkeypatch.setitem(registry._REGISTRY, name, replace(registry._REGISTRY[name], timestep=None))
    model, inputs = build(name)
    model.to(torch.bfloat16)
    inputs = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    expected = call(model, inputs)[0]
    plan = schedule(model, (None,) * 3, ({0: 1.0}, None, {0: 1.0}))
    results, bytes_of = {}, {}
    for kind in ("same", storage):
        with layercache.enabled(model, plan, storage=kind) as cache:
            step = stepping(cache, 2)
            step(call, model, inputs)
            results[kind] = step(call, model, inputs)[0]
            bytes_of[kind] = cache.report().cache_bytes
            cache.check()
            channels = next(iter(cache.states.values())).images[0].tensor.shape[-1]
    factor = 2.0 if storage == "float32" else (1 + 4 / channels) / 2
    assert bytes_of[storage] == pytest.approx(factor * bytes_of["same"])
    assert psnr(results[storage], expected) > (40 if storage == "float32" else 25)


def test_compact_storage_over_a_generation_and_by_request(pipe, plan):
    expected = cached_and_full(pipe, plan)
    with layercache.enabled(pipe, plan, storage="compact") as cache:
        small = generate(pipe)
        assert psnr(small, expected[0]) > 20 and not torch.equal(small, expected[0])
        with cache.request("a"):
            assert torch.equal(generate(pipe), small)


@pytest.mark.slow
def test_compact_storage_compiled(pipe, plan):
    with layercache.enabled(pipe, plan, storage="compact"):
        small = generate(pipe)
    pipe.transformer.compile(backend="eager", fullgraph=True)
    with layercache.enabled(pipe, plan, storage="compact"):
        assert torch.equal(generate(pipe), small)
    torch._dynamo.reset()


@pytest.mark.parametrize("storage", ["float32", "compact"])
def test_storage_under_a_method_that_decides(pipe, storage):
    """Replayed as a schedule in the same storage its decisions give the same bits."""
    method = DBCache(threshold=1.0, front=1, warmup=2, max_consecutive=1)
    results, bytes_of, decisions = {}, {}, {}
    for kind in ("same", storage):
        with layercache.enabled(pipe, method, storage=kind) as cache:
            results[kind], decisions[kind] = generate(pipe), cache.decisions
            bytes_of[kind] = cache.report().cache_bytes
            exported = cache.export_schedule()
    assert any(not computed for computed in decisions["same"]["cond"])
    assert (bytes_of[storage] < bytes_of["same"]) is (storage == "compact")
    assert torch.equal(results[storage], results["same"]) is (storage == "float32")  # the model is in float32
    assert psnr(results[storage], results["same"]) > 20
    with layercache.enabled(pipe, exported, storage=storage):
        assert torch.equal(generate(pipe), results[storage])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("storage", ["same", "float32", "compact"])
@pytest.mark.parametrize("decides", [False, True])
def test_a_bad_residual_is_reported_from_any_storage(pipe, plan, storage, value, decides):
    plan = FBCache(threshold=0.1) if decides else plan
    with layercache.enabled(pipe, plan, storage=storage) as cache:
        hook = pipe.transformer.transformer_blocks[0].register_forward_hook(
            lambda module, args, output: (output[0], output[1] * value)
        )
        try:
            with pytest.warns(NonFiniteWarning, match="samples 0, 1 of the batch"):
                generate(pipe)
        finally:
            hook.remove()
        with pytest.raises(NonFiniteResidualError):
            cache.check()


def test_storage_is_checked(pipe, plan):
    with pytest.raises(CacheStateError, match="same, float32, compact"):
        layercache.enable(pipe, plan, storage="fp4")
    with pytest.raises(CacheStateError, match="EasyCache stores others"):
        layercache.enable(pipe, EasyCache(), storage="compact")
    assert attachment_of(pipe.transformer) is None


def test_streams_are_described():
    stream = torch.zeros(1, 2, 3)
    with pytest.raises(CacheStateError, match=r"is of shape \(1, 2, 3\) and torch.float32 and gives .* is not there;"):
        check_alike(stream, None)


def test_a_slot_without_memory_holds_nothing_bad():
    assert Storage().is_finite(Buffer())
