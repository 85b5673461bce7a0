"""The transformers the library knows, and what it asks of one: its blocks, its configuration, its output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import model_config, unwrap_compiled
from layercache._version import __version__
from layercache.errors import UnsupportedModelError
from layercache.models.spec import ModelSpec
from layercache.schedule.schedule import Fingerprint

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


_Modulated = tuple[torch.Tensor, torch.Tensor, float]


def _refuse(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this {what}; methods that watch the modulated input do not follow that, take FBCache instead"
    )


def _folded(norm: Any, shift: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> _Modulated:
    """Scale and shift that also hold the weight and bias that the LayerNorm may have."""
    if norm.weight is not None:
        weight, bias = norm.weight.float(), 0.0 if norm.bias is None else norm.bias.float()
        scale, shift = weight * (1 + scale.float()) - 1, bias * (1 + scale.float()) + shift.float()
    return scale.to(dtype), shift.to(dtype), norm.eps


def _qwen_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    if call.get("modulate_index") is not None:
        raise _refuse("Qwen-Image model modulates parts of the picture differently (zero_cond_t)")
    shift, scale = block.img_mod(call["temb"]).chunk(6, dim=-1)[:2]
    return scale, shift, block.img_norm1.eps


def _zero_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    """Of diffusers' ``AdaLayerNormZero`` and what is like it: shift and scale come first, 6 of them or 9."""
    norm, stream = block.norm1, call["hidden_states"]
    if call.get("token_replace_emb") is not None:
        raise _refuse("HunyuanVideo model modulates the first frame differently (token_replace)")
    if getattr(norm, "emb", None) is None:
        given = call["temb"]
    else:
        given = norm.emb(call["timestep"], call["class_labels"], hidden_dtype=stream.dtype)
    width = stream.shape[-1]
    shift, scale = norm.linear(norm.silu(given))[:, : 2 * width].chunk(2, dim=1)
    return _folded(norm.norm, shift, scale, stream.dtype)


def _flux2_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    given = call["temb_mod_img"]
    if given.dim() == 3 and given.shape[1] > 1:
        raise _refuse("FLUX.2 model modulates the tokens of reference pictures differently (kv_cache)")
    shift, scale = given.chunk(6, dim=-1)[:2]
    return scale, shift, block.norm1.eps


def _chroma_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    shift, scale = call["temb"][:, :2].unbind(1)
    return scale, shift, block.norm1.norm.eps


def _hidream_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    inner = block.block
    shift, scale = inner.adaLN_modulation(call["temb"]).chunk(12, dim=-1)[:2]
    return scale, shift, inner.norm1_i.eps


def _cogview3_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    norm = block.norm1
    shift, scale = norm.linear(norm.silu(call["emb"])).chunk(12, dim=1)[:2]
    return scale, shift, norm.norm_x.eps


def _cogview4_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    shift, _, scale = block.norm1.linear(call["temb"]).chunk(12, dim=1)[:3]  # those of the text stand between
    return scale, shift, block.norm1.norm.eps


def _table_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    """Of blocks that add a table of their own to what the model makes of the timestep."""
    given, table = call["temb" if "temb" in call else "timestep"], block.scale_shift_table
    if given.dim() == 4:
        raise _refuse("model is given a timestep for every token")
    shift, scale = (table + given.reshape(-1, *table.shape[-2:]))[:, :2].unbind(1)
    return _folded(block.norm1, shift, scale, call["hidden_states"].dtype)


def _kandinsky_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    shift, scale = block.visual_modulation(call["time_embed"]).chunk(9, dim=-1)[:2]
    return _folded(block.self_attention_norm, shift, scale, call["visual_embed"].dtype)


def _cosmos_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    given, more, norm = call["embedded_timestep"], call.get("temb"), block.norm1
    if call.get("extra_pos_emb") is not None:
        raise _refuse("Cosmos model adds positions to the stream inside its blocks (extra_pos_embed_type)")
    if given.dim() != 2:
        raise _refuse("Cosmos model is given a timestep for every frame")
    made = norm.linear_2(norm.linear_1(norm.activation(given)))
    shift, scale = (made if more is None else made + more).chunk(3, dim=-1)[:2]
    return scale, shift, norm.norm.eps


def _plain_modulation(block: Any, call: Mapping[str, Any]) -> _Modulated:
    """Of blocks whose first LayerNorm has a weight and bias and nothing else: the timestep is a token of its own."""
    stream = call["hidden_states"]
    none = torch.zeros(stream.shape[0], stream.shape[-1], device=stream.device)
    return _folded(block.norm1, none, none, stream.dtype)


