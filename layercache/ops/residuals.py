"""Capturing residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.kernels import capture as kernels
from layercache.kernels import compact as compact_kernels
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
from layercache.ops.dispatch import Checked, Kernels, new_statistics, register, through_registry

CAPTURE_KERNELS = Kernels(
    kernels.capture_triton, kernels.capture_reference, native.if_available(native.capture), plans_on_cpu=True
)
COMPACT_KERNELS = Kernels(
    compact_kernels.capture_compact_triton,
    compact_kernels.capture_compact_reference,
    native.if_available(native.capture_compact),
    plans_on_cpu=True,
)


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

    Source: methods.md §15 P1. Bytes: 3S, with ``previous`` 4S.
    """
    found = CAPTURE_KERNELS.again(outputs, inputs, residuals, flag, previous, statistics, per_sample)
    if found is not NotImplemented:
        return found
    arguments = _check_capture(outputs, inputs, residuals, flag, previous, statistics, per_sample)
    if through_registry([*outputs, *inputs, *residuals, *(previous or ())]):
        if previous is None and not statistics:
            return CAPTURE(outputs, inputs, residuals, flag)
        return CAPTURE_STATISTICS(outputs, inputs, residuals, flag, list(previous or ()), per_sample)
    return _run_capture(*arguments)


def _check_capture(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None,
    previous: Sequence[Tensor] | None,
    statistics: bool,
    per_sample: bool,
) -> tuple[Any, ...]:
    check_streams("capture", "outputs", outputs, MAX_STREAMS)
    check_like("capture", "inputs", inputs, "outputs", outputs, outputs[0].dtype)
    check_like("capture", "residuals", residuals, "outputs", outputs, contiguous=True)
    if previous is not None:
        check_like("capture", "previous", previous, "residuals", residuals, residuals[0].dtype, contiguous=True)
    if flag is not None:
        _check_flag(flag, outputs[0].device)
    check_no_grad("capture", [*outputs, *inputs, *residuals, *(previous or ())])
    if per_sample:
        check_batches("capture", "outputs", outputs)
    return outputs, inputs, residuals, flag, previous, statistics, per_sample


def _run_capture(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None,
    previous: Sequence[Tensor] | None,
    *how: bool,
) -> Tensor | None:
    _check_aliases(outputs, inputs, residuals, flag, previous)
    return CAPTURE_KERNELS.run(outputs, inputs, residuals, flag, previous, *how)


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
    if COMPACT_KERNELS.again(outputs, inputs, codes, scales, flag) is not NotImplemented:
        return
    arguments = _check_compact(outputs, inputs, codes, scales, flag)
    if through_registry([*outputs, *inputs]):
        CAPTURE_COMPACT(*arguments)
    else:
        _run_compact(*arguments)


def _check_compact(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    flag: Tensor | None,
) -> tuple[Any, ...]:
    op = "capture_compact"
    check_streams(op, "outputs", outputs, MAX_STREAMS)
    check_like(op, "inputs", inputs, "outputs", outputs, outputs[0].dtype)
    if outputs[0].dtype == torch.float64:
        fail(op, "outputs[0]", "float64", "float32 or a narrower dtype")
    check_list(op, "codes", codes, len(outputs), len(outputs))
    check_list(op, "scales", scales, len(outputs), len(outputs))
    for s, output in enumerate(outputs):
        if not output.dim():
            fail(op, f"outputs[{s}]", "a single number", "rows of channels")
        if output.shape[-1] > compact_kernels.MAX_CHANNELS:
            fail(op, f"outputs[{s}]", f"{output.shape[-1]} channels wide", f"at most {compact_kernels.MAX_CHANNELS}")
        check_tensor(op, "codes", s, codes[s], "outputs", output, torch.uint8, contiguous=True)
        check_scales(op, f"scales[{s}]", scales[s], output)
    if flag is not None:
        _check_flag(flag, outputs[0].device, op)
    check_no_grad(op, [*outputs, *inputs])
    return outputs, inputs, codes, scales, flag


def _run_compact(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    flag: Tensor | None,
) -> None:
    op = "capture_compact"
    others = [("inputs", inputs), ("outputs", outputs), ("flag", [] if flag is None else [flag])]
    check_written(op, "codes", codes, "codes", [()] * len(codes), [*others, ("scales", scales)])
    check_written(op, "scales", scales, "scales", [()] * len(scales), others)
    COMPACT_KERNELS.run(outputs, inputs, codes, scales, flag)


def _check_flag(flag: Any, device: torch.device, op: str = "capture") -> None:
    if not isinstance(flag, Tensor):
        fail(op, "flag", f"a {type(flag).__name__}", "an int32 tensor of one element, or None")
    check_dense(op, "flag", flag)
    if flag.dtype != torch.int32 or flag.numel() != 1:
        fail(op, "flag", f"{flag.dtype} of shape {tuple(flag.shape)}", "an int32 tensor of one element")
    if flag.device != device:
        fail(op, "flag", f"on {flag.device}", f"on {device} as outputs[0]")


def _check_aliases(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None,
    previous: Sequence[Tensor] | None,
) -> None:
    """Residuals are written, so they may share memory with nothing but their own previous."""
    written = [extent(r) for r in residuals]
    flags = () if flag is None else (flag,)
    groups = {"outputs": outputs, "inputs": inputs, "residuals": residuals, "previous": previous, "flag": flags}
    for name, tensors in groups.items():
        extents = written if name == "residuals" else [extent(t) for t in tensors or ()]
        for s, (first, last) in enumerate(written):
            for k, (other_first, other_last) in enumerate(extents):
                if first < other_last and other_first < last:
                    allowed = k == s and (name == "residuals" or (name == "previous" and other_first == first))
                    if not allowed:
                        fail("capture", f"residuals[{s}]", f"in the same memory as {name}[{k}]", "memory of its own")


def _take_statistics(
    outputs: list[Tensor],
    inputs: list[Tensor],
    residuals: list[Tensor],
    flag: Tensor | None,
    previous: list[Tensor],
    per_sample: bool,
) -> tuple[Any, ...]:
    return outputs, inputs, residuals, flag, previous or None, True, per_sample


def _fake_capture_statistics(
    outputs: list[Tensor],
    inputs: list[Tensor],
    residuals: list[Tensor],
    flag: Tensor | None,
    previous: list[Tensor],
    per_sample: bool,
) -> Tensor:
    rows = len(outputs) * (outputs[0].shape[0] if per_sample else 1)
    return new_statistics(residuals[0], rows, kernels.statistics_count(previous or None, True))


CAPTURE = register(
    "capture(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] residuals, Tensor(b!)? flag) -> ()",
    Checked(CAPTURE_KERNELS, _check_capture, _run_capture, lambda *arguments: (*arguments, None, False, False)),
    lambda *arguments: None,
)
CAPTURE_STATISTICS = register(
    "capture_statistics(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] residuals, Tensor(b!)? flag, "
    "Tensor[] previous, bool per_sample) -> Tensor",
    Checked(CAPTURE_KERNELS, _check_capture, _run_capture, _take_statistics),
    _fake_capture_statistics,
)
CAPTURE_COMPACT = register(
    "capture_compact(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor(c!)? flag) "
    "-> ()",
    Checked(COMPACT_KERNELS, _check_compact, _run_compact),
    lambda *arguments: None,
)
