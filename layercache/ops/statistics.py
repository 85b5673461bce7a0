"""Statistics of tensors against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from layercache.kernels import moments
from layercache.kernels import statistics as kernels
from layercache.ops import native
from layercache.ops.checks import (
    check_batches,
    check_kind,
    check_layout,
    check_like,
    check_list,
    check_no_grad,
    check_streams,
    check_tensor,
    describe,
    fail,
    host_coefficients,
)
from layercache.ops.dispatch import Kernels, new_statistics, register, through_registry

MAX_ERROR_TERMS = 24  # non-zero coefficients in one set of combination_error

CoefficientSets = Any  # host numbers [sets, terms]: nested sequences, a NumPy array or a CPU tensor


def pair_statistics(a: Sequence[Tensor], b: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    """``{sum|a-b|, sum|a|, sum|b|, sum (a-b)^2, sum a^2, sum b^2, sum a*b, max|a-b|}`` of every pair, in one pass.

    Args:
        a, b: tensors [batch, rows, channels], pair by pair of one shape, all of one dtype; last dim contiguous, the
            others may be strided; empty ones give zeros. Channel segments are pairs of slices ``a[..., lo:hi]``.
        per_sample: statistics of each entry of the first dim, in rows pair by pair; the pairs share that dim.

    Returns:
        fp32 [pairs, 8], per sample [pairs * batch, 8], the same bits on every call. NaN anywhere gives NaN, also in
        the maximum.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: 2S.
    """
    given = a, b, per_sample
    found = PAIR_KERNELS.again(given)
    return PAIR_KERNELS.first(given) if found is NotImplemented else found


def _check_pairs(a: Sequence[Tensor], b: Sequence[Tensor], per_sample: bool) -> tuple[Any, ...]:
    check_streams("pair_statistics", "a", a)
    check_like("pair_statistics", "b", b, "a", a, a[0].dtype)
    check_no_grad("pair_statistics", [*a, *b])
    if per_sample:
        check_batches("pair_statistics", "a", a)
    return a, b, per_sample


def combination_error(target: Tensor, terms: Sequence[Tensor], coefficients: CoefficientSets) -> Tensor:
    """How far linear combinations of ``terms`` are from ``target``, for many coefficient sets at once.

    Args:
        target: t, contiguous, any shape.
        terms: p_k, contiguous, of t's shape and dtype, and finite.
        coefficients: c, host numbers [sets, terms]; at most 24 of a set are not zero. Sets that follow one another,
            begin with the same term and have at most one more are evaluated together, ten to a launch.

    Returns:
        fp32 [sets, 4], the same bits on every call:
        ``{sum|sum_k c_k p_k - t|, sum (sum_k c_k p_k - t)^2, sum|t|, sum t^2}``.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: (terms + 1) S at least; ten sets on one common term read 12 S.
    """
    rows = _check_errors(target, terms, coefficients)[2]
    if through_registry([target, *terms]):  # there are too many numbers to go through all arguments
        return COMBINATION_ERROR(target, terms, [c for row in rows for c in row])
    return ERROR_KERNELS(target, terms, rows)


def _check_errors(target: Tensor, terms: Sequence[Tensor], coefficients: CoefficientSets) -> tuple[Any, ...]:
    op = "combination_error"
    check_kind(op, "target", target)
    check_layout(op, "target", target, contiguous=True)
    check_list(op, "terms", terms, 1)
    for k, term in enumerate(terms):
        check_tensor(op, "terms", k, term, "target", target, target.dtype, contiguous=True)
    check_no_grad(op, [target, *terms])
    return target, terms, _coefficient_rows(coefficients, len(terms))


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """Gram matrix ``G_ij = sum x_i * x_j`` of tensors, in one pass.

    Args:
        tensors: x_i, one or more, contiguous, of one shape and dtype; may be empty.

    Returns:
        fp32 [n, n], symmetric, the same bits on every call.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Fitted forecasts. Bytes: n S; more than eight tensors are read several times on the GPU.
    """
    found = GRAM_KERNELS.again((tensors,))
    return GRAM_KERNELS.first((tensors,)) if found is NotImplemented else found


def _check_gram(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    op = "gram"
    check_list(op, "tensors", tensors, 1)
    check_kind(op, "tensors[0]", tensors[0])
    for k, tensor in enumerate(tensors):
        check_tensor(op, "tensors", k, tensor, "tensors[0]", tensors[0], tensors[0].dtype, contiguous=True)
    check_no_grad(op, tensors)
    return (tensors,)


def align(x: Tensor, y: Tensor, probes: Sequence[Tensor], residuals: Sequence[Tensor]) -> Tensor:
    """``x + r_b + gamma * (r_a - r_b)``, ``gamma = clip(sum|y - x - p_b| / sum|p_a - p_b|, 1, 1.5)``.

    The coefficient stays on the device. It is 1 where the ratio is not a number.

    Args:
        x: input of the blocks, contiguous.
        y: output of the probe blocks for x.
        probes: p_a and p_b, residuals of the probe blocks at the newest and the second newest computed step.
        residuals: r_a and r_b, residuals of all blocks at those steps. All of x's shape and dtype, contiguous.

    Returns:
        A new tensor like x.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, DiCache. Bytes: 8 S.
    """
    given = x, y, probes, residuals
    found = ALIGN_KERNELS.again(given)
    return ALIGN_KERNELS.first(given) if found is NotImplemented else found


def _check_align(x: Tensor, y: Tensor, probes: Sequence[Tensor], residuals: Sequence[Tensor]) -> tuple[Any, ...]:
    op = "align"
    check_kind(op, "x", x)
    check_layout(op, "x", x, contiguous=True)
    for name, tensors, count in (("y", [y], 1), ("probes", probes, 2), ("residuals", residuals, 2)):
        check_list(op, name, tensors, count, count)
        for k, tensor in enumerate(tensors):
            check_tensor(op, name, k, tensor, "x", x, x.dtype, contiguous=True)
    check_no_grad(op, [x, y, *probes, *residuals])
    return x, y, probes, residuals


def _coefficient_rows(coefficients: CoefficientSets, terms: int) -> list[list[float]]:
    """Coefficient sets as lists of floats."""
    op = "combination_error"
    if isinstance(coefficients, Tensor) and coefficients.device.type != "cpu":
        fail(op, "coefficients", f"on {coefficients.device}", "numbers on the host; reading them would wait")
    sets = coefficients.tolist() if hasattr(coefficients, "tolist") else coefficients
    if not isinstance(sets, (list, tuple)) or not sets:
        fail(op, "coefficients", describe(sets), f"sets of {terms} numbers, at least one set")
    rows = [host_coefficients(op, f"coefficients[{s}]", row, terms) for s, row in enumerate(sets)]
    for s, row in enumerate(rows):
        used = sum(c != 0 for c in row)
        if used > MAX_ERROR_TERMS:
            fail(op, f"coefficients[{s}]", f"{used} numbers that are not zero", f"at most {MAX_ERROR_TERMS}")
    return rows


def _take_errors(target: Tensor, terms: list[Tensor], coefficients: list[float]) -> tuple[Any, ...]:
    """From the flat coefficients a schema can hold."""
    q = max(len(terms), 1)
    return target, terms, [coefficients[k : k + q] for k in range(0, len(coefficients), q)]


PAIR_KERNELS = Kernels(
    _check_pairs,
    kernels.pair_statistics_triton,
    kernels.pair_statistics_reference,
    native.if_available(native.pair_statistics),
)
register(
    "pair_statistics(Tensor[] a, Tensor[] b, bool per_sample) -> Tensor",
    PAIR_KERNELS,
    lambda a, b, per_sample: new_statistics(
        a[0], len(a) * (a[0].shape[0] if per_sample else 1), kernels.PAIR_STATISTICS
    ),
)
ERROR_KERNELS = Kernels(
    _check_errors,
    kernels.combination_error_triton,
    kernels.combination_error_reference,
    native.if_available(native.combination_error),
)
COMBINATION_ERROR: Any = register(
    "combination_error(Tensor target, Tensor[] terms, float[] coefficients) -> Tensor",
    ERROR_KERNELS,
    lambda target, terms, rows: new_statistics(target, len(rows), kernels.ERROR_STATISTICS),
    _take_errors,
)
GRAM_KERNELS = Kernels(_check_gram, moments.gram_triton, moments.gram_reference, native.if_available(native.gram))
register(
    "gram(Tensor[] tensors) -> Tensor",
    GRAM_KERNELS,
    lambda tensors: new_statistics(tensors[0], len(tensors), len(tensors)),
)
ALIGN_KERNELS = Kernels(
    _check_align,
    moments.align_triton,
    moments.align_reference,
    native.if_available(native.align),
    call=lambda x, y, probes, residuals: ALIGN(x, y, *probes, *residuals),
)
ALIGN: Any = register(
    "align(Tensor x, Tensor y, Tensor p_a, Tensor p_b, Tensor r_a, Tensor r_b) -> Tensor",
    ALIGN_KERNELS,
    lambda x, *others: x.new_empty(x.shape),
    lambda x, y, p_a, p_b, r_a, r_b: (x, y, [p_a, p_b], [r_a, r_b]),
)
