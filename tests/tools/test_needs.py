"""What a pipeline lacks here, said before anything is loaded; which pipelines are known by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import layercache
from layercache.errors import MissingExtraError, UnsupportedModelError
from layercache.models.known import SPECS
from layercache.models.registry import find_transformer
from layercache.tools import needs
from layercache.tools.cli import app
from layercache.tools.needs import EXTRAS, inspect_model, known_classes, lacking, require
from layercache.tools.pipeline_names import pipelines_of
from support.zoo_pipelines import make

ROOT = Path(layercache.__file__).parents[1]
FLUX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "image_encoder": [None, None],
}


def folder(path, index=FLUX, **files):
    for name, content in {"model_index.json": json.dumps(index), **files}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


@pytest.fixture
def without(monkeypatch):
    """Makes modules look as if they were not installed."""

    def hide(*names):
        original = needs.installed
        monkeypatch.setattr(needs, "installed", lambda module: module not in names and original(module))

    return hide


def test_packages_that_a_pipeline_lacks(tmp_path, without):
    path = folder(
        tmp_path,
        **{
            "tokenizer_2/spiece.model": "",
            "transformer/config.json": json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}),
        },
    )
    assert [sentence.split()[2].strip(",") for sentence in lacking(path)] == ["bitsandbytes"]
    without("transformers", "sentencepiece", "google.protobuf", "accelerate", "bitsandbytes")
    found = lacking(path)
    assert [sentence.split()[2].strip(",") for sentence in found] == [
        "transformers", "sentencepiece", "protobuf", "bitsandbytes"
    ]  # fmt: skip
    assert "text_encoder_2, tokenizer_2" in found[0] and 'pip install "layercache[diffusers]"' in found[0]
    assert any("accelerate" in need.sentence and not need.blocks for need in inspect_model(path).needs)
    with pytest.raises(MissingExtraError, match="it needs transformers, which.*it needs sentencepiece"):
        require(path)
    (path / "tokenizer_2" / "tokenizer.json").write_text("{}")
    assert not any("sentencepiece" in sentence for sentence in lacking(path))


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"unet": ["diffusers", "UNet2DConditionModel"], "_class_name": "StableDiffusionPipeline"}, "UNet2DCondition"),
        (FLUX | {"_class_name": "NextPipeline", "_diffusers_version": "99.1"}, "no NextPipeline, and 99.1 wrote it"),
        (FLUX | {"_class_name": "MyPipeline"}, "code of its own (MyPipeline)"),
        (FLUX | {"_class_name": ["pipeline", "MyPipeline"]}, "code of its own (MyPipeline)"),
    ],
)
def test_pipelines_that_cannot_be_used(tmp_path, index, said):
    found = lacking(folder(tmp_path, index))
    assert len(found) == 1 and said in found[0]


def test_transformers_that_are_not_known_are_noted(tmp_path):
    index = FLUX | {"_class_name": "LattePipeline", "transformer": ["diffusers", "LatteTransformer3DModel"]}
    found = inspect_model(folder(tmp_path, index))
    assert not found.lacking and "infer_model" in found.needs[0].sentence


def test_files_and_places_that_are_no_pipeline(tmp_path, without):
    without("gguf")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (tmp_path / "q4.gguf").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "cut.safetensors").write_text("abc")
    weights = {"double_blocks.0.weight": np.zeros(1, np.float32)}
    save_file(weights, tmp_path / "flux.safetensors")
    save_file(weights | {"text_encoders.t5.weight": np.zeros(1, np.float32)}, tmp_path / "whole.safetensors")
    save_file({"transformer.x.lora_A.weight": np.zeros(1, np.float32)}, tmp_path / "style.safetensors")
    expected = {
        "part": "FluxTransformer2DModel alone",
        "q4.gguf": 'pip install "layercache[gguf]"',
        "notes.txt": "neither a file of weights",
        "cut.safetensors": "no whole file",
        "style.safetensors": "with --lora",
        "nowhere/": "no file or folder that is there",
        "nowhere.safetensors": "no file or folder that is there",
    }
    for name, said in expected.items():
        found = lacking(f"{tmp_path}/{name}")
        assert len(found) == 1 and said in found[0], name
    assert "--transformer" in inspect_model(tmp_path / "flux.safetensors").needs[0].sentence
    assert not inspect_model(tmp_path / "whole.safetensors").needs
    assert not lacking(ROOT / "examples" / "tiny_flux.json") and not lacking("demo")


def test_names_on_the_hub_are_looked_up_in_its_cache(tmp_path, monkeypatch, without):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    place = tmp_path / "models--org--flux"
    folder(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    without("transformers")
    found = inspect_model("org/flux")
    assert found.pipeline == "FluxPipeline" and "cache" in found.what and "transformers" in found.lacking[0]
    assert "transformers" in lacking("org/other")[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in lacking("org/other")[1]


def test_commands_refuse_it_before_they_load_anything(tmp_path, without):
    without("transformers", "sentencepiece")
    path = folder(tmp_path, **{"tokenizer_2/spiece.model": ""})
    result = CliRunner().invoke(app.app, ["calibrate", "--model", str(path), "-p", "a", "-o", str(tmp_path / "p")])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "it needs transformers, which is not" in said and "needs sentencepiece" in said


def test_the_command_says_it_and_fails(tmp_path, without):
    without("transformers")
    result = CliRunner().invoke(app.app, ["doctor", "--model", str(folder(tmp_path)), "--json", "-"])
    model = json.loads(result.stdout)["model"]
    assert result.exit_code == 1 and "needs transformers, which is not installed" in model["lacking"][0]
    assert model["transformers"] == {"transformer": "FluxTransformer2DModel"}
    assert "FluxTransformer2DModel, known to layercache" in result.stderr and "lacking" in result.stderr


DIAGNOSED = """
import sys
from layercache.tools.doctor import diagnose
checks = {check.name: check for check in diagnose().checks}
assert not {"torch", "diffusers", "skimage", "matplotlib"} & set(sys.modules) or checks["torch"].state == "broken"
print(checks["torch"].state, checks["torch"].detail, checks["compiled core"].state, sep="|")
"""


def diagnosed(**more) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | more
    run = subprocess.run([sys.executable, "-c", DIAGNOSED], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().split("|")


def test_doctor_loads_torch_s_library_and_no_large_package():
    """Which would take it seconds; see `DIAGNOSED`."""
    assert diagnosed()[::2] == ["ok", "ok"]


def test_doctor_finds_a_torch_that_does_not_load(tmp_path):
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    state, detail, _ = diagnosed(PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert state == "broken" and "libcudart.so.13" in detail


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, (packages, _) in EXTRAS.items():
        names = {line.split(">")[0].split("[")[0] for line in project["optional-dependencies"][extra]}
        assert names - {"diffusers", "layercache"} == set(packages), extra


def test_known_classes_and_pipelines_are_read_from_the_sources():
    assert known_classes() == {spec.model_class for spec in SPECS}
    assert {"FluxPipeline", "FluxKontextPipeline"} <= set(pipelines_of("FluxTransformer2DModel"))
    assert {"WanPipeline", "WanImageToVideoPipeline"} <= set(pipelines_of("WanTransformer3DModel"))
    unnamed = [name for name in known_classes() if not pipelines_of(name)]
    assert not unnamed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FluxKontextPipeline", "FluxTransformer2DModel"),
        ("StableDiffusionXLPipeline", "DeepCache"),
        ("LattePipeline", "infer_model"),
        ("NoSuchThing", "NoSuchThing"),
    ],
)
def test_models_are_found_by_the_names_of_pipelines(name, said):
    result = CliRunner().invoke(app.app, ["models", name], env={"COLUMNS": "300"})
    assert said in result.output and (result.exit_code == 0) == (name == "FluxKontextPipeline")
    assert "Qwen" not in result.output


def test_a_pipeline_with_a_unet_says_what_to_do():
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=2, layers_per_block=1,
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(UnsupportedModelError, match="UNet2DModel.*layercache models"):
        find_transformer(pipe)
    with pytest.raises(UnsupportedModelError, match="is a UNet.*DeepCache"):
        layercache.enable(unet)
    assert find_transformer(make("SanaPipeline", "SanaTransformer2DModel")) is not None
