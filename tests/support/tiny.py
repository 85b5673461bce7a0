"""Small untrained models and schedules that several test files share."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from torch import nn

from layercache.demo.model import NULL_CLASS, TRANSFORMER_CONFIG, ClassEncoder
from layercache.demo.pipeline import DemoPipeline
from layercache.models.registry import fingerprint_of
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Schedule

LAYERS = 6
GROUPS = ((0, 2), (2, 4), (4, 6))
PROMPTS = ["cat", "coffee"]


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights large enough that every block changes both streams a good deal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.06 if parameter.dim() > 1 else 0.02
            offset = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)


def tiny_pipeline(layers: int = LAYERS, seed: int = 0) -> DemoPipeline:
    config = {**TRANSFORMER_CONFIG, "num_layers": layers, "num_attention_heads": 2}
    transformer, encoder = QwenImageTransformer2DModel(**config), ClassEncoder()
    randomise(transformer, seed)
    randomise(encoder, seed + 1)
    with torch.no_grad():
        encoder.embedding.weight[NULL_CLASS] += 1.0
    pipe = DemoPipeline(transformer, encoder, FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calm_pipeline(layers: int = LAYERS) -> DemoPipeline:
    """`tiny_pipeline` with residuals that change little enough from step to step for thresholds to decide by."""
    pipe = tiny_pipeline(layers)
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            block.img_mod[1].weight *= 0.3
            block.txt_mod[1].weight *= 0.3
    return pipe


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def generate(pipe, prompts=PROMPTS, steps: int = 8, seed: int = 0, **call) -> torch.Tensor:
    """Packed latents of one generation; picture k depends on generator ``seed + k`` alone."""
    call.setdefault("output_type", "latent")
    return pipe(list(prompts), num_inference_steps=steps, generator=generators(len(prompts), seed), **call).images


def shifted_sigmas(steps: int, shift: float = 3.0) -> tuple[float, ...]:
    sigmas = np.linspace(1, 1 / steps, steps)
    return (*(shift * sigmas / (1 + (shift - 1) * sigmas)).tolist(), 0.0)


def fingerprint(transformer: nn.Module, sigmas, branches=("cond", "uncond")) -> Fingerprint:
    return fingerprint_of(transformer, tuple(sigmas), tuple(branches))


def schedule_for(pipe, cells, groups=GROUPS) -> Schedule:
    prints = fingerprint(pipe.transformer, shifted_sigmas(len(cells)))
    return Schedule(prints, tuple(groups), tuple(cells), (1.0,) * len(groups))


def mixed_cells(steps: int = 8) -> list[tuple]:
    """Computed, prefix-, suffix- and wholly cached rows, with one and two anchors."""
    kinds = ["ccc", "ccc", "rrc", "rrr", "ccc", "crr", "rcr", "ccc", "rrr", "ccc"]
    rows: list[tuple] = []
    for step in range(steps):
        kind = kinds[step % len(kinds)] if step < steps - 1 else "ccc"
        row = []
        for group in range(3):
            computed = [i for i in range(step) if rows[i][group] is None]
            if kind[group] == "c":
                row.append(None)
            elif len(computed) > 1 and step % 2:
                row.append({computed[-1]: 1.3, computed[-2]: -0.3})
            else:
                row.append({computed[-1]: 1.0})
        rows.append(tuple(row))
    return rows


class SlopeBlock(nn.Module):
    """Adds ``offset + slope * sigma`` to each stream, and some text to the image: linear in sigma all of it."""

    def __init__(self, dim: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.offset = nn.Parameter(torch.randn(2, dim, generator=generator))
        self.slope = nn.Parameter(torch.randn(2, dim, generator=generator))

    def forward(self, hidden_states, encoder_hidden_states, temb):
        change = self.offset + self.slope * temb
        mixed = 0.1 * encoder_hidden_states.mean(dim=1, keepdim=True)
        return encoder_hidden_states + change[1], hidden_states + change[0] + mixed


class SlopeTransformer(nn.Module):
    """A two-stream transformer without diffusers around it."""

    def __init__(self, layers: int = LAYERS, dim: int = 16):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(SlopeBlock(dim, k) for k in range(layers))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=timestep
            )
        return hidden_states
