"""Capturing residuals: what a group added to its streams, with statistics against an older residual if wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .deferred import jit
from .launching import Launch, Planned, taking
from .statistics import pair_sums, with_norms, with_pair
from .tiles import (
    MAX_PROGRAMS,
    accumulator_dtype,
    by_launch,
    entry_of,
    lay_out_launch,
    nbytes,
    new_partials,
    of_entry,
    offsets_at,
    plan_fold,
    share_of,
    spread,
    store_sums,
    taken,
)

if TYPE_CHECKING:
    import triton.language as tl

STATISTICS = 7
INPUT_STATISTICS = 4
# Where the seven statistics stand among the eight of a pair (residual, previous).
_FROM_PAIR = (1, 4, 0, 3, 2, 5, 6)
# Where the four of a residual and its input stand among the eight of that pair.
_FROM_INPUT = (1, 4, 2, 5)


@jit(do_not_specialize_on_alignment=["flag_ptr"])
def _capture_kernel(
    out_ptrs,
    in_ptrs,
    residual_ptrs,
    previous_ptrs,
    flag_ptr,
    partials_ptr,
    sizes,
    STATISTICS: tl.constexpr,
    ENTRIES: tl.constexpr,
    FIELDS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """``STATISTICS`` is 0, 4 (residual and input) or 7 (residual and ``previous``)."""
    pid = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    out_ptr = of_entry(out_ptrs, 0, 1, sizes, pid, ENTRIES, FIELDS)
    in_ptr = of_entry(in_ptrs, 0, 1, sizes, pid, ENTRIES, FIELDS)
    residual_ptr = of_entry(residual_ptrs, 0, 1, sizes, pid, ENTRIES, FIELDS)
    groups, programs, program = share_of(sizes, pid, ENTRIES, FIELDS)
    if STATISTICS == 7:
        previous_ptr = of_entry(previous_ptrs, 0, 1, sizes, pid, ENTRIES, FIELDS)
    bad = tl.zeros([R], tl.float32)
    sums = (bad,) * 8
    for start in range(program * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        off = offsets_at(group, sample, 0, sizes, pid, ENTRIES, FIELDS, True, VEC)
        o_off = offsets_at(group, sample, 0, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        i_off = offsets_at(group, sample, 1, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        o = tl.load(out_ptr + o_off, mask=live, other=0.0).to(tl.float32)
        # the next block reads `out` again, but nobody `in` or `previous`
        i = tl.load(in_ptr + i_off, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        stored = (o - i).to(residual_ptr.dtype.element_ty)
        r = stored.to(tl.float32)
        if STATISTICS == 4:
            sums = with_norms(sums, r, i, VEC)
        if STATISTICS == 7:
            # before the store, so that the residual may take the place of the previous one
            p = tl.load(previous_ptr + off, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
            sums = with_pair(sums, r, p, VEC)
        tl.store(residual_ptr + off, stored, mask=live)
        if flag_ptr is not None:
            bad += tl.sum(tl.where(tl.abs(r) < float("inf"), 0.0, 1.0), 1)
    if flag_ptr is not None:
        # every program that finds one stores the same value, so no atomic is needed
        tl.store(flag_ptr, 1, mask=tl.sum(bad, 0) > 0)
    if STATISTICS > 0:
        row = (entry_of(sizes, pid, ENTRIES, FIELDS) * tl.num_programs(1) + sample) * STATISTICS
        slot = partials_ptr + row * MAX_PROGRAMS + program
        if STATISTICS == 7:
            d_1, r_1, p_1, d_2, r_2, p_2, rp, _ = sums
            sums = r_1, r_2, d_1, d_2, p_1, p_2, rp
        store_sums(slot, sums, STATISTICS, MAX_PROGRAMS)


class Capture(NamedTuple):
    """Arguments of a capture.

    Attributes:
        outputs, inputs: streams [batch, rows, channels] or of fewer dims, last dim contiguous; may be empty.
        residuals: contiguous, written; of outputs' shapes and any floating dtype.
        flag: int32 [1].
        previous: like residuals.
        statistics: also without ``previous``.
        per_sample: one row of statistics per stream and entry of the first dim, stream by stream.
    """

    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]
    residuals: Sequence[Tensor]
    flag: Tensor | None = None
    previous: Sequence[Tensor] | None = None
    statistics: bool = False
    per_sample: bool = False


@Planned
@taking(Capture)
def capture_triton(a: Capture, groups: int | None = None) -> Callable[..., Tensor | None]:
    """`capture_reference` in one launch per eight streams, and a second tiny one for statistics.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    count = statistics_count(a.previous, a.statistics)
    samples = a.outputs[0].shape[0] if a.per_sample and count else 1
    streams = list(zip(a.outputs, a.inputs, a.residuals, a.previous or a.residuals, strict=True))
    filled = [s for s, out in enumerate(a.outputs) if out.numel()]
    parts = [(some, _plan([streams[s] for s in some], count, samples, groups)) for some in by_launch(filled)]

    def run(outputs, inputs, residuals, flag=None, previous=None, *others):
        found = []
        for some, part in parts:
            own = None if previous is None else taken(previous, some)
            found.append(part(taken(outputs, some), taken(inputs, some), taken(residuals, some), own, flag))
        return spread(found, filled, len(outputs), count, outputs[0].device, samples) if count else None

    return run


