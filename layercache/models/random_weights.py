"""Pipelines with random weights from a description: what caching costs and gives on a model one has no weights of."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layercache._utils.formats import what_is
from layercache._utils.memory import free_memory, limited_weights
from layercache._utils.text import shown
from layercache.errors import FileFormatError

KEYS = ("pipeline", "components", "prompt", "seed")
MOST_BYTES = 64 * 10**9
MOST_TEXT = 10**6
MOST_NOISE = 2**26
MOST_SIZE = 2**24


def load_random_pipeline(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, max_bytes: int = MOST_BYTES
) -> Any:
    """A diffusers pipeline with random weights, made of classes of diffusers; nothing is downloaded.

    The file is JSON::

        {"pipeline": "FluxPipeline",
         "components": {"transformer": {"_class_name": "FluxTransformer2DModel", "num_layers": 2, ...},
                        "vae": {"_class_name": "AutoencoderKL", ...},
                        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}},
         "prompt": {"prompt_embeds": [7, 32], "pooled_prompt_embeds": [32]},
         "seed": 0}

    Components that are not named are ``None``. The pipeline takes any text as a prompt and calls its class with noise
    of the shapes under "prompt" (without the batch) that depends on the text and nothing else; a name that ends with
    ``_mask`` gets ones. What begins with ``negative_`` is made of the negative prompt where one is given.

    Args:
        path: of the file, at most 1 MB.
        dtype: of the weights.
        max_bytes: what the weights may take in float32, in which they are made: 64 GB, or the memory that is free where
            that is less.

    Raises:
        FileFormatError: not such a file, diffusers refuses what it says, or it needs more memory.
    """
    data = _description(path)
    try:
        return make_random_pipeline(data, dtype, max_bytes)
    except FileFormatError:
        raise
    except Exception as error:  # constructors raise whatever their arguments make them
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"it lacks {error}" if isinstance(error, KeyError) else lines[0]
        raise FileFormatError(f"cannot make a pipeline of {shown(path)}: {shown(reason)}") from error


def _description(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        with Path(path).open("rb") as file:
            data = json.loads(file.read(MOST_TEXT))
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, Mapping) or not {"pipeline", "components"} <= set(data):
        raise FileFormatError(
            f"cannot make a pipeline of {shown(path)}: it {what_is(path)}; name a file with the entries pipeline and "
            "components, such as examples/tiny_flux.json"
        )
    return data


def make_random_pipeline(
    data: Mapping[str, Any], dtype: torch.dtype = torch.float32, max_bytes: int = MOST_BYTES
) -> Any:
    """The same from the file's content."""
    unknown = sorted(set(data) - set(KEYS))
    if unknown:
        raise ValueError(f"unknown entries {', '.join(unknown)}; there are {', '.join(KEYS)}")
    for config in data["components"].values():
        _check_component_name(config["_class_name"])  # before pipelines are imported, which takes seconds
    base = _pipeline_class(data["pipeline"])
    shapes = {name: tuple(int(n) for n in shape) for name, shape in data.get("prompt", {}).items()}
    if sum(math.prod(shape) for shape in shapes.values()) > MOST_NOISE or min(map(min, shapes.values()), default=1) < 1:
        raise ValueError(f"the shapes under prompt hold no number, or more than {MOST_NOISE} numbers")
    limit = min(max_bytes, free_memory())
    _check_memory(data["components"], limit)
    with torch.random.fork_rng(devices=[]), limited_weights(limit):
        torch.manual_seed(int(data.get("seed", 0)))
        made = {name: _component(config, dtype) for name, config in data["components"].items()}
    wanted = list(inspect.signature(base.__init__).parameters)[1:]
    return _with_texts(base, shapes, dtype)(**{name: made.get(name) for name in wanted} | made)


def _pipeline_class(name: Any) -> Any:
    from diffusers import DiffusionPipeline

    found = _diffusers_class(name)
    if not issubclass(found, DiffusionPipeline) or found is DiffusionPipeline:
        raise ValueError(f"{name} is no pipeline of diffusers")
    return found


def _check_component_name(name: Any) -> None:
    if "Pipeline" in str(name):
        raise ValueError(f"{name} is no transformer, VAE or scheduler of diffusers, and others are not made")


def _component_class(name: Any) -> Any:
    from diffusers import ModelMixin, SchedulerMixin

    found = _diffusers_class(name)
    if not issubclass(found, (ModelMixin, SchedulerMixin)):
        raise ValueError(f"{name} is no transformer, VAE or scheduler of diffusers, and others are not made")
    return found


def _diffusers_class(name: Any) -> type:
    import diffusers

    found = getattr(diffusers, name, None) if isinstance(name, str) and not name.startswith("_") else None
    if not isinstance(found, type):
        raise ValueError(f"diffusers has no {name}")
    return found


def _check_memory(components: Mapping[str, Mapping[str, Any]], limit: int) -> None:
    """Makes every model without its weights first, and refuses those that would not fit."""
    _check_sizes(components)
    # a class that looks at its weights while it is made cannot be measured so; it is counted as it is made
    unmeasured = contextlib.suppress(NotImplementedError, RuntimeError, TypeError)
    with limited_weights(limit), torch.device("meta"), unmeasured:
        for config in components.values():
            _component(config, torch.float32)


def _check_sizes(entry: Any, name: str = "components") -> None:
    """Refuses numbers that only a table without end would be made of."""
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            _check_sizes(value, str(key))
    elif isinstance(entry, list):
        for value in entry:
            _check_sizes(value, name)
    elif isinstance(entry, (int, float)) and abs(entry) > MOST_SIZE:
        raise ValueError(f"{name} is {entry}; no entry is larger than {MOST_SIZE}")


def _component(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    settings = dict(config)
    made = _component_class(settings.pop("_class_name"))(**settings)
    if not isinstance(made, torch.nn.Module):
        return made
    return made.eval() if dtype == torch.float32 else made.to(dtype).eval()


def _with_texts(base: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Any:
    """A subclass of a pipeline that takes texts where the class wants embeddings of them."""
    if not shapes:
        return base

    @functools.wraps(base.__call__)
    def call(self: Any, prompt: str | Sequence[str] | None = None, *args: Any, **kwargs: Any) -> Any:
        if prompt is None:
            return base.__call__(self, *args, **kwargs)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        negative = kwargs.pop("negative_prompt", None)
        others = texts if negative is None else [negative] * len(texts) if isinstance(negative, str) else list(negative)
        given = {}
        for name, shape in shapes.items():
            own = others if name.startswith("negative_") else texts
            given[name] = _embedding(own, name, shape).to(self.device, None if name.endswith("_mask") else dtype)
        if negative is not None and not any(name.startswith("negative_") for name in shapes):
            kwargs["negative_prompt"] = negative
        return base.__call__(self, *args, **kwargs | given)

    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


def _embedding(texts: Sequence[str], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What stands for texts in an argument of the call, a row for each of them."""
    if name.endswith("_mask"):
        return torch.ones((len(texts), *shape), dtype=torch.long)
    return torch.stack([_noise(f"{text} {name}", shape) for text in texts])


def _noise(text: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
