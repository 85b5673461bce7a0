"""What the nodes take from ComfyUI, looked up when it is needed, and what they do where it is not there.

ComfyUI's own modules are imported inside functions: the tests run on a stand-in, and a part that a newer ComfyUI has
renamed gives one warning and sampling without a cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import layercache
from layercache.errors import ArgumentError
from layercache.schedule import Fingerprint

KEY = "layercache"
"""Of the wrappers of a model, and of the state of a run in its ``transformer_options``."""

FOLDER = "layercache"
"""Of schedule files, below ComfyUI's ``models``."""

BLOCK_LISTS = ("double_blocks", "single_blocks", "joint_blocks", "transformer_blocks", "blocks", "layers")

_log = logging.getLogger(KEY)
_warned: set[str] = set()

Wrapper = Callable[..., Any]


def warn_once(text: str) -> None:
    """Writes it to ComfyUI's log, once in a process."""
    if text not in _warned:
        _warned.add(text)
        _log.warning("layercache: %s", text)


def changed_seam(what: str) -> None:
    """Warns that this ComfyUI is not as the nodes know it."""
    warn_once(f"this ComfyUI has {what}, which this version of the node does not know; it samples without cache")


def with_wrappers(model: Any, outer: Wrapper, predict: Wrapper) -> tuple[Any, bool]:
    """A clone of a MODEL with wrappers around a whole sampling and around every step, and whether they are there.

    They take the place of those of another layercache node.
    """
    found = model.clone()
    try:
        from comfy.patcher_extension import WrappersMP

        kinds = (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE)
        add = found.add_wrapper_with_key
    except (ImportError, AttributeError) as error:
        changed_seam(f"no wrappers of a sampling ({error})")
        return found, False
    for kind, wrapper in zip(kinds, (outer, predict), strict=True):
        found.remove_wrappers_with_key(kind, KEY)
        add(kind, KEY, wrapper)
    return found, True


@dataclass(frozen=True)
class Sampling:
    """One call of ``outer_sample``.

    Attributes:
        model: the ``BaseModel``.
        sampler: a ``KSAMPLER``.
        sampler_name: of its function, such as ``sample_euler``.
        sigmas: N + 1 noise levels, read once.
        options: the guider's ``model_options``.
    """

    model: Any
    sampler: Any
    sampler_name: str
    sigmas: tuple[float, ...]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, executor: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sampling | None:
        """From the arguments ``(noise, latent_image, sampler, sigmas, ...)``; ``None`` where they are others."""
        named = dict(zip(("noise", "latent_image", "sampler", "sigmas"), args, strict=False)) | dict(kwargs)
        guider, sampler, sigmas = executor.class_obj, named.get("sampler"), named.get("sigmas")
        try:
            model, options = guider.model_patcher.model, guider.model_options
            levels = tuple(float(sigma) for sigma in sigmas.tolist())  # type: ignore[union-attr]
            name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
        except (AttributeError, TypeError, ValueError) as error:
            changed_seam(f"another call of outer_sample ({error})")
            return None
        return cls(model, sampler, name, levels, options)

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the model as ComfyUI has it, and these noise levels."""
        network = self.model.diffusion_model
        config = getattr(getattr(self.model, "model_config", None), "unet_config", {})
        digits = hashlib.sha256(json.dumps(dict(config), sort_keys=True, default=str).encode()).hexdigest()[:12]
        version = layercache.__version__
        return Fingerprint(type(network).__name__, digits, blocks_of(network), self.sigmas, (), version)


def blocks_of(network: Any) -> int:
    """Blocks over the lists that a network of ComfyUI has; 1 where it has none (UNet)."""
    lists = [getattr(network, name, ()) for name in BLOCK_LISTS]
    return sum(len(one) for one in lists if isinstance(one, torch.nn.ModuleList)) or 1


def holding(options: Mapping[str, Any], run: Any) -> dict[str, Any]:
    """A guider's ``model_options`` that hold the state of a run; those given stay as they are."""
    return {**options, "transformer_options": {**options.get("transformer_options", {}), KEY: run}}


def held(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The state in the arguments ``(x, timestep, model_options, seed)`` of a step; ``None`` where there is none."""
    options = args[2] if len(args) > 2 else kwargs.get("model_options")
    if len(args) < 2 or not isinstance(options, Mapping):
        changed_seam("another call of predict_noise")
        return None
    return options.get("transformer_options", {}).get(KEY)


def schedule_folder() -> Path:
    """Where schedule files are, and are written; it is made."""
    import folder_paths

    folder = Path(folder_paths.models_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def schedule_files() -> list[str]:
    """Names of the schedule files, for a list to choose from."""
    try:
        return sorted(path.name for path in schedule_folder().glob("*.json"))
    except (ImportError, OSError):
        return []


def schedule_path(name: str) -> Path:
    """The file of a name that somebody typed, below `schedule_folder`.

    Raises:
        ArgumentError: it is no plain name.
    """
    if not name or name.startswith(".") or Path(name).name != name or "\\" in name:
        raise ArgumentError(f"give a plain file name such as flux-20-steps.json, not {name!r}", argument="name")
    return schedule_folder() / (name if name.endswith(".json") else f"{name}.json")
