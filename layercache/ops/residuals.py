"""Capturing residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.kernels import capture as kernels
from layercache.kernels import compact as compact_kernels
from layercache.kernels.launching import taking
from layercache.ops import native
from layercache.ops.checks import (
    MAX_STREAMS,
    check_batches,
    check_dense,
    check_like,
    check_list,
    check_no_grad,
    check_scales,
    check_streams,
    check_tensor,
    check_written,
    extent,
    fail,
)
from layercache.ops.dispatch import Kernels, new_statistics, register, through_registry


def capture(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None = None,
    previous: Sequence[Tensor] | None = None,
    statistics: bool = False,
    per_sample: bool = False,
) -> Tensor | None:
    """Writes ``residual_s = output_s - input_s`` for all streams, in one launch (two with statistics).

    Subtracted in fp32 and rounded once. ``flag`` becomes 1 if a stored residual holds NaN or infinity and is
    never cleared here.

    Args:
        outputs, inputs: 1 to 8 streams [batch, rows, channels] of one dtype; last dim contiguous, the others may be
            strided (slices of [text; image]); may be empty.
        residuals: written; contiguous, outputs' shapes, any floating dtype; share no memory with other tensors.
        flag: int32 [1] on the same device.
        previous: tensors like ``residuals``; each may be the residual of its own stream, which is read first.
        statistics: return statistics of residual and input although there is no ``previous``.
        per_sample: statistics of each entry of the first dim, in rows stream by stream; the streams share that dim.

    Returns:
        None; with ``previous`` fp32 [streams, 7] (per sample [streams * batch, 7]) of the residuals as stored, the
        same bits on every call: ``{sum|r|, sum r^2, sum|r-p|, sum (r-p)^2, sum|p|, sum p^2, sum r*p}``; with
        ``statistics`` alone fp32 [streams, 4]: ``{sum|r|, sum r^2, sum|in|, sum in^2}``.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: 3S, with ``previous`` 4S.
    """
    given = outputs, inputs, residuals, flag, previous, statistics, per_sample
    found = CAPTURE_KERNELS.again(given)
    return CAPTURE_KERNELS.first(given) if found is NotImplemented else found


@taking(kernels.Capture)
def _check_capture(a: kernels.Capture) -> kernels.Capture:
    check_streams("capture", "outputs", a.outputs, MAX_STREAMS)
    check_like("capture", "inputs", a.inputs, "outputs", a.outputs, a.outputs[0].dtype)
    check_like("capture", "residuals", a.residuals, "outputs", a.outputs, contiguous=True)
    if a.previous is not None:
        check_like("capture", "previous", a.previous, "residuals", a.residuals, a.residuals[0].dtype, contiguous=True)
    if a.flag is not None:
        _check_flag(a.flag, a.outputs[0].device)
    check_no_grad("capture", [*a.outputs, *a.inputs, *a.residuals, *(a.previous or ())])
    if a.per_sample:
        check_batches("capture", "outputs", a.outputs)
    return a


def store(
    outputs: list[Tensor],
    inputs: list[Tensor],
    residuals: list[Tensor],
    flag: Tensor | None,
    previous: list[Tensor] | None = None,
) -> Tensor | None:
    """`capture` without a look at its arguments, for residuals, older ones too, that were allocated to fit."""
    if not through_registry(outputs + inputs):  # either may still be on its way from another process
        run = CAPTURE_KERNELS.choose(outputs[0])
        if run != CAPTURE_KERNELS.launch:
            return run(outputs, inputs, residuals, flag, previous)
        by = outputs, inputs, residuals[0].dtype, flag is None, previous is None
        return CAPTURE_KERNELS.launch_fitting(by, outputs, inputs, residuals, flag, previous)
    if previous is None:
        return CAPTURE(outputs, inputs, residuals, flag)
    return CAPTURE_STATISTICS(outputs, inputs, residuals, flag, previous, False)


def capture_compact(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    flag: Tensor | None = None,
) -> None:
    """Writes ``output_s - input_s`` as fp8 e4m3 codes with one power of two as the scale of each row.

    The scale is the least power of two for which the row stays within 448; the error of a number is at most 2^-4 of
    it or 2^-10 of its row's scale, whichever is larger. `linear_combination` reads codes with ``scales=``.

    Args:
        outputs, inputs: 1 to 8 streams [batch, rows, channels] of one dtype (not float64), channels at most 16384;
            last dim contiguous, the others may be strided; may be empty.
        codes: uint8, contiguous, of outputs' shapes; written.
        scales: fp32, contiguous, one number per row, such as [batch, rows]; written.
        flag: int32 [1] on the same device; becomes 1 if a difference is NaN or infinite.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: ours. Bytes: 2.5 S for 16-bit streams, against 3 S of `capture`; memory is halved.
    """
    given = outputs, inputs, codes, scales, flag
    if COMPACT_KERNELS.again(given) is NotImplemented:
        COMPACT_KERNELS.first(given)


@taking(compact_kernels.CompactCapture)
def _check_compact(a: compact_kernels.CompactCapture) -> compact_kernels.CompactCapture:
    op, most, streams = "capture_compact", compact_kernels.MAX_CHANNELS, len(a.outputs)
    check_streams(op, "outputs", a.outputs, MAX_STREAMS)
    check_like(op, "inputs", a.inputs, "outputs", a.outputs, a.outputs[0].dtype)
    if a.outputs[0].dtype == torch.float64:
        fail(op, "outputs[0]", "float64", "float32 or a narrower dtype")
    check_list(op, "codes", a.codes, streams, streams)
    check_list(op, "scales", a.scales, streams, streams)
    for s, output in enumerate(a.outputs):
        if not output.dim():
            fail(op, f"outputs[{s}]", "a single number", "rows of channels")
        if output.shape[-1] > most:
            fail(op, f"outputs[{s}]", f"{output.shape[-1]} channels wide", f"at most {most}")
        check_tensor(op, "codes", s, a.codes[s], "outputs", output, torch.uint8, contiguous=True)
        check_scales(op, f"scales[{s}]", a.scales[s], output)
    if a.flag is not None:
        _check_flag(a.flag, a.outputs[0].device, op)
    check_no_grad(op, [*a.outputs, *a.inputs])
    return a


@taking(compact_kernels.CompactCapture)
def _check_compact_memory(a: compact_kernels.CompactCapture) -> None:
    op, own = "capture_compact", [()] * len(a.codes)
    others = [("inputs", a.inputs), ("outputs", a.outputs), ("flag", [] if a.flag is None else [a.flag])]
    check_written(op, "codes", a.codes, "codes", own, [*others, ("scales", a.scales)])
    check_written(op, "scales", a.scales, "scales", own, others)


def _check_flag(flag: Any, device: torch.device, op: str = "capture") -> None:
    if not isinstance(flag, Tensor):
        fail(op, "flag", f"a {type(flag).__name__}", "an int32 tensor of one element, or None")
    check_dense(op, "flag", flag)
    if flag.dtype != torch.int32 or flag.numel() != 1:
        fail(op, "flag", f"{flag.dtype} of shape {tuple(flag.shape)}", "an int32 tensor of one element")
    if flag.device != device:
        fail(op, "flag", f"on {flag.device}", f"on {device} as outputs[0]")


@taking(kernels.Capture)
def _check_capture_memory(a: kernels.Capture) -> None:
    """Residuals are written, so they may share memory with nothing but their own previous."""
    written = [extent(r) for r in a.residuals]
    flags = () if a.flag is None else (a.flag,)
    groups = {"outputs": a.outputs, "inputs": a.inputs, "residuals": a.residuals, "previous": a.previous, "flag": flags}
    for name, tensors in groups.items():
        extents = written if name == "residuals" else [extent(t) for t in tensors or ()]
        for s, (first, last) in enumerate(written):
            for k, (other_first, other_last) in enumerate(extents):
                if first < other_last and other_first < last:
                    allowed = k == s and (name == "residuals" or (name == "previous" and other_first == first))
                    if not allowed:
                        fail("capture", f"residuals[{s}]", f"in the same memory as {name}[{k}]", "memory of its own")


@taking(kernels.Capture)
def _call_capture(a: kernels.Capture) -> Tensor | None:
    """capture through torch.library, where it is two ops: one returns nothing."""
    if a.previous is None and not a.statistics:
        return CAPTURE(*a[:4])
    return CAPTURE_STATISTICS(*a[:4], list(a.previous or ()), a.per_sample)


@taking(kernels.Capture)
def _fake_statistics(a: kernels.Capture) -> Tensor:
    rows = len(a.outputs) * (a.outputs[0].shape[0] if a.per_sample else 1)
    return new_statistics(a.residuals[0], rows, kernels.statistics_count(a.previous, True))


CAPTURE_KERNELS = Kernels(
    _check_capture,
    kernels.capture_triton,
    kernels.capture_reference,
    native.if_available(native.capture),
    _check_capture_memory,
    _call_capture,
    plans_on_cpu=True,
)
CAPTURE = register(
    "capture(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] residuals, Tensor(b!)? flag) -> ()",
    CAPTURE_KERNELS,
    lambda *arguments: None,
    lambda *arguments: (*arguments, None, False, False),
)
CAPTURE_STATISTICS = register(
    "capture_statistics(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] residuals, Tensor(b!)? flag, "
    "Tensor[] previous, bool per_sample) -> Tensor",
    CAPTURE_KERNELS,
    _fake_statistics,
    lambda *arguments: (*arguments[:4], arguments[4] or None, True, arguments[5]),
)
COMPACT_KERNELS = Kernels(
    _check_compact,
    compact_kernels.capture_compact_triton,
    compact_kernels.capture_compact_reference,
    native.if_available(native.capture_compact),
    _check_compact_memory,
    plans_on_cpu=True,
)
register(
    "capture_compact(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor(c!)? flag) "
    "-> ()",
    COMPACT_KERNELS,
    lambda *arguments: None,
)
