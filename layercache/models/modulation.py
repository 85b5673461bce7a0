"""Modulated inputs of transformer blocks, class by class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from layercache.errors import UnsupportedModelError

Modulated = tuple[torch.Tensor, torch.Tensor, float]


def _refuse(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this {what}; methods that watch the modulated input do not follow that, take FBCache instead"
    )


def _folded(norm: Any, shift: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Modulated:
    """Scale and shift that also hold the weight and bias that the LayerNorm may have."""
    if norm.weight is not None:
        weight, bias = norm.weight.float(), 0.0 if norm.bias is None else norm.bias.float()
        scale, shift = weight * (1 + scale.float()) - 1, bias * (1 + scale.float()) + shift.float()
    return scale.to(dtype), shift.to(dtype), norm.eps


def qwen(block: Any, call: Mapping[str, Any]) -> Modulated:
    if call.get("modulate_index") is not None:
        raise _refuse("Qwen-Image model modulates parts of the picture differently (zero_cond_t)")
    shift, scale = block.img_mod(call["temb"]).chunk(6, dim=-1)[:2]
    return scale, shift, block.img_norm1.eps


def zero(block: Any, call: Mapping[str, Any]) -> Modulated:
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


def flux2(block: Any, call: Mapping[str, Any]) -> Modulated:
    given = call["temb_mod_img"]
    if given.dim() == 3 and given.shape[1] > 1:
        raise _refuse("FLUX.2 model modulates the tokens of reference pictures differently (kv_cache)")
    shift, scale = given.chunk(6, dim=-1)[:2]
    return scale, shift, block.norm1.eps


def chroma(block: Any, call: Mapping[str, Any]) -> Modulated:
    shift, scale = call["temb"][:, :2].unbind(1)
    return scale, shift, block.norm1.norm.eps


def hidream(block: Any, call: Mapping[str, Any]) -> Modulated:
    inner = block.block
    shift, scale = inner.adaLN_modulation(call["temb"]).chunk(12, dim=-1)[:2]
    return scale, shift, inner.norm1_i.eps


def cogview3(block: Any, call: Mapping[str, Any]) -> Modulated:
    norm = block.norm1
    shift, scale = norm.linear(norm.silu(call["emb"])).chunk(12, dim=1)[:2]
    return scale, shift, norm.norm_x.eps


def cogview4(block: Any, call: Mapping[str, Any]) -> Modulated:
    shift, _, scale = block.norm1.linear(call["temb"]).chunk(12, dim=1)[:3]  # those of the text stand between
    return scale, shift, block.norm1.norm.eps


def table(block: Any, call: Mapping[str, Any]) -> Modulated:
    """Of blocks that add a table of their own to what the model makes of the timestep."""
    given, table = call["temb" if "temb" in call else "timestep"], block.scale_shift_table
    if given.dim() == 4:
        raise _refuse("model is given a timestep for every token")
    shift, scale = (table + given.reshape(-1, *table.shape[-2:]))[:, :2].unbind(1)
    return _folded(block.norm1, shift, scale, call["hidden_states"].dtype)


def kandinsky(block: Any, call: Mapping[str, Any]) -> Modulated:
    shift, scale = block.visual_modulation(call["time_embed"]).chunk(9, dim=-1)[:2]
    return _folded(block.self_attention_norm, shift, scale, call["visual_embed"].dtype)


def cosmos(block: Any, call: Mapping[str, Any]) -> Modulated:
    given, more, norm = call["embedded_timestep"], call.get("temb"), block.norm1
    if call.get("extra_pos_emb") is not None:
        raise _refuse("Cosmos model adds positions to the stream inside its blocks (extra_pos_embed_type)")
    if given.dim() != 2:
        raise _refuse("Cosmos model is given a timestep for every frame")
    made = norm.linear_2(norm.linear_1(norm.activation(given)))
    shift, scale = (made if more is None else made + more).chunk(3, dim=-1)[:2]
    return scale, shift, norm.norm.eps


def plain(block: Any, call: Mapping[str, Any]) -> Modulated:
    """Of blocks whose first LayerNorm has a weight and bias and nothing else: the timestep is a token of its own."""
    stream = call["hidden_states"]
    none = torch.zeros(stream.shape[0], stream.shape[-1], device=stream.device)
    return _folded(block.norm1, none, none, stream.dtype)
