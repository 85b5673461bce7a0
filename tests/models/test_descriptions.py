"""What is said of the inside of the blocks: the modulated input, and the modules that can be cached apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import layercache
from layercache import ops
from layercache.errors import MethodError, UnsupportedModelError
from layercache.methods.l2c import LearningToCache
from layercache.methods.l2c_training import Training, interpolated
from layercache.methods.teacache import IDENTITY, TeaCache
from layercache.models import registry
from layercache.models.registry import known_models, spec_for, velocities
from layercache.models.spec import named_arguments
from layercache.runtime.attachment import attach
from layercache.runtime.modules import ModuleRouter, copy_of, module_units
from layercache.schedule.memory_plan import COMPUTE, GroupAction
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.tools.report.tables import model_rows, models_table
from support.forwards import next_step
from support.marks import slow
from support.text import plain_text
from support.tiny import fingerprint
from support.zoo import MODELS, build

MODULATED = sorted(spec.model_class for spec in known_models() if spec.modulation and spec.model_class in MODELS)
DIVIDED = sorted(spec.model_class for spec in known_models() if spec.modules and spec.model_class in MODELS)
UNMODULATED = {
    "LTX2VideoTransformer3DModel",  # RMSNorm
    "LTXVideoTransformer3DModel",  # RMSNorm
    "Lumina2Transformer2DModel",  # RMSNorm
    "MochiTransformer3DModel",  # RMSNorm
    "ZImageTransformer2DModel",  # RMSNorm
}
UNDIFFERENTIABLE = {
    "HiDreamImageTransformer2DModel",  # no gradient passes through its experts
}
DUAL = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
NO_POSITIONS = {"extra_pos_embed_type": None}
AFFINE = {"norm_elementwise_affine": True}
SD3, COSMOS, WAN = "SD3Transformer2DModel", "CosmosTransformer3DModel", "WanTransformer3DModel"
HUNYUAN, PIXART, SKY = "HunyuanVideoTransformer3DModel", "PixArtTransformer2DModel", "SkyReelsV2Transformer3DModel"
VARIANTS = [(SD3, DUAL), (PIXART, AFFINE), ("CogVideoXTransformer3DModel", {"norm_elementwise_affine": False})]
TEACACHE = TeaCache(threshold=0.01, coefficients=IDENTITY, cooldown=0)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    """The steps of these tests share one timestep."""
    for spec in known_models():
        monkeypatch.setitem(registry._REGISTRY, spec.model_class, replace(spec, timestep=None))


def test_what_is_said_of_which_class():
    assert set(MODELS) - set(MODULATED) == UNMODULATED
    assert set(DIVIDED) == set(MODELS)
    assert {spec.model_class for spec in known_models() if not spec.differentiable} == UNDIFFERENTIABLE
    rows = {row["model"]: row for row in model_rows()}
    assert not rows["HiDreamImageTransformer2DModel"]["learning_to_cache"]
    assert plain_text(models_table(list(rows.values()))).count("InvarDiff only") == len(UNDIFFERENTIABLE)


# --- the modulated input -------------------------------------------------------------------------------------


def first_query(block: nn.Module) -> nn.Module:
    """What the modulated input enters first: the query projection of the block's first attention."""
    return next(m for name, m in block.named_modules() if name.rpartition(".")[2] in ("to_q", "to_query"))


