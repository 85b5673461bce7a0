"""Timestep tables: which layers become one, the same bits, and what is refused, noticed or computed in full."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._dynamo.testing import CompileCounter

import layercache
from layercache.errors import ArgumentError, CacheStateError, LayerCacheWarning, UnsupportedModelError
from layercache.runtime import transformer_tables
from layercache.runtime.projections import ADAPTED, QUANTISED
from support.marks import slow
from support.tiny import generate as make_pictures
from support.tiny import mixed_cells, schedule_for, tiny_pipeline
from support.zoo import build
from support.zoo_pipelines import PIPELINES, _wan_two_experts, generate, make

STEPS = 2
QWEN = "QwenImageTransformer2DModel"


def pipeline(name, **more):
    pipe, call = PIPELINES[name]()
    return pipe, call | {"num_inference_steps": STEPS} | more


def with_other_prompt(call):
    prompt = call["prompt_embeds"]
    other = [one * 0.5 for one in prompt] if isinstance(prompt, list) else prompt * 0.5
    return call | {"prompt_embeds": other}


def blocks(pattern, count=4):
    return {pattern.format(k) for k in range(count)}


JOINT, SINGLE = "joint_transformer_blocks.{}.norm1", "single_transformer_blocks.{}.norm1.linear"
COGVIDEOX = blocks("transformer_blocks.{}.norm1.linear") | blocks("transformer_blocks.{}.norm2.linear")
PROJECTIONS = {
    "qwen-image": {"time_text_embed.timestep_embedder.linear_2", "norm_out.linear"}
    | blocks("transformer_blocks.{}.img_mod.1")
    | blocks("transformer_blocks.{}.txt_mod.1"),
    "wan, UniPC": {"condition_embedder.time_embedder.linear_2", "condition_embedder.time_proj"},
    "cogvideox, DDIM": {"time_embedding.linear_2", "norm_out.linear"} | COGVIDEOX,
    "lumina 2": {"time_caption_embed.timestep_embedder.linear_2", "noise_refiner.0.norm1.linear", "norm_out.linear_1"}
    | blocks("layers.{}.norm1.linear"),
    "z-image": {"t_embedder.mlp.2", "all_final_layer.2-1.adaLN_modulation.1"}
    | {"noise_refiner.0.adaLN_modulation.0", *blocks("layers.{}.adaLN_modulation.0")},
    "aura flow": {"time_step_proj.linear_2", "norm_out.linear", *blocks(SINGLE, 2)}
    | blocks(JOINT + ".linear", 2)
    | blocks(JOINT + "_context.linear", 2),
    "ltx": {"time_embed.emb.timestep_embedder.linear_2", "time_embed.linear"},
    "pixart": {"adaln_single.emb.timestep_embedder.linear_2", "adaln_single.linear"},
}
SLOW = slow("cogvideox, DDIM", "lumina 2", "z-image", "aura flow", "ltx", "pixart")


@pytest.mark.parametrize("name", ["qwen-image", "wan, UniPC", *SLOW])
def test_folded_layers_bytes_and_bits(name):
    pipe, call = pipeline(name)
    if name.startswith("cogvideox"):  # so that its tables are smaller than its weights
        pipe.transformer = build("CogVideoXTransformer3DModel", time_embed_dim=32)[0]
    plain = [generate(pipe, call), generate(pipe, with_other_prompt(call), seed=1)]
    total = sum(p.nbytes for p in (*pipe.transformer.parameters(), *pipe.transformer.buffers()))
    with layercache.fold_timesteps(pipe, STEPS) as tables:
        assert torch.equal(generate(pipe, call), plain[0])
        assert torch.equal(generate(pipe, with_other_prompt(call), seed=1), plain[1])
        report = tables.report()
        layers = [pipe.transformer.get_submodule(one) for one in report.names]
        assert set(report.names) == PROJECTIONS[name] and not report.kept
        assert report.weights == sum(p.nbytes for layer in layers for p in layer.parameters())
        batch = layers[0]._layercache_table.shape[1] // layers[0].out_features
        guarded = [layer for layer in layers if layer._layercache_inputs is not None]
        numbers = sum(layer.out_features for layer in layers) + sum(layer.in_features for layer in guarded)
        assert report.tables == (STEPS + 1) * batch * (4 * numbers + 8)  # float32; the timesteps in float64
        assert (report.before, report.after) == (total, total - report.weights + report.tables)
        assert report.is_released and report.computed == report.rows == STEPS
        assert report.looked_up >= 2 * STEPS and not report.in_full
    assert tables.report() == report and f"{report.projections} projections" in repr(tables)
    assert not [name for module in pipe.transformer.modules() for name in module.__dict__ if "_layercache" in name]
    assert "maybe_free_model_hooks" not in pipe.__dict__ and all(type(layer) is nn.Linear for layer in layers)
    assert torch.equal(generate(pipe, call), plain[0])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sd3", "9 of its layers also depend on pooled_projections"),
        *slow(("flux 2", "4 of its layers also depend on guidance")),
        ("chroma", "3 of its layers would take more memory as tables"),
        *slow(("cogview 4", "5 of its layers also depend on crop_coords, original_size, target_size")),
        *slow(("hunyuan video", "7 of its layers also depend on pooled_projections")),
        *slow(("mochi", "9 of its layers also depend on encoder_attention_mask, encoder_hidden_states")),
    ],
)
def test_refused_where_something_else_enters(name, why):
    pipe, call = pipeline(name)
    full = generate(pipe, call)
    with pytest.raises(UnsupportedModelError, match=why):
        layercache.fold_timesteps(pipe, STEPS, **call)
    tables = layercache.fold_timesteps(pipe, STEPS)
    with pytest.raises(UnsupportedModelError, match=why):
        generate(pipe, call)
    tables.undo()
    assert torch.equal(generate(pipe, call), full)


def forward_of(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def test_conditions_of_qwen_image_beside_the_timestep():
    model, inputs = build(QWEN, use_additional_t_cond=True)
    inputs["additional_t_cond"] = torch.tensor([1, 0])
    with pytest.raises(UnsupportedModelError, match="9 of its layers also depend on additional_t_cond"):
        layercache.fold_timesteps(model, STEPS)
        forward_of(model, inputs)
    # here every projection is also given the timestep 0, for reference pictures: one more row of each, the same bits
    model, inputs = build(QWEN, zero_cond_t=True)
    inputs["img_shapes"] = [[(1, 2, 4), (1, 2, 4)]] * 2
    full = forward_of(model, inputs)
    with layercache.fold_timesteps(model, 1) as tables:
        assert torch.equal(forward_of(model, inputs), full)
        assert tables.report().projections >= 9


def test_other_timesteps_are_computed_and_kept():
    """Another number of steps, img2img that begins in the middle, and more timesteps than there is room for."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4
    )
    vae.register_to_config(latents_std=[1.0] * 4)
    pipe = make("QwenImageImg2ImgPipeline", QWEN, vae=vae)
    _, call = pipeline("qwen-image", num_inference_steps=5, image=torch.rand(1, 3, 32, 32))
    calls = [call | {"strength": 0.6}, call | {"strength": 1.0}, call | {"num_inference_steps": 4, "strength": 1.0}]
    full = [generate(pipe, one) for one in calls]
    with layercache.fold_timesteps(pipe, 5) as tables:
        rows = []
        for one, picture in zip(calls, full, strict=True):
            assert torch.equal(generate(pipe, one), picture)
            rows.append((tables.report().rows, tables.report().computed))
        assert rows[:2] == [(3, 3), (5, 5)]
        assert rows[2][0] == 5 and rows[2][1] > 5
        with pytest.warns(LayerCacheWarning, match="more than 5 distinct timesteps"):
            assert torch.equal(generate(pipe, calls[1]), full[1])


