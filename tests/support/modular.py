"""Modular pipelines of diffusers around tiny transformers of the zoo: embeddings in, latents out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from support.zoo import build
from support.zoo_pipelines import STEPS, noise


def make(blocks: str, transformer: str, scheduler: Any = None, **components: Any) -> Any:
    """A pipeline of one kind's blocks from the embeddings on.

    Args:
        blocks: class of the blocks that denoise.
        transformer: class of the model.
    """
    import diffusers.modular_pipelines as modular

    module, _, name = blocks.rpartition(".")
    cls = getattr(__import__(f"{modular.__name__}.{module}", fromlist=[name]), name)
    pipe = cls().init_pipeline()
    model, _ = build(transformer)
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
    return pipe, _call(prompt_embeds=[noise(6, 16)], negative_prompt_embeds=[noise(5, 16)])


def _ltx() -> tuple[Any, dict]:
    pipe = make("ltx.modular_blocks_ltx.LTXCoreDenoiseStep", "LTXVideoTransformer3DModel")
    mask = torch.ones(1, 6, dtype=torch.bool)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone()}
    return pipe, _call(num_frames=9, height=64, width=64, **_prompts(6, 16), **masks)


PIPELINES: dict[str, Callable[[], tuple[Any, dict]]] = {
    "flux": _flux,
    "qwen-image": _qwen,
    "wan": _wan,
    "z-image": _z_image,
    "ltx": _ltx,
}


def generate(pipe: Any, call: dict, seed: int = 0) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(seed), output="latents")
