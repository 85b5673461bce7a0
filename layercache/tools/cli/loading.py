"""Loading what ``--model`` and the options beside it name, with a message for everything that can go wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from layercache._utils.text import shown
from layercache.errors import LayerCacheError, MissingExtraError, UnsupportedModelError
from layercache.tools import needs
from layercache.tools.cli.options import ModelOptions
from layercache.tools.lora import split_weight as split_weight

GGUF, WEIGHTS = ".gguf", (".safetensors", ".gguf", ".sft", ".ckpt", ".pt", ".bin")
INSTALL = 'pip install "layercache[diffusers]"'
OFFLINE = {
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
}
"""Errors of huggingface_hub and of what it fetches with, where no hub answers."""
UNKNOWN = {"RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "HFValidationError"}


def choose_device(name: str | None) -> str:
    """The device that was named, or a GPU if there is one: that of this process, where several share a machine.

    Raises:
        LayerCacheError: there are fewer GPUs than processes.
        typer.BadParameter: it is no device, or not here.
    """
    import torch

    available = torch.cuda.is_available()
    if name is None:
        return "cpu" if not available else _own_gpu(torch.cuda)
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is not a device; use cuda, cuda:1 or cpu.", param_hint="--device") from None
    if wanted.type == "cuda" and not available:
        raise typer.BadParameter("torch finds no CUDA GPU here; see layercache doctor.", param_hint="--device")
    return _own_gpu(torch.cuda) if wanted.type == "cuda" and wanted.index is None else name


def _own_gpu(cuda: Any) -> str:
    """The GPU of this process, which becomes its current one."""
    here, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if here == 1:
        return "cuda"
    if here > cuda.device_count():
        raise LayerCacheError(
            f"{here} processes want a GPU each, and there are {cuda.device_count()}; take fewer, or --device cpu",
            argument="workers",
        )
    cuda.set_device(rank)
    return f"cuda:{rank}"


def load_model(options: ModelOptions, check: Callable[[type], None] | None = None) -> Any:
    """The pipeline that the options name, on its device.

    Args:
        options: of the model.
        check: called with the pipeline's class before anything is loaded, to refuse what does not go with it.

    Raises:
        LayerCacheError: it cannot be loaded; the message says what it is and what to do.
    """
    import torch

    device, dtype = choose_device(options.device), getattr(torch, options.dtype.value)
    check_paths(options)
    needs.require(options.model)
    with _refusals(f"the model {options.model!r} on {device}", options.model):
        _check_class(options, check)
        pipe = _new_pipeline(options, device, dtype)
    for text in options.transformer or ():
        name, path = split_name(text, "transformer")
        with _refusals(f"the transformer {path!r}", path):
            if getattr(pipe, name, None) is None:
                raise UnsupportedModelError(f"{type(pipe).__name__} has no {name!r}", argument="transformer")
            if not _is_pipeline_path(options.model):
                cls = type(getattr(pipe, name))
                pipe.register_modules(**{name: _load_transformer(cls, path, name, options.model, dtype).to(device)})
    _set_scheduler(pipe, options.scheduler)
    _load_loras(pipe, options.lora or ())
    return pipe


def _new_pipeline(options: ModelOptions, device: str, dtype: Any) -> Any:
    if options.model == "demo":
        from layercache.demo.pipeline import load_demo_pipeline

        return load_demo_pipeline(device)
    if is_like_demo(options.model):
        return _like_demo(Path(options.model), device)
    require("transformers", f"the model {options.model!r}")
    if options.model.endswith(".json"):
        from layercache.models.random_weights import load_random_pipeline

        return load_random_pipeline(options.model, dtype).to(device)
    more, path = {}, Path(options.model)
    cls = _pipeline_class(options)
    if path.is_file():
        return cls.from_single_file(options.model, dtype=dtype).to(device)
    for text in options.transformer or ():
        name, place = split_name(text, "transformer")
        more[name] = _load_transformer(_component_class(options.model, name), place, name, options.model, dtype)
    if options.controlnet is not None:
        from diffusers import AutoModel

        with _refusals(f"the ControlNet {options.controlnet!r}", options.controlnet):
            more["controlnet"] = AutoModel.from_pretrained(options.controlnet, dtype=dtype)
    return cls.from_pretrained(options.model, dtype=dtype, **more).to(device)


def _check_class(options: ModelOptions, check: Callable[[type], None] | None) -> None:
    """Refuses what can be known not to go with the pipeline's class, which is named where its weights are."""
    if options.scheduler is not None:
        _scheduler_class(options.scheduler)
    cls = pipeline_class(options)
    if cls is None:
        return
    if options.lora and not hasattr(cls, "load_lora_weights"):
        raise UnsupportedModelError(f"{cls.__name__} takes no LoRA", argument="lora")
    if check is not None:
        check(cls)


