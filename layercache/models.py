"""The transformers the library knows, and what it asks of one: its blocks, its configuration, its output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layercache._version import __version__
from layercache.compat import model_config, unwrap_compiled
from layercache.errors import UnsupportedModelError
from layercache.model_spec import ModelSpec
from layercache.schedule import Fingerprint

_REGISTRY: dict[str, ModelSpec] = {}


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


_TWO_LISTS = ("transformer_blocks", "single_transformer_blocks")
_IMAGE_FIRST = ("image", "text")
_IMAGE = ("image",)
_CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")
_ATTENTION_TWICE = (("attn1",), ("attn2",))

for _spec in (
    ModelSpec(
        "QwenImageTransformer2DModel",
        adds=("controlnet_block_samples",),
        modulation=_qwen_modulation,
        modules={"transformer_blocks": (("attn",), ("img_mlp",), ("txt_mlp",))},
    ),
    ModelSpec(
        "FluxTransformer2DModel",
        block_lists=_TWO_LISTS,
        adds=_CONTROLNET,
        modulation=_flux_modulation,
        modules={
            "transformer_blocks": (("attn",), ("ff",), ("ff_context",)),
            "single_transformer_blocks": (("attn",), ("proj_mlp", "act_mlp")),
        },
    ),
    ModelSpec(
        "Flux2Transformer2DModel",
        adds=(),
        block_lists=_TWO_LISTS,
        joint={"single_transformer_blocks": ("text", "image")},
    ),
    ModelSpec(
        "ChromaTransformer2DModel",
        block_lists=_TWO_LISTS,
        adds=_CONTROLNET,
        joint={"single_transformer_blocks": ("text", "image")},
        rewritten={"single_transformer_blocks": "controlnet_single_block_samples"},
    ),
    ModelSpec("LongCatImageTransformer2DModel", block_lists=_TWO_LISTS),
    ModelSpec("OvisImageTransformer2DModel", block_lists=_TWO_LISTS),
    ModelSpec("BriaTransformer2DModel", block_lists=_TWO_LISTS),
    ModelSpec(
        "AuraFlowTransformer2DModel",
        block_lists=("joint_transformer_blocks", "single_transformer_blocks"),
        joint={"single_transformer_blocks": ("text", "image")},
    ),
    ModelSpec(
        "HiDreamImageTransformer2DModel",
        block_lists=("double_stream_blocks", "single_stream_blocks"),
        streams=_IMAGE_FIRST,
        joint={"single_stream_blocks": _IMAGE_FIRST},
        timestep="timesteps",
    ),
    ModelSpec("SD3Transformer2DModel", adds=("block_controlnet_hidden_states",), bypass=("skip_layers",)),
    ModelSpec("CogView3PlusTransformer2DModel", streams=_IMAGE_FIRST, timestep=None),
    ModelSpec("CogView4Transformer2DModel", adds=(), streams=_IMAGE_FIRST),
    ModelSpec("HunyuanImageTransformer2DModel", adds=(), block_lists=_TWO_LISTS, streams=_IMAGE_FIRST),
    ModelSpec("HunyuanVideoTransformer3DModel", adds=(), block_lists=_TWO_LISTS, streams=_IMAGE_FIRST),
    ModelSpec("HunyuanVideoFramepackTransformer3DModel", block_lists=_TWO_LISTS, streams=_IMAGE_FIRST),
    ModelSpec("HunyuanVideo15Transformer3DModel", adds=(), streams=_IMAGE_FIRST),
    ModelSpec("CogVideoXTransformer3DModel", adds=(), streams=_IMAGE_FIRST, timestep=None),
    ModelSpec("MochiTransformer3DModel", adds=(), streams=_IMAGE_FIRST, timestep=None),
    ModelSpec(
        "LTX2VideoTransformer3DModel",
        streams=_IMAGE_FIRST,
        arguments=("hidden_states", "audio_hidden_states"),
        leaves=_IMAGE_FIRST,
    ),
    ModelSpec("LTXVideoTransformer3DModel", adds=(), streams=_IMAGE),
    ModelSpec("WanTransformer3DModel", ("blocks",), _IMAGE, adds=(), modules={"blocks": (*_ATTENTION_TWICE, ("ffn",))}),
    ModelSpec("WanVACETransformer3DModel", ("blocks",), _IMAGE),
    ModelSpec("WanAnimateTransformer3DModel", ("blocks",), _IMAGE, couples=True),
    ModelSpec("ChronoEditTransformer3DModel", ("blocks",), _IMAGE),
    ModelSpec("SkyReelsV2Transformer3DModel", ("blocks",), _IMAGE, adds=()),
    ModelSpec(
        "Kandinsky5Transformer3DModel",
        ("visual_transformer_blocks",),
        _IMAGE,
        arguments=("visual_embed", "text_embed"),
    ),
    ModelSpec("CosmosTransformer3DModel", streams=_IMAGE, timestep=None),
    ModelSpec(
        "ZImageTransformer2DModel",
        ("layers",),
        _IMAGE,
        adds=("controlnet_block_samples",),
        arguments=("x", "attn_mask"),
        timestep=None,
    ),
    ModelSpec("Lumina2Transformer2DModel", ("layers",), _IMAGE, timestep=None),
    ModelSpec("SanaTransformer2DModel", streams=_IMAGE),
    ModelSpec(
        "PixArtTransformer2DModel",
        streams=_IMAGE,
        timestep=None,
        modules={"transformer_blocks": (*_ATTENTION_TWICE, ("ff",))},
    ),
    ModelSpec(
        "DiTTransformer2DModel", streams=_IMAGE, timestep=None, modules={"transformer_blocks": (("attn1",), ("ff",))}
    ),
    ModelSpec("StableAudioDiTModel", streams=_IMAGE, timestep=None),
):
    register_model(_spec)


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
        f"{type(transformer).__name__} is not a transformer layercache knows (see layercache models); let it be found "
        "out with layercache.infer_model(pipe, lambda: pipe(...)), or describe it with "
        "layercache.register_model(layercache.ModelSpec(...))"
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


def text_leaves_of(model_class: str) -> bool:
    """Whether the head of a registered class reads the second stream too; ``False`` of an unknown class."""
    return model_class in _REGISTRY and _REGISTRY[model_class].text_leaves


def first_tensor(output: Any) -> torch.Tensor:
    """The velocity in what a transformer's forward returns: a tensor, a list of one per picture, or an output class."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    return torch.stack(list(first)) if isinstance(first, (list, tuple)) else first


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
