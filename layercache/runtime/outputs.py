"""Outputs of modules: a tensor or a tuple of them, and copies that are kept on the device or in host memory."""

from __future__ import annotations

from typing import Any

import torch

from layercache._utils.tensors import empty_for_any_mode
from layercache.runtime.offload import HostTensor, Transfers
from layercache.runtime.velocity import combine

Stored = torch.Tensor | HostTensor
Output = Any
"""What a module returns: a tensor, or a tuple of tensors (joint attention)."""


def tensors_of(output: Output) -> tuple[torch.Tensor, ...]:
    found = output if isinstance(output, (tuple, list)) else (output,)
    return tuple(t for t in found if isinstance(t, torch.Tensor))


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[batch, rows, channels]``, as the ops take it, of an output that has more dims (a convolution's)."""
    return tensor if tensor.dim() == 3 else tensor.flatten(2).contiguous()


def parked(output: Output, into: Output | None, transfers: Transfers) -> Output:
    """A copy of the output in host memory, in the memory of ``into``."""
    if isinstance(output, torch.Tensor):
        kept = into if isinstance(into, HostTensor) else HostTensor(transfers)
        kept.put_copy(output)
        return kept
    if isinstance(output, (tuple, list)):
        older = into if isinstance(into, (tuple, list)) and len(into) == len(output) else [None] * len(output)
        return tuple(parked(new, old, transfers) for new, old in zip(output, older, strict=True))
    return output


def fetched(output: Output, transfers: Transfers) -> Output:
    """A stored output on its device, for whoever reads it to free."""
    if isinstance(output, HostTensor):
        tensor = output.fetch()
        transfers.unstage(tensor)
        return tensor
    return tuple(fetched(one, transfers) for one in output) if isinstance(output, tuple) else output


def extended(new: Output, old: Output, weight: float) -> Output:
    """``new + weight (new - old)`` of every tensor."""
    if isinstance(new, torch.Tensor):
        return combine([new, old], [1.0 + weight, -weight], None)
    return tuple(extended(*pair, weight) for pair in zip(new, old, strict=True)) if isinstance(new, tuple) else new


def leaves(output: Output) -> tuple[Stored, ...]:
    """What is stored of an output: tensors, on their device or in host memory."""
    found = output if isinstance(output, (tuple, list)) else (output,)
    return tuple(t for t in found if isinstance(t, (torch.Tensor, HostTensor)))


def copy_of(output: Output, into: Output | None = None) -> Output:
    """The output with tensors of its own; those of ``into`` where they fit."""
    if isinstance(output, torch.Tensor):
        fits = isinstance(into, torch.Tensor) and into.shape == output.shape and into.dtype == output.dtype
        if fits and into.device == output.device:  # type: ignore[union-attr]
            return into.copy_(output)  # type: ignore[union-attr]
        return empty_for_any_mode(output.shape, output.dtype, output.device).copy_(output)
    if isinstance(output, (tuple, list)):
        older = into if isinstance(into, (tuple, list)) and len(into) == len(output) else [None] * len(output)
        return tuple(copy_of(new, old) for new, old in zip(output, older, strict=True))
    return output


def settled(stored: Stored) -> torch.Tensor:
    """What is stored, to be looked at."""
    return stored.settled() if isinstance(stored, HostTensor) else stored
