"""A U-ViT (arXiv 2209.12152) and its pipeline: a transformer with long skip connections, described for layercache.

Time and class are tokens beside the patches; the second half of the blocks reads, in reverse order, what the first half
gave. `examples/train_uvit.py` trains one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

import layercache

SPEC = layercache.ModelSpec(
    "UViT",
    block_lists=("in_blocks", "mid_blocks", "out_blocks"),
    streams=("image",),
    arguments=("x",),
    adds=(),
    skips="mirrored",  # the last block reads what the first gave, the last but one what the second gave
    timestep="timestep",
    modules=dict.fromkeys(("in_blocks", "mid_blocks", "out_blocks"), (("attn",), ("mlp",))),
)
layercache.register_model(SPEC)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """With ``skip``, it begins with a linear layer over its input and what an earlier block gave."""

    def __init__(self, dim: int, heads: int, skip: bool = False):
        super().__init__()
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(ModelMixin, ConfigMixin):
    """Predicts ``noise - clean`` of pictures ``[B, C, S, S]`` at times ``[B]`` in 0..1, of classes ``[B]`` int64.

    Class ``num_classes`` is the null class, for guidance. There are ``2 * half + 1`` blocks.
    """

    @register_to_config
    def __init__(
        self,
        size: int = 32,
        patch: int = 4,
        channels: int = 3,
        dim: int = 96,
        heads: int = 4,
        half: int = 4,
        num_classes: int = 12,
    ):
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 2 + (size // patch) ** 2, dim))
        self.in_blocks = nn.ModuleList(Block(dim, heads) for _ in range(half))
        self.mid_blocks = nn.ModuleList([Block(dim, heads)])
        self.out_blocks = nn.ModuleList(Block(dim, heads, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(dim)
        self.decode = nn.Linear(dim, channels * patch**2)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(hidden_states)
        tokens = [_sinusoids(timestep, patches.shape[1]).to(patches.dtype), self.label_embed(labels)]
        x = torch.cat([*(token[:, None] for token in tokens), patches.flatten(2).transpose(1, 2)], dim=1)
        x, given = x + self.pos_embed, []
        for block in self.in_blocks:
            x = block(x)
            given.append(x)
        for block in self.mid_blocks:
            x = block(x)
        for block in self.out_blocks:
            x = block(x, given.pop())
        pixels = self.decode(self.norm(x[:, len(tokens) :])).transpose(1, 2).unflatten(-1, patches.shape[2:])
        return self.smooth(nn.functional.pixel_shuffle(pixels, self.config.patch))


def _sinusoids(times: torch.Tensor, dim: int) -> torch.Tensor:
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=times.device) / (dim // 2))
    angles = 1000 * times.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@dataclass
class UViTPipelineOutput(BaseOutput):
    """``images``: NumPy ``[B, S, S, C]`` in 0..1, or the tensor that the sampler ends with."""

    images: Any


class UViTPipeline(DiffusionPipeline):
    """Class-conditional pictures, with guidance in one batch of both branches; any sampler for flow matching."""

    def __init__(self, transformer: UViT, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: int | Sequence[int] = 0,
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
    ) -> UViTPipelineOutput:
        """Draws one picture per class number in ``prompt``."""
        config, device = self.transformer.config, self._execution_device
        labels = torch.tensor([prompt] if isinstance(prompt, int) else list(prompt), device=device)
        shape = (len(labels), config.channels, config.size, config.size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        guided = guidance_scale > 1
        both = torch.cat([labels, torch.full_like(labels, config.num_classes)]) if guided else labels
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for time in self.progress_bar(self.scheduler.timesteps):
            inputs = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(inputs, (time / 1000).expand(len(inputs)), both)
            if guided:
                cond, uncond = velocity.chunk(2)
                velocity = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
        self.maybe_free_model_hooks()
        images = latents if output_type == "latent" else (latents / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return UViTPipelineOutput(images=images)
