"""LayerNorm with modulation, of a stream or of what a cached run would make of it, and how much it changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .combine import as_rows
from .compact import decode_reference, e4m3_to_float
from .deferred import jit
from .launching import enqueue, new
from .rows import row_offsets, share_out
from .statistics import PAIR_STATISTICS, pair_sums
from .tiles import MAX_PROGRAMS, accumulator_dtype, encoded, finalise, nbytes, new_partials, on_device_of

if TYPE_CHECKING:
    import triton.language as tl

MAX_SEGMENTS = 4


@jit()
def _modulate_kernel(
    x_ptr,
    residual_ptrs,
    code_scale_ptrs,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    previous_ptr,
    z_ptr,
    y_ptr,
    coefficients,
    coefficients_ptr,
    partials_ptr,
    eps,
    sizes,
    segments,
    TERMS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    VEC: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    rows, row_groups, batch_rows = sizes[0] >> 2, sizes[1] >> 2, sizes[2] >> 2
    x_batch, x_row, scale_batch, shift_batch = sizes[3] >> 2, sizes[4] >> 2, sizes[5] >> 2, sizes[6] >> 2
    programs = tl.num_programs(0)
    group = tl.arange(0, GROUPS)[None, :, None]
    lane = tl.arange(0, VEC)[None, None, :]
    column = group * VEC + lane
    inside = group < row_groups
    channels = (row_groups * VEC).to(tl.float32)
    zero = tl.zeros([ROWS, GROUPS], tl.float32)
    sums = (zero,) * (SEGMENTS * STATISTICS)
    for start in range(pid * ROWS, rows, programs * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None, None]
        live = inside & (row < rows)
        off = row * row_groups * VEC + column
        batch = (row.to(tl.int32) // batch_rows).to(tl.int64)
        y = tl.load(x_ptr + row_offsets(row, batch_rows, x_batch, x_row) * VEC + column, mask=live, other=0.0).to(
            tl.float32
        )
        if STATISTICS > 0:
            # asked for before the first sum: behind its barrier the wait would be a second one
            p = tl.load(previous_ptr + off, mask=live, other=0.0)
        for k in tl.static_range(TERMS):
            if code_scale_ptrs is None:
                r = tl.load(residual_ptrs[k] + off, mask=live, other=0.0).to(tl.float32)
            else:
                code_scale = tl.load(code_scale_ptrs[k] + row, mask=row < rows, other=0.0)
                r = e4m3_to_float(tl.load(residual_ptrs[k] + off, mask=live, other=0)) * code_scale
            if coefficients_ptr is None:
                y += coefficients[k] * r
            else:
                y += tl.load(coefficients_ptr + k) * r
        if y_ptr is not None:
            tl.store(y_ptr + off, y.to(y_ptr.dtype.element_ty), mask=live)
        mean = tl.sum(tl.sum(y, 2), 1)[:, None, None] / channels
        centred = tl.where(live, y - mean, 0.0)
        variance = tl.sum(tl.sum(centred * centred, 2), 1)[:, None, None] / channels
        z = centred * (1.0 / tl.sqrt_rn(variance + eps))
        if weight_ptr is not None:
            z = z * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            z = z + tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + batch * scale_batch * VEC + column, mask=live, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + batch * shift_batch * VEC + column, mask=live, other=0.0).to(tl.float32)
        stored = (z * (1.0 + scale) + shift).to(z_ptr.dtype.element_ty)
        if STATISTICS > 0:
            p = p.to(tl.float32)
            for s in tl.static_range(SEGMENTS):
                a, b = stored.to(tl.float32), p
                if SEGMENTS > 1 or bias_ptr is not None:
                    # segments are bounded by channels, rows by groups
                    counted = live & (column >= (segments[s] >> 2)) & (column < (segments[s + 1] >> 2))
                    a, b = tl.where(counted, a, 0.0), tl.where(counted, b, 0.0)
                d = a - b
                found = (
                    sums[s * 8] + tl.sum(tl.abs(d), 2),
                    sums[s * 8 + 1] + tl.sum(tl.abs(a), 2),
                    sums[s * 8 + 2] + tl.sum(tl.abs(b), 2),
                    sums[s * 8 + 3] + tl.sum(d * d, 2),
                    sums[s * 8 + 4] + tl.sum(a * a, 2),
                    sums[s * 8 + 5] + tl.sum(b * b, 2),
                    sums[s * 8 + 6] + tl.sum(a * b, 2),
                    tl.maximum(sums[s * 8 + 7], tl.max(tl.abs(d), 2)),
                )
                sums = sums[: s * 8] + found + sums[s * 8 + 8 :]
        # behind the load of the previous one, whose place it may take
        tl.store(z_ptr + off, stored, mask=live)
    if STATISTICS > 0:
        for s in tl.static_range(SEGMENTS):
            slot = partials_ptr + s * STATISTICS * MAX_PROGRAMS + pid
            total = tl.sum(tl.sum(sums[s * 8], 1), 0)
            tl.store(slot, total)
            for k in tl.static_range(1, 7):
                tl.store(slot + k * MAX_PROGRAMS, tl.sum(tl.sum(sums[s * 8 + k], 1), 0))
            # a maximum may drop NaN, which must never look like a small difference; the sum of |d| keeps it
            peak = tl.max(tl.max(sums[s * 8 + 7], 1), 0)
            tl.store(slot + 7 * MAX_PROGRAMS, tl.where(total == total, peak, total))


def modulate_triton(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residuals: Sequence[Tensor] = (),
    coefficients: Sequence[float] | Tensor = (),
    previous: Tensor | None = None,
    segments: Sequence[int] = (),
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    result: Tensor | None = None,
    stream: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`modulate_reference` in one launch, and a second tiny one with ``previous``."""
    z = new(x.shape, x.dtype, x.device) if result is None else result
    bounds = [0, *segments, x.shape[-1]]
    parts = len(bounds) - 1
    if not x.numel():
        empty = torch.zeros((parts, PAIR_STATISTICS), dtype=torch.float32, device=x.device)
        return z, None if previous is None else empty
    scale, shift = as_rows(scale), as_rows(shift)
    dense = [t for t in (z, *residuals, previous, stream, weight, bias) if t is not None]
    shape = share_out([x], [*dense, *(t for t in (scale, shift) if t.is_contiguous())])
    steps = shape.steps(x) + [t.stride(0) // shape.width if t.shape[0] > 1 else 0 for t in (scale, shift)]
    count = 0 if previous is None else PAIR_STATISTICS
    # where nothing is summed up, the GPU shares out the rows better than a loop does
    programs = min(shape.tiles, MAX_PROGRAMS) if count else shape.tiles
    partials = new_partials(parts * count, x.device) if count else None
    on_device = isinstance(coefficients, Tensor)
    with on_device_of(x):
        enqueue(
            _modulate_kernel,
            (programs,),
            x,
            tuple(residuals) or None,
            None if scales is None else tuple(scales),
            scale,
            shift,
            weight,
            bias,
            previous,
            z,
            stream,
            None if on_device or not residuals else tuple(float(c) for c in coefficients),
            coefficients if on_device else None,
            partials,
            float(eps),
            shape.sizes(x.shape[-1], *steps),
            encoded(bounds),
            TERMS=len(residuals),
            SEGMENTS=parts if count else 0,
            STATISTICS=count,
            ROWS=shape.per_program,
            GROUPS=shape.groups,
            VEC=shape.width,
            MAX_PROGRAMS=MAX_PROGRAMS,
            **shape.options,
        )
        if partials is None:
            return z, None
        return z, finalise(partials, [programs], PAIR_STATISTICS, PAIR_STATISTICS - 1, samples=parts)


def modulate_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residuals: Sequence[Tensor] = (),
    coefficients: Sequence[float] | Tensor = (),
    previous: Tensor | None = None,
    segments: Sequence[int] = (),
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    result: Tensor | None = None,
    stream: Tensor | None = None,
    scales: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``z = LayerNorm(y) * (1 + scale) + shift`` of ``y = x + sum_k c_k r_k``, in fp32 (fp64 for fp64), rounded once.

    Args:
        x: [batch, rows, channels], last dim contiguous.
        scale, shift: [batch, 1, channels] or [batch, channels] (a batch of 1 is broadcast).
        residuals, coefficients: r_k, contiguous, like x; c_k, host numbers or fp32 on the device.
        previous: the z of an earlier step, contiguous; then statistics are returned. It may be ``result``.
        segments: inner bounds of the channel ranges whose statistics are kept apart.
        eps: of the LayerNorm, whose variance is that of the population.
        weight, bias: [channels], of the LayerNorm.
        result: written instead of a new tensor.
        stream: receives y.
        scales: then residuals are codes of `compact` (uint8), and these fp32 [rows] their scales.

    Returns:
        z, and the eight statistics of a pair (see `statistics`) of z as stored and ``previous``: fp32
        [segments + 1, 8], or None.

    Source: TeaCache, SpectralCache; methods.md §15 P10, P2n. Bytes: 2 S, 3 S with ``previous``; each residual and
    ``stream`` one more.
    """
    accumulator = accumulator_dtype(x.dtype)
    values = coefficients.tolist() if isinstance(coefficients, Tensor) else coefficients
    if scales is not None:
        residuals = [decode_reference(code, own, x.shape) for code, own in zip(residuals, scales, strict=True)]
    y = x.to(accumulator)
    for r, c in zip(residuals, values, strict=True):
        y = y + torch.tensor(c, dtype=accumulator) * r.to(accumulator)
    if stream is not None:
        stream.copy_(y)
    channels = (x.shape[-1],)
    affine = [None if t is None else t.to(accumulator) for t in (weight, bias)]
    z = torch.nn.functional.layer_norm(y, channels, affine[0], affine[1], eps)
    z = z * (1 + as_rows(scale).to(accumulator)) + as_rows(shift).to(accumulator)
    older = None if previous is None else previous.clone()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if result is None else result
    out.copy_(z)
    if older is None:
        return out, None
    bounds = [0, *segments, x.shape[-1]]
    parts = [(out[..., lo:hi], older[..., lo:hi]) for lo, hi in zip(bounds, bounds[1:], strict=False)]
    return out, torch.stack([pair_sums(a, b).to(accumulator) for a, b in parts])


def minimum_bytes(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residuals: Sequence[Tensor] = (),
    coefficients: object = (),
    previous: Tensor | None = None,
    *others: object,
    stream: Tensor | None = None,
    **options: object,
) -> int:
    """Bytes that must move: x, residuals, previous, scale and shift once in, z (and y) once out."""
    return nbytes(t for t in (x, x, *residuals, previous, stream, scale, shift) if t is not None)
