"""Capturing residuals: what a group added to its streams, with statistics against an older residual if wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .statistics import pair_sums
from .tiles import (
    GROUPS,
    MAX_PROGRAMS,
    OPTIONS,
    SLOW_GROUPS,
    accumulator_dtype,
    finalise,
    in_pairs,
    jit,
    nbytes,
    new_partials,
    on_device_of,
    row_groups_at,
    spread,
    stream_sizes,
    vector_width,
)

try:
    import triton.language as tl
except ImportError:
    pass

STATISTICS = 7
# Where the seven statistics stand among the eight of a pair (residual, previous).
_FROM_PAIR = (1, 4, 0, 3, 2, 5, 6)
_SIZES = ["groups", "programs", "row_groups", "batch_rows", "o_batch", "o_row", "i_batch", "i_row"]


@jit()
def _capture_stream(
    pointers,
    previous_ptr,
    flag_ptr,
    partials_ptr,
    pid,
    sizes,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """The part of one program in one stream; ``previous_ptr`` and ``partials_ptr`` are None without statistics."""
    out_ptr, in_ptr, residual_ptr = pointers
    groups, programs, row_groups, batch_rows, o_batch, o_row, i_batch, i_row = sizes
    lane = tl.arange(0, VEC)[None, :]
    zero = tl.zeros([R], tl.float32)
    bad = zero
    r_1, r_2, d_1, d_2, p_1, p_2, rp = zero, zero, zero, zero, zero, zero, zero
    for start in range(pid * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        off = group[:, None] * VEC + lane
        if CONTIGUOUS:
            o_off = off
            i_off = off
        else:
            o_off = row_groups_at(group, row_groups, batch_rows, o_batch, o_row)[:, None] * VEC + lane
            i_off = row_groups_at(group, row_groups, batch_rows, i_batch, i_row)[:, None] * VEC + lane
        o = tl.load(out_ptr + o_off, mask=live, other=0.0).to(tl.float32)
        # the next block reads `out` again, but nobody `in` or `previous`
        i = tl.load(in_ptr + i_off, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        stored = (o - i).to(residual_ptr.dtype.element_ty)
        r = stored.to(tl.float32)
        if partials_ptr is not None:
            # before the store, so that the residual may take the place of the previous one
            p = tl.load(previous_ptr + off, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
            d = r - p
            r_1 += tl.sum(tl.abs(r), 1)
            r_2 += tl.sum(r * r, 1)
            d_1 += tl.sum(tl.abs(d), 1)
            d_2 += tl.sum(d * d, 1)
            p_1 += tl.sum(tl.abs(p), 1)
            p_2 += tl.sum(p * p, 1)
            rp += tl.sum(r * p, 1)
        tl.store(residual_ptr + off, stored, mask=live)
        if flag_ptr is not None:
            bad += tl.sum(tl.where(tl.abs(r) < float("inf"), 0.0, 1.0), 1)
    if flag_ptr is not None:
        # every program that finds one stores the same value, so no atomic is needed
        tl.store(flag_ptr, 1, mask=tl.sum(bad, 0) > 0)
    if partials_ptr is not None:
        slot = partials_ptr + pid
        tl.store(slot, tl.sum(r_1, 0))
        tl.store(slot + MAX_PROGRAMS, tl.sum(r_2, 0))
        tl.store(slot + 2 * MAX_PROGRAMS, tl.sum(d_1, 0))
        tl.store(slot + 3 * MAX_PROGRAMS, tl.sum(d_2, 0))
        tl.store(slot + 4 * MAX_PROGRAMS, tl.sum(p_1, 0))
        tl.store(slot + 5 * MAX_PROGRAMS, tl.sum(p_2, 0))
        tl.store(slot + 6 * MAX_PROGRAMS, tl.sum(rp, 0))


@jit(
    do_not_specialize=[f"{name}_{stream}" for stream in (0, 1) for name in _SIZES],
    do_not_specialize_on_alignment=["flag_ptr"],
)
def _capture_kernel(
    stream_0,
    previous_0,
    stream_1,
    previous_1,
    flag_ptr,
    partials_ptr,
    groups_0,
    programs_0,
    row_groups_0,
    batch_rows_0,
    o_batch_0,
    o_row_0,
    i_batch_0,
    i_row_0,
    groups_1,
    programs_1,
    row_groups_1,
    batch_rows_1,
    o_batch_1,
    o_row_1,
    i_batch_1,
    i_row_1,
    STREAMS: tl.constexpr,
    STATISTICS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """The first ``programs_0`` programs serve stream 0, the others stream 1 (if ``STREAMS`` is 2)."""
    pid = tl.program_id(0).to(tl.int64)
    sizes_0 = (groups_0, programs_0, row_groups_0, batch_rows_0, o_batch_0, o_row_0, i_batch_0, i_row_0)
    if STREAMS == 1:
        _capture_stream(stream_0, previous_0, flag_ptr, partials_ptr, pid, sizes_0, CONTIGUOUS, VEC, R, MAX_PROGRAMS)
    else:
        sizes_1 = (groups_1, programs_1, row_groups_1, batch_rows_1, o_batch_1, o_row_1, i_batch_1, i_row_1)
        partials_1 = partials_ptr
        if partials_ptr is not None:
            partials_1 = partials_ptr + STATISTICS * MAX_PROGRAMS
        if pid < programs_0:
            _capture_stream(
                stream_0, previous_0, flag_ptr, partials_ptr, pid, sizes_0, CONTIGUOUS, VEC, R, MAX_PROGRAMS
            )
        else:
            pid -= programs_0
            _capture_stream(stream_1, previous_1, flag_ptr, partials_1, pid, sizes_1, CONTIGUOUS, VEC, R, MAX_PROGRAMS)


def capture_triton(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None = None,
    previous: Sequence[Tensor] | None = None,
    groups: int | None = None,
) -> Tensor | None:
    """`capture_reference` in one launch per two streams, and a second tiny one with ``previous``.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    filled = [s for s, out in enumerate(outputs) if out.numel()]
    found: list[Tensor] = []
    for pair in in_pairs(filled):
        streams = [(outputs[s], inputs[s], residuals[s], None if previous is None else previous[s]) for s in pair]
        found += _launch(streams, flag, previous is not None, groups)
    if previous is None:
        return None
    return spread(found, filled, len(outputs), STATISTICS, outputs[0].device)


