"""Statistics of tensors against each other: pairs, and linear combinations against a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .deferred import jit
from .launching import Launch, Planned, on_device_of
from .tiles import (
    GROUPS,
    MAX_PROGRAMS,
    OPTIONS,
    SLOW_GROUPS,
    accumulator_dtype,
    by_launch,
    entry_of,
    lanes,
    lay_out_launch,
    nbytes,
    new_partials,
    of_entry,
    offsets_at,
    plan_fold,
    program_count,
    share_of,
    spread,
    summed,
    taken,
    vector_width,
)

if TYPE_CHECKING:
    import triton.language as tl

PAIR_STATISTICS = 8
ERROR_STATISTICS = 4
# Sets of one launch: ten need 79 registers. Ten is also every span of one anchor.
MAX_SETS = 10
SLOW_ERROR_GROUPS = SLOW_GROUPS // 2
# Elements the reference holds in fp64 at a time.
_CHUNK = 65536
# Rows of one batched product of the reference: each thread keeps the errors it made in its own cache.
_ROW, _ROWS = 2048, 16


@jit()
def with_pair(sums, a, b, VEC: tl.constexpr):
    """The eight statistics of pairs of numbers [R, VEC] added to what a thread has found so far."""
    d_1, a_1, b_1, d_2, a_2, b_2, ab, peak = sums
    a_lanes, b_lanes = lanes(a, VEC), lanes(b, VEC)
    for k in tl.static_range(VEC):
        x, y = a_lanes[k], b_lanes[k]
        d = x - y
        d_1 += tl.abs(d)
        a_1 += tl.abs(x)
        b_1 += tl.abs(y)
        d_2 = tl.fma(d, d, d_2)
        a_2 = tl.fma(x, x, a_2)
        b_2 = tl.fma(y, y, b_2)
        ab = tl.fma(x, y, ab)
        peak = tl.maximum(peak, tl.abs(d))
    return d_1, a_1, b_1, d_2, a_2, b_2, ab, peak


@jit()
def with_norms(sums, a, b, VEC: tl.constexpr):
    """Sums of |a|, a^2, |b|, b^2 of numbers [R, VEC] added to the first four of what a thread has found so far."""
    a_1, a_2, b_1, b_2 = sums[:4]
    a_lanes, b_lanes = lanes(a, VEC), lanes(b, VEC)
    for k in tl.static_range(VEC):
        a_1 += tl.abs(a_lanes[k])
        a_2 = tl.fma(a_lanes[k], a_lanes[k], a_2)
        b_1 += tl.abs(b_lanes[k])
        b_2 = tl.fma(b_lanes[k], b_lanes[k], b_2)
    return (a_1, a_2, b_1, b_2) + sums[4:]


@jit()
def store_pair(slot, sums, MAX_PROGRAMS: tl.constexpr):
    """Stores the eight statistics of a program, each in a row of its own."""
    # a maximum may drop NaN, which must never look like a small difference; the sum of |d| keeps it
    lost = tl.where(sums[0] == sums[0], 0.0, sums[0])
    index = tl.arange(0, 8)
    found = summed(sums[:7] + (lost,), 8)
    found = tl.where(index == 7, found + tl.max(sums[7], 0), found)
    tl.store(slot + index * MAX_PROGRAMS, found)


@jit()
def _pair_statistics_kernel(
    a_ptrs,
    b_ptrs,
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
    pid = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    a_ptr = of_entry(a_ptrs, 0, 1, sizes, pid, ENTRIES, FIELDS)
    b_ptr = of_entry(b_ptrs, 0, 1, sizes, pid, ENTRIES, FIELDS)
    groups, programs, program = share_of(sizes, pid, ENTRIES, FIELDS)
    sums = (tl.zeros([R], tl.float32),) * STATISTICS
    for start in range(program * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        a_off = offsets_at(group, sample, 0, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        b_off = offsets_at(group, sample, 1, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        a = tl.load(a_ptr + a_off, mask=live, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + b_off, mask=live, other=0.0).to(tl.float32)
        sums = with_pair(sums, a, b, VEC)
    row = (entry_of(sizes, pid, ENTRIES, FIELDS) * tl.num_programs(1) + sample) * STATISTICS
    store_pair(partials_ptr + row * MAX_PROGRAMS + program, sums, MAX_PROGRAMS)


@jit(do_not_specialize=["groups", "programs", "first_row"])
def _combination_error_kernel(
    target_ptr,
    common_ptr,
    other_ptrs,
    common_coefficients,
    other_coefficients,
    partials_ptr,
    groups,
    programs,
    first_row,
    SETS: tl.constexpr,
    TERMS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Errors of ``SETS`` sets of one common and ``TERMS`` own terms, whose pointers and coefficients are set-major."""
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, VEC)[None, :]
    zero = tl.zeros([R], tl.float32)
    e_1 = (zero,) * SETS
    e_2 = (zero,) * SETS
    t_1, t_2 = zero, zero
    for start in range(pid * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        off = group[:, None] * VEC + lane
        t = tl.load(target_ptr + off, mask=live, other=0.0).to(tl.float32)
        c = tl.load(common_ptr + off, mask=live, other=0.0).to(tl.float32)
        t_1 += tl.sum(tl.abs(t), 1)
        t_2 += tl.sum(t * t, 1)
        for s in tl.static_range(SETS):
            predicted = common_coefficients[s] * c
            for k in tl.static_range(TERMS):
                p = tl.load(other_ptrs[s * TERMS + k] + off, mask=live, other=0.0).to(tl.float32)
                predicted += other_coefficients[s * TERMS + k] * p
            e = predicted - t
            e_1 = e_1[:s] + (e_1[s] + tl.sum(tl.abs(e), 1),) + e_1[s + 1 :]
            e_2 = e_2[:s] + (e_2[s] + tl.sum(e * e, 1),) + e_2[s + 1 :]
    slot = partials_ptr + pid
    for s in tl.static_range(SETS):
        row = first_row + 4 * s
        tl.store(slot + row * MAX_PROGRAMS, tl.sum(e_1[s], 0))
        tl.store(slot + (row + 1) * MAX_PROGRAMS, tl.sum(e_2[s], 0))
        tl.store(slot + (row + 2) * MAX_PROGRAMS, tl.sum(t_1, 0))
        tl.store(slot + (row + 3) * MAX_PROGRAMS, tl.sum(t_2, 0))


@Planned
def pair_statistics_triton(
    a: Sequence[Tensor], b: Sequence[Tensor], per_sample: bool = False, groups: int | None = None
) -> Callable[..., Tensor]:
    """`pair_statistics_reference` in one launch per eight pairs and a second tiny one.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    samples = a[0].shape[0] if per_sample else 1
    filled = [s for s, tensor in enumerate(a) if tensor.numel()]
    parts = [(some, _plan_pairs([(a[s], b[s]) for s in some], samples, groups)) for some in by_launch(filled)]

    def run(a: Sequence[Tensor], b: Sequence[Tensor], per_sample: bool = False) -> Tensor:
        found = [part(taken(a, some), taken(b, some)) for some, part in parts]
        return spread(found, filled, len(a), PAIR_STATISTICS, a[0].device, samples)

    return run


def _plan_pairs(
    pairs: Sequence[tuple[Tensor, Tensor]], samples: int, groups: int | None
) -> Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]:
    """One launch for pairs that are not empty."""
    layout = lay_out_launch(pairs, (), groups, samples, sums=True)
    rows, sizes = len(pairs) * samples * PAIR_STATISTICS, layout.sizes
    launch = Launch(
        _pair_statistics_kernel,
        layout.grid,
        STATISTICS=PAIR_STATISTICS,
        MAX_PROGRAMS=MAX_PROGRAMS,
        **layout.constants,
    )
    fold = plan_fold(layout.programs, PAIR_STATISTICS, max_at=PAIR_STATISTICS - 1, samples=samples)

    def run(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        partials = new_partials(rows, a[0].device)
        launch(a, b, partials, sizes)
        return fold(partials)

    return run


def pair_statistics_reference(a: Sequence[Tensor], b: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    """Per pair ``{sum|a-b|, sum|a|, sum|b|, sum (a-b)^2, sum a^2, sum b^2, sum a*b, max|a-b|}``.

    Args:
        a, b: pairs of tensors of one shape, last dim contiguous; may be empty (then all statistics are 0).
        per_sample: one row per pair and entry of the first dim, pair by pair; the pairs share their first dim.

    Returns:
        fp32 [pairs, 8], per sample [pairs * batch, 8] (fp64 for fp64 input).

    Source: docs/methods.md, Formulas of the ops. Bytes: every tensor once in (2S), see `pair_minimum_bytes`.
    """
    pairs = [(x, y) for pair in zip(a, b, strict=True) for x, y in (zip(*pair, strict=True) if per_sample else [pair])]
    return torch.stack([pair_sums(x, y).to(accumulator_dtype(x.dtype)) for x, y in pairs])


def pair_sums(a: Tensor, b: Tensor) -> Tensor:
    """The eight statistics of one pair, added up in fp64."""
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    sums = torch.zeros(PAIR_STATISTICS, dtype=torch.float64, device=a.device)
    for first in range(0, a.numel(), _CHUNK):
        x = flat_a[first : first + _CHUNK].double()
        y = flat_b[first : first + _CHUNK].double()
        d = x - y
        size = d.abs()
        found = [size.sum(), x.abs().sum(), y.abs().sum(), d.dot(d), x.dot(x), y.dot(y), x.dot(y)]
        sums[:-1] += torch.stack(found)
        sums[-1] = torch.maximum(sums[-1], size.max())
    return sums


def pair_minimum_bytes(a: Sequence[Tensor], b: Sequence[Tensor], per_sample: bool = False) -> int:
    """Bytes that must move: every tensor once in."""
    return nbytes(a) + nbytes(b)


@dataclass
class ErrorLaunch:
    """Sets that one launch evaluates together.

    Attributes:
        common: number of the term all sets begin with; -1 is the target itself, for sets of zeros.
        common_coefficients: its coefficient in each set.
        others, other_coefficients: the further terms of each set, as many for each.
    """

    common: int
    common_coefficients: list[float] = field(default_factory=list)
    others: list[list[int]] = field(default_factory=list)
    other_coefficients: list[list[float]] = field(default_factory=list)

    @property
    def passes(self) -> int:
        """Tensors read."""
        return len({-1, self.common, *(k for terms in self.others for k in terms)})

    def accepts(self, terms: list[int]) -> bool:
        """Whether a set with these non-zero terms may join: the same first term and at most one more."""
        return (
            len(terms) <= 2
            and self.common == (terms[0] if terms else -1)
            and len(self.others[0]) == 1
            and len(self.others) < MAX_SETS
        )

    def add(self, terms: list[int], row: Sequence[float]) -> None:
        self.common_coefficients.append(row[terms[0]] if terms else 0.0)
        # a set of one term reads it twice (from the cache), the second time with coefficient 0
        self.others.append(terms[1:] or [self.common])
        self.other_coefficients.append([row[k] for k in terms[1:]] or [0.0])


def plan_error_launches(coefficients: Sequence[Sequence[float]]) -> list[ErrorLaunch]:
    """Groups consecutive sets that begin with the same term and have at most one more; others go alone."""
    launches: list[ErrorLaunch] = []
    for row in coefficients:
        terms = [k for k, coefficient in enumerate(row) if coefficient != 0]
        if not launches or not launches[-1].accepts(terms):
            launches.append(ErrorLaunch(terms[0] if terms else -1))
        launches[-1].add(terms, row)
    return launches


def combination_error_triton(
    target: Tensor, terms: Sequence[Tensor], coefficients: Sequence[Sequence[float]], groups: int | None = None
) -> Tensor:
    """`combination_error_reference` in one launch per `ErrorLaunch` and a last tiny one; no plan, because which terms a
    launch reads depends on what they are multiplied with.

    Args:
        coefficients: host numbers [sets, terms].
        groups: 16-byte groups per tile, a power of two.
    """
    sets = len(coefficients)
    if not target.numel():
        return torch.zeros((sets, ERROR_STATISTICS), dtype=torch.float32, device=target.device)
    width = vector_width((), (target, *terms))
    tile = groups or (GROUPS if width > 1 else SLOW_ERROR_GROUPS)
    programs = program_count(target.numel() // width, tile)
    partials = new_partials(ERROR_STATISTICS * sets, target.device)
    row = 0
    with on_device_of(target):
        for launch in plan_error_launches(coefficients):
            start = Launch(
                _combination_error_kernel,
                (programs,),
                SETS=len(launch.others),
                TERMS=len(launch.others[0]),
                VEC=width,
                R=tile,
                MAX_PROGRAMS=MAX_PROGRAMS,
                **OPTIONS,
            )
            start(
                target,
                target if launch.common < 0 else terms[launch.common],
                tuple(target if k < 0 else terms[k] for others in launch.others for k in others),
                tuple(launch.common_coefficients),
                tuple(c for own in launch.other_coefficients for c in own),
                partials,
                target.numel() // width,
                programs,
                row,
            )
            row += ERROR_STATISTICS * len(launch.others)
        return plan_fold([programs], ERROR_STATISTICS, samples=sets)(partials)


def combination_error_reference(
    target: Tensor, terms: Sequence[Tensor], coefficients: Sequence[Sequence[float]]
) -> Tensor:
    """Per set ``{sum|sum_k c_k p_k - t|, sum (sum_k c_k p_k - t)^2, sum|t|, sum t^2}``; no prediction is stored.

    Terms must be finite: a NaN may also reach sets in which its term has coefficient 0.

    Args:
        target: t, contiguous.
        terms: p_k, of t's shape and dtype.
        coefficients: c, host numbers [sets, terms].

    Returns:
        fp32 [sets, 4] (fp64 for fp64 input).

    Source: docs/methods.md, Formulas of the ops. Bytes: see `combination_minimum_bytes` and `combination_launch_bytes`.
    """
    accumulator = accumulator_dtype(target.dtype)
    flat = [tensor.reshape(-1) for tensor in (*terms, target)]
    # the target is one more term with coefficient -1, so that one product gives the errors
    matrix = torch.tensor([[*row, -1.0] for row in coefficients], dtype=accumulator, device=target.device)
    sums = torch.zeros((len(matrix), 2), dtype=torch.float64, device=target.device)
    norms = torch.zeros(2, dtype=torch.float64, device=target.device)
    whole = target.numel() - target.numel() % _ROW
    rows = [tensor[:whole].view(-1, _ROW) for tensor in flat]
    tail = [tensor[whole:].view(1, -1) for tensor in flat]
    # kept from one batch to the next: fresh memory of this size costs more than the arithmetic
    shape = (min(_ROWS, len(rows[0])), len(flat), _ROW)
    stacked = torch.empty(shape, dtype=accumulator, device=target.device)
    errors = torch.empty((shape[0], len(matrix), _ROW), dtype=accumulator, device=target.device)
    for first in range(0, len(rows[0]), _ROWS):
        batch = [tensor[first : first + _ROWS] for tensor in rows]
        count = len(batch[0])
        _add_errors(batch, matrix, stacked[:count], errors[:count], sums, norms)
    if tail[0].numel():
        _add_errors(tail, matrix, stacked.new_empty(0), stacked.new_empty(0), sums, norms)
    return _with_target(sums, norms).to(accumulator)


def _add_errors(
    batch: Sequence[Tensor], matrix: Tensor, stacked: Tensor, errors: Tensor, sums: Tensor, norms: Tensor
) -> None:
    """Adds what rows [n, length] of the terms and the target contribute; ``stacked`` and ``errors`` are scratch."""
    torch.stack([tensor.to(matrix.dtype) for tensor in batch], dim=1, out=stacked)
    torch.bmm(matrix.expand(len(stacked), -1, -1), stacked, out=errors)
    sums[:, 0] += errors.abs_().sum(2).sum(0, dtype=torch.float64)
    sums[:, 1] += errors.square_().sum(2).sum(0, dtype=torch.float64)
    goal = stacked[:, -1]
    norms[0] += goal.abs().sum(1).sum(dtype=torch.float64)
    norms[1] += goal.square().sum(1).sum(dtype=torch.float64)


def _with_target(errors: Tensor, norms: Tensor) -> Tensor:
    """[sets, 2] and the [2] that all sets share, as [sets, 4]."""
    return torch.cat((errors, norms.expand(len(errors), 2)), dim=1)


def combination_minimum_bytes(target: Tensor, terms: Sequence[Tensor], coefficients: object = None) -> int:
    """Bytes that must move: target and terms once in, (terms + 1) S."""
    return nbytes((target, *terms))


def combination_launch_bytes(target: Tensor, coefficients: Sequence[Sequence[float]]) -> int:
    """Bytes the Triton launches read: each reads its target and every distinct term of its sets once.

    With ten spans on one anchor that is 12 S for ten sets, against 40 S one set at a time.
    """
    return sum(launch.passes for launch in plan_error_launches(coefficients)) * nbytes((target,))
