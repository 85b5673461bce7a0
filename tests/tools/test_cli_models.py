"""What ``--model`` and the options beside it name, the arguments of the call, and the files of a result."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

import layercache
from layercache.tools.cli import loading, results
from layercache.tools.cli.options import CallOptions, Dtype, ModelOptions
from layercache.tools.cli.pipelines import call_arguments, load_pipeline
from support import saved_pipelines as saved
from support.commands import done, frames_of, refused, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- what a model is -----------------------------------------------------------------------------------------------


@pytest.fixture
def flux(folder) -> Path:
    return saved.saved_in(folder, "flux")


def generate_on(*words: object) -> str:
    return refused("generate", "-p", "a fox", "--steps", 2, *words)


def test_paths_that_lead_nowhere_or_to_something_else(folder, flux, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_new_pipeline", lambda *_: pytest.fail("something was loaded"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for name in ("x.gguf", "x.safetensors"):
        (tmp_path / name).write_bytes(b"")
    for words, said in (
        (("--model", "./nowhere"), "cannot load the model './nowhere': there is no such file or folder"),
        (("--model", "no/such/folder"), "no such file or folder"),
        (("--model", "none.safetensors"), "no such file or folder"),
        (("--model", "none.json"), "no such file or folder"),
        (("--model", "empty"), "no model_index.json, so it holds no pipeline"),
        (("--model", "notes.txt"), "none of weights or of a description"),
        (("--model", flux / "transformer"), "it holds a FluxTransformer2DModel alone; name its pipeline as --model"),
        (("--model", "x.gguf"), "name its pipeline as --model and the file as --transformer"),
        (("--model", "x.safetensors"), "if it holds a whole pipeline, name its class as --pipeline"),
        (("--model", flux, "--transformer", "none.gguf"), "cannot load the transformer 'none.gguf': there is no such"),
        (("--model", flux, "--lora", "none/lora.safetensors:0.5"), "cannot load the LoRA 'none/lora.safetensors'"),
        (("--model", flux, "--controlnet", "./none"), "cannot load the ControlNet './none'"),
        (("--model", "demo", "--pipeline", "FluxPipeline"), "Invalid value for --pipeline: the model 'demo' is of one"),
        (
            ("--model", "x.safetensors", "--pipeline", "FluxPipeline", "--controlnet", flux),
            "for --controlnet: the model",
        ),
    ):
        assert said in generate_on(*words), words


def test_a_folder_of_components_says_what_it_holds(flux, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "transformer").symlink_to(flux / "transformer")
    text = generate_on("--model", "parts")
    assert "it holds transformer, and no model_index.json" in text and "parts/transformer as --transformer" in text


def test_a_pipeline_with_code_of_its_own_is_refused_in_words(flux, tmp_path):
    index = json.loads((flux / "model_index.json").read_text())
    for number, name in enumerate((["pipeline", "MyPipeline"], "MyPipeline")):
        own = tmp_path / f"own-{number}"
        own.mkdir()
        (own / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        text = generate_on("--model", own)
        assert "code of its own (MyPipeline)" in text and "layercache.enable(pipe, schedule)" in text


def test_a_name_of_the_hub_without_a_network(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'") from LocalEntryNotFoundError("no network")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    text = generate_on("--model", "someone/some-model")
    assert "no folder here, and the hub cannot be reached" in text and "hf download someone/some-model" in text
    monkeypatch.setattr(diffusers.FluxPipeline, "from_single_file", offline)
    Path("whole.safetensors").write_bytes(b"")
    text = generate_on("--model", "whole.safetensors", "--pipeline", "FluxPipeline")
    assert "the configuration of what it holds comes from the hub" in text


def test_what_is_not_installed_is_named_before_anything_is_loaded(flux, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"")
    find = loading.importlib.util.find_spec
    missing = set()
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    for package, words in (
        ("transformers", ()),
        ("gguf", ("--transformer", "x.gguf")),
        ("peft", ("--lora", "x.gguf")),
    ):
        missing = {package}
        text = generate_on("--model", flux, *words)
        assert f"needs {package}, which is not installed: pip install" in text


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece_of_none"), "sentencepiece_of_none"),
        (ImportError("T5Tokenizer requires the notthere library but it was not found"), "notthere"),
        (ImportError("Loading a GGUF checkpoint ... Please install `notthere` first"), "notthere"),
        (ImportError("Using it requires: `pip install -U notthere`"), "notthere"),
        (ImportError("numpy is broken; pip install numpy"), None),
        (RuntimeError("pip install notthere"), None),
    ],
)
def test_the_package_that_an_error_misses(error, package):
    assert loading.missing_package(error) == package


def test_one_file_of_a_transformer(flux, tmp_path):
    """Weights of another model in the pipeline, from a folder, and from one file of either kind."""
    other = saved.build("FluxTransformer2DModel", seed=5)[0]
    other.save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    write_gguf(tmp_path / "other.gguf", other.state_dict())
    expected = other.state_dict()["transformer_blocks.0.attn.to_q.weight"]
    for path in (tmp_path / "other", file, tmp_path / "other.gguf"):
        options = ModelOptions(model=str(flux), transformer=[str(path)], dtype=Dtype.float32)
        weight = load_pipeline(options).transformer.state_dict()["transformer_blocks.0.attn.to_q.weight"]
        assert torch.allclose(torch.as_tensor(weight).float(), expected, atol=1e-3)
    words = ("--model", flux, "--transformer", tmp_path / "other.gguf", *saved.SMALL, *saved.SHORT)
    done("generate", "-p", "a fox", "--steps", 2, *words)
    assert "has no 'transformer_2'" in generate_on("--model", flux, "--transformer", f"transformer_2={file}")


def write_gguf(path: Path, weights: dict[str, torch.Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(path), "flux")
    for name, weight in weights.items():
        writer.add_tensor(name, weight.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_loras_and_their_weights(flux, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    plain = ModelOptions(model=str(flux), dtype=Dtype.float32)
    pipe = load_pipeline(plain)
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(tmp_path / "style", transformer_lora_layers=layers)
    file = tmp_path / "style" / "pytorch_lora_weights.safetensors"
    for text, weight in ((f"{file}:0.5", 0.5), (str(tmp_path / "style"), 1.0)):
        found = load_pipeline(ModelOptions(model=str(flux), lora=[text], dtype=Dtype.float32))
        (name,) = found.get_active_adapters()
        assert name in ("pytorch_lora_weights", "style")
        module = found.transformer.transformer_blocks[0].attn.to_q
        assert module.scaling[name] == weight
    assert "takes no LoRA" in refused("generate", "-p", "cat", "--lora", file)


def test_another_scheduler_takes_the_settings_of_the_first(flux):
    options = ModelOptions(model=str(flux), scheduler="UniPCMultistepScheduler")
    scheduler = load_pipeline(options).scheduler
    assert type(scheduler).__name__ == "UniPCMultistepScheduler"
    assert (scheduler.config.flow_shift, scheduler.config.prediction_type) == (3.0, "flow_prediction")
    assert "diffusers has no scheduler 'NoScheduler'" in generate_on("--model", flux, "--scheduler", "NoScheduler")
    assert "no pipeline 'FluxTransformer2DModel'" in generate_on(
        "--model", flux, "--pipeline", "FluxTransformer2DModel"
    )


def test_another_model_like_the_bundled_one():
    deep = Path(__file__).parents[2] / "examples" / "deep_model"
    if not (deep / "transformer" / "diffusion_pytorch_model.safetensors").exists():
        pytest.skip("trained models are not here")
    done("generate", "--model", deep, "-p", "cat", "--steps", 2)
    assert "not one of astronaut" in refused("calibrate", "--model", deep, "-p", "unicorn")


# --- arguments of the call -------------------------------------------------------------------------------------------


def pipe_of(flux: Path, cls: str = "FluxPipeline"):
    return load_pipeline(ModelOptions(model=str(flux), pipeline=cls))


def test_arguments_by_name_are_json_or_text(flux):
    call = CallOptions(arg=["true_cfg_scale=2", "sigmas=[1.0, 0.5]", "negative_prompt_2=dark = bad"])
    assert call_arguments(pipe_of(flux), call) == {
        "true_cfg_scale": 2,
        "sigmas": [1.0, 0.5],
        "negative_prompt_2": "dark = bad",
    }


def test_arguments_that_the_pipeline_lacks_are_refused_with_its_own(folder, flux):
    text = generate_on("--model", flux, "--arg", "strenght=1")
    assert "FluxPipeline takes no strenght. Its arguments are prompt_2," in text and "max_sequence_length" in text
    assert "num_inference_steps is set by --steps" in generate_on("--model", flux, "--arg", "num_inference_steps=3")
    assert "'strength' is not NAME=VALUE" in generate_on("--model", flux, "--arg", "strength")
    assert "takes no num_frames" in generate_on("--model", flux, "--num-frames", 5)
    assert "FluxPipeline takes no picture" in generate_on(
        "--model", flux, "--image", saved.beside_in(folder) / "picture.png"
    )
    text = generate_on("--model", saved.saved_in(folder, "wan-i2v"), *saved.SMALL)
    assert "WanImageToVideoPipeline needs a picture (image)" in text


def test_what_the_class_tells_is_refused_before_anything_is_loaded(folder, flux, monkeypatch):
    """A large model takes minutes to load, and a name of the call is wrong whatever its weights are."""
    monkeypatch.setattr(loading, "_new_pipeline", lambda *_: pytest.fail("something was loaded"))
    described = Path(__file__).parents[2] / "examples" / "tiny_flux.json"
    deep = described.with_name("deep_model")
    misspelt = ("--arg", "max_sequence_lenght=8", "--arg", "gudance_scale=2")
    for model, cls in ((flux, "FluxPipeline"), (described, "FluxPipeline")):
        said = generate_on("--model", model, *misspelt)
        assert f"{cls} takes no max_sequence_lenght, gudance_scale. Did you mean max_sequence_length or" in said
        assert "or guidance_scale? Its arguments are" in said
    for words, said in (
        (("--model", saved.saved_in(folder, "wan-i2v")), "WanImageToVideoPipeline needs a picture (image)"),
        (("--model", flux, "--num-frames", 5), "takes no num_frames"),
        (("--model", flux, "--scheduler", "EulerSampler"), "no scheduler 'EulerSampler'"),
        (("--model", deep, "--negative-prompt", "x"), "DemoPipeline takes no negative_prompt"),
        (("--model", "demo", "--arg", "guidance=2"), "Did you mean guidance_scale?"),
    ):
        assert said in generate_on(*words), words
    index = json.loads((flux / "model_index.json").read_text())
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda name: index)  # as of the Hub
    assert "FluxPipeline takes no steps" in generate_on("--model", "some/flux", "--arg", "steps=8")


def test_pictures_go_by_the_names_of_the_call(folder, flux):
    file = saved.beside_in(folder) / saved.PICTURE
    found = call_arguments(pipe_of(flux, "FluxInpaintPipeline"), CallOptions(image=[str(file), f"mask_image={file}"]))
    assert sorted(found) == ["image", "mask_image"] and found["image"].size == (32, 32)
    found = call_arguments(pipe_of(flux, "FluxKontextPipeline"), CallOptions(image=[str(file), str(file)]))
    assert [picture.mode for picture in found["image"]] == ["RGB", "RGB"]
    assert "none.png cannot be read: No such file" in generate_on("--model", flux, "--image", "none.png")


def test_a_negative_prompt_that_does_nothing_is_warned_of(flux):
    with pytest.warns(layercache.errors.LayerCacheWarning, match="no effect on this model unless"):
        call_arguments(pipe_of(flux), CallOptions(negative_prompt="blur"))


# --- files ---------------------------------------------------------------------------------------------------------


FRAMES = np.stack([np.full((32, 48, 3), k / 4) for k in range(5)])


def test_pixels_of_what_pipelines_give():
    grey = PIL.Image.new("RGB", (8, 4), (51, 51, 51))
    video = np.stack([np.full((3, 4, 8), k / 2) for k in range(3)])  # channels first
    sound = torch.zeros(1, 2, 50)
    for result, shape, mean in (
        (SimpleNamespace(images=[grey]), (4, 8, 3), 0.2),
        (SimpleNamespace(frames=[[grey, grey]]), (2, 4, 8, 3), 0.2),
        (SimpleNamespace(frames=torch.tensor(video)[None]), (3, 4, 8, 3), 0.5),
        (SimpleNamespace(frames=np.full((1, 2, 4, 8, 3), 1.5), audio=sound), (2, 4, 8, 3), 1.0),
    ):
        pixels = results.pixels_of(result)
        assert pixels.shape == shape and pixels.mean() == pytest.approx(mean)
    assert results.sound_of(SimpleNamespace(frames=None, audio=sound)).shape == (50, 2)
    with pytest.raises(layercache.LayerCacheError, match="no picture and no video, but numbers of shape"):
        results.pixels_of(SimpleNamespace(images=np.zeros((1, 64, 16))))


def test_a_video_as_mp4_gif_and_frames(tmp_path):
    results.save_pixels(FRAMES, tmp_path / "x.mp4", 10.0)
    read = frames_of(tmp_path / "x.mp4")
    assert len(read) == 5 and read[0].shape == (32, 48, 3)
    assert [int(frame.mean()) for frame in read] == pytest.approx([0, 64, 128, 191, 255], abs=3)
    results.save_pixels(FRAMES, tmp_path / "x.gif", 10.0)
    with PIL.Image.open(tmp_path / "x.gif") as picture:
        assert (picture.n_frames, picture.info["duration"]) == (5, 100)
    results.save_pixels(FRAMES, tmp_path / "frames", 10.0)
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == [f"{k:04d}.png" for k in range(5)]
    assert np.asarray(PIL.Image.open(tmp_path / "frames" / "0002.png")).mean() == 128


def test_names_of_results_are_checked_before_anything_runs(folder, flux, monkeypatch):
    wan = saved.saved_in(folder, "wan")
    assert "WanPipeline makes videos; x.png should end with .mp4" in generate_on("--model", wan, "-o", "x.png")
    assert "FluxPipeline makes pictures; x.mp4" in generate_on("--model", flux, "-o", "x.mp4")
    monkeypatch.setattr(results, "has_ffmpeg", lambda: False)
    assert 'pip install "layercache[video]"; or name a .gif' in generate_on("--model", wan, "-o", "x.mp4")
    assert results.output_for(load_pipeline(ModelOptions(model=str(wan))), None) == Path("video.gif")


def test_the_rate_of_frames(folder):
    pipe = load_pipeline(ModelOptions(model=str(saved.saved_in(folder, "ltx"))))
    assert results.frame_rate_of(pipe, None) == 25 and results.frame_rate_of(pipe, 12.0) == 12
    assert call_arguments(pipe, CallOptions(frame_rate=12.0)) == {"frame_rate": 12.0}
    assert results.frame_rate_of(SimpleNamespace(), None) == 16


def test_a_result_that_cannot_be_written_goes_elsewhere(folder, flux, tmp_path, monkeypatch):
    """The folder turns into a file while the picture is drawn."""
    place = tmp_path / "out"
    place.mkdir()
    drawing = diffusers.FluxPipeline.__call__

    @functools.wraps(drawing)
    def draw(self, *args, **kwargs):
        place.rmdir()
        place.write_text("in the way")
        return drawing(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.FluxPipeline, "__call__", draw)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words = ("--model", flux, *saved.SMALL, "--arg", "max_sequence_length=16", "-o", place / "x.png")
    result = run("generate", "-p", "a fox", "--steps", 2, *words)
    assert result.exit_code == 1 and "the result is in" in result.stderr
    kept = result.stderr.split("the result is in ")[1].split(" instead")[0]
    assert PIL.Image.open(kept).size == (32, 32)
