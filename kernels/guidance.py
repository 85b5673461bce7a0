"""Classifier-free guidance, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .deferred import jit
from .launching import enqueue, new
from .rows import row_offsets, share_out
from .tiles import accumulator_dtype, nbytes, on_device_of

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _guidance_kernel(
    cond_ptr,
    uncond_ptr,
    out_ptr,
    scale,
    sizes,
    RESCALE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    VEC: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    rows, row_groups, batch_rows = sizes[0] >> 2, sizes[1] >> 2, sizes[2] >> 2
    group = tl.arange(0, GROUPS)[None, :, None]
    column = group * VEC + tl.arange(0, VEC)[None, None, :]
    row = (pid * ROWS + tl.arange(0, ROWS))[:, None, None]
    live = (group < row_groups) & (row < rows)
    c_off = row_offsets(row, batch_rows, sizes[3] >> 2, sizes[4] >> 2) * VEC + column
    u_off = row_offsets(row, batch_rows, sizes[5] >> 2, sizes[6] >> 2) * VEC + column
    c = tl.load(cond_ptr + c_off, mask=live, other=0.0).to(tl.float32)
    u = tl.load(uncond_ptr + u_off, mask=live, other=0.0).to(tl.float32)
    v = u + scale * (c - u)
    if RESCALE:
        wanted = tl.sqrt_rn(tl.sum(tl.sum(c * c, 2), 1))
        found = tl.sqrt_rn(tl.sum(tl.sum(v * v, 2), 1))
        # a row of zeros stays one
        factor = tl.div_rn(wanted, tl.where(found == 0.0, 1.0, found))
        v = v * factor[:, None, None]
    tl.store(out_ptr + row * row_groups * VEC + column, v.to(out_ptr.dtype.element_ty), mask=live)


def guidance_triton(cond: Tensor, uncond: Tensor, scale: float, rescale: bool) -> Tensor:
    """`guidance_reference` in one launch."""
    out = new(cond.shape, cond.dtype, cond.device)
    if not cond.numel():
        return out
    shape = share_out([cond, uncond], [out])
    with on_device_of(cond):
        enqueue(
            _guidance_kernel,
            (shape.tiles,),
            cond,
            uncond,
            out,
            float(scale),
            shape.sizes(cond.shape[-1], *shape.steps(cond, uncond)),
            RESCALE=rescale,
            ROWS=shape.per_program,
            GROUPS=shape.groups,
            VEC=shape.width,
            **shape.options,
        )
    return out


def guidance_reference(cond: Tensor, uncond: Tensor, scale: float, rescale: bool) -> Tensor:
    """``v = uncond + scale * (cond - uncond)``, rescaled to ``v * ||cond|| / ||v||`` of each row if wanted.

    In fp32 (fp64 for fp64), rounded once; a row whose v is zero stays zero.

    Args:
        cond, uncond: [batch, rows, channels] or [rows, channels], last dim contiguous.

    Returns:
        A new contiguous tensor in the dtype of cond.

    Source: Qwen-Image's true CFG; methods.md §15 P5c. Bytes: 3 S.
    """
    accumulator = accumulator_dtype(cond.dtype)
    c, u = cond.to(accumulator), uncond.to(accumulator)
    v = u + torch.tensor(scale, dtype=accumulator) * (c - u)
    if rescale:
        found = v.norm(dim=-1, keepdim=True)
        v = v * (c.norm(dim=-1, keepdim=True) / torch.where(found == 0, torch.ones_like(found), found))
    return v.to(cond.dtype).contiguous()


def minimum_bytes(cond: Tensor, uncond: Tensor, *others: object) -> int:
    """Bytes that must move: both once in, the result once out."""
    return nbytes((cond, uncond, cond))
