"""Linear combinations of stored residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.kernels import combine as kernels
from layercache.ops.checks import (
    MAX_STREAMS,
    check_kind,
    check_no_grad,
    check_streams,
    check_tensor,
    describe,
    fail,
    host_coefficients,
    layout,
)
from layercache.ops.dispatch import Kernels, register, through_registry

Coefficients = Sequence[float] | Tensor

_KERNELS = Kernels(kernels.linear_combination_triton, kernels.linear_combination_reference)


def linear_combination(
    bases: Sequence[Tensor], residuals: Sequence[Sequence[Tensor]], coefficients: Coefficients
) -> list[Tensor]:
    """``y_s = x_s + sum_k c_k r_sk`` for all streams, in one launch per two streams.

    Summed in fp32 in the order of k, every product rounded before it is added, the sum rounded once. One term with
    coefficient 1 is ``torch.add(x, r)`` bit by bit. A further term with coefficient 0 changes nothing, except that
    -0.0 becomes 0.0 and that NaN or infinity in the term gives NaN.

    Args:
        bases: x_s, 1 to 4 streams [batch, rows, channels] of one dtype; last dim contiguous, the others may be
            strided; may be empty.
        residuals: for every stream its r_sk, contiguous, of x_s's shape, all of one dtype; 1 to 8, as many for each.
        coefficients: c_k for all streams: finite host numbers, or an fp32 tensor [terms] on the same device, whose
            values a compiled graph does not depend on.

    Returns:
        New contiguous tensors in the dtype of the bases.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: methods.md §15 P2, P3. Bytes: (terms + 2) S.
    """
    op = "linear_combination"
    check_streams(op, "bases", bases, MAX_STREAMS)
    terms = _check_residual_lists(residuals, bases)
    everything = [*bases, *(r for stream in residuals for r in stream)]
    check_no_grad(op, everything)
    if isinstance(coefficients, Tensor):
        _check_device_coefficients(coefficients, terms, bases[0].device)
    else:
        coefficients = host_coefficients(op, "coefficients", coefficients, terms)
    if through_registry(everything):
        flat = everything[len(bases) :]
        if isinstance(coefficients, Tensor):
            return LINEAR_COMBINATION(bases, flat, [], coefficients)
        return LINEAR_COMBINATION(bases, flat, coefficients, None)
    return _KERNELS(bases, residuals, coefficients)


def _check_residual_lists(residuals: Any, bases: Sequence[Tensor]) -> int:
    """Residuals of linear_combination; the number of terms."""
    op = "linear_combination"
    if not isinstance(residuals, (list, tuple)) or len(residuals) != len(bases):
        fail(op, "residuals", describe(residuals), f"a list of {len(bases)}, one list of residuals per stream")
    dtype = None
    for s, stream in enumerate(residuals):
        if not isinstance(stream, (list, tuple)) or not 1 <= len(stream) <= kernels.MAX_TERMS:
            fail(op, f"residuals[{s}]", describe(stream), f"a list of at least 1 and at most {kernels.MAX_TERMS} terms")
        if len(stream) != len(residuals[0]):
            fail(op, f"residuals[{s}]", describe(stream), f"{len(residuals[0])} terms as residuals[0]")
        if dtype is None:
            check_kind(op, "residuals[0][0]", stream[0])
            dtype = stream[0].dtype
        for k, residual in enumerate(stream):
            check_tensor(op, f"residuals[{s}]", k, residual, f"bases[{s}]", bases[s], dtype, contiguous=True)
    if dtype != bases[0].dtype and torch.float64 in (dtype, bases[0].dtype):
        fail(op, "residuals[0][0]", dtype, f"float64 only with float64 bases, here {bases[0].dtype}")
    return len(residuals[0])


def _check_device_coefficients(coefficients: Tensor, terms: int, device: torch.device) -> None:
    op, name = "linear_combination", "coefficients"
    if coefficients.dtype != torch.float32 or coefficients.dim() != 1 or not coefficients.is_contiguous():
        fail(op, name, f"{coefficients.dtype} {layout(coefficients)}", "float32, of one dim and contiguous")
    if coefficients.shape[0] != terms:
        fail(op, name, f"{coefficients.shape[0]} numbers", f"{terms}, one per term")
    if coefficients.device != device:
        fail(op, name, f"on {coefficients.device}", f"on {device} as bases[0], or host numbers")


def _linear_combination(
    bases: list[Tensor], residuals: list[Tensor], host: list[float], on_device: Tensor | None
) -> list[Tensor]:
    """With the flat residuals a schema can hold."""
    q = len(residuals) // len(bases)
    streams = [residuals[k : k + q] for k in range(0, len(residuals), q)]
    return _KERNELS(bases, streams, host if on_device is None else on_device)


LINEAR_COMBINATION = register(
    "linear_combination(Tensor[] bases, Tensor[] residuals, float[] coefficients, Tensor? device_coefficients) "
    "-> Tensor[]",
    _linear_combination,
    lambda bases, residuals, coefficients, device_coefficients: [x.new_empty(x.shape) for x in bases],
)