def test_batches_of_several_timesteps_other_batches_and_autocast():
    model, inputs = build(QWEN)
    mixed = inputs | {"timestep": torch.tensor([0.25, 0.75])}
    single = {name: value[:1] for name, value in inputs.items()}
    plain = [forward_of(model, one) for one in (inputs, mixed, single)]
    with layercache.fold_timesteps(model, STEPS) as tables:
        for _ in range(2):
            assert all(
                torch.equal(forward_of(model, one), x) for one, x in zip((inputs, mixed, single), plain, strict=True)
            )
        assert (tables.report().rows, tables.report().computed, len(tables.parts[0].kinds)) == (3, 3, 2)
        with pytest.warns(LayerCacheWarning, match="autocast"), torch.autocast("cpu", torch.bfloat16):
            low = forward_of(model, inputs)
        with pytest.warns(LayerCacheWarning, match="NaN"):
            assert forward_of(model, inputs | {"timestep": torch.full((2,), torch.nan)}).isnan().all()
        with pytest.warns(LayerCacheWarning, match="gradients"):
            model(**inputs)[0].sum().backward()
        assert tables.report().in_full.total() == 3
        assert model.norm_out.linear.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low, forward_of(model, inputs))


@pytest.fixture
def as_if_on_accelerator(monkeypatch):
    """The host asks for the values of timesteps only where it has to, as it does of a GPU."""
    monkeypatch.setattr(transformer_tables, "is_on_accelerator", lambda tensor: True)


