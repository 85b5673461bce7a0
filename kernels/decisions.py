"""What dynamic methods decide by: statistics of rows, and a threshold that is compared on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .deferred import jit
from .launching import Launch, Planned, new
from .rows import SUMMED, floats, load_chunk, row_offsets, share_out
from .tiles import (
    MAX_PROGRAMS,
    OPTIONS,
    accumulator_dtype,
    encoded,
    nbytes,
    new_partials,
    store_sums,
)

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _row_statistics_kernel(
    a_ptr,
    b_ptr,
    partials_ptr,
    sizes,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    EXACT: tl.constexpr,
    VEC: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Partial sums over rows of ``q - 1``, ``(q - 1)^2`` and ``1 - cos``, where q is the ratio of the norms."""
    pid, sample = tl.program_id(0), tl.program_id(1)
    rows, row_groups, batch_rows = sizes[0] >> 2, sizes[1] >> 2, sizes[2] >> 2
    q_1 = tl.zeros([ROWS], tl.float32)
    q_2, angle = q_1, q_1
    for start in range(pid * ROWS, rows, tl.num_programs(0) * ROWS):
        flat = start + tl.arange(0, ROWS)
        # a row beyond the last is the last once more, which does not count
        row = (tl.minimum(flat, rows - 1) + sample * rows)[:, None]
        a_own = row_offsets(row, batch_rows, sizes[3] >> 2, sizes[4] >> 2)
        b_own = row_offsets(row, batch_rows, sizes[5] >> 2, sizes[6] >> 2)
        a_2 = tl.zeros([ROWS, GROUPS * VEC], tl.float32)
        b_2, ab = a_2, a_2
        for c in tl.static_range(CHUNKS):
            a = floats(load_chunk(a_ptr, a_own, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
            b = floats(load_chunk(b_ptr, b_own, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
            a_2, b_2, ab = tl.fma(a, a, a_2), tl.fma(b, b, b_2), tl.fma(a, b, ab)
        a_norm, b_norm, product = tl.sqrt_rn(tl.sum(a_2, 1)), tl.sqrt_rn(tl.sum(b_2, 1)), tl.sum(ab, 1)
        ratio = tl.where(flat < rows, tl.div_rn(a_norm, b_norm) - 1.0, 0.0)
        q_1 += ratio
        q_2 += ratio * ratio
        angle += tl.where(flat < rows, 1.0 - tl.div_rn(product, a_norm * b_norm), 0.0)
    store_sums(partials_ptr + sample * 3 * MAX_PROGRAMS + pid, (q_1, q_2, angle), 3, MAX_PROGRAMS)


@jit()
def _row_results_kernel(partials_ptr, out_ptr, programs, rows, MAX_PROGRAMS: tl.constexpr):
    """The three results of a sample, from what every program of `_row_statistics_kernel` found."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, MAX_PROGRAMS)
    slot = partials_ptr + sample * 3 * MAX_PROGRAMS + column
    filled = column < (programs >> 2)
    count = (rows >> 2).to(tl.float32)
    mean = tl.div_rn(tl.sum(tl.load(slot, mask=filled, other=0.0), 0), count)
    squares = tl.sum(tl.load(slot + MAX_PROGRAMS, mask=filled, other=0.0), 0)
    angle = tl.div_rn(tl.sum(tl.load(slot + 2 * MAX_PROGRAMS, mask=filled, other=0.0), 0), count)
    spread = squares - count * mean * mean
    # not a maximum, which may drop NaN
    variance = tl.div_rn(tl.where(spread < 0.0, 0.0, spread), tl.where(count > 1.0, count - 1.0, 1.0))
    tl.store(out_ptr + 3 * sample, 1.0 + mean)
    tl.store(out_ptr + 3 * sample + 1, tl.where(count > 1.0, tl.sqrt_rn(variance), float("nan")))
    tl.store(out_ptr + 3 * sample + 2, angle)


@jit()
def _decide_kernel(
    numerator_ptr, denominator_ptr, accumulated_ptr, flag_ptr, polynomial, threshold, TERMS: tl.constexpr
):
    """Horner's rule, highest power first."""
    ratio = tl.div_rn(tl.load(numerator_ptr), tl.load(denominator_ptr))
    change = polynomial[0] + 0.0 * ratio
    for k in tl.static_range(1, TERMS):
        change = change * ratio + polynomial[k]
    total = tl.load(accumulated_ptr) + change
    # false for NaN: a bad number never looks like a small change
    small = total < threshold
    tl.store(accumulated_ptr, tl.where(small, total, 0.0))
    tl.store(flag_ptr, tl.where(small, 1, 0))


@Planned
def row_statistics_triton(a: Tensor, b: Tensor, per_sample: bool = False) -> Callable[..., Tensor]:
    """`row_statistics_reference` in one launch and a second tiny one."""
    shape = share_out([a, b], held=SUMMED)
    samples = a.shape[0] if per_sample else 1
    rows = shape.rows // samples
    programs = min(-(-rows // shape.per_program), MAX_PROGRAMS)
    sizes = shape.sizes(*shape.steps(a, b), rows=rows)
    launch = Launch(_row_statistics_kernel, (programs, samples), MAX_PROGRAMS=MAX_PROGRAMS, **shape.constants)
    last = Launch(_row_results_kernel, (samples,), MAX_PROGRAMS=MAX_PROGRAMS, **OPTIONS)
    counts = encoded((programs, rows))

    def run(a: Tensor, b: Tensor, per_sample: bool = False) -> Tensor:
        partials = new_partials(3 * samples, a.device)
        launch(a, b, partials, sizes)
        out = new((samples, 3), torch.float32, a.device)
        last(partials, out, *counts)
        return out

    return run


@Planned
def decide_triton(
    numerator: Tensor,
    denominator: Tensor,
    accumulated: Tensor,
    flag: Tensor,
    polynomial: Sequence[float],
    threshold: float,
) -> Callable[..., None]:
    """`decide_reference` in one tiny launch."""
    launch = Launch(_decide_kernel, (1,), TERMS=len(polynomial), **OPTIONS)

    def run(numerator, denominator, accumulated, flag, polynomial, threshold):
        launch(numerator, denominator, accumulated, flag, tuple(map(float, polynomial)), float(threshold))

    return run


def row_statistics_reference(a: Tensor, b: Tensor, per_sample: bool = False) -> Tensor:
    """Mean and standard deviation of ``||a|| / ||b||`` of rows, and mean of ``1 - cos(a, b)``.

    Args:
        a, b: [batch, rows, channels] or [rows, channels], last dim contiguous, not empty.
        per_sample: over the rows of each entry of the first dim apart.

    Returns:
        fp32 [1 or batch, 3] (fp64 for fp64). The deviation is that of a sample, NaN for a single row.

    Source: docs/methods.md, MagCache. Bytes: 2 S.
    """
    x, y = a.double(), b.double()
    ratio, angle = x.norm(dim=-1) / y.norm(dim=-1), 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    samples = a.shape[0] if per_sample else 1
    ratio, angle = ratio.reshape(samples, -1), angle.reshape(samples, -1)
    deviation = ratio.std(1) if ratio.shape[1] > 1 else torch.full_like(ratio[:, 0], torch.nan)
    return torch.stack([ratio.mean(1), deviation, angle.mean(1)], dim=1).to(accumulator_dtype(a.dtype))


def decide_reference(
    numerator: Tensor,
    denominator: Tensor,
    accumulated: Tensor,
    flag: Tensor,
    polynomial: Sequence[float],
    threshold: float,
) -> None:
    """``accumulated += p(numerator / denominator)``; ``flag = accumulated < threshold``, else accumulated becomes 0.

    NaN never counts as small. Nothing is read by the host.

    Args:
        numerator, denominator: fp32 with one element each.
        accumulated: fp32 [1], updated.
        flag: int32 [1], written: 1 to reuse, 0 to compute.
        polynomial: coefficients of p, highest power first.
        threshold: the bound.

    Source: docs/methods.md, TeaCache.
    """
    ratio = numerator.view(()) / denominator.view(())
    change = torch.full_like(ratio, polynomial[0]) + 0.0 * ratio
    for c in polynomial[1:]:
        change = change * ratio + torch.tensor(c, dtype=ratio.dtype)
    total = accumulated.view(()) + change
    small = total < threshold
    accumulated.copy_(torch.where(small, total, torch.zeros_like(total)).view(accumulated.shape))
    flag.copy_(small.to(flag.dtype).view(flag.shape))


def minimum_bytes(a: Tensor, b: Tensor, per_sample: bool = False) -> int:
    """Bytes that must move: both once in."""
    return nbytes((a, b))
