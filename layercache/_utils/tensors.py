"""Layouts of tensors that the ops ask for."""

from __future__ import annotations

import torch


def dense(stream: torch.Tensor) -> torch.Tensor:
    """The stream with its channels side by side; some models take theirs from a transposed convolution's output."""
    return stream if stream.stride(-1) == 1 else stream.contiguous()
