"""What the library knows of each transformer class: where its blocks are and what they pass on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layercache._version import __version__
from layercache.compat import model_config, unwrap_compiled
from layercache.errors import UnsupportedModelError
from layercache.schedule import Fingerprint

Modulation = Callable[[nn.Module, Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor, float]]


@dataclass(frozen=True)
class ModelSpec:
    """How a transformer's forward runs through its blocks.

    Attributes:
        model_class: class name; subclasses of it are found too.
        block_lists: attribute names of the ``ModuleList`` s, in the order the forward runs through them.
            Streams must not change between two lists.
        streams: order in which a block returns its streams, of ``"image"`` and ``"text"``. A model whose
            blocks return one tensor has ``("image",)``.
        arguments: the block's argument names of the streams, ``(image, text)``, also their positions.
        timestep: argument of the transformer's forward that holds sigma or ``1000 * sigma``, if any does.
        modulation: of the first block and the arguments of its call, scale and shift ``[B, D]`` of its modulated input
            ``LayerNorm(image) * (1 + scale) + shift``, and the LayerNorm's eps; for methods that look at it.
        modules: per block list, the modules of a block whose outputs (before the gate) can be cached apart: each entry
            names submodules that run one after the other, of which the last one's output is kept.
    """

    model_class: str
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    streams: tuple[str, ...] = ("text", "image")
    arguments: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    timestep: str | None = "timestep"
    modulation: Modulation | None = None
    modules: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)

    @property
    def has_text(self) -> bool:
        return "text" in self.streams

    def block_modules(self, transformer: nn.Module) -> list[nn.ModuleList]:
        return [getattr(transformer, name) for name in self.block_lists]

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Image and text stream among the arguments of a block's call."""
        found = []
        for position, name in enumerate(self.arguments):
            found.append(kwargs[name] if name in kwargs else args[position])
        return found[0], found[1] if self.has_text else None

    def unpack(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Image and text stream of a block's output."""
        if not self.has_text:
            return (output[0] if isinstance(output, tuple) else output), None
        return output[self.streams.index("image")], output[self.streams.index("text")]

    def pack(self, image: torch.Tensor, text: torch.Tensor | None) -> Any:
        """The output a block would give for these streams."""
        if not self.has_text:
            return image
        return tuple(image if stream == "image" else text for stream in self.streams)


_REGISTRY: dict[str, ModelSpec] = {}


def register_model(spec: ModelSpec) -> None:
    """Makes a transformer class known (or replaces what is known of it)."""
    _REGISTRY[spec.model_class] = spec


def _qwen_modulation(block: Any, call: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, float]:
    if call.get("modulate_index") is not None:
        raise UnsupportedModelError(
            "this Qwen-Image model modulates parts of the picture differently (zero_cond_t); methods that watch the "
            "modulated input do not follow that, take FBCache instead"
        )
    shift, scale = block.img_mod(call["temb"]).chunk(6, dim=-1)[:2]
    return scale, shift, block.img_norm1.eps


def _flux_modulation(block: Any, call: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, float]:
    norm = block.norm1
    shift, scale = norm.linear(norm.silu(call["temb"])).chunk(6, dim=1)[:2]
    return scale, shift, norm.norm.eps


register_model(
    ModelSpec(
        "QwenImageTransformer2DModel",
        modulation=_qwen_modulation,
        modules={"transformer_blocks": (("attn",), ("img_mlp",), ("txt_mlp",))},
    )
)
register_model(
    ModelSpec(
        "FluxTransformer2DModel",
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        modulation=_flux_modulation,
        modules={
            "transformer_blocks": (("attn",), ("ff",), ("ff_context",)),
            "single_transformer_blocks": (("attn",), ("proj_mlp", "act_mlp")),
        },
    )
)


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
    raise UnsupportedModelError(
        f"{type(transformer).__name__} is not a transformer layercache knows "
        f"({', '.join(sorted(_REGISTRY))}); describe it with layercache.register_model(ModelSpec(...))"
    )


def find_transformer(target: Any) -> nn.Module:
    """The transformer of a pipeline, or ``target`` itself when it is one; compiled wrappers are opened.

    Raises:
        UnsupportedModelError: there is none.
    """
    module = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(
            f"expected a diffusers pipeline with a transformer, or a transformer, got {type(target).__name__}"
        )
    return unwrap_compiled(module)


def first_tensor(output: Any) -> torch.Tensor:
    """The velocity in what a transformer's forward returns: a tensor, a tuple, or one of diffusers' outputs."""
    return output if isinstance(output, torch.Tensor) else output[0]


def config_hash(transformer: nn.Module) -> str:
    """Twelve hex digits that change when the transformer's configuration does."""
    text = json.dumps(model_config(transformer), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def count_blocks(transformer: nn.Module) -> int:
    return sum(len(blocks) for blocks in spec_for(transformer).block_modules(transformer))


def fingerprint_of(transformer: nn.Module, sigmas: Sequence[float], branches: Sequence[str]) -> Fingerprint:
    """What a schedule for this transformer, these noise levels and guidance branches is valid for."""
    return Fingerprint(
        model_class=type(transformer).__name__,
        config_hash=config_hash(transformer),
        num_blocks=count_blocks(transformer),
        sigmas=tuple(sigmas),
        branches=tuple(branches),
        package_version=__version__,
    )
