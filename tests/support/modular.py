"""Modular pipelines of diffusers around tiny transformers of the zoo: embeddings in, latents out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance, LTX2Guidance

from support.zoo import build
from support.zoo_pipelines import STEPS, Codec, noise

SD3 = "SD3Transformer2DModel"


def make(blocks: str, transformer: str, scheduler: Any = None, config: Any = None, **components: Any) -> Any:
    """A pipeline of one kind's blocks from the embeddings on.

    Args:
        blocks: class of the blocks that denoise.
        transformer: class of the model.
        config: entries that its configuration has others of.
    """
    import diffusers.modular_pipelines as modular

    module, _, name = blocks.rpartition(".")
    cls = getattr(__import__(f"{modular.__name__}.{module}", fromlist=[name]), name)
    pipe = cls().init_pipeline()
    model, _ = build(transformer, **(config or {}))
    pipe.update_components(transformer=model, scheduler=scheduler or FlowMatchEulerDiscreteScheduler(), **components)
    for block in loops(pipe._blocks):
        block.set_progress_bar_config(disable=True)
    return pipe


def loops(blocks: Any) -> list[Any]:
    inner = [loop for block in blocks.sub_blocks.values() for loop in loops(block)]
    return [blocks, *inner] if hasattr(blocks, "progress_bar") else inner


def _call(**more: Any) -> dict[str, Any]:
    return {"num_inference_steps": STEPS, "height": 32, "width": 32} | more


def _flux() -> tuple[Any, dict]:
    pipe = make("flux.modular_blocks_flux.FluxCoreDenoiseStep", "FluxTransformer2DModel")
    return pipe, _call(prompt_embeds=noise(1, 6, 32), pooled_prompt_embeds=noise(1, 32))


def _prompts(tokens: int, width: int) -> dict[str, torch.Tensor]:
    embeds = noise(1, tokens, width)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": 0.3 * embeds}


def _qwen() -> tuple[Any, dict]:
    pipe = make("qwenimage.modular_blocks_qwenimage.QwenImageCoreDenoiseStep", "QwenImageTransformer2DModel")
    mask = torch.ones(1, 6, dtype=torch.long)
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask.clone()}
    return pipe, _call(**_prompts(6, 16), **masks)


def _wan() -> tuple[Any, dict]:
    pipe = make("wan.modular_blocks_wan.WanCoreDenoiseStep", "WanTransformer3DModel")
    return pipe, _call(num_frames=5, latents=noise(1, 4, 2, 4, 4), **_prompts(6, 16))


def _z_image() -> tuple[Any, dict]:
    pipe = make("z_image.modular_blocks_z_image.ZImageCoreDenoiseStep", "ZImageTransformer2DModel")
    pipe.update_components(guider=ClassifierFreeGuidance(5.0))  # its own is off
    return pipe, _call(prompt_embeds=[noise(6, 16)], negative_prompt_embeds=[noise(5, 16)])


def _ltx() -> tuple[Any, dict]:
    pipe = make("ltx.modular_blocks_ltx.LTXCoreDenoiseStep", "LTXVideoTransformer3DModel")
    mask = torch.ones(1, 6, dtype=torch.bool)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}
    return pipe, _call(num_frames=9, height=64, width=64, **_prompts(6, 16), **masks)


def _sd3() -> tuple[Any, dict]:
    pipe = make("stable_diffusion_3.modular_blocks_stable_diffusion_3.StableDiffusion3T2ICoreDenoiseStep", SD3)
    pooled = {"pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": 0.3 * noise(1, 8)}
    return pipe, _call(latents=noise(1, 4, 8, 8), **_prompts(6, 16), **pooled)


def _flux2() -> tuple[Any, dict]:
    blocks = "flux2.modular_blocks_flux2_klein_base.Flux2KleinBaseCoreDenoiseStep"
    return make(blocks, "Flux2Transformer2DModel"), _call(**_prompts(6, 32))


def _wan_two_experts() -> tuple[Any, dict]:
    second, _ = build("WanTransformer3DModel", seed=1)
    pipe = make("wan.modular_blocks_wan22.Wan22CoreDenoiseStep", "WanTransformer3DModel", transformer_2=second)
    pipe.update_components(boundary_ratio=0.6)
    return pipe, _wan()[1]


def _hunyuan_video() -> tuple[Any, dict]:
    blocks = "hunyuan_video1_5.modular_blocks_hunyuan_video1_5.HunyuanVideo15CoreDenoiseStep"
    pipe = make(blocks, "HunyuanVideo15Transformer3DModel", config={"in_channels": 9})
    call = _call(num_frames=5, latents=noise(1, 4, 2, 4, 4), **_prompts(6, 16))
    for name, tensor in _prompts(4, 8).items():
        call[f"{name}_2"] = tensor
    for end, tokens in (("", 6), ("_2", 4)):
        call[f"prompt_embeds_mask{end}"] = call[f"negative_prompt_embeds_mask{end}"] = torch.ones(1, tokens)
    return pipe, call


def _ltx2() -> tuple[Any, dict]:
    """Video and sound, each with a guider."""
    config = Codec(latent_channels=4, sample_rate=16000, mel_hop_length=160, mel_bins=4)
    pipe = make("ltx2.modular_blocks_ltx2.LTX2CoreDenoiseStep", "LTX2VideoTransformer3DModel")
    pipe.vae = Codec(spatial_compression_ratio=8, temporal_compression_ratio=4)
    pipe.audio_vae = Codec(config=config, mel_compression_ratio=4, temporal_compression_ratio=4)
    pipe.update_components(guider=LTX2Guidance(3.0, stg_scale=1.0, spatio_temporal_guidance_blocks=[1]))
    pipe.update_components(audio_guider=LTX2Guidance(2.0))
    call = _call(num_frames=9, height=64, width=64, frame_rate=45.0, dtype=torch.float32)
    for name, tensor in {"prompt_embeds": noise(1, 6, 16), "audio_prompt_embeds": noise(1, 6, 16) * 0.5}.items():
        call[f"connector_{name}"], call[f"negative_connector_{name}"] = tensor, 0.3 * tensor
    mask = torch.ones(1, 6)
    return pipe, call | {"connector_attention_mask": mask, "negative_connector_attention_mask": mask, "batch_size": 1}


PIPELINES: dict[str, Callable[[], tuple[Any, dict]]] = {
    "flux": _flux,
    "qwen-image": _qwen,
    "wan": _wan,
    "z-image": _z_image,
    "ltx": _ltx,
    "sd3": _sd3,
    "flux 2": _flux2,
    "wan, two experts": _wan_two_experts,
    "hunyuan video": _hunyuan_video,
    "ltx 2": _ltx2,
}


def generate(pipe: Any, call: dict, seed: int = 0) -> torch.Tensor:
    found = pipe(**call, generator=torch.Generator().manual_seed(seed), output=["latents", "audio_latents"])
    return torch.cat([latents.flatten() for latents in found.values() if latents is not None])
