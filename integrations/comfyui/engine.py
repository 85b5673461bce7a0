"""What the nodes take from ComfyUI, looked up when it is needed, and what they do where it is not there.

ComfyUI's own modules are imported inside functions: the tests run on a stand-in, and a part that a newer ComfyUI has
renamed gives one warning and sampling without a cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import layercache
from layercache.errors import ArgumentError
from layercache.schedule import Fingerprint

KEY = "layercache"
"""Of the wrappers of a model, and of the state of a run in its ``transformer_options``."""

FORWARD = "layercache_forward"
"""The state of a forward in its ``transformer_options``, where groups of layers are reused."""

FOLDER = "layercache"
"""Of schedule files, below ComfyUI's ``models``."""

BLOCK_LISTS = ("double_blocks", "single_blocks", "joint_blocks", "transformer_blocks", "blocks", "layers")

_log = logging.getLogger(KEY)
_warned: set[str] = set()
_changes: set[str] = set()

Wrapper = Callable[..., Any]


def warn_once(text: str) -> None:
    """Writes it to ComfyUI's log, once in a process."""
    if text not in _warned:
        _warned.add(text)
        _log.warning("layercache: %s", text)


def changed_seam(what: str) -> None:
    """Warns that this ComfyUI is not as the nodes know it; once in a process, whatever else is missing."""
    if not _changes:
        warn_once(f"this ComfyUI has {what}, which this version of the node does not know; it samples without cache")
    _changes.add(what)


def with_wrappers(model: Any, outer: Wrapper, predict: Wrapper, forward: Wrapper | None = None) -> tuple[Any, bool]:
    """A clone of a MODEL with wrappers, and whether they are there.

    They take the place of those of another layercache node.

    Args:
        model: stays as it is.
        outer: around a whole sampling.
        predict: around every step.
        forward: around every call of the network.
    """
    try:
        from comfy.patcher_extension import WrappersMP

        found = model.clone()
        wrappers = {WrappersMP.OUTER_SAMPLE: outer, WrappersMP.PREDICT_NOISE: predict}
        if forward is not None:
            wrappers[WrappersMP.DIFFUSION_MODEL] = forward
        for kind, wrapper in wrappers.items():
            found.remove_wrappers_with_key(kind, KEY)
            found.add_wrapper_with_key(kind, KEY, wrapper)
    except (ImportError, AttributeError, TypeError) as error:
        changed_seam(f"no wrappers of a sampling ({error})")
        return model, False
    return found, True


def block_patcher() -> Callable[..., dict[str, Any]] | None:
    """ComfyUI's function that replaces a block in ``model_options``; ``None`` where there is none."""
    try:
        from comfy.model_patcher import set_model_options_patch_replace
    except ImportError as error:
        changed_seam(f"no replacing of blocks ({error})")
        return None
    return set_model_options_patch_replace  # type: ignore[no-any-return, unused-ignore]


def own_memory() -> AbstractContextManager[Any]:
    """Within it, memory is allocated that outlives a forward.

    Newer ComfyUI plan the memory of a forward ahead, and let others pause that.
    """
    pause = _pause()
    return nullcontext() if pause is None else pause()


@functools.cache
def _pause() -> Callable[[], AbstractContextManager[Any]] | None:
    try:
        from comfy.model_prefetch import pause_malloc_graph
    except ImportError:
        return None
    return pause_malloc_graph  # type: ignore[no-any-return, unused-ignore]


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


@dataclass(frozen=True)
class StepCall:
    """One call of ``predict_noise``.

    Attributes:
        x: latents ``[B, ...]``.
        sigma: noise level, ``[B]`` or one number.
        options: the ``model_options``.
    """

    x: torch.Tensor
    sigma: torch.Tensor
    options: Mapping[str, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> StepCall | None:
        """From the arguments ``(x, timestep, model_options, seed)``; ``None`` where they are others."""
        named = dict(zip(("x", "timestep", "model_options", "seed"), args, strict=False)) | dict(kwargs)
        x, sigma, options = named.get("x"), named.get("timestep"), named.get("model_options")
        if (
            isinstance(x, torch.Tensor)
            and isinstance(sigma, torch.Tensor)
            and isinstance(options, Mapping)
            and x.dim() > 2
            and sigma.dim() < 2
            and sigma.numel() in (1, len(x))
        ):
            return cls(x, sigma.reshape(-1), options, args, kwargs)
        changed_seam("another call of predict_noise")
        return None

    def holding(self, run: Any, options: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with other ``model_options``, which hold the state of a run."""
        own = {**options, "transformer_options": {**options.get("transformer_options", {}), KEY: run}}
        return replaced(self.args, self.kwargs, self.options, own)


def replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], old: Any, new: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call with one of them replaced."""
    return tuple(new if one is old else one for one in args), {k: new if v is old else v for k, v in kwargs.items()}


def forward_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``transformer_options`` among the arguments of a forward; empty where there are none."""
    found = [one for one in (*args, *kwargs.values()) if isinstance(one, Mapping) and "uuids" in one]
    return found[-1] if found else {}


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
