"""Classifier-free guidance, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .deferred import jit
from .launching import Launch, Planned, new_like, outline
from .rows import floats, load_chunk, row_offsets, share_out, store_chunk
from .tiles import accumulator_dtype, nbytes

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
    CHUNKS: tl.constexpr,
    EXACT: tl.constexpr,
    VEC: tl.constexpr,
):
    rows, row_groups, batch_rows = sizes[0] >> 2, sizes[1] >> 2, sizes[2] >> 2
    flat = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    # a row beyond the last is the last once more, which is not stored
    row = tl.minimum(flat, rows - 1)
    c_own = row_offsets(row, batch_rows, sizes[3] >> 2, sizes[4] >> 2)
    u_own = row_offsets(row, batch_rows, sizes[5] >> 2, sizes[6] >> 2)
    wanted = tl.zeros([ROWS, GROUPS * VEC], tl.float32)
    found, values = wanted, ()
    for k in tl.static_range(CHUNKS):
        c = floats(load_chunk(cond_ptr, c_own, row_groups, k, CHUNKS, GROUPS, VEC, EXACT))
        u = floats(load_chunk(uncond_ptr, u_own, row_groups, k, CHUNKS, GROUPS, VEC, EXACT))
        v = u + scale * (c - u)
        if RESCALE:
            wanted, found = tl.fma(c, c, wanted), tl.fma(v, v, found)
        values = values + (v,)
    if RESCALE:
        # together, so that they wait once for the other warps
        wanted, found = tl.split(tl.sqrt_rn(tl.sum(tl.join(wanted, found), 1)))
        # a row of zeros stays one
        factor = tl.div_rn(wanted, tl.where(found == 0.0, 1.0, found))[:, None]
    for k in tl.static_range(CHUNKS):
        v = values[k]
        if RESCALE:
            v = v * factor
        store_chunk(out_ptr, row.to(tl.int64) * row_groups, v, flat < rows, row_groups, k, CHUNKS, GROUPS, VEC, EXACT)


@Planned
def guidance_triton(cond: Tensor, uncond: Tensor, scale: float, rescale: bool) -> Callable[..., Tensor]:
    """`guidance_reference` in one launch."""
    if not cond.numel():
        return lambda cond, *others: new_like([cond])[0]
    shape = share_out([cond, uncond], [outline(cond)])
    sizes = shape.sizes(*shape.steps(cond, uncond))
    launch = Launch(_guidance_kernel, (shape.tiles,), RESCALE=rescale, **shape.constants)

    def run(cond: Tensor, uncond: Tensor, scale: float, rescale: bool) -> Tensor:
        (out,) = new_like([cond])
        launch(cond, uncond, out, float(scale), sizes)
        return out

    return run


def guidance_reference(cond: Tensor, uncond: Tensor, scale: float, rescale: bool) -> Tensor:
    """``v = uncond + scale * (cond - uncond)``, rescaled to ``v * ||cond|| / ||v||`` of each row if wanted.

    In fp32 (fp64 for fp64), rounded once; a row whose v is zero stays zero.

    Args:
        cond, uncond: [batch, rows, channels] or [rows, channels], last dim contiguous.

    Returns:
        A new contiguous tensor in the dtype of cond.

    Source: Qwen-Image's true CFG; docs/methods.md, Formulas of the ops. Bytes: 3 S.
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