# --- what a path is ----------------------------------------------------------------------------------------------


def check_paths(options: ModelOptions) -> None:
    """Refuses paths that lead nowhere, or to something else than what is wanted, before anything is imported.

    Raises:
        LayerCacheError: says what is there, and what to give instead.
    """
    _check_model(options)
    for name in ("pipeline", "controlnet"):
        is_file = name == "pipeline" and Path(options.model).is_file() and not options.model.endswith(".json")
        if getattr(options, name) is not None and not is_file and not _is_pipeline_path(options.model):
            raise LayerCacheError(
                f"the model {options.model!r} is of one pipeline, and takes no other; leave it out",
                argument=name,
            )
    for text in options.transformer or ():
        path = split_name(text, "transformer")[1]
        _check_there(path, "transformer")
        if path.endswith(GGUF):
            require("gguf", f"the transformer {path!r}", 'pip install "layercache[gguf]"')
            require("accelerate", f"the transformer {path!r}")
    for text in options.lora or ():
        _check_there(split_weight(text)[0], "lora")
        require("peft", f"the LoRA {text!r}", "pip install peft")
    if options.controlnet is not None:
        _check_there(options.controlnet, "controlnet")


def _check_model(options: ModelOptions) -> None:
    model, path = options.model, Path(options.model)
    if model == "demo" or (path.is_dir() and is_like_demo(model)):
        return
    _check_there(model, "model")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise _no_pipeline(model, path)
    if not path.is_file() or model.endswith(".json"):
        return
    if not model.endswith(WEIGHTS):
        raise _refused(model, "it is a file, and none of weights or of a description (.json)", "model")
    if model.endswith(GGUF) or options.pipeline is None:
        raise _refused(
            model,
            f"it is one file of weights; if it holds a transformer, name its pipeline as --model and the file as "
            f"--transformer (--model black-forest-labs/FLUX.1-dev --transformer {shown(path.name)})"
            + ("" if model.endswith(GGUF) else "; if it holds a whole pipeline, name its class as --pipeline"),
            "model",
        )


def _no_pipeline(model: str, path: Path) -> LayerCacheError:
    """Of a folder without model_index.json: what is in it instead."""
    own = _class_in(path / "config.json")
    if own is not None:
        return _refused(
            model, f"it holds a {own} alone; name its pipeline as --model and this folder as --transformer", "model"
        )
    parts = sorted(found.parent.name for found in path.glob("*/config.json"))
    if parts:
        return _refused(
            model,
            f"it holds {' and '.join(map(shown, parts))}, and no model_index.json that says how they make a pipeline; "
            "save the whole with pipe.save_pretrained(folder), or name a pipeline as --model and "
            f"{shown(path / parts[-1])} as --transformer",
            "model",
        )
    return _refused(model, "the folder has no model_index.json, so it holds no pipeline of diffusers", "model")


def _check_there(text: str, argument: str) -> None:
    """Refuses a path at which nothing is, unless it may be a name of the hub."""
    if Path(text).exists():
        return
    may_be_of_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.endswith((*WEIGHTS, ".json"))
    if not may_be_of_hub or text.startswith("."):
        raise _refused(text, "there is no such file or folder", argument)


def _refused(text: str, reason: str, argument: str) -> LayerCacheError:
    what = {"model": "model", "lora": "LoRA", "controlnet": "ControlNet"}.get(argument, "transformer")
    return LayerCacheError(f"cannot load the {what} {text!r}: {reason}", argument=argument)


def is_like_demo(model: str) -> bool:
    """Whether a folder holds another model of the bundled model's kind, such as examples/deep_model."""
    return _class_in(Path(model) / "class_encoder" / "config.json") == "ClassEncoder"


