"""Every registered transformer class of diffusers with a tiny configuration, and arguments for its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from support.tiny import randomise

B = 2
TEXT, IMAGE = 6, 4  # tokens of the text, side of the picture


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def _ids(axes: int) -> dict[str, torch.Tensor]:
    grid = torch.zeros(IMAGE * IMAGE, axes)
    grid[:, 1], grid[:, 2] = torch.arange(IMAGE).repeat_interleave(IMAGE), torch.arange(IMAGE).repeat(IMAGE)
    return {"img_ids": grid, "txt_ids": torch.zeros(TEXT, axes)}


def _flux(config: dict[str, Any], axes: int = 3, **more: torch.Tensor) -> tuple[dict, dict]:
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    config = {"in_channels": 4, "num_layers": 2, "num_single_layers": 2} | heads | config
    inputs = {"hidden_states": noise(B, IMAGE * IMAGE, 4), "encoder_hidden_states": noise(B, TEXT, 32)}
    return config, inputs | _ids(axes) | {"timestep": torch.full((B,), 0.5)} | more


def _approximator() -> dict[str, int]:
    return {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}


def _video(config: dict[str, Any], text: int, tokens: int = TEXT, batch: int = B, **more: Any) -> tuple[dict, dict]:
    inputs = {"hidden_states": noise(batch, 4, 2, 4, 4), "encoder_hidden_states": noise(batch, tokens, text)}
    return {"in_channels": 4, "out_channels": 4} | config, inputs | {"timestep": torch.full((batch,), 500.0)} | more


def _picture(config: dict[str, Any], text: int, **more: Any) -> tuple[dict, dict]:
    inputs = {"hidden_states": noise(B, 4, 8, 8), "encoder_hidden_states": noise(B, TEXT, text)}
    return {"in_channels": 4} | config, inputs | {"timestep": torch.full((B,), 500.0)} | more


def _sizes() -> dict[str, torch.Tensor]:
    size = torch.tensor([[64, 64]] * B)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(B, 2, dtype=torch.long)}


_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
}


def _qwen() -> tuple[dict, dict]:
    config = {"in_channels": 16, "out_channels": 4, "num_layers": 4, "attention_head_dim": 16}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}
    inputs = {"hidden_states": noise(B, 16, 16), "encoder_hidden_states": noise(B, TEXT, 16)}
    inputs |= {"encoder_hidden_states_mask": ones(B, TEXT).bool(), "img_shapes": [[(1, 4, 4)]] * B}
    return config, inputs | {"timestep": torch.full((B,), 0.5)}


def _aura_flow() -> tuple[dict, dict]:
    config = {"sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8}
    config |= {"num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 16}
    return _picture(config | {"out_channels": 4, "pos_embed_max_size": 64}, 16)


def _hidream() -> tuple[dict, dict]:
    config = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
    config |= {"attention_head_dim": 8, "num_attention_heads": 2, "caption_channels": [8, 4], "text_emb_dim": 8}
    config |= {"num_routed_experts": 2, "num_activated_experts": 2, "axes_dims_rope": (4, 2, 2)}
    config |= {"max_resolution": (8, 8), "llama_layers": (0, 1, 2, 1), "force_inference_output": True}
    inputs = {"hidden_states": noise(B, 4, 8, 8), "encoder_hidden_states_t5": noise(B, 3, 8)}
    inputs |= {"encoder_hidden_states_llama3": noise(3, B, 5, 4), "pooled_embeds": noise(B, 8)}
    return config, inputs | {"timesteps": torch.full((B,), 500)}


def _sd3() -> tuple[dict, dict]:
    config = {"sample_size": 8, "patch_size": 2, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2}
    config |= {"caption_projection_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 8}
    return _picture(config | {"out_channels": 4, "pos_embed_max_size": 8}, 16, pooled_projections=noise(B, 8))


def _cogview(**more: Any) -> tuple[dict, dict]:
    config = {"patch_size": 2, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2, "out_channels": 4}
    return _picture(config | {"text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4} | more, 8, **_sizes())


def _hunyuan_image() -> tuple[dict, dict]:
    config = _HUNYUAN | {"patch_size": (1, 1), "attention_head_dim": 8, "rope_axes_dim": (4, 4)}
    config |= {"out_channels": 4, "text_embed_2_dim": None, "guidance_embeds": False}
    del config["pooled_projection_dim"]
    return _picture(config, 16, encoder_attention_mask=ones(B, TEXT))


def _hunyuan_video() -> tuple[dict, dict]:
    more = {"pooled_projections": noise(B, 8), "encoder_attention_mask": ones(B, TEXT)}
    return _video(_HUNYUAN | {"patch_size_t": 1, "guidance_embeds": False}, 16, **more)


def _framepack() -> tuple[dict, dict]:
    config = _HUNYUAN | {"patch_size_t": 1, "guidance_embeds": False, "has_image_proj": True, "image_proj_dim": 8}
    config |= {"has_clean_x_embedder": True, "patch_size": 2}
    more = {"pooled_projections": noise(B, 8), "encoder_attention_mask": ones(B, TEXT)}
    for name, frames in {"latents_clean": 1, "latents_history_2x": 2, "latents_history_4x": 4}.items():
        more |= {name: noise(B, 4, frames, 4, 4), f"indices_{name}": torch.arange(frames)}
    return _video(config, 16, image_embeds=noise(B, 3, 8), indices_latents=torch.arange(2), **more)


def _hunyuan_15() -> tuple[dict, dict]:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "num_refiner_layers": 1}
    config |= {"mlp_ratio": 2.0, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16, "text_embed_2_dim": 8}
    config |= {"image_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "target_size": 16}
    more = {"encoder_hidden_states_2": noise(B, 4, 8), "image_embeds": torch.zeros(B, 3, 12)}
    more |= {"encoder_attention_mask": ones(B, TEXT), "encoder_attention_mask_2": ones(B, 4)}
    return _video(config, 16, **more)


def _cogvideox() -> tuple[dict, dict]:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4}
    config |= {"time_embed_dim": 4, "text_embed_dim": 8, "num_layers": 4, "sample_width": 8, "sample_height": 8}
    config |= {"sample_frames": 8, "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": TEXT}
    inputs = {"hidden_states": noise(B, 1, 4, 8, 8), "encoder_hidden_states": noise(B, TEXT, 8)}
    return config, inputs | {"timestep": torch.full((B,), 500)}


def _mochi() -> tuple[dict, dict]:
    config = {"patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4}
    config |= {"pooled_projection_dim": 16, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": TEXT}
    return _video(config | {"out_channels": None}, 16, encoder_attention_mask=ones(B, TEXT).bool())


def _ltx() -> tuple[dict, dict]:
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8}
    config |= {"cross_attention_dim": 16, "num_layers": 4, "caption_channels": 16}
    inputs = {"hidden_states": noise(B, 32, 4), "encoder_hidden_states": noise(B, TEXT, 16)}
    inputs |= {"timestep": torch.full((B,), 500.0), "encoder_attention_mask": ones(B, TEXT).bool()}
    return config, inputs | {"num_frames": 2, "height": 4, "width": 4}


def _ltx2() -> tuple[dict, dict]:
    config, inputs = _ltx()
    config |= {"patch_size": 1, "patch_size_t": 1, "audio_in_channels": 4, "audio_out_channels": 4}
    config |= {"audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
    inputs |= {"audio_hidden_states": noise(B, 5, 4), "audio_encoder_hidden_states": noise(B, TEXT, 16)}
    return config | {"rope_double_precision": False}, inputs | {"audio_num_frames": 5, "fps": 25.0}


def _vace() -> tuple[dict, dict]:
    config, inputs = _video(_WAN | {"vace_layers": [0, 2], "vace_in_channels": 8}, 16)
    return config, inputs | {"control_hidden_states": noise(B, 8, 2, 4, 4)}


def _wan_animate() -> tuple[dict, dict]:
    channels = {str(size): 4 for size in (4, 8, 16, 32, 64)}
    config = _WAN | {"in_channels": 12, "latent_channels": 4, "out_channels": 4, "image_dim": 4}
    config |= {"motion_encoder_channel_sizes": channels, "motion_encoder_size": 16, "motion_style_dim": 8}
    config |= {"motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16}
    config |= {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}
    inputs = {"hidden_states": noise(1, 12, 3, 4, 4), "encoder_hidden_states": noise(1, TEXT, 16)}
    inputs |= {"timestep": torch.full((1,), 500.0), "encoder_hidden_states_image": noise(1, 3, 4)}
    return config, inputs | {"pose_hidden_states": noise(1, 4, 2, 4, 4), "face_pixel_values": noise(1, 3, 5, 16, 16)}


def _kandinsky() -> tuple[dict, dict]:
    config = {"in_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4}
    config |= {"patch_size": (1, 2, 2), "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 4}
    inputs = {"hidden_states": noise(1, 2, 8, 8, 4), "encoder_hidden_states": noise(1, TEXT, 8)}
    inputs |= {"timestep": torch.full((1,), 500.0), "pooled_projections": noise(1, 8)}
    places = [torch.arange(2), torch.arange(4), torch.arange(4)]
    inputs |= {"visual_rope_pos": places, "text_rope_pos": torch.arange(TEXT)}
    return config | {"axes_dims": (1, 1, 2), "visual_cond": False, "attention_type": "regular"}, inputs


def _cosmos() -> tuple[dict, dict]:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4, "mlp_ratio": 2}
    config |= {"text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "patch_size": (1, 2, 2)}
    config |= {"concat_padding_mask": False, "controlnet_block_every_n": 1, "extra_pos_embed_type": "learnable"}
    return _video(config, 16, fps=30)


def _z_image() -> tuple[dict, dict]:
    config = {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 16, "n_layers": 4}
    config |= {"n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 16, "axes_dims": [8, 4, 4]}
    inputs = {"x": [noise(4, 1, 8, 8) for _ in range(B)], "t": torch.full((B,), 0.5)}
    return config | {"axes_lens": [64, 32, 32]}, inputs | {"cap_feats": [noise(TEXT, 16) for _ in range(B)]}


def _lumina2() -> tuple[dict, dict]:
    config = {"sample_size": 8, "patch_size": 2, "hidden_size": 24, "num_layers": 4, "num_refiner_layers": 1}
    config |= {"num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2)}
    config |= {"axes_lens": (32, 32, 32), "cap_feat_dim": 16}
    return _picture(config, 16, encoder_attention_mask=ones(B, TEXT).bool())


def _sana() -> tuple[dict, dict]:
    config = {"patch_size": 1, "out_channels": 4, "num_layers": 4, "attention_head_dim": 4, "num_attention_heads": 2}
    config |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8}
    return _picture(config | {"caption_channels": 8, "sample_size": 8}, 8)


def _pixart() -> tuple[dict, dict]:
    config = {"sample_size": 8, "num_layers": 4, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    config |= {"cross_attention_dim": 16, "out_channels": 8, "use_additional_conditions": False}
    none = {"aspect_ratio": None, "resolution": None}
    return _picture(config | {"caption_channels": None}, 16, added_cond_kwargs=none)


def _dit() -> tuple[dict, dict]:
    config = {"in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8}
    config |= {"num_layers": 4, "num_embeds_ada_norm": 1000, "sample_size": 8}
    labels = torch.tensor([1, 2])
    return config, {"hidden_states": noise(B, 4, 8, 8), "timestep": torch.full((B,), 500), "class_labels": labels}


def _stable_audio() -> tuple[dict, dict]:
    config = {"sample_size": 8, "in_channels": 4, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2}
    config |= {"num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 8, "time_proj_dim": 16}
    config |= {"global_states_input_dim": 8, "cross_attention_input_dim": 8}
    inputs = {"hidden_states": noise(B, 4, 8), "timestep": torch.full((B,), 0.5)}
    return config, inputs | {"encoder_hidden_states": noise(B, TEXT, 8), "global_hidden_states": noise(B, 1, 8)}


MODELS: dict[str, Callable[[], tuple[dict, dict]]] = {
    "QwenImageTransformer2DModel": _qwen,
    "FluxTransformer2DModel": lambda: _flux(
        {"pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]}, pooled_projections=noise(B, 32)
    ),
    "Flux2Transformer2DModel": lambda: _flux({"axes_dims_rope": [4, 4, 4, 4]}, axes=4, guidance=ones(B)),
    "ChromaTransformer2DModel": lambda: _flux({"axes_dims_rope": [4, 4, 8]} | _approximator()),
    "LongCatImageTransformer2DModel": lambda: _flux({"pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]}),
    "OvisImageTransformer2DModel": lambda: _flux({"axes_dims_rope": [4, 4, 8], "out_channels": 4}),
    "BriaTransformer2DModel": lambda: _flux({"pooled_projection_dim": None, "axes_dims_rope": [4, 4, 8]}),
    "AuraFlowTransformer2DModel": _aura_flow,
    "HiDreamImageTransformer2DModel": _hidream,
    "SD3Transformer2DModel": _sd3,
    "CogView3PlusTransformer2DModel": lambda: _cogview(pos_embed_max_size=8, sample_size=8),
    "CogView4Transformer2DModel": _cogview,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "HunyuanVideo15Transformer3DModel": _hunyuan_15,
    "CogVideoXTransformer3DModel": _cogvideox,
    "MochiTransformer3DModel": _mochi,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx2,
    "WanTransformer3DModel": lambda: _video(_WAN, 16),
    "WanVACETransformer3DModel": _vace,
    "WanAnimateTransformer3DModel": _wan_animate,
    "ChronoEditTransformer3DModel": lambda: _video(_WAN, 16),
    "SkyReelsV2Transformer3DModel": lambda: _video(_WAN, 16),
    "Kandinsky5Transformer3DModel": _kandinsky,
    "CosmosTransformer3DModel": _cosmos,
    "ZImageTransformer2DModel": _z_image,
    "Lumina2Transformer2DModel": _lumina2,
    "SanaTransformer2DModel": _sana,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "StableAudioDiTModel": _stable_audio,
}


def build(name: str, seed: int = 0, **changed: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A transformer with random weights, its configuration ``changed``, and arguments for its forward."""
    torch.manual_seed(seed)
    config, inputs = MODELS[name]()
    model = getattr(diffusers, name)(**config | changed).eval()
    randomise(model, seed)
    return model, inputs
