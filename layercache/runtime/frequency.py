"""Two bands of frequency of a picture's or video's latents: what changes slowly over the picture, and the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Grid = tuple[int, int, int]
"""Frames, rows and columns."""


def low_pass(tensor: torch.Tensor) -> torch.Tensor:
    """What is left of ``[..., H, W]`` within a circle of frequencies, of a radius of a fifth of the shorter side.

    Computed in float32; given in the tensor's dtype.
    """
    height, width = tensor.shape[-2:]
    radius = min(height, width) // 5
    rows, columns = (torch.fft.fftfreq(n, 1 / n, device=tensor.device) for n in (height, width))
    kept = rows[:, None] ** 2 + columns**2 <= radius**2
    return torch.fft.ifft2(torch.fft.fft2(tensor.float()) * kept).real.to(tensor.dtype)


def low_band(tensor: torch.Tensor, grid: Grid | None) -> torch.Tensor:
    """`low_pass` of latents: ``[B, C, H, W]``, video with H and W last, or tokens ``[B, S, C]`` of a grid."""
    if tensor.dim() != 3:
        return low_pass(tensor)
    assert grid is not None
    pictures = tensor.unflatten(1, grid).movedim(-1, 2)  # [B, F, C, H, W]
    return low_pass(pictures).movedim(2, -1).flatten(1, 3)


def grid_of(arguments: Mapping[str, Any], tokens: int) -> Grid | None:
    """The grid of so many tokens, by a forward's arguments; a square where they do not say it, ``None`` of neither.

    Looks at ``img_shapes``, at ``num_frames``, ``height`` and ``width``, and at positions ``img_ids`` (which asks the
    device).
    """
    found = [_shape(arguments.get("img_shapes"))]
    found.append(tuple(arguments.get(name) for name in ("num_frames", "height", "width")))
    ids = arguments.get("img_ids")
    side = math.isqrt(tokens)
    if side * side == tokens:
        found.append((1, side, side))
    elif isinstance(ids, torch.Tensor) and ids.shape[-1] == 3:
        found.append((1, *(len(axis.unique()) for axis in ids.reshape(-1, 3)[:tokens, 1:].unbind(-1))))
    for grid in found:
        if grid is not None and len(grid) == 3 and all(isinstance(n, int) for n in grid) and math.prod(grid) == tokens:
            return grid
    return None


def _shape(value: Any) -> tuple[Any, ...] | None:
    """The first triple in nested lists."""
    while isinstance(value, Sequence) and value and isinstance(value[0], Sequence):
        value = value[0]
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