def _like_demo(path: Path, device: str) -> Any:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    from layercache.demo.model import ClassEncoder
    from layercache.demo.pipeline import DemoPipeline

    settings = {"dtype": torch.float32, "low_cpu_mem_usage": False}
    transformer = QwenImageTransformer2DModel.from_pretrained(path / "transformer", **settings)
    encoder = ClassEncoder.from_pretrained(path / "class_encoder", **settings)
    return DemoPipeline(transformer, encoder, FlowMatchEulerDiscreteScheduler(shift=3.0)).to(device)


def _class_in(config: Path) -> str | None:
    """The class that a component's configuration names."""
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(data, dict) and isinstance(data.get("_class_name"), str):
            return str(data["_class_name"])
    return None


def _is_pipeline_path(model: str) -> bool:
    """Whether diffusers loads it, which then takes another transformer from the start."""
    return not (model == "demo" or model.endswith(".json") or is_like_demo(model) or Path(model).is_file())


def pipeline_class(options: ModelOptions) -> type | None:
    """The class of the pipeline that will be loaded; ``None`` where that is known behind loading only."""
    if options.model == "demo" or is_like_demo(options.model):
        from layercache.demo.pipeline import DemoPipeline

        return DemoPipeline
    import diffusers

    if options.model.endswith(".json"):
        found = getattr(diffusers, needs.inspect_model(options.model).pipeline, None)
    else:
        require("transformers", f"the model {options.model!r}")
        found = _pipeline_class(options)
        if found is diffusers.DiffusionPipeline:
            found = getattr(diffusers, str(found.load_config(options.model).get("_class_name")), None)
    is_own = isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)
    return found if is_own else None


# --- classes of diffusers ----------------------------------------------------------------------------------------


def _pipeline_class(options: ModelOptions) -> Any:
    """The class to load a pipeline with: the one named, or the folder's own, which is of diffusers."""
    import diffusers

    if options.pipeline is not None:
        return _named(options.pipeline, diffusers.DiffusionPipeline, "pipeline", "FluxImg2ImgPipeline")
    name = diffusers.DiffusionPipeline.load_config(options.model).get("_class_name")
    if isinstance(name, (list, tuple)) or getattr(diffusers, str(name), None) is None:
        custom = name[-1] if isinstance(name, (list, tuple)) else name
        raise _refused(
            options.model,
            f"it holds a pipeline with code of its own ({shown(custom)}), which is not run from here; name a class of "
            "diffusers as --pipeline, or load it in Python and call layercache.search(pipe, prompts) and "
            "layercache.enable(pipe, schedule)",
            "model",
        )
    if options.controlnet is not None and "ControlNet" not in str(name):
        return _named(str(name).removesuffix("Pipeline") + "ControlNetPipeline", object, "pipeline", "")
    return diffusers.DiffusionPipeline


def _named(name: str, base: type, argument: str, example: str) -> Any:
    import diffusers

    require("transformers", name)
    found = getattr(diffusers, name, None) if not name.startswith("_") else None
    if not isinstance(found, type) or not issubclass(found, base):
        raise LayerCacheError(
            f"diffusers has no {argument} {name!r}" + (f"; a class such as {example} is expected" if example else ""),
            argument=argument,
        )
    return found


def _component_class(model: str, name: str) -> Any:
    """The class of a component of a pipeline that is not loaded yet."""
    import diffusers

    entry = diffusers.DiffusionPipeline.load_config(model).get(name)
    if not isinstance(entry, (list, tuple)) or entry[-1] is None:
        raise UnsupportedModelError(f"the pipeline has no {name!r}", argument="transformer")
    return getattr(diffusers, entry[-1])