_TWO_LISTS = ("transformer_blocks", "single_transformer_blocks")
_IMAGE_FIRST = ("image", "text")
_IMAGE = ("image",)
_CONTROLNET = ("controlnet_block_samples", "controlnet_single_block_samples")
_ATTENTION_TWICE = (("attn1",), ("attn2",))
_JOINT = (("attn",), ("ff",), ("ff_context",))
_THREE = (*_ATTENTION_TWICE, ("ff",))
_VIDEO_AND_SOUND = (
    *(("attn1",), ("audio_attn1",), ("attn2",), ("audio_attn2",)),
    *(("audio_to_video_attn",), ("video_to_audio_attn",), ("ff",), ("audio_ff",)),
)
_WAN: dict[str, Any] = {"modulation": _table_modulation, "modules": {"blocks": (*_ATTENTION_TWICE, ("ffn",))}}
_FLUX_MODULES = {"transformer_blocks": _JOINT, "single_transformer_blocks": (("attn",), ("proj_mlp", "act_mlp"))}
_FLUX: dict[str, Any] = {"block_lists": _TWO_LISTS, "modulation": _zero_modulation, "modules": _FLUX_MODULES}

for _spec in (
    ModelSpec(
        "QwenImageTransformer2DModel",
        adds=("controlnet_block_samples",),
        modulation=_qwen_modulation,
        modules={"transformer_blocks": (("attn",), ("img_mlp",), ("txt_mlp",))},
    ),
    ModelSpec("FluxTransformer2DModel", adds=_CONTROLNET, **_FLUX),
    ModelSpec(
        "Flux2Transformer2DModel",
        adds=(),
        block_lists=_TWO_LISTS,
        joint={"single_transformer_blocks": ("text", "image")},
        modulation=_flux2_modulation,
        modules={"transformer_blocks": _JOINT, "single_transformer_blocks": (("attn",),)},
    ),
    ModelSpec(
        "ChromaTransformer2DModel",
        block_lists=_TWO_LISTS,
        adds=_CONTROLNET,
        joint={"single_transformer_blocks": ("text", "image")},
        rewritten={"single_transformer_blocks": "controlnet_single_block_samples"},
        modulation=_chroma_modulation,
        modules=_FLUX_MODULES,
    ),
    ModelSpec("LongCatImageTransformer2DModel", **_FLUX),
    ModelSpec(
        "OvisImageTransformer2DModel",
        block_lists=_TWO_LISTS,
        modulation=_zero_modulation,
        # its act_mlp takes one half of proj_mlp's output
        modules={"transformer_blocks": _JOINT, "single_transformer_blocks": (("attn",), ("proj_mlp",))},
    ),
    ModelSpec(
        "BriaTransformer2DModel",
        rewritten={"single_transformer_blocks": "controlnet_single_block_samples"},
        **_FLUX,
    ),
    ModelSpec(
        "AuraFlowTransformer2DModel",
        block_lists=("joint_transformer_blocks", "single_transformer_blocks"),
        joint={"single_transformer_blocks": ("text", "image")},
        modulation=_zero_modulation,
        modules={"joint_transformer_blocks": _JOINT, "single_transformer_blocks": (("attn",), ("ff",))},
    ),
    ModelSpec(
        "HiDreamImageTransformer2DModel",
        block_lists=("double_stream_blocks", "single_stream_blocks"),
        streams=_IMAGE_FIRST,
        joint={"single_stream_blocks": _IMAGE_FIRST},
        timestep="timesteps",
        modulation=_hidream_modulation,
        modules={
            "double_stream_blocks": (("block.attn1",), ("block.ff_i",), ("block.ff_t",)),
            "single_stream_blocks": (("block.attn1",), ("block.ff_i",)),
        },
        differentiable=False,  # its experts run without gradients
    ),
    ModelSpec(
        "SD3Transformer2DModel",
        adds=("block_controlnet_hidden_states",),
        bypass=("skip_layers",),
        modulation=_zero_modulation,
        modules={"transformer_blocks": (("attn",), ("attn2",), ("ff",), ("ff_context",))},
    ),
    ModelSpec(
        "CogView3PlusTransformer2DModel",
        streams=_IMAGE_FIRST,
        timestep=None,
        modulation=_cogview3_modulation,
        modules={"transformer_blocks": (("attn1",), ("ff",))},
    ),
    ModelSpec(
        "CogView4Transformer2DModel",
        adds=(),
        streams=_IMAGE_FIRST,
        modulation=_cogview4_modulation,
        # its feed-forward runs twice in a block, on the picture and on the text
        modules={"transformer_blocks": (("attn1",),)},
    ),
    ModelSpec("HunyuanImageTransformer2DModel", adds=(), streams=_IMAGE_FIRST, **_FLUX),
    ModelSpec("HunyuanVideoTransformer3DModel", adds=(), streams=_IMAGE_FIRST, **_FLUX),
    ModelSpec("HunyuanVideoFramepackTransformer3DModel", streams=_IMAGE_FIRST, **_FLUX),
    ModelSpec(
        "HunyuanVideo15Transformer3DModel",
        adds=(),
        streams=_IMAGE_FIRST,
        modulation=_zero_modulation,
        modules={"transformer_blocks": _JOINT},
    ),
    ModelSpec(
        "CogVideoXTransformer3DModel",
        adds=(),
        streams=_IMAGE_FIRST,
        timestep=None,
        modulation=_zero_modulation,
        modules={"transformer_blocks": (("attn1",), ("ff",))},
    ),
    ModelSpec(
        "MochiTransformer3DModel",
        adds=(),
        streams=_IMAGE_FIRST,
        timestep=None,
        modules={"transformer_blocks": (("attn1",), ("ff",), ("ff_context",))},
    ),
    ModelSpec(
        "LTX2VideoTransformer3DModel",
        streams=_IMAGE_FIRST,
        arguments=("hidden_states", "audio_hidden_states"),
        leaves=_IMAGE_FIRST,
        modules={"transformer_blocks": _VIDEO_AND_SOUND},
    ),
    ModelSpec("LTXVideoTransformer3DModel", adds=(), streams=_IMAGE, modules={"transformer_blocks": _THREE}),
    ModelSpec("WanTransformer3DModel", ("blocks",), _IMAGE, adds=(), **_WAN),
    ModelSpec("WanVACETransformer3DModel", ("blocks",), _IMAGE, **_WAN),
    ModelSpec("WanAnimateTransformer3DModel", ("blocks",), _IMAGE, couples=True, **_WAN),
    ModelSpec("ChronoEditTransformer3DModel", ("blocks",), _IMAGE, **_WAN),
    ModelSpec("SkyReelsV2Transformer3DModel", ("blocks",), _IMAGE, adds=(), **_WAN),
    ModelSpec(
        "Kandinsky5Transformer3DModel",
        ("visual_transformer_blocks",),
        _IMAGE,
        arguments=("visual_embed", "text_embed"),
        modulation=_kandinsky_modulation,
        modules={"visual_transformer_blocks": (("self_attention",), ("cross_attention",), ("feed_forward",))},
    ),
    ModelSpec(
        "CosmosTransformer3DModel",
        streams=_IMAGE,
        timestep=None,
        modulation=_cosmos_modulation,
        modules={"transformer_blocks": _THREE},
    ),
    ModelSpec(
        "ZImageTransformer2DModel",
        ("layers",),
        _IMAGE,
        adds=("controlnet_block_samples",),
        arguments=("x", "attn_mask"),
        timestep=None,
        modules={"layers": (("attention",), ("feed_forward",))},
    ),
    ModelSpec(
        "Lumina2Transformer2DModel",
        ("layers",),
        _IMAGE,
        timestep=None,
        modules={"layers": (("attn",), ("feed_forward",))},
    ),
    ModelSpec(
        "SanaTransformer2DModel",
        streams=_IMAGE,
        modulation=_table_modulation,
        modules={"transformer_blocks": _THREE},
    ),
    ModelSpec(
        "PixArtTransformer2DModel",
        streams=_IMAGE,
        timestep=None,
        modulation=_table_modulation,
        modules={"transformer_blocks": _THREE},
    ),
    ModelSpec(
        "DiTTransformer2DModel",
        streams=_IMAGE,
        timestep=None,
        modulation=_zero_modulation,
        modules={"transformer_blocks": (("attn1",), ("ff",))},
    ),
    ModelSpec(
        "StableAudioDiTModel",
        streams=_IMAGE,
        timestep=None,
        modulation=_plain_modulation,
        modules={"transformer_blocks": _THREE},
    ),
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


EXPERTS = ("transformer", "transformer_2")
"""Components of a pipeline that share its steps; most have the first alone."""


def find_transformer(target: Any, name: str = "transformer") -> nn.Module:
    """The transformer of a pipeline, or ``target`` itself when it is one; compiled wrappers are opened.

    Args:
        target: a pipeline, or a transformer.
        name: the component to take, where a pipeline has several transformers.

    Raises:
        UnsupportedModelError: there is none.
    """
    module = target if isinstance(target, nn.Module) else getattr(target, name, None)
    if isinstance(module, nn.Module):
        return unwrap_compiled(module)
    known = experts_of(target)
    if known:
        raise UnsupportedModelError(f"the pipeline has no {name!r}; its transformers are {', '.join(known)}")
    raise UnsupportedModelError(
        f"expected a diffusers pipeline with a transformer, or a transformer, got {type(target).__name__}"
    )


def experts_of(pipeline: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by the names of their components, as the pipeline calls them."""
    found = {name: getattr(pipeline, name, None) for name in EXPERTS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


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


def config_hash(transformer: nn.Module) -> str:
    """Twelve hex digits that change when the transformer's configuration does."""
    text = json.dumps(model_config(transformer), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def count_blocks(transformer: nn.Module) -> int:
    return sum(len(blocks) for blocks in spec_for(transformer).block_modules(transformer))


def fingerprint_of(
    transformer: nn.Module, sigmas: Sequence[float], branches: Sequence[str], steps: Sequence[int] = ()
) -> Fingerprint:
    """What a schedule for this transformer, these noise levels and guidance branches is valid for.

    ``steps`` are those at which the transformer runs; none given stands for all.
    """
    whole = len(steps) == len(sigmas) - 1
    return Fingerprint(
        model_class=type(transformer).__name__,
        config_hash=config_hash(transformer),
        num_blocks=count_blocks(transformer),
        sigmas=tuple(sigmas),
        branches=tuple(branches),
        package_version=__version__,
        steps_run=() if whole else tuple(steps),
    )