@pytest.mark.parametrize(
    ("name", "changed"),
    [(name, NO_POSITIONS if name == COSMOS else {}) for name in MODULATED] + VARIANTS,
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_the_modulated_input_is_what_enters_the_first_attention(name, changed, monkeypatch):
    model, inputs = build(name, **changed)
    looked, entered, original = [], [], ops.modulate

    def modulate(*args, **kwargs):
        z, statistics = original(*args, **kwargs)
        looked.append(z.clone())
        return z, statistics

    monkeypatch.setattr(ops, "modulate", modulate)
    query = first_query(spec_for(model).block_modules(model)[0][0])
    hook = query.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    expected = next_step(model, inputs)
    with layercache.enabled(model, TEACACHE, num_steps=3) as cache:
        next_step(model, inputs)
        hook.remove()
        again = next_step(model, inputs)
        assert cache.report().cached_cells == 1
    own = entered[1][:, -looked[0].shape[1] :]  # some join the text in front of it
    torch.testing.assert_close(looked[0], own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("name", MODULATED)
def test_the_modulation_has_the_streams_dtype(name):
    """In bf16, with what diffusers keeps in fp32."""
    model, inputs = build(name, **(NO_POSITIONS if name == COSMOS else {}))
    model.to(torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        if set(model._keep_in_fp32_modules or ()) & set(parameter_name.split(".")):
            parameter.data = parameter.data.float()
    spec, seen = spec_for(model), []
    block = spec.block_modules(model)[0][0]

    def look(module, args, kwargs):
        stream = spec.calls(0).given(args, kwargs)
        scale, shift, eps = spec.modulation(module, named_arguments(module, args, kwargs))
        seen.append(ops.modulate(stream.contiguous(), scale, shift, eps=eps)[0].dtype)
        raise StopIteration

    hook = block.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(StopIteration):
        next_step(model, {key: in_bf16(value) for key, value in inputs.items()})
    hook.remove()
    assert seen == [torch.bfloat16]


def in_bf16(value):
    if isinstance(value, list):
        return [in_bf16(entry) for entry in value]
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def per_token(inputs: dict) -> dict:
    """A timestep for every token of the 2 x 2 x 2 of the picture."""
    return inputs | {"timestep": torch.full((2, 8), 500.0)}


def per_frame(inputs: dict) -> dict:
    return inputs | {"timestep": torch.full((2, 2), 500.0), "enable_diffusion_forcing": True}


def per_frame_of_cosmos(inputs: dict) -> dict:
    return inputs | {"timestep": torch.full((2, 1, 2, 1, 1), 0.5)}


@pytest.mark.parametrize(
    ("name", "changed", "change", "message"),
    [
        (COSMOS, {}, dict, "extra_pos_embed_type"),
        (COSMOS, NO_POSITIONS, per_frame_of_cosmos, "every frame"),
        (HUNYUAN, {"image_condition_type": "token_replace"}, dict, "token_replace"),
        (WAN, {}, per_token, "every token"),
        (SKY, {}, per_frame, "every token"),
    ],
)
def test_what_one_scale_cannot_say_is_refused(name, changed, change, message):
    model, inputs = build(name, **changed)
    inputs = change(inputs)
    next_step(model, inputs)
    with (
        layercache.enabled(model, TEACACHE, num_steps=3),
        pytest.raises(UnsupportedModelError, match=message) as caught,
    ):
        next_step(model, inputs)
    assert "take FBCache instead" in str(caught.value)


@pytest.mark.parametrize("name", sorted(UNMODULATED))
def test_models_without_a_modulated_input_are_refused(name):
    model, _ = build(name)
    with pytest.raises(MethodError, match=f"{name} does not say how to get it; take fbcache"):
        layercache.enable(model, TEACACHE, num_steps=3)


def test_arguments_by_name():
    class Block(nn.Module):
        def forward(self, x, temb, *args, mask=None, **kwargs): ...

    assert named_arguments(Block(), (1, 2, 3), {"mask": 4}) == {"x": 1, "temb": 2, "mask": 4}
    assert named_arguments(torch.compile(Block()), (1,), {"temb": 2}) == {"x": 1, "temb": 2}
    assert named_arguments(Block(), (), {"x": 1}) == {"x": 1}


# --- modules cached apart ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*DIVIDED, "SD3 with two attentions"])
def divided(request):
    return build(SD3, **DUAL) if request.param not in MODELS else build(request.param)


def module_schedule(model: nn.Module, rows: list, reused: tuple[int, ...] = ()) -> ModuleSchedule:
    names = tuple(unit.name for unit in module_units(model, spec_for(model)))
    sigmas = (*np.linspace(1, 0.1, len(rows)).tolist(), 0.0)
    table = tuple(tuple(bool(c) for c in np.broadcast_to(row, len(names))) for row in rows)
    return ModuleSchedule(fingerprint(model, sigmas, ("all",)), names, table, frozenset(reused))


def test_every_module_runs_once_in_a_forward(divided):
    model, inputs = divided
    units = module_units(model, spec_for(model))
    runs = dict.fromkeys((unit.name for unit in units), 0)
    hooks = []
    for unit in units:
        assert model.get_submodule(unit.name.partition("+")[0]) is unit.modules[0]
        hooks += [
            module.register_forward_hook(lambda *_, name=unit.name: runs.__setitem__(name, runs[name] + 1))
            for module in unit.modules
        ]
    next_step(model, inputs)
    for hook in hooks:
        hook.remove()
    assert runs == {unit.name: len(unit.modules) for unit in units}


def test_reused_modules_with_the_same_input_give_the_full_step(divided):
    """Computed, reused (all, some), and whole steps reused twice in a row: what is stored is not written into."""
    model, inputs = divided
    expected = next_step(model, inputs)
    count = len(module_units(model, spec_for(model)))
    some = np.random.default_rng(0).random(count) < 0.5
    rows = [True, True, False, some, ~some, False, False, False, True]
    with layercache.enabled(model, module_schedule(model, rows, reused=(5, 6))) as cache:
        found = [next_step(model, inputs) for _ in rows]
        assert cache.report().fallback_rows == 0 and cache.report().forwards == len(rows)
    for step in found:
        assert all(torch.equal(a, b) for a, b in zip(step, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(next_step(model, inputs), expected, strict=True))


def other_inputs(inputs: dict) -> dict:
    """Other noise in the latents."""
    key = "x" if "x" in inputs else "hidden_states"
    value = inputs[key]
    moved = [v * 0.5 + 0.3 for v in value] if isinstance(value, list) else value * 0.5 + 0.3
    return inputs | {key: moved}


@pytest.mark.parametrize("seed", [0, *slow(None)])
def test_reused_modules_give_what_they_gave(divided, seed):
    """Against plain hooks that put the outputs of another forward in the place of the modules' own."""
    model, inputs = divided
    units = module_units(model, spec_for(model))
    reused = np.ones(len(units), bool) if seed is None else np.random.default_rng(seed).random(len(units)) < 0.5
    chosen = [unit.modules[-1] for unit, yes in zip(units, reused, strict=True) if yes]
    kept: dict[nn.Module, object] = {}
    hooks = [m.register_forward_hook(lambda m, a, out: kept.setdefault(m, copy_of(out))) for m in chosen]
    full = next_step(model, inputs)
    expected = next_step(model, other_inputs(inputs))  # the hooks give what the first forward gave
    for hook in hooks:
        hook.remove()
    with layercache.enabled(model, module_schedule(model, [True, ~reused])):
        assert all(torch.equal(a, b) for a, b in zip(next_step(model, inputs), full, strict=True))
        found = next_step(model, other_inputs(inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found, next_step(model, other_inputs(inputs)), strict=True))


class Blending(ModuleRouter):
    """Records the outputs of one forward, and mixes them into those of the next as Learning-to-Cache does."""

    betas: torch.Tensor | None = None

    def __init__(self, model: nn.Module, starts: torch.Tensor):
        super().__init__(model, spec_for(model), None)
        self.starts_at, self.recorded, self.slopes = starts, {}, ()

    def through(self, number, compute):
        output = compute()
        if self.betas is None:
            self.recorded.setdefault(number, copy_of(output))
            return output
        return interpolated(output, self.recorded[number], self.betas[number])

    def after(self, output, rerun):
        """How fast the output moves along a random direction: by the gradient, and by a difference quotient."""
        direction = torch.rand(len(self.units), generator=torch.Generator().manual_seed(1))
        betas, h = self.starts_at.clone().requires_grad_(), 0.05

        def velocity(betas):
            self.betas = betas
            self.open((GroupAction(COMPUTE),))
            return torch.cat([part.flatten().double() for part in velocities(rerun(), self.spec)])

        moved = velocity(betas.detach() + h * direction) - velocity(betas.detach() - h * direction)
        with torch.enable_grad():
            (velocity(betas) * moved).sum().backward()
        self.slopes, self.betas = (float(betas.grad @ direction), float((moved * moved).sum()) / (2 * h)), None


def test_gradients_pass_through_every_module(divided):
    model, inputs = divided
    if type(model).__name__ in UNDIFFERENTIABLE:
        pytest.skip("its experts run without gradients")
    count = len(module_units(model, spec_for(model)))
    router = Blending(model, torch.rand(count, generator=torch.Generator().manual_seed(0)))
    attachment = attach(model, router)
    model.requires_grad_(False)
    try:
        next_step(model, inputs)
        next_step(model, other_inputs(inputs))
    finally:
        attachment.detach()
        model.requires_grad_(True)
    found, expected = router.slopes
    assert found and found == pytest.approx(expected, rel=5e-3, abs=0.0)


def test_learning_needs_gradients():
    model, _ = build("HiDreamImageTransformer2DModel")
    feed_forward, x = model.double_stream_blocks[0].block.ff_i, torch.randn(1, 4, 16, requires_grad=True)
    for parameter in feed_forward.shared_experts.parameters():
        parameter.data.zero_()
    given = feed_forward(x)
    (gradient,) = torch.autograd.grad(given.sum(), x)
    assert given.any() and not gradient.any()
    with pytest.raises(UnsupportedModelError, match=r"no gradient .* take InvarDiff"):
        Training(model, spec_for(model), None, LearningToCache())


def forwards(model: nn.Module, inputs: dict, steps: int):
    """So many steps of a loop with other latents at each, by hand; the outputs."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    latents = torch.zeros(1, 4)

    def run():
        scheduler.set_timesteps(steps)
        found = []
        for k, t in enumerate(scheduler.timesteps):
            own = {name: inputs[name] * (1 - 0.2 * k) for name in ("hidden_states", "audio_hidden_states")}
            found.append([part.clone() for part in next_step(model, inputs | own)])
            scheduler.step(latents, t, latents)
        return found

    return scheduler, run


def test_both_streams_that_leave_a_model_are_learned_from_and_kept():
    """LTX-2: the error of picture and sound, and both of a step that is reused whole."""
    model, inputs = build("LTX2VideoTransformer3DModel")
    scheduler, run = forwards(model, inputs, 2)
    training = Training(model, spec_for(model), scheduler, LearningToCache(by_cost=False))
    training.prepare(2)
    beta = torch.sigmoid(training.theta[0].detach()).tolist()
    attachment = attach(model, training)
    try:
        with torch.no_grad():
            full = run()
    finally:
        attachment.detach()
    kept: dict[str, torch.Tensor] = {}

    def blended(name, share):
        def hook(module, args, output):
            return kept.setdefault(name, output) if name not in kept else share * output + (1 - share) * kept[name]

        return hook

    units = module_units(model, spec_for(model))
    hooks = [u.modules[0].register_forward_hook(blended(u.name, b)) for u, b in zip(units, beta, strict=True)]
    student = run()
    for hook in hooks:
        hook.remove()
    errors = [float((a - b).pow(2).mean()) for a, b in zip(full[1], student[1], strict=True)]
    assert min(errors) > 0 and training.take_sums()[0] == pytest.approx(sum(errors), rel=1e-4)
    with layercache.enabled(model, module_schedule(model, [True, False], reused=(1,))):
        first = next_step(model, inputs)
        again = next_step(model, other_inputs(inputs) | {"audio_hidden_states": inputs["audio_hidden_states"] * 0.5})
    assert len(first) == 2 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
