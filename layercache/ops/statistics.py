"""Statistics of tensors against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from layercache.kernels import statistics as kernels
from layercache.ops.checks import (
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

_PAIRS = Kernels(kernels.pair_statistics_triton, kernels.pair_statistics_reference)
_ERRORS = Kernels(kernels.combination_error_triton, kernels.combination_error_reference)


def pair_statistics(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """``{sum|a-b|, sum|a|, sum|b|, sum (a-b)^2, sum a^2, sum b^2, sum a*b, max|a-b|}`` of every pair, in one pass.

    Args:
        a, b: tensors [batch, rows, channels], pair by pair of one shape, all of one dtype; last dim contiguous, the
            others may be strided; empty ones give zeros.

    Returns:
        fp32 [pairs, 8], the same bits on every call. NaN anywhere gives NaN, also in the maximum.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: methods.md §15 P6. Bytes: 2S.
    """
    check_streams("pair_statistics", "a", a)
    check_like("pair_statistics", "b", b, "a", a, a[0].dtype)
    everything = [*a, *b]
    check_no_grad("pair_statistics", everything)
    if through_registry(everything):
        return PAIR_STATISTICS(a, b)
    return _PAIRS(a, b)


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

    Source: methods.md §15 P6b. Bytes: (terms + 1) S at least; ten sets on one common term read 12 S.
    """
    op = "combination_error"
    check_kind(op, "target", target)
    check_layout(op, "target", target, contiguous=True)
    check_list(op, "terms", terms, 1)
    for k, term in enumerate(terms):
        check_tensor(op, "terms", k, term, "target", target, target.dtype, contiguous=True)
    check_no_grad(op, [target, *terms])
    rows = _coefficient_rows(coefficients, len(terms))
    if through_registry([target, *terms]):
        return COMBINATION_ERROR(target, terms, [c for row in rows for c in row])
    return _ERRORS(target, terms, rows)


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


def _combination_error(target: Tensor, terms: list[Tensor], coefficients: list[float]) -> Tensor:
    """With the flat coefficients a schema can hold."""
    q = len(terms)
    return _ERRORS(target, terms, [coefficients[k : k + q] for k in range(0, len(coefficients), q)])


PAIR_STATISTICS = register(
    "pair_statistics(Tensor[] a, Tensor[] b) -> Tensor",
    _PAIRS,
    lambda a, b: new_statistics(a[0], len(a), kernels.PAIR_STATISTICS),
)
COMBINATION_ERROR = register(
    "combination_error(Tensor target, Tensor[] terms, float[] coefficients) -> Tensor",
    _combination_error,
    lambda target, terms, coefficients: new_statistics(
        target, len(coefficients) // len(terms), kernels.ERROR_STATISTICS
    ),
)
