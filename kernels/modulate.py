"""LayerNorm with modulation, of a stream or of what a cached run would make of it, and how much it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .combine import as_rows
from .compact import decode_reference, e4m3_to_float
from .deferred import jit
from .launching import Launch, Planned, new_like, outline, taking
from .rows import Rows, batch_of, floats, load_chunk, row_offsets, share_out, store_chunk
from .statistics import PAIR_STATISTICS, pair_sums, store_pair, with_pair
from .tiles import MAX_PROGRAMS, accumulator_dtype, encoded, nbytes, new_partials, plan_fold

if TYPE_CHECKING:
    import triton.language as tl

MAX_SEGMENTS = 4


@jit()
def _normalised(
    y,
    column,
    row_groups,
    channels,
    eps,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    EXACT: tl.constexpr,
    VEC: tl.constexpr,
):
    """Chunks of rows less their mean, and one over their standard deviation."""
    total = y[0]
    for c in tl.static_range(1, CHUNKS):
        total += y[c]
    mean = tl.sum(total, 1)[:, None] / channels
    squares = tl.zeros_like(y[0])
    for c in tl.static_range(CHUNKS):
        centred = y[c] - mean
        if c == CHUNKS - 1 and not EXACT:
            centred = tl.where((c * GROUPS * VEC + column) // VEC < row_groups, centred, 0.0)
        squares = tl.fma(centred, centred, squares)
        y = y[:c] + (centred,) + y[c + 1 :]
    return y, tl.rsqrt(tl.sum(squares, 1)[:, None] / channels + eps)


@jit()
def _affine(
    z,
    weight_ptr,
    bias_ptr,
    row_groups,
    c: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    VEC: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One chunk with the LayerNorm's own weight and bias, if it has them."""
    if weight_ptr is not None:
        z = z * floats(load_chunk(weight_ptr, 0, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
    if bias_ptr is not None:
        z = z + floats(load_chunk(bias_ptr, 0, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
    return z


@jit()
def _with_segments(
    found,
    fresh,
    previous,
    inside,
    at,
    segments,
    SEGMENTS: tl.constexpr,
    BOUNDED: tl.constexpr,
    COUNT: tl.constexpr,
    VEC: tl.constexpr,
):
    """Statistics of every channel range with one chunk of z and of the previous z added."""
    for s in tl.static_range(SEGMENTS):
        a, b = fresh, previous
        if BOUNDED:
            # segments are bounded by channels, rows by groups
            counted = inside & (at >= (segments[s] >> 2)) & (at < (segments[s + 1] >> 2))
            a, b = tl.where(counted, a, 0.0), tl.where(counted, b, 0.0)
        a, b = tl.reshape(a, [COUNT, VEC]), tl.reshape(b, [COUNT, VEC])
        found = found[: s * 8] + with_pair(found[s * 8 : s * 8 + 8], a, b, VEC) + found[s * 8 + 8 :]
    return found


@jit()
def _counted(found, sums, own, COUNT: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """``found``, but ``sums`` for rows that are the last once more."""
    counted = tl.reshape(tl.broadcast_to(own, [ROWS, GROUPS]), [ROWS * GROUPS])
    for k in tl.static_range(COUNT):
        found = found[:k] + (tl.where(counted, found[k], sums[k]),) + found[k + 1 :]
    return found


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
    BOUNDED: tl.constexpr,
    STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    EXACT: tl.constexpr,
    SHARED: tl.constexpr,
    VEC: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """``SHARED`` says that a program's rows are all of one batch entry, and so have one scale and shift."""
    rows, row_groups, batch_rows = sizes[0] >> 2, sizes[1] >> 2, sizes[2] >> 2
    x_batch, x_row, scale_batch, shift_batch = sizes[3] >> 2, sizes[4] >> 2, sizes[5] >> 2, sizes[6] >> 2
    column = tl.arange(0, GROUPS * VEC)[None, :]
    channels = (row_groups * VEC).to(tl.float32)
    sums = (tl.zeros([ROWS * GROUPS], tl.float32),) * (SEGMENTS * STATISTICS)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        flat = first + tl.arange(0, ROWS)[:, None]
        # a row beyond the last is the last once more, which is not stored
        row = tl.minimum(flat, rows - 1) if ROWS > 1 else flat
        batch = batch_of(tl.full([1, 1], first, tl.int32) if SHARED else row, batch_rows).to(tl.int64)
        own = row.to(tl.int64) * row_groups
        x_own = row_offsets(row, batch_rows, x_batch, x_row)
        y, previous = (), ()
        for c in tl.static_range(CHUNKS):
            value = floats(load_chunk(x_ptr, x_own, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
            if STATISTICS > 0:
                # asked for before the first sum: behind its barrier the wait would be a second one
                previous = previous + (load_chunk(previous_ptr, own, row_groups, c, CHUNKS, GROUPS, VEC, EXACT),)
            for k in tl.static_range(TERMS):
                r = load_chunk(residual_ptrs[k], own, row_groups, c, CHUNKS, GROUPS, VEC, EXACT)
                if code_scale_ptrs is None:
                    r = floats(r)
                else:
                    r = e4m3_to_float(r) * tl.load(code_scale_ptrs[k] + row)
                value += (coefficients[k] if coefficients_ptr is None else tl.load(coefficients_ptr + k)) * r
            if y_ptr is not None:
                store_chunk(y_ptr, own, value, flat < rows, row_groups, c, CHUNKS, GROUPS, VEC, EXACT)
            y = y + (value,)
        y, factor = _normalised(y, column, row_groups, channels, eps, GROUPS, CHUNKS, EXACT, VEC)
        found = sums
        for c in tl.static_range(CHUNKS):
            z = _affine(y[c] * factor, weight_ptr, bias_ptr, row_groups, c, CHUNKS, GROUPS, VEC, EXACT)
            scale = floats(load_chunk(scale_ptr, batch * scale_batch, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
            shift = floats(load_chunk(shift_ptr, batch * shift_batch, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
            stored = (z * (1.0 + scale) + shift).to(z_ptr.dtype.element_ty)
            if STATISTICS > 0:
                at = c * GROUPS * VEC + column
                inside = at // VEC < row_groups
                a, b = stored.to(tl.float32), floats(previous[c])
                found = _with_segments(found, a, b, inside, at, segments, SEGMENTS, BOUNDED, ROWS * GROUPS, VEC)
            # behind the load of the previous one, whose place it may take
            store_chunk(z_ptr, own, stored, flat < rows, row_groups, c, CHUNKS, GROUPS, VEC, EXACT)
        if ROWS > 1:
            found = _counted(found, sums, flat < rows, SEGMENTS * STATISTICS, ROWS, GROUPS)
        sums = found
    for s in tl.static_range(SEGMENTS):
        slot = partials_ptr + s * STATISTICS * MAX_PROGRAMS + tl.program_id(0)
        store_pair(slot, sums[s * 8 : s * 8 + 8], MAX_PROGRAMS)


class Modulation(NamedTuple):
    """Arguments of a LayerNorm with modulation.

    Attributes:
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
    """

    x: Tensor
    scale: Tensor
    shift: Tensor
    residuals: Sequence[Tensor] = ()
    coefficients: Sequence[float] | Tensor = ()
    previous: Tensor | None = None
    segments: Sequence[int] = ()
    eps: float = 1e-6
    weight: Tensor | None = None
    bias: Tensor | None = None
    result: Tensor | None = None
    stream: Tensor | None = None
    scales: Sequence[Tensor] | None = None


@Planned
@taking(Modulation)
def modulate_triton(a: Modulation) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`modulate_reference` in one launch, and a second tiny one with ``previous``."""
    bounds = [0, *a.segments, a.x.shape[-1]]
    parts = len(bounds) - 1
    count = 0 if a.previous is None else PAIR_STATISTICS
    # of sums and of codes, which take more registers, rows in pairs are no faster
    pairs = not count and all(residual.element_size() > 1 for residual in a.residuals)
    others = (*a.residuals, a.previous, a.stream, a.weight, a.bias, a.result)
    shape, steps = _lay_out(a.x, a.scale, a.shift, others, pairs)
    # where nothing is summed up, the GPU shares out the rows better than a loop does
    programs = min(shape.tiles, MAX_PROGRAMS) if count else shape.tiles
    sizes, ends = shape.sizes(*steps), encoded(bounds)
    on_device = isinstance(a.coefficients, Tensor)
    launch = Launch(
        _modulate_kernel,
        (programs,),
        TERMS=len(a.residuals),
        SEGMENTS=parts if count else 0,
        BOUNDED=parts > 1 or (a.bias is not None and not shape.exact),
        STATISTICS=count,
        SHARED=shape.each > 1,
        MAX_PROGRAMS=MAX_PROGRAMS,
        **shape.constants,
    )
    fold = plan_fold([programs], PAIR_STATISTICS, PAIR_STATISTICS - 1, samples=parts)

    def run(
        x, scale, shift, residuals=(), coefficients=(), previous=None, segments=(), eps=1e-6, weight=None, bias=None,
        result=None, stream=None, scales=None,
    ):  # fmt: skip
        z = new_like([x])[0] if result is None else result
        if not x.numel():
            return z, torch.zeros((parts, count), dtype=torch.float32, device=x.device) if count else None
        partials = new_partials(parts * count, x.device) if count else None
        launch(
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
            None if on_device or not residuals else tuple(map(float, coefficients)),
            coefficients if on_device else None,
            partials,
            float(eps),
            sizes,
            ends,
        )
        return z, None if partials is None else fold(partials)

    return run


def _lay_out(
    x: Tensor, scale: Tensor, shift: Tensor, others: Iterable[Tensor | None], pairs: bool
) -> tuple[Rows, list[int]]:
    """How the rows are shared out, in ``pairs`` where it pays, and the strides of x, scale and shift."""
    scale, shift = as_rows(scale), as_rows(shift)
    shape = share_out([x, scale, shift], [outline(x), *(t for t in others if t is not None)])
    if pairs:
        shape = shape.in_pairs()
    return shape, shape.steps(x) + [t.stride(0) // shape.width if t.shape[0] > 1 else 0 for t in (scale, shift)]


@taking(Modulation)
def modulate_reference(a: Modulation) -> tuple[Tensor, Tensor | None]:
    """``z = LayerNorm(y) * (1 + scale) + shift`` of ``y = x + sum_k c_k r_k``, in fp32 (fp64 for fp64), rounded once.

    Returns:
        z, and the eight statistics of a pair (see `statistics`) of z as stored and ``previous``: fp32
        [segments + 1, 8], or None.

    Source: docs/methods.md, Formulas of the ops. Bytes: 2 S, 3 S with ``previous``; each residual and ``stream`` one
    more.
    """
    x, residuals, accumulator = a.x, a.residuals, accumulator_dtype(a.x.dtype)
    values = a.coefficients.tolist() if isinstance(a.coefficients, Tensor) else a.coefficients
    if a.scales is not None:
        residuals = [decode_reference(code, own, x.shape) for code, own in zip(residuals, a.scales, strict=True)]
    y = x.to(accumulator)
    for r, c in zip(residuals, values, strict=True):
        y = y + torch.tensor(c, dtype=accumulator) * r.to(accumulator)
    if a.stream is not None:
        a.stream.copy_(y)
    channels = (x.shape[-1],)
    affine = [None if t is None else t.to(accumulator) for t in (a.weight, a.bias)]
    z = torch.nn.functional.layer_norm(y, channels, affine[0], affine[1], a.eps)
    z = z * (1 + as_rows(a.scale).to(accumulator)) + as_rows(a.shift).to(accumulator)
    older = None if a.previous is None else a.previous.clone()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if a.result is None else a.result
    out.copy_(z)
    if older is None:
        return out, None
    bounds = [0, *a.segments, x.shape[-1]]
    parts = [(out[..., lo:hi], older[..., lo:hi]) for lo, hi in zip(bounds, bounds[1:], strict=False)]
    return out, torch.stack([pair_sums(*part).to(accumulator) for part in parts])


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
