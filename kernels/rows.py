"""What kernels share that need a whole row (token) at a time.

A program takes a few rows at a time, [ROWS, GROUPS, VEC] elements, and keeps them in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .deferred import jit
from .tiles import OPTIONS, encoded, power_of_two, row_strides, vector_width

if TYPE_CHECKING:
    import triton.language as tl

MAX_CHANNELS = 16384
# Elements of a program's rows, where there is more than one.
TILE = 2048


@jit()
def row_offsets(row, batch_rows, batch_step, row_step):
    """Offset, in groups, of rows [ROWS] of a tensor."""
    # fewer than 2^31 rows; a 64-bit division costs about a hundred instructions
    short = row.to(tl.int32)
    batch = short // batch_rows
    return batch.to(tl.int64) * batch_step + (short - batch * batch_rows).to(tl.int64) * row_step


@dataclass(frozen=True)
class Rows:
    """How rows [batch, rows, channels] are shared out to programs."""

    width: int
    groups: int
    per_program: int
    rows: int
    batch_rows: int
    warps: int

    @property
    def options(self) -> dict[str, Any]:
        return {**OPTIONS, "num_warps": self.warps}

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.per_program)

    def steps(self, *tensors: Tensor) -> list[int]:
        """Batch and row stride of every tensor, in groups."""
        return [step // self.width for t in tensors for step in row_strides(t)]

    def sizes(self, channels: int, *others: int, rows: int | None = None) -> tuple[int, ...]:
        return encoded((self.rows if rows is None else rows, channels // self.width, self.batch_rows, *others))


def share_out(strided: Sequence[Tensor], contiguous: Sequence[Tensor] = ()) -> Rows:
    channels = strided[0].shape[-1]
    width = vector_width(strided, contiguous)
    if channels % width:
        width = 1
    groups = power_of_two(channels // width)
    batch_rows = strided[0].shape[-2] if strided[0].dim() > 1 else 1
    warps = 4 if groups * width <= 2048 else 8 if groups * width <= 4096 else 16
    return Rows(width, groups, max(1, TILE // (groups * width)), strided[0].numel() // channels, batch_rows, warps)
