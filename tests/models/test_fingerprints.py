"""What a schedule is bound to: the architecture, not how the model is run."""

import dataclasses
import hashlib
import json
import warnings

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel

import layercache
from layercache.errors import LayerCacheWarning, ScheduleMismatchError
from layercache.models.registry import config_hash, count_blocks, fingerprint_of
from layercache.schedule.fingerprint import Fingerprint, call_settings
from layercache.schedule.schedule import Schedule
from support import tiny
from support.tiny import SlopeTransformer, tiny_pipeline

SMALL = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
SMALL |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]}


def flux(**changes):
    return FluxTransformer2DModel(**SMALL | changes)


def written(model) -> Fingerprint:
    """A fingerprint as it comes out of a file."""
    return Fingerprint.from_json(json.loads(json.dumps(fingerprint_of(model, (1.0, 0.5, 0.0), ("",)).to_json())))


def check(prints, model):
    prints.check_model(type(model).__name__, config_hash(model), count_blocks(model))


def hash_of_0_1(model) -> str:
    """As version 0.1 hashed a configuration: all public entries."""
    entries = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()[:12]


def old(model) -> Fingerprint:
    """A fingerprint of version 0.1."""
    return dataclasses.replace(written(model), config_hash=hash_of_0_1(model), architecture={}, settings={})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prints", [written, old])
def test_new_entries_of_the_configuration_void_nothing(prints):
    before = prints(flux())
    for entries in ({"an_option_of_next_year": None}, {"an_option_of_next_year": 3}, {"_private": 1}):
        model = flux()
        model.register_to_config(**entries)
        check(before, model)
    check(before, flux())


@pytest.mark.parametrize("prints", [written, old])
def test_an_argument_that_a_newer_class_takes_voids_nothing_at_its_default(prints):
    before = prints(flux())

    class Newer(FluxTransformer2DModel):
        def __init__(self, *args, qk_scale=1.0, **kwargs):
            super().__init__(*args, **kwargs)

    Newer.__init__.__signature__ = _with_argument("qk_scale", 1.0)
    Newer.__name__ = "FluxTransformer2DModel"
    same, other = flux(), flux()
    for model, value in ((same, 1.0), (other, 2.0)):
        model.register_to_config(qk_scale=value)
        model.__class__ = Newer
    check(before, same)
    with pytest.raises(ScheduleMismatchError):
        check(before, other)


def _with_argument(name, default):
    import inspect

    signature = inspect.signature(FluxTransformer2DModel.__init__)
    added = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    return signature.replace(parameters=[*signature.parameters.values(), added])


@pytest.mark.parametrize("prints", [written, old])
@pytest.mark.parametrize(
    "change", [{"num_layers": 2}, {"guidance_embeds": True}, {"in_channels": 32}, {"patch_size": 2}]
)
def test_another_model_is_refused(prints, change):
    with pytest.raises(ScheduleMismatchError, match="calibrate and plan on this transformer"):
        check(prints(flux()), flux(**change))


def test_a_refusal_names_what_differs():
    with pytest.raises(ScheduleMismatchError, match=r"\(guidance_embeds was False and is True\)"):
        check(written(flux()), flux(guidance_embeds=True))


@pytest.mark.parametrize("prints", [written, old])
def test_models_outside_diffusers_are_the_same_as_before(prints, monkeypatch):
    from layercache.models import registry

    model = SlopeTransformer()
    model.config = {}
    with registry.temporarily_known(layercache.ModelSpec("SlopeTransformer")):
        check(prints(model), model)


