"""A transformer that is not from diffusers: found out by watching it, calibrated, planned and cached.

python examples/plain_pytorch.py
"""

from __future__ import annotations

import torch
from torch import nn

import layercache


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.time = nn.Linear(1, dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shifted = self.norm1(x) + self.time(t.reshape(-1, 1, 1))
        x = x + 0.3 * self.attention(shifted, shifted, shifted, need_weights=False)[0]
        return x + 0.3 * self.mlp(self.norm2(x))


class Denoiser(nn.Module):
    def __init__(self, dim: int = 64, depth: int = 12):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, dim), nn.Linear(dim, 8)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.enter(latents)
        for block in self.blocks:
            x = block(x, t)
        return self.leave(x)


def main() -> None:
    torch.manual_seed(0)
    model = Denoiser().eval()
    sigmas = [1 - k / 20 for k in range(21)]

    def generate(seed: int) -> torch.Tensor:
        latents = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for now, after in zip(sigmas, sigmas[1:], strict=False):
                latents = latents + (after - now) * model(latents, torch.tensor([now]))
        return latents

    spec = layercache.infer_model(model, lambda: model(torch.randn(1, 64, 8), torch.tensor([1.0])))
    print(f"found: {spec.model_class}, blocks in {', '.join(spec.block_lists)}")
    profile = layercache.calibrate(model, run=generate, samples=3, sigmas=sigmas, progress=False)
    schedule = layercache.plan(profile, budget=0.6)
    full = generate(7)
    with layercache.enabled(model, schedule) as cache:
        cached = generate(7)
        print(cache.report())
    print(f"relative error: {float((cached - full).norm() / full.norm()):.2e}")


if __name__ == "__main__":
    main()