def statistics_count(previous: Sequence[Tensor] | None, statistics: bool) -> int:
    """How many numbers per stream a capture returns."""
    return STATISTICS if previous is not None else INPUT_STATISTICS if statistics else 0


def _plan(streams: Sequence[tuple[Tensor, ...]], count: int, samples: int, groups: int | None) -> Callable[..., Any]:
    """One launch for streams that are not empty; their statistics, if wanted."""
    others = [t for stream in streams for t in stream[2:]]
    layout = lay_out_launch([stream[:2] for stream in streams], others, groups, samples, sums=count > 0)
    rows, sizes = len(streams) * samples * count, layout.sizes
    launch = Launch(_capture_kernel, layout.grid, STATISTICS=count, MAX_PROGRAMS=MAX_PROGRAMS, **layout.constants)
    fold = plan_fold(layout.programs, count, samples=samples)

    def run(outputs, inputs, residuals, previous, flag):
        partials = new_partials(rows, outputs[0].device) if rows else None
        launch(outputs, inputs, residuals, previous, flag, partials, sizes)
        return None if partials is None else fold(partials)

    return run


@taking(Capture)
def capture_reference(a: Capture) -> Tensor | None:
    """``residual_s = output_s - input_s``, subtracted in fp32 (fp64 for fp64) and rounded once into ``residuals``.

    ``flag`` [1] int32 becomes 1 if a stored residual holds NaN or infinity, and is left alone otherwise. With
    ``previous`` (a residual may be its own previous one: it is read first) the result is, per stream,
    ``{sum|r|, sum r^2, sum|r-p|, sum (r-p)^2, sum|p|, sum p^2, sum r*p}`` of the residual as stored; with
    ``statistics`` alone it is ``{sum|r|, sum r^2, sum|in|, sum in^2}``.

    Returns:
        None, or fp32 [streams, 7 or 4], per sample [streams * batch, 7 or 4] (fp64 for fp64 input).

    Source: docs/methods.md, Formulas of the ops. Bytes: see `minimum_bytes`.
    """
    rows = []
    count = statistics_count(a.previous, a.statistics)
    samples = a.outputs[0].shape[0] if a.per_sample else 1
    for s, (output, before, residual) in enumerate(zip(a.outputs, a.inputs, a.residuals, strict=True)):
        older = None if a.previous is None else a.previous[s]
        if older is not None and older.data_ptr() == residual.data_ptr():
            older = older.clone()
        if output.numel():
            _subtract(output, before, residual)
            if a.flag is not None:
                low, high = torch.aminmax(residual)
                a.flag.masked_fill_(~(torch.isfinite(low) & torch.isfinite(high)), 1)
        if count:
            pair = residual, before if older is None else older
            order = _FROM_INPUT if older is None else _FROM_PAIR
            for sample in range(samples):
                parts = [t[sample] for t in pair] if a.per_sample else pair
                rows.append(pair_sums(*parts)[list(order)].to(accumulator_dtype(residual.dtype)))
    return torch.stack(rows) if count else None


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
    *others: object,
) -> int:
    """Bytes that must move: outputs, inputs and previous once in, residuals once out (3S, 4S with previous)."""
    return nbytes(outputs) + nbytes(inputs) + nbytes(residuals) + nbytes(previous or ())
