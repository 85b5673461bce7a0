"""The registry of transformer classes, and what the library asks of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import (
    adapters_of,
    model_arguments,
    model_config,
    model_defaults,
    quantisation_of,
    unwrap_compiled,
)
from layercache._version import __version__
from layercache.errors import UnsupportedModelError
from layercache.models.known import SPECS
from layercache.models.spec import ModelSpec
from layercache.schedule.fingerprint import ConfigHash, Fingerprint

_REGISTRY: dict[str, ModelSpec] = {spec.model_class: spec for spec in SPECS}


def register_model(spec: ModelSpec) -> None:
    """Makes a transformer class known (or replaces what is known of it)."""
    _REGISTRY[spec.model_class] = spec


@contextmanager
def temporarily_known(spec: ModelSpec) -> Iterator[None]:
    """Knows a class within a ``with`` block."""
    before = _REGISTRY.get(spec.model_class)
    register_model(spec)
    try:
        yield
    finally:
        del _REGISTRY[spec.model_class]
        if before is not None:
            register_model(before)


def known_models() -> tuple[ModelSpec, ...]:
    """Every registered model, by class name."""
    return tuple(_REGISTRY[name] for name in sorted(_REGISTRY))


def spec_for(transformer: nn.Module) -> ModelSpec:
    """The registered description of a transformer.

    Raises:
        UnsupportedModelError: no class in its inheritance is registered.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in _REGISTRY:
            return _REGISTRY[cls.__name__]
    if "UNet" in type(transformer).__name__:
        raise UnsupportedModelError(
            f"{type(transformer).__name__} is a UNet, whose blocks change the size of what they pass on; layercache "
            "caches transformers ('layercache models' lists them). For UNets there are other caches, such as DeepCache"
        )
    raise UnsupportedModelError(
        f"{type(transformer).__name__} is not a transformer layercache knows (see layercache models); let it be found "
        "out with layercache.infer_model(pipe, lambda: pipe(...)), or describe it with "
        "layercache.register_model(layercache.ModelSpec(...))"
    )


EXPERTS = ("transformer", "transformer_2")
"""Components of a pipeline that share its steps; most have the first alone."""


def find_transformer(pipe: Any, name: str = "transformer") -> nn.Module:
    """The transformer of a pipeline, or ``pipe`` itself when it is one; wrappers of torch.compile and PEFT are opened.

    Args:
        pipe: a pipeline, or a transformer.
        name: the component to take, where a pipeline has several transformers.

    Raises:
        UnsupportedModelError: there is none.
    """
    module = pipe if isinstance(pipe, nn.Module) else getattr(pipe, name, None)
    if isinstance(module, nn.Module):
        return unwrap_compiled(module)
    known = experts_of(pipe)
    if known:
        raise UnsupportedModelError(f"the pipeline has no {name!r}; its transformers are {', '.join(known)}")
    if isinstance(getattr(pipe, "unet", None), nn.Module):
        raise UnsupportedModelError(
            f"{type(pipe).__name__} denoises with a {type(pipe.unet).__name__}, and layercache caches the blocks of "
            "transformers: take a pipeline that 'layercache models' lists (for UNets there are other caches, such as "
            "DeepCache)"
        )
    raise UnsupportedModelError(
        f"expected a diffusers pipeline with a transformer, or a transformer, got {type(pipe).__name__}"
    )


def experts_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by the names of their components, as the pipeline calls them."""
    found = {name: getattr(pipe, name, None) for name in EXPERTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def expert_settings(pipe: Any) -> dict[str, Any]:
    """Where a pipeline with several transformers turns from one to the next, as `Fingerprint.settings` holds it."""
    if len(experts_of(pipe)) < 2:
        return {}
    boundary = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    return {"experts": [f"boundary_ratio {boundary:g}" if isinstance(boundary, (int, float)) else "no boundary_ratio"]}


def text_leaves_of(model_class: str) -> bool:
    """Whether the head of a registered class reads the second stream too; ``False`` of an unknown class."""
    return model_class in _REGISTRY and _REGISTRY[model_class].text_leaves


def first_tensor(output: Any) -> torch.Tensor:
    """The velocity in what a transformer's forward returns: a tensor, a list of one per picture, or an output class."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    return torch.stack(list(first)) if isinstance(first, (list, tuple)) else first


def velocities(output: Any, spec: ModelSpec) -> list[torch.Tensor]:
    """What a transformer's forward returns for each of the streams that leave it."""
    if len(spec.leaves) == 1:
        return [first_tensor(output)]
    return [first_tensor((output[k],)) for k in range(len(spec.leaves))]


def config_hash(transformer: nn.Module) -> ConfigHash:
    """Twelve hex digits that change when the transformer's architecture does.

    They are of the configuration entries that its class is made with: how the weights are quantised, and entries that
    the class does not take, are none of them.
    """
    config, defaults = _as_json(model_config(transformer)), model_defaults(transformer)
    names = set(config) if defaults is None else set(config) & model_arguments(transformer)
    entries = {name: config[name] for name in sorted(names)}
    return ConfigHash(
        _digest(entries), entries, _as_json(defaults or {}), _older_hashes(transformer, names), settings_of(transformer)
    )


def _older_hashes(transformer: nn.Module, names: set[str]) -> frozenset[str]:
    """What 0.1, which hashed all entries, wrote for this transformer, with or without one that has its default."""
    config, defaults = model_config(transformer), model_defaults(transformer) or {}
    own = {name: value for name, value in config.items() if name in names}
    found = {_digest(config), _digest(own)}
    for name, value in own.items():
        if name in defaults and _as_json(defaults[name]) == _as_json(value):
            found.add(_digest({key: entry for key, entry in own.items() if key != name}))
    return frozenset(found)


def _digest(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _as_json(value: Any) -> Any:
    """A value as it is after it was written and read."""
    return json.loads(json.dumps(value, default=str))


def settings_of(transformer: nn.Module) -> dict[str, Any]:
    """What a transformer runs with that changes results and voids no schedule, as `Fingerprint.settings` holds it."""
    dtype = next((p.dtype for p in transformer.parameters() if p.is_floating_point()), None)
    found = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    return found | {"quantisation": quantisation_of(transformer), "adapters": adapters_of(transformer)}


def count_blocks(transformer: nn.Module) -> int:
    return sum(len(blocks) for blocks in spec_for(transformer).block_modules(transformer))


def fingerprint_of(
    transformer: nn.Module, sigmas: Sequence[float], branches: Sequence[str], steps: Sequence[int] = ()
) -> Fingerprint:
    """What a schedule for this transformer, these noise levels and guidance branches is valid for.

    ``steps`` are those at which the transformer runs; none given stands for all.
    """
    whole, configured = len(steps) == len(sigmas) - 1, config_hash(transformer)
    return Fingerprint(
        model_class=type(transformer).__name__,
        config_hash=str(configured),
        num_blocks=count_blocks(transformer),
        sigmas=tuple(sigmas),
        branches=tuple(branches),
        package_version=__version__,
        steps_run=() if whole else tuple(steps),
        architecture=configured.entries,
        settings=configured.settings,
    )
