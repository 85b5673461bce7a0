"""What the kernels share: triton when it is there, the shape of a launch, row addressing, the last reduction stage.

A tensor is seen as 16-byte groups of ``VEC`` elements and masked by whole groups, never by elements: only then
loads and stores stay 16 bytes wide for every size, from one binary. Tensors whose size, strides or address do not
fit take the same kernels with ``VEC = 1``, the slow path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the references below every kernel work without it
    triton = None

# Groups per tile: two 16-byte loads in flight per thread and tensor. Compiled for sm_90 that takes 32 registers in
# capture, 77 with its statistics, 36 for two terms of a combination and 96 for eight.
GROUPS = 256
# Groups of one element per tile of the slow path.
SLOW_GROUPS = 1024
# A fixed bound, not the number of multiprocessors, so that the order of summation is the same on every GPU.
MAX_PROGRAMS = 1024
# Fused multiply-adds are off so that GPU, interpreter and eager PyTorch round alike; memory-bound code loses nothing.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def jit(**options: Any) -> Callable[[Callable], Any]:
    """``triton.jit(**options)``, or nothing where triton is missing: modules still import, kernels cannot run."""

    def decorate(function: Callable) -> Any:
        return function if triton is None else triton.jit(function, **options)

    return decorate


@jit()
def row_groups_at(group, row_groups, batch_rows, batch_stride, row_stride):
    """Offset, in groups, of groups of a tensor [batch, batch_rows, row_groups] with strided first two dims."""
    # a 64-bit division costs about a hundred instructions; callers refuse strided tensors of 2^31 elements
    short = group.to(tl.int32)
    row = short // row_groups
    batch_start = (row // batch_rows).to(tl.int64) * batch_stride
    return batch_start + (row % batch_rows).to(tl.int64) * row_stride + short % row_groups


@jit(do_not_specialize=["programs_0", "programs_1", "statistics"])
def _finalise_kernel(
    partials_ptr,
    out_ptr,
    programs_0,
    programs_1,
    statistics,
    MAX_AT: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """One program per statistic: folds its partials in a fixed order, by maximum at ``MAX_AT``, else by sum."""
    row = tl.program_id(0).to(tl.int64)
    programs = programs_0
    if row >= statistics:
        programs = programs_1
    column = tl.arange(0, MAX_PROGRAMS)
    partial = tl.load(partials_ptr + row * MAX_PROGRAMS + column, mask=column < programs, other=0.0)
    folded = tl.sum(partial, 0)
    if MAX_AT >= 0:
        # tl.max drops NaN on some targets, a sum never does
        peak = tl.where(folded == folded, tl.max(partial, 0), folded)
        folded = tl.where(row % statistics == MAX_AT, peak, folded)
    tl.store(out_ptr + row, folded)


def new_partials(statistics: int, device: torch.device) -> Tensor:
    """Room for what every program finds: fp32 [statistics, MAX_PROGRAMS], not initialised."""
    return torch.empty((statistics, MAX_PROGRAMS), dtype=torch.float32, device=device)


def finalise(partials: Tensor, programs: Sequence[int], statistics: int, max_at: int = -1) -> Tensor:
    """Folds partials [streams * statistics, MAX_PROGRAMS] into fp32 [streams, statistics], at most two streams."""
    out = torch.empty((len(programs), statistics), dtype=torch.float32, device=partials.device)
    _finalise_kernel[(len(programs) * statistics,)](
        partials,
        out,
        programs[0],
        programs[-1],
        statistics,
        MAX_AT=max_at,
        MAX_PROGRAMS=MAX_PROGRAMS,
        **OPTIONS,
    )
    return out


def spread(
    found: Sequence[Tensor], filled: Sequence[int], streams: int, statistics: int, device: torch.device
) -> Tensor:
    """Statistics of the streams that are not empty, in their rows of fp32 [streams, statistics]; zeros elsewhere."""
    if len(found) == 1 and len(filled) == streams:
        return found[0]
    out = torch.zeros((streams, statistics), dtype=torch.float32, device=device)
    for row, values in zip(filled, (values for launch in found for values in launch), strict=True):
        out[row] = values
    return out


def program_count(groups: int, tile: int) -> int:
    return min(-(-groups // tile), MAX_PROGRAMS)


def vector_width(strided: Iterable[Tensor], contiguous: Iterable[Tensor]) -> int:
    """Elements per group: 16 bytes of the narrowest tensor, or 1 where a size, stride or address does not allow it."""
    tensors = [*strided, *contiguous]
    width = 16 // min(t.element_size() for t in tensors)
    for t in tensors:
        if t.data_ptr() % 16 or t.numel() % width:
            return 1
        if not t.is_contiguous() and any(step % width for step in (t.shape[-1], *row_strides(t))):
            return 1
    return width


def row_strides(tensor: Tensor) -> tuple[int, int]:
    """Strides of batch and row, in elements; those of dims of one entry never matter and are 0."""
    batch, row = (0, 0, *tensor.stride())[-3:-1]
    sizes = (1, 1, 1, *tensor.shape)[-3:-1]
    return (batch if sizes[0] > 1 else 0), (row if sizes[1] > 1 else 0)


def stream_sizes(strided: Sequence[Tensor], width: int, tile: int) -> list[int]:
    """Sizes a kernel needs of one stream: groups, programs, groups per row, rows per batch entry, then the
    batch and row stride of every tensor. All but the first two matter only where a tensor is strided."""
    first = strided[0]
    groups = first.numel() // width
    sizes = [groups, program_count(groups, tile)]
    if all(tensor.is_contiguous() for tensor in strided):
        # one row, so that it may share a launch with a strided stream
        return [*sizes, groups, 1, *([0, 0] * len(strided))]
    sizes += [max(first.shape[-1] // width, 1), first.shape[-2]]
    for tensor in strided:
        sizes += [stride // width for stride in row_strides(tensor)]
    return sizes


def in_pairs(streams: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Streams by launch: two share one, each with its own programs."""
    return (streams[first : first + 2] for first in range(0, len(streams), 2))


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one; free when it already is."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