def test_a_known_run_is_not_read_and_a_wrong_timestep_never_passes(as_if_on_accelerator, monkeypatch):
    pipe, call = pipeline("qwen-image")
    full = generate(pipe, call)
    with layercache.fold_timesteps(pipe, STEPS + 1) as tables:
        assert torch.equal(generate(pipe, call), full)
        with monkeypatch.context() as patched:
            patched.setattr(transformer_tables.Tables, "row_of", None)
            assert torch.equal(generate(pipe, call), full)
        calls = []
        pipe.transformer.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
        generate(pipe, call)
        pipe.scheduler._step_index = 0  # another loop runs on the model, while this one seems to be at a step
        other = calls[0] | {"timestep": torch.tensor([0.123]), "return_dict": False}
        assert forward_of(pipe.transformer, other).isnan().all()
        with pytest.raises(CacheStateError, match="Run it again"):
            tables.check()
        assert torch.isfinite(forward_of(pipe.transformer, other)).all()
        assert torch.equal(generate(pipe, call), full)


class Quantised(nn.Linear):
    """Of another class than torch's own."""


class Scaled(nn.Module):
    """Its embedding depends on a number that is no tensor, and on a pooled text where one is given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 16), nn.Linear(16, 32), nn.Linear(32, 64))

    def forward(self, hidden_states, timestep, scale=1.0, pooled=None):
        embedding = self.layers[:2](timestep[:, None] * scale)
        return (self.layers[2](embedding if pooled is None else embedding + pooled) + hidden_states,)


def test_a_layer_is_given_up_where_another_forward_gives_it_more():
    model = Scaled()
    inputs = {"hidden_states": torch.zeros(1, 64), "timestep": torch.tensor([0.5])}
    more = inputs | {"pooled": torch.ones(1, 32)}
    full = [forward_of(model, inputs), forward_of(model, more)]
    with layercache.fold_timesteps(model, 2, **inputs) as tables:
        assert torch.equal(forward_of(model, inputs), full[0]) and tables.report().names == ("layers.1", "layers.2")
        with pytest.warns(LayerCacheWarning, match="1 projections depend on more than the timestep"):
            assert torch.equal(forward_of(model, more), full[1])
        assert torch.equal(forward_of(model, inputs), full[0]) and tables.report().names == ("layers.1",)
        assert torch.equal(forward_of(model, more | {"pooled": torch.zeros(1, 32)}), full[0])
    tables = layercache.fold_timesteps(model, 2, **inputs)
    for index in (1, 2):  # all that was folded is something else now
        layer = Quantised(*reversed(model.layers[index].weight.shape))
        layer.load_state_dict(model.layers[index].state_dict())
        model.layers[index] = layer
    with pytest.warns(LayerCacheWarning, match="2 of its layers have quantised or sharded weights"):
        assert torch.equal(forward_of(model, inputs), full[0])
    assert torch.equal(forward_of(model, inputs), full[0]) and not tables.parts[0]._lock.is_held
    assert "nothing is folded" in repr(tables)


def test_a_number_that_enters_the_embedding_is_noticed():
    model = Scaled()
    inputs = {"hidden_states": torch.zeros(1, 64), "timestep": torch.tensor([0.5])}
    full = forward_of(model, inputs)
    tables = layercache.fold_timesteps(model, 2)
    assert torch.equal(forward_of(model, inputs), full) and tables.report().projections == 2
    assert torch.equal(forward_of(model, inputs | {"scale": 1.0}), full)
    with pytest.raises(CacheStateError, match="The tables are undone"):
        forward_of(model, inputs | {"scale": 2.0})
    assert type(model.layers[1]) is nn.Linear and not torch.equal(forward_of(model, inputs | {"scale": 2.0}), full)


class Switched(nn.Module):
    """Reads the timestep on the host: from 0.5 on, the second projection gets something else than the first one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 32), *(nn.Linear(32, 64) for _ in range(3))])

    def forward(self, hidden_states, timestep):
        embedding = self.layers[0](timestep[:, None])
        other = embedding * (2.0 if timestep.tolist()[0] > 0.5 else 1.0)
        made = [self.layers[1](embedding), self.layers[2](other), self.layers[3](embedding)]
        return (hidden_states + sum(made),)


