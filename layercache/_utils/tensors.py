"""Layouts of tensors that the ops ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def dense(stream: torch.Tensor) -> torch.Tensor:
    """The stream as the ops read it: contiguous, or of 2 or 3 dims with its channels side by side.

    Some models take theirs from a transposed convolution's output; that is copied.
    """
    if stream.is_contiguous() or (stream.dim() in (2, 3) and stream.stride(-1) == 1):
        return stream
    return stream.contiguous()


def empty_for_any_mode(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor that is kept: one made under `torch.inference_mode` could not be written outside it."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)
