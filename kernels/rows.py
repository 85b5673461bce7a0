"""What kernels share that need a whole row (token) at a time.

A program takes a few rows at a time, each in chunks of [ROWS, GROUPS * VEC] elements, and keeps them in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .deferred import jit
from .tiles import OPTIONS, encoded, power_of_two, row_strides, vector_width

if TYPE_CHECKING:
    import triton.language as tl

MAX_CHANNELS = 16384
# Elements of its row that a thread holds at most, and where it only sums them up.
HELD, SUMMED = 40, 128
# Chunks of a row at most, each of which is code of its own.
MAX_CHUNKS = 16
# Groups of a chunk of all rows of a program; of one row at least so many, 128 bytes.
TILE_GROUPS, LEAST_GROUPS = 128, 8
# Threads of a warp, each of which takes one group of a chunk.
WARP = 64 if torch.version.hip else 32


@jit()
def row_offsets(row, batch_rows, batch_step, row_step):
    """Offset, in groups, of rows (int32) of a tensor."""
    # fewer than 2^31 rows; a 64-bit division costs about a hundred instructions
    batch = row // batch_rows
    return batch.to(tl.int64) * batch_step + (row - batch * batch_rows).to(tl.int64) * row_step


@jit()
def load_chunk(pointer, inside, LAST: tl.constexpr, EXACT: tl.constexpr):
    """A chunk of rows, of which only the last reaches beyond them, and only where sizes are not ``EXACT``."""
    if EXACT or not LAST:
        return tl.load(pointer)
    return tl.load(pointer, mask=inside, other=0.0)


@dataclass(frozen=True)
class Rows:
    """How rows [batch, rows, channels] are shared out to programs."""

    width: int
    groups: int
    chunks: int
    exact: bool
    per_program: int
    rows: int
    batch_rows: int
    warps: int

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
            "num_warps": self.warps,
        }

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.per_program)

    def steps(self, *tensors: Tensor) -> list[int]:
        """Batch and row stride of every tensor, in groups."""
        return [step // self.width for t in tensors for step in row_strides(t)]

    def sizes(self, channels: int, *others: int, rows: int | None = None) -> tuple[int, ...]:
        return encoded((self.rows if rows is None else rows, channels // self.width, self.batch_rows, *others))


def share_out(strided: Sequence[Tensor], contiguous: Sequence[Tensor] = (), held: int = HELD) -> Rows:
    """How rows are shared out where a thread may hold ``held`` elements of one."""
    channels = strided[0].shape[-1]
    width = vector_width(strided, contiguous)
    if channels % width:
        width = 1
    groups = chunk_groups(channels // width, min(held // width, MAX_CHUNKS))
    chunks = -(-(channels // width) // groups)
    batch_rows = strided[0].shape[-2] if strided[0].dim() > 1 else 1
    return Rows(
        width,
        groups,
        chunks,
        chunks * groups * width == channels,
        max(1, TILE_GROUPS // groups),
        strided[0].numel() // max(channels, 1),
        batch_rows,
        min(max(TILE_GROUPS, groups) // WARP, 16),
    )


def chunk_groups(groups: int, most: int) -> int:
    """Groups per chunk, a power of two: at most so many chunks, of them the least padding, then the most chunks."""
    whole = power_of_two(groups)
    choices = [1 << bit for bit in range(whole.bit_length()) if groups <= most << bit]
    wide = [size for size in choices if size >= LEAST_GROUPS] or [whole]
    return min(wide, key=lambda size: (-(-groups // size) * size, size))