def test_every_new_row_is_verified_in_the_forward_that_takes_it():
    model = Switched()
    low, high = ({"hidden_states": torch.zeros(1, 64), "timestep": torch.tensor([time])} for time in (0.2, 0.7))
    tables = layercache.fold_timesteps(model, 2, **low)
    forward_of(model, low)
    assert [layer._layercache_inputs is None for layer in model.layers[1:]] == [False, True, False]
    with pytest.raises(CacheStateError, match="The tables are undone"):
        forward_of(model, high)
    assert "nothing is folded" in repr(tables) and type(model.layers[2]) is nn.Linear


def add_adapter(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["img_mod.1", "to_q"], init_lora_weights=False))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_lora_weights_quantised_layers_and_changes_are_noticed():
    pipe, call = pipeline("qwen-image")
    plain = generate(pipe, call)
    tables = layercache.fold_timesteps(pipe, STEPS)
    assert torch.equal(generate(pipe, call), plain)
    add_adapter(pipe.transformer)
    adapted = generate(pipe, call)
    assert (tables.report().projections, tables.report().kept) == (6, {ADAPTED: 4})
    pipe.transformer.disable_adapters()
    assert torch.equal(generate(pipe, call), plain)
    pipe.transformer.enable_adapters()
    with torch.no_grad():
        pipe.transformer.norm_out.linear.weight.mul_(1.5)
    generate(pipe, call)
    with torch.no_grad():
        pipe.transformer.norm_out.linear.bias.add_(0.5)
    changed = generate(pipe, call)
    assert tables.report().projections == 6
    tables.undo()
    assert torch.equal(generate(pipe, call), changed) and not torch.equal(adapted, changed)
    pipe.transformer.transformer_blocks[0].img_mod[1].base_layer.__class__ = Quantised
    with layercache.fold_timesteps(pipe, STEPS) as tables:
        assert torch.equal(generate(pipe, call), changed)
        assert tables.report().kept == {ADAPTED: 3, QUANTISED: 1}


@pytest.mark.slow
def test_peft_without_the_models_own_methods_is_noticed():
    pipe, call = pipeline("qwen-image")
    tables = layercache.fold_timesteps(pipe, STEPS)
    plain = generate(pipe, call)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["img_mod.1"], init_lora_weights=False), pipe.transformer)
    adapted = generate(pipe, call)
    assert tables.report().kept == {ADAPTED: 4}
    tables.undo()
    assert torch.equal(generate(pipe, call), adapted) and not torch.equal(adapted, plain)


def test_offloaded_models_and_wrong_arguments_are_refused():
    pipe, call = pipeline("qwen-image")
    for steps in (0, True, 2.5):
        with pytest.raises(ArgumentError, match="distinct timesteps"):
            layercache.fold_timesteps(pipe, steps)
    with pytest.raises(UnsupportedModelError, match="no argument that holds a timestep"):
        layercache.fold_timesteps(nn.Linear(2, 2), STEPS)
    tables = layercache.fold_timesteps(pipe, STEPS)
    with pytest.raises(CacheStateError, match="already"):
        layercache.fold_timesteps(pipe, STEPS)
    generate(pipe, call)
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(CacheStateError, match="group_offloading"):
        generate(pipe, call)
    tables.undo()
    with pytest.raises(CacheStateError, match="group_offloading"):
        layercache.fold_timesteps(pipe, STEPS)
    model = build(QWEN)[0]
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(CacheStateError, match="accelerate"):
        layercache.fold_timesteps(model, STEPS)


