"""What kernels share that need a whole row (token) at a time.

A program takes a few rows at a time, each in chunks of [ROWS, GROUPS * VEC] elements, and keeps them in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .deferred import jit
from .tiles import MAX_PROGRAMS, OPTIONS, encoded, power_of_two, row_strides, vector_width

if TYPE_CHECKING:
    import triton.language as tl

MAX_CHANNELS = 16384
# Elements of its row that a thread holds at most; of each of two; and of one where it only sums them up.
HELD, PAIRED, SUMMED = 40, 24, 128
# Chunks of a row at most, each of which is code of its own.
MAX_CHUNKS = 16
# Groups of a chunk of all rows of a program; of one row at least so many, 128 bytes.
TILE_GROUPS, LEAST_GROUPS = 128, 8
# Threads of a warp, each of which takes one group of a chunk.
WARP = 64 if torch.version.hip else 32


@jit()
def batch_of(row, batch_rows):
    """Batch entry of rows (int32)."""
    # fewer than 2^31 rows; a 64-bit division costs about a hundred instructions, one with signs twice as many as this
    return (row.to(tl.uint32) // batch_rows.to(tl.uint32)).to(tl.int32)


@jit()
def row_offsets(row, batch_rows, batch_step, row_step):
    """Offset, in groups, of rows (int32) of a tensor."""
    batch = batch_of(row, batch_rows)
    return batch.to(tl.int64) * batch_step + (row - batch * batch_rows).to(tl.int64) * row_step


@jit()
def load_chunk(
    pointer,
    start,
    row_groups,
    c: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    VEC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Chunk ``c`` of rows that begin ``start`` groups [ROWS, 1] behind the pointer: numbers, or words of two bf16.

    Only the last chunk reaches beyond the row, and only where sizes are not ``EXACT``.
    """
    PAIRS: tl.constexpr = pointer.dtype.element_ty == tl.bfloat16 and VEC > 1
    LANES: tl.constexpr = VEC // 2 if PAIRS else VEC
    if PAIRS:
        pointer = pointer.to(tl.pointer_type(tl.int32))
    column = c * GROUPS * LANES + tl.arange(0, GROUPS * LANES)[None, :]
    if EXACT or c < CHUNKS - 1:
        return tl.load(pointer + start * LANES + column)
    return tl.load(pointer + start * LANES + column, mask=column // LANES < row_groups, other=0)


@jit()
def floats(chunk):
    """What `load_chunk` found, as fp32 [ROWS, GROUPS * VEC]."""
    if chunk.dtype == tl.int32:
        # one instruction each; the compiler's own conversion of every second takes two
        low, high = chunk << 16, chunk & -65536
        pairs = tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
        x = tl.reshape(pairs, [chunk.shape[0], 2 * chunk.shape[1]])
    else:
        x = chunk.to(tl.float32)
    return x


@jit()
def store_chunk(
    pointer,
    start,
    x,
    counted,
    row_groups,
    c: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    VEC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Stores a chunk of those rows that are ``counted``, [ROWS, 1]; see `load_chunk`."""
    column = c * GROUPS * VEC + tl.arange(0, GROUPS * VEC)[None, :]
    live = counted if EXACT or c < CHUNKS - 1 else counted & (column // VEC < row_groups)
    tl.store(pointer + start * VEC + column, x.to(pointer.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class Rows:
    """How rows [batch, rows, channels] are shared out to programs.

    Attributes:
        width, row_groups, groups: elements per group, groups per row and per chunk of a row.
        each: rows that a thread takes part in; several are of one batch entry.
    """

    width: int
    row_groups: int
    groups: int
    rows: int
    batch_rows: int
    each: int

    @property
    def chunks(self) -> int:
        return -(-self.row_groups // self.groups)

    @property
    def exact(self) -> bool:
        """Whether the chunks hold a row and no more."""
        return self.chunks * self.groups == self.row_groups

    @property
    def per_program(self) -> int:
        return self.each * max(1, TILE_GROUPS // self.groups)

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.per_program)

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that every kernel for rows takes."""
        return {
            "ROWS": self.per_program,
            "GROUPS": self.groups,
            "CHUNKS": self.chunks,
            "EXACT": self.exact,
            "VEC": self.width,
            **OPTIONS,
            "num_warps": min(max(TILE_GROUPS, self.groups) // WARP, 16),
        }

    def steps(self, *tensors: Tensor) -> list[int]:
        """Batch and row stride of every tensor, in groups."""
        return [step // self.width for t in tensors for step in row_strides(t)]

    def sizes(self, *others: int, rows: int | None = None) -> tuple[int, ...]:
        return encoded((self.rows if rows is None else rows, self.row_groups, self.batch_rows, *others))

    def in_pairs(self) -> Rows:
        """Two rows per thread, which read once what they share; where this pads them no more, and is enough work."""
        pairs = replace(self, groups=chunk_groups(self.row_groups, PAIRED // self.width), each=2)
        # where two threads took the same channels, Triton would hand them over in shared memory
        fits = pairs.groups >= TILE_GROUPS and pairs.chunks * pairs.groups <= self.chunks * self.groups
        enough = self.batch_rows % pairs.per_program == 0 and pairs.tiles >= MAX_PROGRAMS
        return pairs if fits and enough else self


def share_out(strided: Sequence[Tensor], contiguous: Sequence[Tensor] = (), held: int = HELD) -> Rows:
    """How rows are shared out where a thread may hold ``held`` elements of one."""
    channels = strided[0].shape[-1]
    width = vector_width(strided, contiguous)
    if channels % width:
        width = 1
    batch_rows = strided[0].shape[-2] if strided[0].dim() > 1 else 1
    groups = chunk_groups(channels // width, held // width)
    return Rows(width, channels // width, groups, strided[0].numel() // max(channels, 1), batch_rows, 1)


def chunk_groups(groups: int, most: int) -> int:
    """Groups per chunk, a power of two: at most so many chunks, of them the least padding, then the most chunks."""
    whole, most = power_of_two(groups), min(most, MAX_CHUNKS)
    choices = [1 << bit for bit in range(whole.bit_length()) if groups <= most << bit]
    wide = [size for size in choices if size >= LEAST_GROUPS] or [whole]
    return min(wide, key=lambda size: (-(-groups // size) * size, size))