def _load_transformer(cls: Any, path: str, name: str, model: str, dtype: Any) -> Any:
    """A transformer of a class from a folder, the hub, or one file, whose configuration is that of the pipeline."""
    with _refusals(f"the transformer {path!r}", path):
        if not Path(path).is_file():
            inside = Path(path) / name / "config.json"
            more = {"subfolder": name} if inside.is_file() else {}
            return cls.from_pretrained(path, dtype=dtype, **more)
        if not hasattr(cls, "from_single_file"):
            raise UnsupportedModelError(f"diffusers loads no {cls.__name__} from one file; give a folder")
        settings: dict[str, Any] = {"dtype": dtype}
        if path.endswith(GGUF):
            from diffusers import GGUFQuantizationConfig

            settings["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
        if _is_pipeline_path(model):
            settings |= {"config": model, "subfolder": name}
        return cls.from_single_file(path, **settings)


def _set_scheduler(pipe: Any, name: str | None) -> None:
    """Another sampler, with the settings of the pipeline's own; of flow matching where that is."""
    if name is None:
        return
    cls, before = _scheduler_class(name), pipe.scheduler
    config, accepted = dict(before.config), inspect.signature(cls.__init__).parameters
    if type(before).__name__.startswith("FlowMatch") and "use_flow_sigmas" in accepted:
        config |= {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": config.get("shift", 1.0),
        }
    pipe.register_modules(scheduler=cls.from_config(config))


def _scheduler_class(name: str) -> Any:
    from diffusers import SchedulerMixin

    return _named(name, SchedulerMixin, "scheduler", "UniPCMultistepScheduler")


def _load_loras(pipe: Any, loras: Any) -> None:
    names: list[str] = []
    weights: list[float] = []
    for text in loras:
        path, weight = split_weight(text)
        if not hasattr(pipe, "load_lora_weights"):
            raise UnsupportedModelError(f"{type(pipe).__name__} takes no LoRA", argument="lora")
        name = re.sub(r"\W", "_", Path(path).stem) or "lora"
        name = f"{name}_{len(names)}" if name in names else name
        with _refusals(f"the LoRA {path!r}", path):
            place = Path(path)
            if place.is_file():
                pipe.load_lora_weights(str(place.parent), weight_name=place.name, adapter_name=name)
            else:
                pipe.load_lora_weights(path, adapter_name=name)
        names.append(name)
        weights.append(weight)
    if names:
        pipe.set_adapters(names, adapter_weights=weights)


def split_name(text: str, default: str) -> tuple[str, str]:
    """``NAME=PATH`` apart; the name by default where there is none."""
    name, sign, path = text.partition("=")
    return (name, path) if sign and name.isidentifier() and not Path(text).exists() else (default, text)


# --- messages ----------------------------------------------------------------------------------------------------


def require(package: str, what: str, install: str = INSTALL) -> None:
    """Raises `MissingExtraError` where a package is missing that loading needs."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(f"{what} needs {package}, which is not installed: {install}")


@contextlib.contextmanager
def _refusals(what: str, path: str) -> Iterator[None]:
    """Context whose failures become one sentence: what could not be loaded, why, and what to do."""
    try:
        yield
    except (LayerCacheError, typer.BadParameter):
        raise
    except Exception as error:  # classes of models raise whatever their files make them
        if os.environ.get("LAYERCACHE_DEBUG") == "1":
            raise
        cls = MissingExtraError if isinstance(error, ImportError) else LayerCacheError
        raise cls(f"cannot load {what}: {reason_of(error, path)}") from error


def reason_of(error: BaseException, path: str) -> str:
    """Why something was not loaded, in a sentence."""
    names, now = set[str](), error
    seen: list[BaseException] = []
    while now is not None and now not in seen:
        seen.append(now)
        names |= {cls.__name__ for cls in type(now).__mro__} | set(re.findall(r"\bConnectError\b", str(now)))
        now = now.__cause__ or now.__context__  # type: ignore[assignment]
    if not Path(path).exists() and names & OFFLINE:
        return (
            "it is no folder here, and the hub cannot be reached; fetch it where there is a network "
            f"(hf download {shown(path)}), or name a folder"
        )
    if Path(path).is_file() and names & OFFLINE:
        return (
            "the configuration of what it holds comes from the hub, which cannot be reached; do it where there is a "
            "network, or give the folder of a pipeline as --model and this file as --transformer"
        )
    if not Path(path).exists() and names & UNKNOWN:
        return "it is no folder here, and the hub has none of this name, or wants you to log in (hf auth login)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    missing = missing_package(error)
    return f"it needs {missing}, which is not installed: {INSTALL}" if missing else shown(lines[0])


def missing_package(error: BaseException) -> str | None:
    """The package without which something was not imported; the libraries say so in several ways."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    for pattern in (
        r"requires the (\S+) library",
        r"[Pp]lease install [`']?([\w-]+)[`']?",
        r"pip install [-U ]*[`']?([\w-]+)",
        r"cannot instantiate .* without the? ?[`']?(\w+)",
    ):
        found = re.search(pattern, text)
        if found and isinstance(error, (ImportError, ValueError)):
            name = found[1].lower()
            return None if importlib.util.find_spec(name.replace("-", "_")) else name
    return None
