"""What the kernels share: triton when it is there, the shape of a launch, row addressing, the last reduction stage.

A tensor is seen as 16-byte groups of ``VEC`` elements and masked by whole groups, never by elements: only then
loads and stores stay 16 bytes wide for every size, from one binary. Tensors whose size, strides or address do not
fit take the same kernels with ``VEC = 1``, the slow path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .deferred import jit
from .launching import Launch, new

if TYPE_CHECKING:
    import triton.language as tl

# Groups per tile: one 16-byte load in flight per thread and tensor. Two per thread were 1 to 2 % slower on an H200, and
# 14 % with eight terms, whose registers left too few programs on a multiprocessor (docs/benchmarks.md).
GROUPS = 128
# Groups of one element per tile of the slow path.
SLOW_GROUPS = 1024
# Of kernels that sum up, whose programs loop. A fixed bound, not the number of multiprocessors, so that the order of
# summation is the same on every GPU. On an H200 half as many were 7 to 17 % slower, twice as many 3 to 10 %.
MAX_PROGRAMS = 1024
# Streams, branches or pairs that share a launch.
MAX_ENTRIES = 8
# Fused multiply-adds are off so that GPU, interpreter and eager PyTorch round equally; memory-bound code loses nothing.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@jit()
def row_groups_at(group, row_groups, batch_rows, batch_stride, row_stride):
    """Offset, in groups, of groups of a tensor [batch, batch_rows, row_groups] with strided first two dims."""
    # a 64-bit division costs about a hundred instructions; `lay_out_launch` refuses as many groups
    short, row = group.to(tl.uint32), row_of(group, row_groups)
    batch = row // batch_rows.to(tl.uint32)
    within = row - batch * batch_rows.to(tl.uint32)
    start = batch.to(tl.int64) * batch_stride + within.to(tl.int64) * row_stride
    return start + (short - row * row_groups.to(tl.uint32)).to(tl.int64)


@jit()
def row_of(group, row_groups):
    """Row of groups of a contiguous tensor; fewer than 2^32 groups."""
    return group.to(tl.uint32) // row_groups.to(tl.uint32)


@jit()
def lanes(values, VEC: tl.constexpr):
    """The ``VEC`` tensors [R] of values [R, VEC], which a thread holds anyway; no order is promised."""
    parts = (values,)
    for level in tl.static_range(5):
        if (VEC >> level) > 1:
            halves = ()
            for k in tl.static_range(1 << level):
                halves = halves + tl.split(tl.reshape(parts[k], [values.shape[0], VEC >> (level + 1), 2]))
            parts = halves
    flat = ()
    for k in tl.static_range(VEC):
        flat = flat + (tl.reshape(parts[k], [values.shape[0]]),)
    return flat


@jit()
def summed(values, COUNT: tl.constexpr):
    """The sums of ``COUNT`` (a power of two) tensors [R], as one tensor: together they wait once for each other."""
    parts = values
    for level in tl.static_range(5):
        if (COUNT >> level) > 1:
            joined = ()
            for k in tl.static_range(COUNT >> (level + 1)):
                joined = joined + (tl.join(parts[k], parts[k + (COUNT >> (level + 1))]),)
            parts = joined
    return tl.sum(tl.reshape(parts[0], [values[0].shape[0], COUNT]), 0)


@jit()
def store_sums(slot, values, COUNT: tl.constexpr, MAX_PROGRAMS: tl.constexpr):
    """Stores the sums of ``COUNT`` tensors [R] of a program, each in a row of its own."""
    WIDTH: tl.constexpr = 4 if COUNT <= 4 else 8
    for start in tl.static_range(0, COUNT, WIDTH):
        some = ()
        for k in tl.static_range(WIDTH):
            some = some + (values[start + k if start + k < COUNT else start],)
        row = start + tl.arange(0, WIDTH)
        tl.store(slot + row * MAX_PROGRAMS, summed(some, WIDTH), mask=row < COUNT)


@jit()
def of_entry(values, at: tl.constexpr, step: tl.constexpr, sizes, pid, ENTRIES: tl.constexpr, FIELDS: tl.constexpr):
    """``values[entry * step + at]`` of the entry that program ``pid`` serves: a choice among arguments, not a load."""
    found = values[at]
    for entry in tl.static_range(1, ENTRIES):
        found = tl.where(pid >= sizes[entry * FIELDS] >> 2, values[entry * step + at], found)
    return found


@jit()
def size_of_entry(at: tl.constexpr, sizes, pid, ENTRIES: tl.constexpr, FIELDS: tl.constexpr):
    """Field ``at`` of the program's entry, decoded; `Entries.sizes` tells the order."""
    return of_entry(sizes, at, FIELDS, sizes, pid, ENTRIES, FIELDS) >> 2


@jit()
def entry_of(sizes, pid, ENTRIES: tl.constexpr, FIELDS: tl.constexpr):
    """Number of the program's entry."""
    entry = tl.zeros([], tl.int32)
    for k in tl.static_range(1, ENTRIES):
        entry = tl.where(pid >= sizes[k * FIELDS] >> 2, k, entry)
    return entry