def _launch(
    streams: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]],
    flag: Tensor | None,
    with_statistics: bool,
    groups: int | None,
) -> list[Tensor]:
    """One launch for one or two streams that are not empty; their statistics, if wanted."""
    strided = [tensor for stream in streams for tensor in stream[:2]]
    contiguous = [tensor for stream in streams for tensor in stream[2:] if tensor is not None]
    width = vector_width(strided, contiguous)
    tile = groups or (GROUPS if width > 1 else SLOW_GROUPS)
    sizes = [stream_sizes(stream[:2], width, tile) for stream in streams]
    programs = [size[1] for size in sizes]
    partials = new_partials(len(streams) * STATISTICS, strided[0].device) if with_statistics else None
    with on_device_of(strided[0]):
        _capture_kernel[(sum(programs),)](
            *(streams[0][:3], streams[0][3]),
            *((streams[1][:3], streams[1][3]) if len(streams) > 1 else (None, None)),
            flag,
            partials,
            *sizes[0],
            *sizes[-1],
            STREAMS=len(streams),
            STATISTICS=STATISTICS,
            CONTIGUOUS=all(tensor.is_contiguous() for tensor in strided),
            VEC=width,
            R=tile,
            MAX_PROGRAMS=MAX_PROGRAMS,
            **OPTIONS,
        )
        return [] if partials is None else [finalise(partials, programs, STATISTICS)]


def capture_reference(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None = None,
    previous: Sequence[Tensor] | None = None,
) -> Tensor | None:
    """``residual_s = output_s - input_s``, subtracted in fp32 (fp64 for fp64) and rounded once into ``residuals``.

    ``flag`` [1] int32 becomes 1 if a stored residual holds NaN or infinity, and is left alone otherwise. With
    ``previous`` (a residual may be its own previous one: it is read first) the result is, per stream,
    ``{sum|r|, sum r^2, sum|r-p|, sum (r-p)^2, sum|p|, sum p^2, sum r*p}`` of the residual as stored.

    Args:
        outputs, inputs: streams [batch, rows, channels] or of fewer dims, last dim contiguous; may be empty.
        residuals: contiguous, written; of outputs' shapes and any floating dtype.
        previous: like residuals.

    Returns:
        None, or fp32 [streams, 7] (fp64 for fp64 input).

    Source: methods.md §15 P1. Bytes: see `minimum_bytes`.
    """
    rows = []
    for s, (output, before, residual) in enumerate(zip(outputs, inputs, residuals, strict=True)):
        accumulator = accumulator_dtype(residual.dtype)
        if not output.numel():
            rows.append(torch.zeros(STATISTICS, dtype=accumulator, device=output.device))
            continue
        older = None if previous is None else previous[s]
        if older is not None and older.data_ptr() == residual.data_ptr():
            older = older.clone()
        _subtract(output, before, residual)
        if flag is not None:
            low, high = torch.aminmax(residual)
            flag.masked_fill_(~(torch.isfinite(low) & torch.isfinite(high)), 1)
        if older is not None:
            rows.append(pair_sums(residual, older)[list(_FROM_PAIR)].to(accumulator))
    return None if previous is None else torch.stack(rows)


def _subtract(output: Tensor, before: Tensor, residual: Tensor) -> None:
    """One pass where PyTorch rounds the fp32 difference straight into the residual's dtype, else two."""
    if residual.dtype == output.dtype or output.dtype in (torch.float32, torch.float64):
        torch.sub(output, before, out=residual)
    else:
        residual.copy_(output.float() - before.float())


def minimum_bytes(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None = None,
    previous: Sequence[Tensor] | None = None,
) -> int:
    """Bytes that must move: outputs, inputs and previous once in, residuals once out (3S, 4S with previous)."""
    return nbytes(outputs) + nbytes(inputs) + nbytes(residuals) + nbytes(previous or ())
