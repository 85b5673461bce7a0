"""Adding a linear combination of stored residuals to the streams: what a cached run of groups costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tiles import (
    GROUPS,
    OPTIONS,
    SLOW_GROUPS,
    accumulator_dtype,
    in_pairs,
    jit,
    nbytes,
    on_device_of,
    row_groups_at,
    stream_sizes,
    vector_width,
)

try:
    import triton.language as tl
except ImportError:
    pass

MAX_TERMS = 8
_SIZES = ["groups", "programs", "row_groups", "batch_rows", "x_batch", "x_row"]


@jit()
def _combine_stream(
    pointers,
    residual_ptrs,
    coefficients,
    coefficients_ptr,
    pid,
    sizes,
    TERMS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
):
    """The part of one program in one stream."""
    x_ptr, y_ptr = pointers
    groups, programs, row_groups, batch_rows, x_batch, x_row = sizes
    lane = tl.arange(0, VEC)[None, :]
    for start in range(pid * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        off = group[:, None] * VEC + lane
        if CONTIGUOUS:
            x_off = off
        else:
            x_off = row_groups_at(group, row_groups, batch_rows, x_batch, x_row)[:, None] * VEC + lane
        y = tl.load(x_ptr + x_off, mask=live, other=0.0).to(tl.float32)
        for k in tl.static_range(TERMS):
            r = tl.load(residual_ptrs[k] + off, mask=live, other=0.0).to(tl.float32)
            if coefficients_ptr is None:
                y += coefficients[k] * r
            else:
                y += tl.load(coefficients_ptr + k) * r
        tl.store(y_ptr + off, y.to(y_ptr.dtype.element_ty), mask=live)


@jit(
    do_not_specialize=[f"{name}_{stream}" for stream in (0, 1) for name in _SIZES],
    do_not_specialize_on_alignment=["coefficients_ptr"],
)
def _linear_combination_kernel(
    stream_0,
    residuals_0,
    stream_1,
    residuals_1,
    coefficients,
    coefficients_ptr,
    groups_0,
    programs_0,
    row_groups_0,
    batch_rows_0,
    x_batch_0,
    x_row_0,
    groups_1,
    programs_1,
    row_groups_1,
    batch_rows_1,
    x_batch_1,
    x_row_1,
    STREAMS: tl.constexpr,
    TERMS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
):
    """The first ``programs_0`` programs serve stream 0, the others stream 1 (if ``STREAMS`` is 2).

    Coefficients are either host numbers or, with ``coefficients_ptr``, read from the device.
    """
    pid = tl.program_id(0).to(tl.int64)
    sizes_0 = (groups_0, programs_0, row_groups_0, batch_rows_0, x_batch_0, x_row_0)
    if STREAMS == 1:
        _combine_stream(stream_0, residuals_0, coefficients, coefficients_ptr, pid, sizes_0, TERMS, CONTIGUOUS, VEC, R)
    else:
        sizes_1 = (groups_1, programs_1, row_groups_1, batch_rows_1, x_batch_1, x_row_1)
        if pid < programs_0:
            _combine_stream(
                stream_0, residuals_0, coefficients, coefficients_ptr, pid, sizes_0, TERMS, CONTIGUOUS, VEC, R
            )
        else:
            pid -= programs_0
            _combine_stream(
                stream_1, residuals_1, coefficients, coefficients_ptr, pid, sizes_1, TERMS, CONTIGUOUS, VEC, R
            )


def linear_combination_triton(
    bases: Sequence[Tensor],
    residuals: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float] | Tensor,
    groups: int | None = None,
) -> list[Tensor]:
    """`linear_combination_reference` in one launch per two streams.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    combined = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in bases]
    filled = [s for s, x in enumerate(bases) if x.numel()]
    for pair in in_pairs(filled):
        streams = [(bases[s], combined[s], tuple(residuals[s])) for s in pair]
        _launch(streams, coefficients, groups)
    return combined


def _launch(
    streams: Sequence[tuple[Tensor, Tensor, tuple[Tensor, ...]]],
    coefficients: Sequence[float] | Tensor,
    groups: int | None,
) -> None:
    """One launch for one or two streams that are not empty."""
    bases = [x for x, _, _ in streams]
    width = vector_width(bases, [t for _, y, terms in streams for t in (y, *terms)])
    tile = groups or (GROUPS if width > 1 else SLOW_GROUPS)
    sizes = [stream_sizes((x,), width, tile) for x in bases]
    on_device = isinstance(coefficients, Tensor)
    second = streams[1] if len(streams) > 1 else (None, None, None)
    with on_device_of(bases[0]):
        _linear_combination_kernel[(sum(size[1] for size in sizes),)](
            streams[0][:2],
            streams[0][2],
            None if second[0] is None else second[:2],
            second[2],
            None if on_device else tuple(float(c) for c in coefficients),
            coefficients if on_device else None,
            *sizes[0],
            *sizes[-1],
            STREAMS=len(streams),
            TERMS=len(streams[0][2]),
            CONTIGUOUS=all(x.is_contiguous() for x in bases),
            VEC=width,
            R=tile,
            **OPTIONS,
        )


def linear_combination_reference(
    bases: Sequence[Tensor], residuals: Sequence[Sequence[Tensor]], coefficients: Sequence[float] | Tensor
) -> list[Tensor]:
    """``y_s = x_s + sum_k c_k r_sk``, in fp32 (fp64 for fp64) in the order of k, rounded once at the end.

    Every product is rounded before it is added. With one term and coefficient 1 the result is ``torch.add(x, r)``
    bit by bit. A further term with coefficient 0 changes nothing, except that -0.0 becomes 0.0 and that NaN or
    infinity in the term gives NaN.

    Args:
        bases: x_s [batch, rows, channels] or of fewer dims, last dim contiguous; may be empty.
        residuals: per stream its r_sk, contiguous, of x_s's shape, 1 to 8 of them and as many for every stream.
        coefficients: c_k, host numbers or fp32 [terms]; used in fp32.

    Returns:
        New contiguous tensors in the dtype of the bases.

    Source: methods.md §15 P2, P3. Bytes: see `minimum_bytes`.
    """
    values = coefficients.tolist() if isinstance(coefficients, Tensor) else [float(c) for c in coefficients]
    return [_combine(x, terms, values) for x, terms in zip(bases, residuals, strict=True)]


def _combine(x: Tensor, terms: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(terms) == 1 and coefficients[0] == 1.0 and terms[0].dtype == x.dtype:
        return torch.add(x, terms[0], out=y)
    accumulator = accumulator_dtype(x.dtype)
    # multiplied by 1 after the coefficient: a multiply-add can then be fused only where that rounds the same
    one = torch.ones((), dtype=accumulator, device=x.device)
    if x.dtype == accumulator:
        total = torch.addcmul(x, terms[0], one, value=coefficients[0], out=y)
    else:
        total = torch.addcmul(x.to(accumulator), terms[0], one, value=coefficients[0])
    for r, c in zip(terms[1:], coefficients[1:], strict=True):
        torch.addcmul(total, r, one, value=c, out=total)
    return total if total is y else y.copy_(total)


def minimum_bytes(bases: Sequence[Tensor], residuals: Sequence[Sequence[Tensor]], coefficients: object = None) -> int:
    """Bytes that must move: bases and residuals once in, results once out, (terms + 2) S."""
    return 2 * nbytes(bases) + sum(nbytes(terms) for terms in residuals)