@jit()
def share_of(sizes, pid, ENTRIES: tl.constexpr, FIELDS: tl.constexpr):
    """What program ``pid`` takes of its entry: groups, programs that share them, and its number among those."""
    groups = size_of_entry(1, sizes, pid, ENTRIES, FIELDS)
    programs = size_of_entry(2, sizes, pid, ENTRIES, FIELDS)
    return groups, programs, pid - size_of_entry(0, sizes, pid, ENTRIES, FIELDS)


@jit()
def offsets_at(
    group,
    sample,
    tensor: tl.constexpr,
    sizes,
    pid,
    ENTRIES: tl.constexpr,
    FIELDS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Offsets [R, VEC] of the elements of groups of a sample of the entry's tensor number ``tensor``."""
    if CONTIGUOUS:
        found = sample * size_of_entry(1, sizes, pid, ENTRIES, FIELDS) + group
    else:
        row_groups = size_of_entry(3, sizes, pid, ENTRIES, FIELDS)
        batch_rows = size_of_entry(4, sizes, pid, ENTRIES, FIELDS)
        sample_step = size_of_entry(5 + 3 * tensor, sizes, pid, ENTRIES, FIELDS)
        batch_step = size_of_entry(5 + 3 * tensor + 1, sizes, pid, ENTRIES, FIELDS)
        row_step = size_of_entry(5 + 3 * tensor + 2, sizes, pid, ENTRIES, FIELDS)
        found = sample * sample_step + row_groups_at(group, row_groups, batch_rows, batch_step, row_step)
    return found[:, None] * VEC + tl.arange(0, VEC)[None, :]


@jit()
def _finalise_kernel(
    partials_ptr,
    out_ptr,
    programs,
    rows,
    ENTRIES: tl.constexpr,
    STATISTICS: tl.constexpr,
    MAX_AT: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """One program per statistic: folds its partials in a fixed order, by maximum at ``MAX_AT``, else by sum."""
    row = tl.program_id(0).to(tl.int64)
    filled = programs[0] >> 2
    for entry in tl.static_range(1, ENTRIES):
        filled = tl.where(row >= entry * (rows >> 2), programs[entry] >> 2, filled)
    column = tl.arange(0, MAX_PROGRAMS)
    partial = tl.load(partials_ptr + row * MAX_PROGRAMS + column, mask=column < filled, other=0.0)
    folded = tl.sum(partial, 0)
    if MAX_AT >= 0:
        # tl.max drops NaN on some targets, a sum never does
        peak = tl.where(folded == folded, tl.max(partial, 0), folded)
        folded = tl.where(row % STATISTICS == MAX_AT, peak, folded)
    tl.store(out_ptr + row, folded)


def new_partials(statistics: int, device: torch.device) -> Tensor:
    """Room for what every program finds: fp32 [statistics, MAX_PROGRAMS], not initialised."""
    return new((statistics, MAX_PROGRAMS), torch.float32, device)


def plan_fold(
    programs: Sequence[int],
    statistics: int,
    max_at: int = -1,
    samples: int = 1,
    shape: Sequence[int] | None = None,
) -> Callable[[Tensor], Tensor]:
    """Folds partials [entries * samples * statistics, MAX_PROGRAMS] into fp32 [entries * samples, statistics], or
    another shape of as many numbers."""
    shape = tuple(shape or (len(programs) * samples, statistics))
    launch = Launch(
        _finalise_kernel,
        (math.prod(shape),),
        ENTRIES=len(programs),
        STATISTICS=statistics,
        MAX_AT=max_at,
        MAX_PROGRAMS=MAX_PROGRAMS,
        **OPTIONS,
    )
    filled, (rows,) = encoded(programs), encoded([samples * statistics])

    def fold(partials: Tensor) -> Tensor:
        out = new(shape, torch.float32, partials.device)
        launch(partials, out, filled, rows)
        return out

    return fold


def encoded(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes as kernels get them, decoded by ``>> 2``: never 1 and never a multiple of 16, for which Triton would
    compile further binaries."""
    return tuple(4 * size + 3 for size in sizes)


@dataclass(frozen=True)
class Entries:
    """How several entries (streams, branches, pairs) share a launch, each with programs of its own.

    Attributes:
        width, tile: elements per group, groups per tile.
        contiguous: whether no entry needs strides.
        samples: second dim of the grid; every sample of an entry is reduced apart.
        programs: of each entry.
        sizes: encoded, ``fields`` per entry: first program, groups per sample, programs; where rows are counted, groups
            per row; where strided, also rows per batch entry, and sample, batch and row stride of every tensor.
    """

    width: int
    tile: int
    contiguous: bool
    samples: int
    programs: tuple[int, ...]
    sizes: tuple[int, ...]
    fields: int

    @property
    def grid(self) -> tuple[int, int]:
        return sum(self.programs), self.samples

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that every kernel for entries takes."""
        return {
            "ENTRIES": len(self.programs),
            "FIELDS": self.fields,
            "CONTIGUOUS": self.contiguous,
            "VEC": self.width,
            "R": self.tile,
            **OPTIONS,
        }


def lay_out_launch(
    strided: Sequence[Sequence[Tensor]],
    contiguous: Sequence[Tensor] = (),
    groups: int | None = None,
    samples: int = 1,
    rows: bool = False,
    sums: bool = False,
) -> Entries:
    """Sizes of a launch.

    Args:
        strided: per entry, none of them empty, its tensors that may be strided.
        contiguous: all other tensors.
        groups: 16-byte groups per tile, a power of two; None for the default.
        samples: reduce the entries of the first dim apart.
        rows: whether the kernel asks for the row of a group although all is contiguous.
        sums: whether the programs leave partial sums, at most `MAX_PROGRAMS` of them. Others have a tile each, which
            the GPU shares out better than a loop does.
    """
    width = vector_width((t for entry in strided for t in entry), contiguous, samples)
    tile = groups or (GROUPS if width > 1 else SLOW_GROUPS)
    dense = all(t.is_contiguous() for entry in strided for t in entry)
    sizes: list[int] = []
    programs: list[int] = []
    for entry in strided:
        count = entry[0].numel() // samples // width
        if (rows or not dense) and count >= 2**32:
            raise ValueError(f"{count} groups, where rows are counted; expected fewer than 2^32")
        tiles = -(-count // tile)
        fields = [sum(programs), count, min(tiles, MAX_PROGRAMS) if sums else tiles]
        if not dense:
            fields += _row_sizes(entry, width, samples, rows)
        elif rows:
            fields.append(max(entry[0].shape[-1] // width, 1))
        sizes += fields
        programs.append(fields[2])
    return Entries(width, tile, dense, samples, tuple(programs), encoded(sizes), len(sizes) // len(programs))


def _row_sizes(entry: Sequence[Tensor], width: int, samples: int, rows: bool) -> list[int]:
    """Groups per row, rows per batch entry, and sample, batch and row stride of every tensor."""
    first = entry[0]
    if not rows and all(t.is_contiguous() for t in entry):
        # one row, so that a tensor of any number of dims may share a launch with a strided one
        groups = first.numel() // samples // width
        return [groups, 1, *([groups, 0, 0] * len(entry))]
    sizes = [max(first.shape[-1] // width, 1), first.shape[-2] if first.dim() > 1 else 1]
    for tensor in entry:
        batch, row = (step // width for step in row_strides(tensor))
        sizes += [batch if samples > 1 else 0, 0 if samples > 1 else batch, row]
    return sizes


def spread(
    found: Sequence[Tensor],
    filled: Sequence[int],
    streams: int,
    statistics: int,
    device: torch.device,
    samples: int = 1,
) -> Tensor:
    """Statistics of the streams that are not empty, in their rows of fp32 [streams * samples, statistics]; zeros
    elsewhere."""
    if len(found) == 1 and len(filled) == streams:
        return found[0]
    out = torch.zeros((streams, samples, statistics), dtype=torch.float32, device=device)
    if filled:
        out[list(filled)] = torch.cat(list(found)).view(len(filled), samples, statistics)
    return out.view(streams * samples, statistics)


def program_count(groups: int, tile: int) -> int:
    return min(-(-groups // tile), MAX_PROGRAMS)


def vector_width(strided: Iterable[Tensor], contiguous: Iterable[Tensor], samples: int = 1) -> int:
    """Elements per group: 16 bytes of the narrowest tensor, or 1 where a size, stride or address does not allow it.

    Codes of one byte do not count: a thread that loads 16 of them would have to pass half on to its neighbour.
    """
    tensors = [*strided, *contiguous]
    width = 16 // min(size for t in tensors if (size := t.element_size()) > 1)
    for t in tensors:
        if t.data_ptr() % 16 or t.numel() % (width * samples):
            return 1
        if not t.is_contiguous() and any(step % width for step in (t.shape[-1], *row_strides(t))):
            return 1
    return width


def row_strides(tensor: Tensor) -> tuple[int, int]:
    """Strides of batch and row, in elements; those of dims of one entry never matter and are 0."""
    batch, row = (0, 0, *tensor.stride())[-3:-1]
    sizes = (1, 1, 1, *tensor.shape)[-3:-1]
    return (batch if sizes[0] > 1 else 0), (row if sizes[1] > 1 else 0)


def by_launch(entries: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Entries as they share a launch."""
    return (entries[first : first + MAX_ENTRIES] for first in range(0, len(entries), MAX_ENTRIES))


def taken(entries: Sequence[Any], some: Sequence[int]) -> tuple[Any, ...]:
    """The entries of one launch, by their numbers, which rise."""
    return tuple(entries) if len(some) == len(entries) else tuple([entries[s] for s in some])


def power_of_two(least: int) -> int:
    """The smallest that is at least so large."""
    return 1 << (least - 1).bit_length()


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
