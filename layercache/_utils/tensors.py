"""Layouts of tensors that the ops ask for."""

from __future__ import annotations

import torch


def dense(stream: torch.Tensor) -> torch.Tensor:
    """The stream as the ops read it: contiguous, or of 2 or 3 dims with its channels side by side.

    Some models take theirs from a transposed convolution's output; that is copied.
    """
    if stream.is_contiguous() or (stream.dim() in (2, 3) and stream.stride(-1) == 1):
        return stream
    return stream.contiguous()
