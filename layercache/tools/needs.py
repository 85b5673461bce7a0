"""What a pipeline needs and this installation lacks, found without loading it or importing anything heavy.

A folder is read as it lies, a model of the Hub as far as its cache holds it; nothing is downloaded.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercache._utils.text import shown
from layercache.demo.weights import find_weights
from layercache.errors import MissingExtraError, UnsupportedModelError

DEMO_TRANSFORMER = "QwenImageTransformer2DModel"
OWN_CODE = "it brings code of its own"
SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")
EXTRAS: dict[str, tuple[dict[str, str], str]] = {
    "diffusers": (
        {
            "transformers": "transformers",
            "accelerate": "accelerate",
            "sentencepiece": "sentencepiece",
            "protobuf": "google.protobuf",
        },
        "most real pipelines do not load",
    ),
    "figures": (
        {"scikit-image": "skimage", "matplotlib": "matplotlib", "pillow": "PIL"},
        "no PSNR and SSIM, or no figures",
    ),
    "compare": (
        {"jinja2": "jinja2", "altair": "altair", "vl-convert-python": "vl_convert", "pandas": "pandas"},
        "no pages with plots, or no tables for pandas",
    ),
    "video": ({"imageio": "imageio", "imageio-ffmpeg": "imageio_ffmpeg"}, "videos are not written as mp4"),
    "gguf": ({"gguf": "gguf"}, "files quantised as GGUF do not load"),
    "ui": ({"gradio": "gradio"}, "no 'layercache ui'"),
    "metrics": ({"prometheus-client": "prometheus_client"}, "no layercache.metrics.prometheus"),
}
"""Optional packages of each extra, with the module that is imported, and what is lost without them."""

_QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "gguf": "gguf",
}
_OWN_NAMES = {"optimum.quanto": "optimum-quanto"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Need:
    """One thing to know of a pipeline on this installation.

    Attributes:
        sentence: what it is, and what to do.
        blocks: whether the pipeline cannot be used as things stand.
        package: the package that is missing, by the name it is installed by; empty where it is something else.
    """

    sentence: str
    blocks: bool = True
    package: str = ""


@dataclass(frozen=True)
class Inspection:
    """What is known of a model before it is loaded.

    Attributes:
        model: as it was named.
        what: what that is: ``"the bundled model"``, ``"a folder with a FluxPipeline"``.
        pipeline: class of the pipeline; empty where it is not known.
        transformers: class of each transformer by its component.
        needs: what is missing, and what else there is to know.
    """

    model: str
    what: str
    pipeline: str = ""
    transformers: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()

    @property
    def lacking(self) -> list[str]:
        """Sentences on what must be mended first."""
        return [need.sentence for need in self.needs if need.blocks]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "what": self.what,
            "pipeline": self.pipeline or None,
            "transformers": dict(self.transformers),
            "lacking": self.lacking,
            "notes": [need.sentence for need in self.needs if not need.blocks],
        }


def lacking(model: str | os.PathLike[str]) -> list[str]:
    """Sentences on what a model needs and this installation lacks; empty where nothing is known to be missing."""
    return inspect_model(model).lacking


def require(model: str | os.PathLike[str]) -> None:
    """Refuses a model whose packages are missing, or that has no transformer, before anything is imported.

    Raises:
        MissingExtraError: packages are missing; the message names all of them.
        UnsupportedModelError: its pipeline denoises without a transformer.
    """
    found = [need for need in inspect_model(model).needs if need.blocks]
    for need in found:
        if isinstance(need, _Unsupported):
            raise UnsupportedModelError(need.sentence, argument="model")
    if missing := [need.sentence for need in found if need.package]:
        raise MissingExtraError(f"the model {os.fspath(model)!r} cannot be loaded: {'; '.join(missing)}")


class _Unsupported(Need):
    """A pipeline that no cache of this library can be used on."""


def inspect_model(model: str | os.PathLike[str]) -> Inspection:
    """Looks at what ``--model`` names: ``demo``, a description (.json), a folder, one file, or a name on the Hub."""
    name = os.fspath(model)
    path = Path(name).expanduser()
    if name == "demo":
        return _of_demo(name)
    if path.is_dir():
        return _of_folder(name, path)
    if path.is_file():
        return _of_file(name, path)
    if name.endswith((".json", *SINGLE_FILES)) or not _HUB_NAME.fullmatch(name) or name.startswith((".", "~", "/")):
        problem = f"{shown(name)} is no file or folder that is there, and no name on the Hub such as 'org/name'"
        return Inspection(name, "nothing that is there", needs=(Need(problem),))
    return _of_hub(name)


def _of_demo(name: str) -> Inspection:
    needs: tuple[Need, ...] = ()
    try:
        find_weights()
    except MissingExtraError as error:
        needs = (Need(str(error), package="layercache-demo"),)
    return Inspection(name, "the bundled model", "DemoPipeline", {"transformer": DEMO_TRANSFORMER}, needs)


def _of_hub(name: str) -> Inspection:
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(name, "model_index.json")
    if isinstance(found, str):
        return _of_folder(name, Path(found).parent, "a model of the Hub, in its cache: a {}")
    needs = [need for need in map(_package_need, ("transformers", "accelerate")) if need]
    if constants.HF_HUB_OFFLINE:
        needs.append(
            Need(f"{shown(name)} is not in the cache of the Hub, and HF_HUB_OFFLINE is set: unset it to download it")
        )
    else:
        note = "it is not in the cache of the Hub: what else it needs is known once its model_index.json is there"
        needs.append(Need(note, blocks=False))
    return Inspection(name, "a name of the Hub", needs=tuple(needs))


def _of_file(name: str, path: Path) -> Inspection:
    if path.suffix == ".json":
        return _of_description(name, _json(path))
    if path.suffix == ".gguf":
        missing = _package_need("gguf")
        note = Need(
            f"{shown(name)} holds a transformer alone: give the pipeline it belongs to with --model, and this file "
            "with --transformer",
            blocks=False,
        )
        return Inspection(name, "a transformer quantised as GGUF", needs=tuple(filter(None, (missing, note))))
    if path.suffix == ".safetensors":
        return _of_tensors(name, path)
    if path.suffix in SINGLE_FILES:
        text = "it is read with from_single_file of the pipeline's class; other formats than .safetensors may run code"
        return Inspection(name, "a file of weights", needs=(Need(text, blocks=False),))
    return Inspection(name, "a file", needs=(Need(f"{shown(name)} is neither a file of weights nor a description"),))


def _of_description(name: str, data: Mapping[str, Any]) -> Inspection:
    """A file that describes a pipeline with random weights (`layercache.models.random_weights`)."""
    pipeline, given = data.get("pipeline"), data.get("components")
    parts = given if isinstance(given, Mapping) else {}
    components = {
        key: ("diffusers", str(part.get("_class_name"))) for key, part in parts.items() if isinstance(part, Mapping)
    }
    if not isinstance(pipeline, str) or not components:
        return Inspection(name, "a file", needs=(Need(f"{shown(name)} describes no pipeline (see examples)"),))
    transformers = _transformers_of(components)
    needs = (
        *_class_needs(pipeline, components, Path()),
        *_model_needs(pipeline, components, transformers),
        *_package_needs(components, Path()),
    )
    return Inspection(name, "a description of a model with random weights", pipeline, transformers, needs)


def _transformers_of(components: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    return {key: components[key][1] for key in ("transformer", "transformer_2") if key in components}


def _of_tensors(name: str, path: Path) -> Inspection:
    """One file of safetensors: a whole checkpoint has text encoders in it, others are a transformer or a LoRA."""
    try:
        with path.open("rb") as file:
            names = list(json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 2**27))))
    except (OSError, ValueError):
        return Inspection(name, "a damaged file", needs=(Need(f"{shown(name)} is no whole file of safetensors"),))
    if any("lora" in key for key in names):
        hint = "give the pipeline it belongs to with --model, and this file with --lora"
        return Inspection(name, "a LoRA", needs=(Need(f"{shown(name)} holds a LoRA alone: {hint}"),))
    if any(key.startswith(("text_encoder", "cond_stage_model", "conditioner", "te.")) for key in names):
        needs = [_package_need("transformers"), _package_need("accelerate")]
        return Inspection(name, "a checkpoint in one file", needs=tuple(filter(None, needs)))
    hint = "give the pipeline it belongs to with --model, and this file with --transformer"
    note = Need(f"{shown(name)} seems to hold a transformer alone: {hint}", blocks=False)
    return Inspection(name, "weights of one model", needs=(note,))


def _of_folder(name: str, folder: Path, what: str = "a folder with a {}") -> Inspection:
    index = _json(folder / "model_index.json")
    if _json(folder / "class_encoder" / "config.json").get("_class_name") == "ClassEncoder":
        return Inspection(name, "a model of the bundled one's kind", "DemoPipeline", {"transformer": DEMO_TRANSFORMER})
    if not index:
        return _without_index(name, folder)
    pipeline = index.get("_class_name")
    components = {
        key: (str(value[0]), str(value[1]))
        for key, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    }
    transformers = _transformers_of(components)
    needs = [*_class_needs(pipeline, components, folder, str(index.get("_diffusers_version", "")))]
    if not any(need.sentence.startswith(OWN_CODE) for need in needs):
        needs += [*_model_needs(pipeline, components, transformers), *_package_needs(components, folder)]
    text = str(pipeline[-1] if isinstance(pipeline, list) and pipeline else pipeline)
    return Inspection(name, what.format(shown(text)), text, transformers, tuple(needs))


def _without_index(name: str, folder: Path) -> Inspection:
    config = _json(folder / "config.json")
    cls = str(config.get("_class_name", ""))
    if cls:
        text = (
            f"{shown(name)} holds a {shown(cls)} alone: give the pipeline it belongs to with --model, and this folder "
            "with --transformer"
        )
        return Inspection(name, f"a folder with a {shown(cls)}", needs=(Need(text),))
    text = f"{shown(name)} has no model_index.json, so it is no pipeline that diffusers saved (pipe.save_pretrained)"
    return Inspection(name, "a folder", needs=(Need(text),))


def _class_needs(
    pipeline: Any, components: Mapping[str, tuple[str, str]], folder: Path, saved_by: str = ""
) -> Iterator[Need]:
    """Classes that come from elsewhere, or that this diffusers lacks and the version in ``saved_by`` has."""
    from layercache.tools.pipeline_names import diffusers_folder, is_in_diffusers

    if diffusers_folder() is None:
        yield Need("it needs diffusers, which is not installed: pip install diffusers", package="diffusers")
        return
    own = [library for library, _ in components.values() if (folder / f"{library}.py").is_file()]
    own += [str(pipeline[-1])] if isinstance(pipeline, list) and pipeline else []
    classes = [str(pipeline), *(cls for library, cls in components.values() if library == "diffusers")]
    unknown = [] if own else [cls for cls in dict.fromkeys(classes) if not is_in_diffusers(cls)]
    here = _version("diffusers")
    if unknown and _is_newer(saved_by, here):
        names = " and no ".join(map(shown, unknown))
        text = f"diffusers {here} has no {names}, and {shown(saved_by)} wrote it: pip install --upgrade diffusers"
        yield Need(text, package="diffusers")
    elif own or unknown:
        yield Need(
            f"{OWN_CODE} ({', '.join(map(shown, own or unknown))}), which layercache does not run: load it in Python, "
            "and give the pipeline to layercache.enable(pipe)"
        )


def _is_newer(version: str, than: str) -> bool:
    """Of two versions such as 0.42.1; ``False`` where one is not known."""
    numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version, than)]
    return bool(numbers[0] and numbers[1]) and numbers[0] > numbers[1]


def _model_needs(
    pipeline: Any, components: Mapping[str, tuple[str, str]], transformers: Mapping[str, str]
) -> Iterator[Need]:
    """Whether layercache knows the transformer, and what to do where there is none."""
    if not transformers:
        unet = components.get("unet", components.get("prior", ("", "")))[1]
        yield _Unsupported(unet_sentence(str(pipeline), unet))
        return
    for cls in dict.fromkeys(transformers.values()):
        if cls not in known_classes():
            yield Need(
                f"{shown(cls)} is not among the transformers that layercache knows: "
                "layercache.infer_model(pipe, lambda: pipe(...)) finds out how it runs through its blocks, or describe "
                "it with layercache.register_model(layercache.ModelSpec(...))",
                blocks=False,
            )


def unet_sentence(pipeline: str, unet: str) -> str:
    """What to say of a pipeline without a transformer."""
    with_what = f"with a {shown(unet)}" if unet else "without a transformer"
    return (
        f"{shown(pipeline)} denoises {with_what}, and layercache caches the blocks of transformers: take a pipeline "
        "that 'layercache models' lists (for UNets there are other caches, such as DeepCache)"
    )


def _package_needs(components: Mapping[str, tuple[str, str]], folder: Path) -> Iterator[Need]:
    if need := _package_need("transformers"):
        # classes of pipelines import it even where no component is of it
        own = [shown(key) for key, (library, _) in components.items() if library == "transformers"]
        yield Need(need.sentence + (f" (for {', '.join(own)})" if own else ""), package=need.package)
    for key, (library, cls) in components.items():
        if library == "transformers" and "Tokenizer" in cls and _reads_sentencepiece(folder / key, cls):
            for package in ("sentencepiece", "protobuf"):
                if need := _package_need(package):
                    yield Need(f"{need.sentence} (for {shown(key)}, a {shown(cls)})", package=need.package)
    for key in components:
        if method := _quantised_by(folder / key):
            module = _QUANTISERS.get(method, "")
            if module and not installed(module):
                package = _OWN_NAMES.get(module, module)
                how = 'pip install "layercache[gguf]"' if package == "gguf" else f"pip install {package}"
                text = f"it needs {package}, which is not installed: {how} (for {shown(key)}, quantised by it)"
                yield Need(text, package=package)
    if not installed("accelerate"):
        yield Need(
            "without accelerate, which is not installed, loading takes twice the memory, and offload does not work: "
            'pip install "layercache[diffusers]"',
            blocks=False,
            package="accelerate",
        )


def _reads_sentencepiece(folder: Path, cls: str) -> bool:
    """Whether a tokenizer is made from a file of sentencepiece: there is no other, or the class is a slow one."""
    has_model = any((folder / name).is_file() for name in _SENTENCEPIECE)
    is_slow = not cls.endswith("Fast") and (_version("transformers") or "5").startswith("4.")
    return has_model and (is_slow or not (folder / "tokenizer.json").is_file())


def _quantised_by(folder: Path) -> str:
    found = _json(folder / "config.json").get("quantization_config")
    return str(found.get("quant_method", "")) if isinstance(found, Mapping) else ""


def _package_need(package: str) -> Need | None:
    """That a package of an extra is missing."""
    for extra, (packages, _) in EXTRAS.items():
        if package in packages:
            if installed(packages[package]):
                return None
            how = f'pip install "layercache[{extra}]"'
            return Need(f"it needs {package}, which is not installed: {how}", package=package)
    raise AssertionError(package)


def installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the package above is missing, or stands in sys.modules without a spec
        return False


@functools.lru_cache(maxsize=1)
def known_classes() -> frozenset[str]:
    """Class names of the transformers that are described, read from the source: importing it needs torch."""
    text = (Path(__file__).parents[1] / "models" / "known.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r'ModelSpec\(\s*"(\w+)"', text))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
