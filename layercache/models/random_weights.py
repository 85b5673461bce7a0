"""Pipelines with random weights from a description: what caching costs and gives on a model one has no weights of."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layercache._utils.formats import what_is
from layercache.errors import FileFormatError

KEYS = ("pipeline", "components", "prompt", "seed")


def load_random_pipeline(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline with random weights.

    The file is JSON::

        {"pipeline": "FluxPipeline",
         "components": {"transformer": {"_class_name": "FluxTransformer2DModel", "num_layers": 2, ...},
                        "vae": {"_class_name": "AutoencoderKL", ...},
                        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}},
         "prompt": {"prompt_embeds": [7, 32], "pooled_prompt_embeds": [32]},
         "seed": 0}

    Components that are not named are ``None``. The pipeline takes any text as a prompt and calls its class with noise
    of the shapes under "prompt" (without the batch) that depends on the text and nothing else.

    Raises:
        FileFormatError: not such a file, or diffusers refuses what it says.
    """
    data = _description(path)
    try:
        return make_random_pipeline(data, dtype)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise FileFormatError(f"cannot make a pipeline of {path}: {reason}") from error


def _description(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, Mapping) or not {"pipeline", "components"} <= set(data):
        raise FileFormatError(
            f"cannot make a pipeline of {path}: it {what_is(path)}; name a file with the entries pipeline and "
            "components, such as examples/tiny_flux.json"
        )
    return data


def make_random_pipeline(data: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The same from the file's content."""
    unknown = sorted(set(data) - set(KEYS))
    if unknown:
        raise ValueError(f"unknown entries {', '.join(unknown)}; there are {', '.join(KEYS)}")
    base = _diffusers_class(data["pipeline"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(data.get("seed", 0)))
        made = {name: _component(config, dtype) for name, config in data["components"].items()}
    shapes = {name: tuple(int(n) for n in shape) for name, shape in data.get("prompt", {}).items()}
    wanted = list(inspect.signature(base.__init__).parameters)[1:]
    return _with_texts(base, shapes, dtype)(**{name: made.get(name) for name in wanted} | made)


def _diffusers_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise ValueError(f"diffusers has no {name}")
    return found


def _component(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    settings = dict(config)
    made = _diffusers_class(settings.pop("_class_name"))(**settings)
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
        given = {
            name: torch.stack([_noise(f"{text} {name}", shape) for text in texts]) for name, shape in shapes.items()
        }
        moved = {name: tensor.to(self.device, dtype) for name, tensor in given.items()}
        return base.__call__(self, *args, **kwargs | moved)

    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


def _noise(text: str, shape: tuple[int, ...]) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
