"""LoRA adapters on a pipeline for as long as a context lasts.

Commands read names of adapters here before anything is loaded, so that torch is imported in functions.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layercache._utils.text import shown
from layercache.errors import LayerCacheError, UnsupportedModelError


def split_weight(text: str) -> tuple[str, float]:
    """``PATH:WEIGHT`` apart; a weight of 1 where there is none."""
    path, sign, weight = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if sign and path:
            return path, float(weight)
    return text, 1.0


@contextlib.contextmanager
def with_lora(pipe: Any, lora: str) -> Iterator[None]:
    """Context in which a pipeline has one more LoRA; behind it, it is as it was.

    Args:
        pipe: a diffusers pipeline.
        lora: ``PATH`` or ``PATH:WEIGHT`` of a file of safetensors or a folder with one; empty for none.

    Raises:
        LayerCacheError: it cannot be loaded.
        UnsupportedModelError: the pipeline takes no LoRA.
    """
    if not lora:
        yield
        return
    from layercache.models.registry import find_transformer

    path, weight = split_weight(lora)
    target: Any = pipe if hasattr(pipe, "load_lora_weights") else find_transformer(pipe)
    if not hasattr(target, "load_lora_weights") and not hasattr(target, "load_lora_adapter"):
        raise UnsupportedModelError(f"{type(pipe).__name__} takes no LoRA", argument="lora")
    before = _layers(pipe)
    active = sorted({name for names, _ in before.values() for name in names})
    name = re.sub(r"\W", "_", Path(path).stem) or "lora"
    name += "_transfer" * (name in active)
    try:
        _load(target, path, name)
        target.set_adapters([*active, name], [*(_weight(before, one) for one in active), weight])
        if not any(name in scaling for _, scaling in _layers(pipe).values()):
            raise LayerCacheError("it is for another model: none of its layers is in this one")
    except Exception as error:  # its file may hold anything
        _restore(target, before, name)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LayerCacheError(f"cannot load the LoRA {path!r}: {shown(reason[0])}", argument="lora") from error
    try:
        yield
    finally:
        _restore(target, before, name)


def _load(target: Any, path: str, name: str) -> None:
    """Loads a LoRA as one more adapter."""
    place = Path(path)
    usual = place / "pytorch_lora_weights.safetensors"
    file = (
        place
        if place.is_file()
        else usual
        if usual.is_file()
        else next(iter(sorted(place.glob("*.safetensors"))), None)
    )
    if file is None:
        raise LayerCacheError("there is no file of safetensors")
    where = {"weight_name": file.name, "adapter_name": name, "local_files_only": True}
    if hasattr(target, "load_lora_weights"):
        target.load_lora_weights(os.fspath(file.parent), **where)
        return
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        prefix = "transformer" if any(key.startswith("transformer.") for key in stored.keys()) else None
    target.load_lora_adapter(os.fspath(file.parent), prefix=prefix, **where)


def _layers(pipe: Any) -> dict[Any, tuple[list[str], dict[str, float]]]:
    """Active adapters and scales of every layer with a LoRA."""
    import torch

    from layercache.models.registry import find_transformer

    parts = pipe.components.values() if hasattr(pipe, "components") else [find_transformer(pipe)]
    found = {}
    for part in parts:
        layers: Any = part.modules() if isinstance(part, torch.nn.Module) else ()
        for layer in layers:
            if isinstance(getattr(layer, "scaling", None), dict) and hasattr(layer, "active_adapters"):
                found[layer] = (list(layer.active_adapters), dict(layer.scaling))
    return found


def _weight(before: dict[Any, tuple[list[str], dict[str, float]]], name: str) -> float:
    """The weight an adapter was set to: what its scale is, over what it is made with."""
    for layer, (_, scaling) in before.items():
        if name in scaling:
            rank = layer.r[name] ** (0.5 if getattr(layer, "use_rslora", {}).get(name) else 1)
            return float(scaling[name] / (layer.lora_alpha[name] / rank))
    return 1.0


def _restore(target: Any, before: dict[Any, tuple[list[str], dict[str, float]]], name: str) -> None:
    if not before:
        (target.unload_lora_weights if hasattr(target, "unload_lora_weights") else target.unload_lora)()
        return
    with contextlib.suppress(Exception):  # of an adapter that was not loaded
        target.delete_adapters(name)
    for layer, (active, scaling) in before.items():
        layer.scaling.update(scaling)
        layer.set_adapter(active)
