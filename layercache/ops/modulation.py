"""Ops on whole rows: LayerNorm with modulation, guidance, and what dynamic methods decide by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.kernels import decisions as decision_kernels
from layercache.kernels import guidance as guidance_kernels
from layercache.kernels import modulate as kernels
from layercache.kernels.combine import MAX_TERMS
from layercache.kernels.launching import taking
from layercache.kernels.modulate import Modulation
from layercache.kernels.rows import MAX_CHANNELS
from layercache.ops import native
from layercache.ops.checks import (
    check_dense,
    check_kind,
    check_layout,
    check_list,
    check_no_grad,
    check_scales,
    check_tensor,
    check_written,
    fail,
    host_coefficients,
    layout,
)
from layercache.ops.combinations import check_device_coefficients, host_or_device
from layercache.ops.dispatch import Kernels, new_statistics, register


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
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
    """``z = LayerNorm(y) * (1 + scale) + shift`` of ``y = x + sum_k c_k r_k``, in one launch (two with ``previous``).

    The modulated input of a block, as TeaCache and SpectralCache compare it between steps, or what follows a run of
    cached groups. In fp32, rounded once.

    Args:
        x: [batch, rows, channels], channels at most 16384; last dim contiguous, the others may be strided.
        scale, shift: [batch, 1, channels] or [batch, channels] in x's dtype; a batch of 1 serves all.
        residuals: r_k, contiguous, like x, up to 8.
        coefficients: c_k, finite host numbers, or fp32 [terms] on the same device.
        previous: the z of an earlier step, contiguous; then statistics are returned. It may be ``result``.
        segments: inner bounds of up to 4 channel ranges whose statistics are kept apart, rising.
        eps: of the LayerNorm, whose variance is that of the population.
        weight, bias: [channels] in x's dtype, of a LayerNorm that has them.
        result: written instead of a new tensor, contiguous, like x.
        stream: receives y, contiguous, like x.
        scales: when the residuals are codes of `capture_compact` (uint8): their scales, fp32, one number per row.

    Returns:
        z; and fp32 [ranges, 8], the statistics of `pair_statistics` of z as stored and ``previous``, or None.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: 2 S, with ``previous`` 3 S; every residual and ``stream`` one
    more.
    """
    given = x, scale, shift, residuals, coefficients, previous, segments, eps, weight, bias, result, stream, scales
    found = MODULATE_KERNELS.again(given)
    return MODULATE_KERNELS.first(given) if found is NotImplemented else found


@taking(Modulation)
def _check_modulate(a: Modulation) -> tuple[Any, ...]:
    op, x, coefficients = "modulate", a.x, a.coefficients
    _check_rows(op, "x", x)
    for name, vector in (("scale", a.scale), ("shift", a.shift)):
        _check_vector(op, name, vector, x)
    dense = {"previous": a.previous, "result": a.result, "stream": a.stream}
    for name, tensor in dense.items():
        if tensor is not None:
            check_tensor(op, name, 0, tensor, "x", x, x.dtype, contiguous=True)
    _check_residuals(x, a.residuals, a.scales)
    if isinstance(coefficients, Tensor):
        check_device_coefficients(op, coefficients, (len(a.residuals),), x.device)
    else:
        coefficients = host_coefficients(op, "coefficients", coefficients, len(a.residuals))
    _check_norm(x, a.segments, a.eps, {"weight": a.weight, "bias": a.bias})
    everything = (x, a.scale, a.shift, *a.residuals, *dense.values(), a.weight, a.bias)
    check_no_grad(op, [t for t in everything if t is not None])
    return *a[:4], coefficients, *a[5:]


@taking(Modulation)
def _check_modulate_memory(a: Modulation) -> None:
    read = {"x": [a.x], "residuals": a.residuals, "scale": [a.scale], "shift": [a.shift], "scales": a.scales or ()}
    read |= {"coefficients": [a.coefficients] if isinstance(a.coefficients, Tensor) else []}
    read |= {name: [own] for name, own in (("weight", a.weight), ("bias", a.bias)) if own is not None}
    if a.stream is not None:
        # `previous` may be where the result goes, but not the stream
        apart = [("previous", [a.previous])] if a.previous is not None and a.previous is not a.result else []
        beside = [("result", [a.result])] if a.result is not None else []
        check_written("modulate", "stream", [a.stream], "stream", [[]], [*read.items(), *beside, *apart])
    if a.result is not None:
        own = [[a.previous]] if a.previous is not None else [[]]
        check_written("modulate", "result", [a.result], "previous", own, list(read.items()))


def _check_residuals(x: Tensor, residuals: Sequence[Tensor], scales: Sequence[Tensor] | None) -> None:
    """Residuals of `modulate`, or their codes and scales."""
    check_list("modulate", "residuals", residuals, 0, MAX_TERMS)
    for k, residual in enumerate(residuals):
        dtype = x.dtype if scales is None else torch.uint8
        check_tensor("modulate", "residuals", k, residual, "x", x, dtype, contiguous=True)
    if scales is not None:
        check_list("modulate", "scales", scales, len(residuals), len(residuals))
        for k, own in enumerate(scales):
            check_scales("modulate", f"scales[{k}]", own, x)


def _check_norm(x: Tensor, segments: Sequence[int], eps: float, affine: dict[str, Tensor | None]) -> None:
    """The LayerNorm of `modulate`, and the channel ranges of its statistics."""
    width = x.shape[-1]
    for name, own in affine.items():
        if own is None:
            continue
        check_kind("modulate", name, own)
        if own.shape != x.shape[-1:] or own.dtype != x.dtype or own.device != x.device or not own.is_contiguous():
            found = f"{own.dtype} {layout(own)} on {own.device}"
            fail("modulate", name, found, f"{x.dtype} of shape ({width},) on {x.device}, contiguous")
    bounds = [0, *segments, width]
    if len(bounds) > kernels.MAX_SEGMENTS + 1 or any(lo >= hi for lo, hi in zip(bounds, bounds[1:], strict=False)):
        fail("modulate", "segments", list(segments), f"up to {kernels.MAX_SEGMENTS - 1} rising bounds within {width}")
    if not (eps > 0 and math.isfinite(eps)):
        fail("modulate", "eps", eps, "a positive number")


def combine_guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: bool = False) -> Tensor:
    """``v = uncond + scale * (cond - uncond)``; with ``rescale`` ``v * ||cond|| / ||v||`` of each row, in one launch.

    In fp32, rounded once; a row whose v is zero stays zero.

    Args:
        cond, uncond: [batch, rows, channels] or [rows, channels] of one dtype, channels at most 16384; last dim
            contiguous, the others may be strided; may be empty.
        scale: the guidance scale.
        rescale: keep the norm of the conditional prediction, as Qwen-Image's true CFG does.

    Returns:
        A new contiguous tensor in the dtype of ``cond``.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: 3 S.
    """
    given = cond, uncond, scale, rescale
    found = GUIDANCE_KERNELS.again(given)
    return GUIDANCE_KERNELS.first(given) if found is NotImplemented else found


def _check_guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: bool) -> tuple[Any, ...]:
    op = "combine_guidance"
    _check_rows(op, "cond", cond, dims=(2, 3))
    check_tensor(op, "uncond", 0, uncond, "cond", cond, cond.dtype)
    scale = host_coefficients(op, "scale", [scale], 1)[0]
    check_no_grad(op, [cond, uncond])
    return cond, uncond, scale, rescale


def row_statistics(a: Tensor, b: Tensor, per_sample: bool = False) -> Tensor:
    """Mean and standard deviation of ``||a|| / ||b||`` over rows, and mean of ``1 - cos(a, b)``.

    Args:
        a, b: [batch, rows, channels] or [rows, channels] of one dtype, channels at most 16384; last dim contiguous,
            the others may be strided; not empty.
        per_sample: over the rows of each entry of the first dim apart.

    Returns:
        fp32 [1 or batch, 3]. A row of zeros gives NaN or infinity.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, MagCache. Bytes: 2 S.
    """
    given = a, b, per_sample
    found = ROW_KERNELS.again(given)
    return ROW_KERNELS.first(given) if found is NotImplemented else found


def _check_row_pair(a: Tensor, b: Tensor, per_sample: bool) -> tuple[Any, ...]:
    op = "row_statistics"
    _check_rows(op, "a", a, dims=(3,) if per_sample else (2, 3))
    check_tensor(op, "b", 0, b, "a", a, a.dtype)
    if not a.numel():
        fail(op, "a", f"of shape {tuple(a.shape)}", "a tensor that is not empty")
    check_no_grad(op, [a, b])
    return a, b, per_sample


def decide(
    numerator: Tensor,
    denominator: Tensor,
    accumulated: Tensor,
    flag: Tensor,
    polynomial: Sequence[float],
    threshold: float,
) -> None:
    """``accumulated += p(numerator / denominator)``; ``flag = accumulated < threshold``, else accumulated becomes 0.

    Everything stays on the device. NaN never counts as a small change.

    Args:
        numerator, denominator: fp32 with one element each, such as entries of `pair_statistics`.
        accumulated: fp32 [1], updated.
        flag: int32 [1], written: 1 to reuse, 0 to compute.
        polynomial: 1 to 8 coefficients of p, highest power first.
        threshold: the bound.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, TeaCache.
    """
    given = numerator, denominator, accumulated, flag, polynomial, threshold
    if DECIDE_KERNELS.again(given) is NotImplemented:
        DECIDE_KERNELS.first(given)


def _check_decide(
    numerator: Tensor,
    denominator: Tensor,
    accumulated: Tensor,
    flag: Tensor,
    polynomial: Sequence[float],
    threshold: float,
) -> tuple[Any, ...]:
    op = "decide"
    numbers = {"numerator": numerator, "denominator": denominator, "accumulated": accumulated, "flag": flag}
    for name, tensor in numbers.items():
        dtype = torch.int32 if name == "flag" else torch.float32
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.numel() != 1:
            found = f"{tensor.dtype} {layout(tensor)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            fail(op, name, found, f"{dtype} with one element")
        if tensor.layout is not torch.strided:
            check_dense(op, name, tensor)
        if tensor.device != numerator.device:
            fail(op, name, f"on {tensor.device}", f"on {numerator.device} as numerator")
    polynomial = host_coefficients(op, "polynomial", polynomial, len(polynomial))
    if not 1 <= len(polynomial) <= 8:
        fail(op, "polynomial", f"{len(polynomial)} numbers", "1 to 8")
    threshold = host_coefficients(op, "threshold", [threshold], 1)[0]
    return numerator, denominator, accumulated, flag, polynomial, threshold


def _check_decide_memory(numerator: Tensor, denominator: Tensor, accumulated: Tensor, flag: Tensor, *how: Any) -> None:
    if accumulated.data_ptr() == flag.data_ptr():
        fail("decide", "flag", "in the same memory as accumulated", "memory of its own")


def _check_rows(op: str, name: str, tensor: Any, dims: tuple[int, ...] = (3,)) -> None:
    check_kind(op, name, tensor)
    if tensor.dim() not in dims:
        expected = "[batch, rows, channels]" if dims == (3,) else "[batch, rows, channels] or [rows, channels]"
        fail(op, name, f"of shape {tuple(tensor.shape)}", expected)
    if tensor.shape[-1] > MAX_CHANNELS:
        fail(op, name, f"{tensor.shape[-1]} channels wide", f"at most {MAX_CHANNELS}")
    check_layout(op, name, tensor, contiguous=False)


def _check_vector(op: str, name: str, vector: Any, x: Tensor) -> None:
    """A modulation vector, one for each entry of the batch or for all."""
    check_kind(op, name, vector)
    channels = x.shape[-1]
    allowed = {(batch, *middle, channels) for batch in (1, x.shape[0]) for middle in ((), (1,))}
    if tuple(vector.shape) not in allowed:
        expected = f"({x.shape[0]}, 1, {channels}) or ({x.shape[0]}, {channels})"
        fail(op, name, f"of shape {tuple(vector.shape)}", expected)
    if vector.dtype != x.dtype or vector.device != x.device:
        fail(op, name, f"{vector.dtype} on {vector.device}", f"{x.dtype} on {x.device} as x")
    if channels > 1 and vector.stride(-1) != 1:
        fail(op, name, layout(vector), "a tensor whose last dim is contiguous")


@taking(Modulation)
def _call_modulate(a: Modulation) -> tuple[Tensor, Tensor | None]:
    """modulate through torch.library, which may not return what it writes."""
    z = a.x.new_empty(a.x.shape) if a.result is None else a.result
    host, on_device = ([], a.coefficients) if isinstance(a.coefficients, Tensor) else (a.coefficients, None)
    norm = (list(a.segments), a.eps, a.weight, a.bias, a.scales or [])
    statistics = MODULATE(z, a.stream, a.x, a.scale, a.shift, a.residuals, host, on_device, a.previous, *norm)
    return z, None if a.previous is None else statistics


def _take_modulate(z: Tensor, stream: Tensor | None, *others: Any) -> tuple[Any, ...]:
    x, scale, shift, residuals, host, on_device, *norm, scales = others
    coefficients = host_or_device("modulate", host, on_device)
    return x, scale, shift, residuals, coefficients, *norm, z, stream, scales or None


@taking(Modulation)
def _fake_modulate(a: Modulation) -> Tensor:
    return new_statistics(a.x, 0 if a.previous is None else len(a.segments) + 1, kernels.PAIR_STATISTICS)


MODULATE_KERNELS = Kernels(
    _check_modulate,
    kernels.modulate_triton,
    kernels.modulate_reference,
    native.if_available(native.modulate),
    _check_modulate_memory,
    _call_modulate,
    plans_on_cpu=True,
)
MODULATE = register(
    "modulate(Tensor(a!) z, Tensor(b!)? stream, Tensor x, Tensor scale, Tensor shift, Tensor[] residuals, "
    "float[] coefficients, Tensor? device_coefficients, Tensor? previous, int[] segments, float eps, Tensor? weight, "
    "Tensor? bias, Tensor[] scales) -> Tensor",
    MODULATE_KERNELS,
    _fake_modulate,
    _take_modulate,
    lambda found, z, stream, x, *others: (
        new_statistics(x, 0, kernels.PAIR_STATISTICS) if found[1] is None else found[1]
    ),
)
GUIDANCE_KERNELS = Kernels(
    _check_guidance,
    guidance_kernels.guidance_triton,
    guidance_kernels.guidance_reference,
    native.if_available(native.guidance),
)
register(
    "combine_guidance(Tensor cond, Tensor uncond, float scale, bool rescale) -> Tensor",
    GUIDANCE_KERNELS,
    lambda cond, *others: cond.new_empty(cond.shape),
)
ROW_KERNELS = Kernels(
    _check_row_pair,
    decision_kernels.row_statistics_triton,
    decision_kernels.row_statistics_reference,
    native.if_available(native.row_statistics),
)
register(
    "row_statistics(Tensor a, Tensor b, bool per_sample) -> Tensor",
    ROW_KERNELS,
    lambda a, b, per_sample: new_statistics(a, a.shape[0] if per_sample else 1, 3),
)
DECIDE_KERNELS = Kernels(
    _check_decide,
    decision_kernels.decide_triton,
    decision_kernels.decide_reference,
    native.if_available(native.decide),
    _check_decide_memory,
)
register(
    "decide(Tensor numerator, Tensor denominator, Tensor(a!) accumulated, Tensor(b!) flag, float[] polynomial, "
    "float threshold) -> ()",
    DECIDE_KERNELS,
    lambda *arguments: None,
)