def test_copies_files_and_casts():
    pipe, call = pipeline("qwen-image")
    names = list(pipe.transformer.state_dict())
    tables = layercache.fold_timesteps(pipe, STEPS)
    plain = generate(pipe, call)
    assert list(pipe.transformer.state_dict()) == names
    for other in (copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))):
        assert type(other.norm_out.linear) is nn.Linear
        both = pipe.transformer, other
        pipe.transformer = other
        assert torch.equal(generate(pipe, call), plain)
        pipe.transformer = both[0]
    pipe.transformer.to(torch.bfloat16)
    call |= {name: call[name].bfloat16() for name in ("prompt_embeds", "negative_prompt_embeds")}
    low = generate(pipe, call)
    assert (tables.report().rows, low.dtype) == (STEPS, torch.bfloat16)
    tables.undo()
    assert torch.equal(generate(pipe, call), low)


def test_released_weights_stay_on_the_host_when_the_model_moves():
    """So a model that fits no accelerator with them can be moved there without them."""
    model, inputs = build(QWEN)
    with layercache.fold_timesteps(model, 1, **inputs) as tables:
        report = tables.report()
        assert (report.projections, report.rows, report.looked_up) == (10, 0, 0)
        assert report.is_released and "on the host" in repr(tables)
        layer, weight = model.norm_out.linear, model.norm_out.linear.weight
        model.to("meta")
        moved = [one.nbytes for one in (*model.parameters(), *model.buffers()) if one.is_meta]
        assert sum(moved) == report.before - report.weights
        assert layer.weight is weight and weight.device.type == "cpu"
        assert tables.report().tables == 0
    assert layer.weight.is_meta  # where the rest of the model is


@pytest.mark.parametrize("order", ["folded first", *slow("cached first")])
def test_with_a_cache(order):
    """Rows are computed whether or not a block runs at that step, and are there when it is computed again."""
    pipe, cells = tiny_pipeline(layers=3), mixed_cells(5)
    schedule = schedule_for(pipe, cells, ((0, 1), (1, 2), (2, 3)))
    run = partial(make_pictures, steps=5)
    full = run(pipe)
    with layercache.enabled(pipe, schedule):
        cached = run(pipe)
    if order == "cached first":
        layercache.enable(pipe, schedule)
    with layercache.fold_timesteps(pipe, 5) as tables:
        if order == "folded first":
            layercache.enable(pipe, schedule)
        assert torch.equal(run(pipe), cached)
        assert tables.report().rows == 5
        layercache.disable(pipe)
        assert torch.equal(run(pipe), full)
        assert tables.report().computed == 5


@pytest.mark.parametrize("how", slow("blocks", "whole"))
def test_compiled(how):
    torch._dynamo.reset()
    pipe, backend = tiny_pipeline(layers=2), CompileCounter()
    run = partial(make_pictures, steps=3)
    full = run(pipe)
    with layercache.fold_timesteps(pipe, 3) as tables:
        if how == "whole":
            pipe.transformer.compile(backend=backend, fullgraph=True)
        else:
            pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
        assert torch.equal(run(pipe), full)
        graphs = backend.frame_count
        assert torch.equal(run(pipe, prompts=["rocket", "cat"]), run(pipe, prompts=["rocket", "cat"]))
        assert backend.frame_count == graphs == 1
        assert tables.report().is_released
    torch._dynamo.reset()


def test_both_experts_of_a_pipeline():
    pipe, call = _wan_two_experts()
    call |= {"num_inference_steps": 3}
    full = generate(pipe, call)
    with layercache.fold_timesteps(pipe, 3) as tables:
        assert torch.equal(generate(pipe, call), full)
        assert [part.looked_up > 0 for part in tables.parts] == [True, True]
        assert tables.report().projections == 4
