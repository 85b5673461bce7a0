"""Pipelines with random weights, from a description."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from layercache.errors import FileFormatError, MethodError
from layercache.models.random_weights import load_random_pipeline
from layercache.tools.cli.app import app
from layercache.tools.compare.entries import PEERS, CalibratedModel
from support.tiny import randomise

FLUX = Path(__file__).parents[2] / "examples" / "tiny_flux.json"
CALL = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}


@pytest.fixture(scope="module")
def flux():
    pipe = load_random_pipeline(FLUX)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, prompt, seed=0):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **CALL).images


def test_texts_are_prompts(flux):
    fox = latents(flux, "a fox")
    assert type(flux).__name__ == "FluxPipeline" and torch.isfinite(fox).all()
    assert torch.equal(fox, latents(flux, "a fox")) and not torch.equal(fox, latents(flux, "a lake"))
    both = latents(flux, ["a fox", "a lake"])
    assert both.shape[0] == 2


def test_weights_depend_on_the_seed_alone(flux, tmp_path):
    state = torch.random.get_rng_state()
    again = load_random_pipeline(FLUX)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(FLUX.read_text()) | {"seed": 1}))
    weights = [next(p.transformer.parameters()) for p in (flux, again, load_random_pipeline(other))]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    half = load_random_pipeline(FLUX, torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, text",
    [
        ({"pipeline": "NoPipeline"}, "no NoPipeline"),
        ({"components": {"transformer": {"layers": 2}}}, "_class_name"),
        ({"components": {"transformer": {"_class_name": "FluxTransformer2DModel", "depth": 2}}}, "depth"),
        ({"weights": "random"}, "unknown entries weights"),
    ],
)
def test_what_cannot_be_made_is_said(tmp_path, change, text):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(json.loads(FLUX.read_text()) | change))
    with pytest.raises(FileFormatError, match=text):
        load_random_pipeline(path)
    with pytest.raises(FileFormatError):
        load_random_pipeline(tmp_path / "missing.json")


FLUX_SIZES = {"_class_name": "FluxTransformer2DModel", "joint_attention_dim": 32, "pooled_projection_dim": 32}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vae": {"_class_name": "ModularPipeline", "pretrained_model_name_or_path": "a/b"}}, "is no transformer, VAE"),
        ({"vae": {"_class_name": "AutoPipelineForText2Image"}}, "is no transformer, VAE"),
        ({"vae": {"_class_name": "utils"}}, "has no utils"),
        ({"vae": {"_class_name": ["AutoencoderKL"]}}, "has no"),
        ({"transformer": FLUX_SIZES | {"num_layers": 4000}}, "takes more than .* GB"),
        pytest.param(
            {"transformer": FLUX_SIZES | {"num_layers": 10**6, "attention_head_dim": 2}},
            "takes more|more than 100000",
            marks=pytest.mark.slow,
        ),
        ({"scheduler": {"_class_name": "DDIMScheduler", "num_train_timesteps": 10**12}}, "no entry is larger"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "cannot make"),
    ],
)
def test_only_models_of_diffusers_that_fit_are_made(tmp_path, monkeypatch, change, text):
    """No network, and no memory before it is known how much."""
    import socket

    def connect(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    data, path = json.loads(FLUX.read_text()), tmp_path / "model.json"
    path.write_text(json.dumps(data | {"components": data["components"] | change}))
    with pytest.raises(FileFormatError, match=text):
        load_random_pipeline(path)


def test_the_limit_of_memory_is_an_argument():
    with pytest.raises(FileFormatError, match=r"takes more than 0.001 GB.*max_bytes"):
        load_random_pipeline(FLUX, max_bytes=10**6)


@pytest.mark.parametrize(
    "change", [{"pipeline": "FluxTransformer2DModel"}, {"prompt": {"prompt_embeds": [10**6, 10**6]}}]
)
def test_other_entries_are_bounded_too(tmp_path, change):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(FLUX.read_text()) | change))
    with pytest.raises(FileFormatError, match="is no pipeline|numbers"):
        load_random_pipeline(path)


@pytest.mark.slow
def test_comparison_of_a_described_model(tmp_path):
    arguments = ["compare", "--model", str(FLUX), "-p", "a fox", "--methods", "uniform,fbcache", "--budgets", "0.6"]
    arguments += ["--steps", "5", "--seeds", "1", "--batch", "1", "--calibration", "1", "--height", "32"]
    arguments += ["--width", "32", "--dtype", "float32", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    outcomes = json.loads((tmp_path / "compare.json").read_text())["outcomes"]
    assert [o["method"] for o in outcomes] == ["uniform", "fbcache"] and not any(o["error"] for o in outcomes)


WAN = {
    "pipeline": "WanPipeline",
    "components": {
        "transformer": {
            "_class_name": "WanTransformer3DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        },
        "vae": {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16, "num_res_blocks": 1},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0},
    },
    "prompt": {"prompt_embeds": [8, 16], "negative_prompt_embeds": [8, 16]},
}


def test_seacache_runs_where_it_applies(flux, tmp_path):
    with pytest.raises(MethodError, match="WanTransformer3DModel"):
        PEERS["diffusers:seacache"](CalibratedModel(flux, [["a fox"]], [0], CALL, [0.6]), 0.6)
    (tmp_path / "wan.json").write_text(json.dumps(WAN))
    pipe = load_random_pipeline(tmp_path / "wan.json")
    pipe.set_progress_bar_config(disable=True)
    randomise(pipe.transformer)
    call = {"num_inference_steps": 8, "height": 16, "width": 16, "num_frames": 5, "output_type": "latent"}
    entry = PEERS["diffusers:seacache"](CalibratedModel(pipe, [["a fox"]], [0], call, [0.6]), 0.6)
    assert entry.setting.startswith("threshold") and not pipe.transformer.is_cache_enabled
    with entry.attach():
        assert pipe.transformer.is_cache_enabled