def test_another_number_format_quantisation_or_adapter_warns_of_what_was_measured():
    before = written(flux())
    with pytest.warns(LayerCacheWarning, match="measured with number format float32, not bfloat16 as here"):
        check(before, flux().to(torch.bfloat16))
    model = flux()
    model.register_to_config(quantization_config={"quant_method": "bitsandbytes"})
    with pytest.warns(LayerCacheWarning, match="quantisation none, not bitsandbytes"):
        check(before, model)
    model = flux()
    model.peft_config = {"style": object()}
    with pytest.warns(LayerCacheWarning, match="LoRA adapters none, not style"):
        check(before, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(old(flux()), flux().to(torch.bfloat16))  # 0.1 did not write what it measured with


def test_guidance_and_size_are_recorded_and_warned_of(tmp_path):
    pipe = tiny_pipeline(layers=3)
    call = {"num_inference_steps": 4, "guidance_scale": 3.0}
    profile = layercache.calibrate(pipe, ["cat"], progress=False, max_distance=2, max_span=1, **call)
    profile = layercache.StabilityProfile.load(profile.save(tmp_path / "p.safetensors"))
    assert profile.fingerprint.settings["guidance"] == ["guidance_scale 3"]
    front = layercache.search(pipe, ["cat"], budgets=(0.8,), effort="quick", progress=False, **call)
    for prints in (profile.fingerprint, front.points[0].schedule.fingerprint):
        with pytest.warns(LayerCacheWarning, match="with guidance guidance_scale 3, not guidance_scale 5 as here"):
            prints.warn_of(call_settings({"guidance_scale": 5.0}))


def test_guidance_by_the_pipelines_own_default_is_recorded():
    pipe = tiny_pipeline(layers=3)
    profile = layercache.calibrate(
        pipe, ["cat"], progress=False, max_distance=2, max_span=1, num_inference_steps=3, height=32
    )
    assert profile.fingerprint.settings["guidance"] == ["guidance_scale 4"]
    assert profile.fingerprint.settings["size"] == ["height 32", "width 32"]
    schedule = layercache.plan(profile, budget=1.0)
    with layercache.enabled(pipe, schedule), warnings.catch_warnings():
        warnings.simplefilter("error", LayerCacheWarning)
        pipe("cat", num_inference_steps=3)
        with pytest.raises(LayerCacheWarning, match="guidance_scale 4, not guidance_scale 5"):
            pipe("cat", num_inference_steps=3, guidance_scale=5.0)


def test_a_schedule_of_0_1_runs_on_its_model(tmp_path):
    pipe = tiny_pipeline()
    schedule = tiny.schedule_for(pipe, tiny.mixed_cells())
    schedule = dataclasses.replace(
        schedule, fingerprint=dataclasses.replace(schedule.fingerprint, config_hash=hash_of_0_1(pipe.transformer))
    )
    data = json.loads(schedule.to_json())
    del data["checksum"], data["fingerprint"]["architecture"], data["fingerprint"]["settings"]
    (tmp_path / "old.json").write_text(json.dumps(data | {"version": 2}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LayerCacheWarning)
        with layercache.enabled(pipe, Schedule.load(tmp_path / "old.json")):
            assert torch.isfinite(tiny.generate(pipe)).all()
        with pytest.raises(ScheduleMismatchError):
            layercache.enable(tiny_pipeline(layers=5), Schedule.load(tmp_path / "old.json"))


def test_a_model_in_wrappers_of_peft_and_the_compiler_is_found():
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    config = peft.LoraConfig(r=2, target_modules=["to_q"])
    wrapped = peft.get_peft_model(pipe.transformer, config)
    assert isinstance(wrapped.get_base_model(), QwenImageTransformer2DModel)
    schedule = tiny.schedule_for(tiny_pipeline(), tiny.mixed_cells())
    expected = tiny.generate(pipe)
    for model in (wrapped, torch.compile(wrapped)):
        pipe.transformer = model
        with pytest.warns(LayerCacheWarning, match="LoRA adapters none, not default"):
            cache = layercache.enable(pipe, schedule)
        assert cache.transformer is wrapped.get_base_model()
        layercache.disable(pipe)
    pipe.transformer = wrapped
    with layercache.enabled(pipe, Schedule.compute_all(schedule.fingerprint)):
        assert torch.equal(tiny.generate(pipe), expected)
