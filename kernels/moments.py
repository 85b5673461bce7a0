"""Sums over many tensors at once: Gram matrices, and norms of linear combinations that are never stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .combine import Matrix, linear_combination_reference, linear_combination_triton
from .deferred import jit
from .launching import Launch, Planned, new
from .tiles import (
    GROUPS,
    MAX_PROGRAMS,
    OPTIONS,
    SLOW_GROUPS,
    accumulator_dtype,
    encoded,
    lanes,
    nbytes,
    new_partials,
    plan_fold,
    program_count,
    store_sums,
    vector_width,
)

if TYPE_CHECKING:
    import triton.language as tl

# Tensors of one launch: eight need half the usual tile to stay in registers, with their 36 products.
MAX_TENSORS = 8
MAX_GAMMA = 1.5
# Elements the reference holds in fp64 at a time.
_CHUNK = 65536


@jit()
def _gram_kernel(
    pointers,
    partials_ptr,
    sizes,
    TENSORS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Partial sums of ``x_i * x_j``, each kept for (i, j) and (j, i)."""
    pid = tl.program_id(0).to(tl.int64)
    groups, programs = sizes[0] >> 2, sizes[1] >> 2
    lane = tl.arange(0, VEC)[None, :]
    sums = (tl.zeros([R], tl.float32),) * (TENSORS * (TENSORS + 1) // 2)
    for start in range(pid * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        off = group[:, None] * VEC + lane
        values = ()
        for i in tl.static_range(TENSORS):
            values = values + lanes(tl.load(pointers[i] + off, mask=live, other=0.0).to(tl.float32), VEC)
        updated = ()
        for i in tl.static_range(TENSORS):
            for j in tl.static_range(i, TENSORS):
                total = sums[i * TENSORS - i * (i - 1) // 2 + j - i]
                for k in tl.static_range(VEC):
                    total = tl.fma(values[i * VEC + k], values[j * VEC + k], total)
                updated = updated + (total,)
        sums = updated
    whole = ()
    for i in tl.static_range(TENSORS):
        for j in tl.static_range(TENSORS):
            if i <= j:
                whole = whole + (sums[i * TENSORS - i * (i - 1) // 2 + j - i],)
            else:
                whole = whole + (sums[j * TENSORS - j * (j - 1) // 2 + i - j],)
    store_sums(partials_ptr + pid, whole, TENSORS * TENSORS, MAX_PROGRAMS)


@jit()
def _linear_sums_kernel(
    pointers,
    coefficients,
    partials_ptr,
    sizes,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    USED: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Partial sums of ``|y_m|`` and ``y_m^2``; bit ``m * INPUTS + k`` of ``USED``: output m has a term in input k."""
    pid = tl.program_id(0).to(tl.int64)
    groups, programs = sizes[0] >> 2, sizes[1] >> 2
    lane = tl.arange(0, VEC)[None, :]
    sums = (tl.zeros([R], tl.float32),) * (2 * OUTPUTS)
    for start in range(pid * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        off = group[:, None] * VEC + lane
        values = ()
        for k in tl.static_range(INPUTS):
            values = values + lanes(tl.load(pointers[k] + off, mask=live, other=0.0).to(tl.float32), VEC)
        for m in tl.static_range(OUTPUTS):
            norm, square = sums[2 * m], sums[2 * m + 1]
            for at in tl.static_range(VEC):
                y = tl.zeros([R], tl.float32)
                for k in tl.static_range(INPUTS):
                    if (USED >> (m * INPUTS + k)) & 1:
                        y = tl.fma(values[k * VEC + at], coefficients[m * INPUTS + k], y)
                norm += tl.abs(y)
                square = tl.fma(y, y, square)
            sums = sums[: 2 * m] + (norm, square) + sums[2 * m + 2 :]
    store_sums(partials_ptr + pid, sums, 2 * OUTPUTS, MAX_PROGRAMS)


@jit()
def _gamma_kernel(sums_ptr, coefficients_ptr, MAX_GAMMA: tl.constexpr):
    """``(1 - gamma, gamma)`` with ``gamma = clip(sums[0] / sums[2], 1, MAX_GAMMA)``, 1 where that is not a number."""
    numerator, denominator = tl.load(sums_ptr), tl.load(sums_ptr + 2)
    ratio = tl.div_rn(numerator, tl.where(denominator > 0, denominator, 1.0))
    gamma = tl.where((denominator > 0) & (ratio > 1), tl.where(ratio < MAX_GAMMA, ratio, MAX_GAMMA), 1.0)
    tl.store(coefficients_ptr, 1.0 - gamma)
    tl.store(coefficients_ptr + 1, gamma)


def _shape(tensors: Sequence[Tensor], groups: int | None) -> tuple[int, int, int, int]:
    """Elements per group, groups per tile, groups, programs."""
    width = vector_width((), tensors)
    tile = groups or (GROUPS if width > 1 else SLOW_GROUPS // 2)
    count = tensors[0].numel() // width
    return width, tile, count, program_count(count, tile)


@Planned
def gram_triton(tensors: Sequence[Tensor], groups: int | None = None) -> Callable[..., Tensor]:
    """`gram_reference` in one launch for up to eight tensors, beyond that one for every two blocks of four.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    count, step = len(tensors), MAX_TENSORS // 2
    if not tensors[0].numel():
        return lambda tensors: torch.zeros((count, count), dtype=torch.float32, device=tensors[0].device)
    if count <= MAX_TENSORS:
        return _plan_gram(tensors, groups)
    blocks = [slice(first, min(first + step, count)) for first in range(0, count, step)]
    pairs = [(first, second) for row, first in enumerate(blocks) for second in blocks[row + 1 :]]
    parts = [(*pair, _plan_gram([t for block in pair for t in tensors[block]], groups)) for pair in pairs]

    def run(tensors: Sequence[Tensor]) -> Tensor:
        out = new((count, count), torch.float32, tensors[0].device)
        for first, second, part in parts:
            both = part([*tensors[first], *tensors[second]])
            out[first, first], out[first, second] = both[:step, :step], both[:step, step:]
            out[second, first], out[second, second] = both[step:, :step], both[step:, step:]
        return out

    return run


def _plan_gram(tensors: Sequence[Tensor], groups: int | None) -> Callable[[Sequence[Tensor]], Tensor]:
    width, tile, count, programs = _shape(tensors, groups)
    number, sizes = len(tensors), encoded((count, programs))
    launch = Launch(_gram_kernel, (programs,), TENSORS=number, VEC=width, R=tile, MAX_PROGRAMS=MAX_PROGRAMS, **OPTIONS)
    fold = plan_fold([programs], number, samples=number)

    def run(tensors: Sequence[Tensor]) -> Tensor:
        partials = new_partials(number * number, tensors[0].device)
        launch(tuple(tensors), partials, sizes)
        return fold(partials)

    return run


def plan_linear_sums(
    tensors: Sequence[Tensor], matrix: Matrix, groups: int | None = None
) -> Callable[[Sequence[Tensor]], Tensor]:
    """`linear_sums_reference` in one launch and a second tiny one.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    outputs = len(matrix)
    if not tensors[0].numel():
        return lambda tensors: torch.zeros((outputs, 2), dtype=torch.float32, device=tensors[0].device)
    width, tile, count, programs = _shape(tensors, groups)
    flat = [c for row in matrix for c in row]
    values, sizes = tuple(0 if c is None else float(c) for c in flat), encoded((count, programs))
    launch = Launch(
        _linear_sums_kernel,
        (programs,),
        INPUTS=len(tensors),
        OUTPUTS=outputs,
        USED=sum((c is not None) << bit for bit, c in enumerate(flat)),
        VEC=width,
        R=tile,
        MAX_PROGRAMS=MAX_PROGRAMS,
        **OPTIONS,
    )
    fold = plan_fold([programs], 2, samples=outputs)

    def run(tensors: Sequence[Tensor]) -> Tensor:
        partials = new_partials(2 * outputs, tensors[0].device)
        launch(tuple(tensors), values, partials, sizes)
        return fold(partials)

    return run


ALIGNMENT: Matrix = [[1.0, -1.0, -1.0, None], [None, None, -1.0, 1.0]]


@Planned
def align_triton(
    x: Tensor, y: Tensor, probes: Sequence[Tensor], residuals: Sequence[Tensor], groups: int | None = None
) -> Callable[..., Tensor]:
    """`align_reference` in two launches over full tensors and two tiny ones."""
    sums = plan_linear_sums([y, x, probes[1], probes[0]], ALIGNMENT, groups)
    gamma = Launch(_gamma_kernel, (1,), MAX_GAMMA=MAX_GAMMA, **OPTIONS)
    model = new((2,), torch.float32, torch.device("meta"))
    combine = linear_combination_triton.plan([x], [[residuals[1], residuals[0]]], model, groups=groups)

    def run(x: Tensor, y: Tensor, probes: Sequence[Tensor], residuals: Sequence[Tensor]) -> Tensor:
        coefficients = new((2,), torch.float32, x.device)
        gamma(sums([y, x, probes[1], probes[0]]), coefficients)
        return combine([x], [[residuals[1], residuals[0]]], coefficients)[0]

    return run


def gram_reference(tensors: Sequence[Tensor]) -> Tensor:
    """``G_ij = sum x_i * x_j``, added up in fp64.

    Args:
        tensors: x_i, contiguous, of one shape and dtype; may be empty.

    Returns:
        fp32 [n, n] (fp64 for fp64 input), symmetric.

    Source: docs/methods.md, Fitted forecasts. Bytes: every tensor once in, n S (the GPU reads more for more
    than eight tensors).
    """
    flat = [t.reshape(-1) for t in tensors]
    total = torch.zeros((len(flat), len(flat)), dtype=torch.float64, device=tensors[0].device)
    for first in range(0, flat[0].numel(), _CHUNK):
        rows = torch.stack([t[first : first + _CHUNK].double() for t in flat])
        total += rows @ rows.T
    return total.to(accumulator_dtype(tensors[0].dtype))


def linear_sums_reference(tensors: Sequence[Tensor], matrix: Matrix) -> Tensor:
    """``{sum|y_m|, sum y_m^2}`` of ``y_m = sum_k M_mk x_k``, none of which is stored.

    Args:
        tensors: x_k, contiguous, of one shape and dtype.
        matrix: M [outputs, inputs], host numbers; None where an input is not used.

    Returns:
        fp32 [outputs, 2] (fp64 for fp64 input).

    Source: docs/methods.md, Formulas of the ops. Bytes: every tensor once in.
    """
    flat = [t.reshape(-1) for t in tensors]
    sums = torch.zeros((len(matrix), 2), dtype=torch.float64, device=tensors[0].device)
    for first in range(0, flat[0].numel(), _CHUNK):
        values = [t[first : first + _CHUNK].double() for t in flat]
        for m, row in enumerate(matrix):
            y = torch.zeros_like(values[0])
            for x, c in zip(values, row, strict=True):
                if c is not None:
                    y += c * x
            sums[m, 0] += y.abs().sum()
            sums[m, 1] += y.square().sum()
    return sums.to(accumulator_dtype(tensors[0].dtype))


def align_reference(x: Tensor, y: Tensor, probes: Sequence[Tensor], residuals: Sequence[Tensor]) -> Tensor:
    """``x + r_b + gamma * (r_a - r_b)`` with ``gamma = clip(sum|y - x - p_b| / sum|p_a - p_b|, 1, 1.5)``.

    Computed as ``x + (1 - gamma) * r_b + gamma * r_a``; gamma is 1 where the ratio is not a number.

    Args:
        x: input of the blocks, contiguous.
        y: output of the probe blocks for x, like x.
        probes: p_a and p_b, residuals of the probe blocks at the newest and the second newest computed step.
        residuals: r_a and r_b, residuals of all blocks at those steps.

    Source: docs/methods.md, DiCache. Bytes: 8 S.
    """
    sums = linear_sums_reference([y, x, probes[1], probes[0]], ALIGNMENT)
    ratio = sums[0, 0] / sums[1, 0]
    gamma = torch.where((sums[1, 0] > 0) & (ratio > 1), ratio.clamp(max=MAX_GAMMA), torch.ones_like(ratio))
    coefficients = torch.stack([1 - gamma, gamma])
    return linear_combination_reference([x], [[residuals[1], residuals[0]]], coefficients)[0]


def gram_minimum_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that must move: every tensor once in."""
    return nbytes(tensors)


def align_minimum_bytes(x: Tensor, y: Tensor, probes: Sequence[Tensor], residuals: Sequence[Tensor]) -> int:
    """Bytes that must move: x twice, because the coefficient depends on all of it; the others once; the result out."""
    return nbytes((x, x, y, *probes, *residuals, x))
