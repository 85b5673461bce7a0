"""Capturing residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.kernels import capture as kernels
from layercache.ops.checks import MAX_STREAMS, check_like, check_no_grad, check_streams, extent, fail
from layercache.ops.dispatch import Kernels, new_statistics, register, through_registry

_KERNELS = Kernels(kernels.capture_triton, kernels.capture_reference)


def capture(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None = None,
    previous: Sequence[Tensor] | None = None,
) -> Tensor | None:
    """Writes ``residual_s = output_s - input_s`` for all streams, in one launch per two streams.

    Subtracted in fp32 and rounded once. ``flag`` becomes 1 if a stored residual holds NaN or infinity and is
    never cleared here.

    Args:
        outputs, inputs: 1 to 4 streams [batch, rows, channels] of one dtype; last dim contiguous, the others may be
            strided (slices of [text; image]); may be empty.
        residuals: written; contiguous, outputs' shapes, any floating dtype; share no memory with other tensors.
        flag: int32 [1] on the same device.
        previous: tensors like ``residuals``; each may be the residual of its own stream, which is read first.

    Returns:
        None; with ``previous`` fp32 [streams, 7] of the residuals as stored, the same bits on every call:
        ``{sum|r|, sum r^2, sum|r-p|, sum (r-p)^2, sum|p|, sum p^2, sum r*p}``.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: methods.md §15 P1. Bytes: 3S, with ``previous`` 4S.
    """
    check_streams("capture", "outputs", outputs, MAX_STREAMS)
    check_like("capture", "inputs", inputs, "outputs", outputs, outputs[0].dtype)
    check_like("capture", "residuals", residuals, "outputs", outputs, contiguous=True)
    if previous is not None:
        check_like("capture", "previous", previous, "residuals", residuals, residuals[0].dtype, contiguous=True)
    if flag is not None:
        _check_flag(flag, outputs[0].device)
    everything = [*outputs, *inputs, *residuals, *(previous or ())]
    check_no_grad("capture", everything)
    if through_registry(everything):
        if previous is None:
            return CAPTURE(outputs, inputs, residuals, flag)
        return CAPTURE_STATISTICS(outputs, inputs, residuals, flag, previous)
    _check_aliases(outputs, inputs, residuals, previous)
    return _KERNELS(outputs, inputs, residuals, flag, previous)


def _check_flag(flag: Any, device: torch.device) -> None:
    if not isinstance(flag, Tensor):
        fail("capture", "flag", f"a {type(flag).__name__}", "an int32 tensor of one element, or None")
    if flag.dtype != torch.int32 or flag.numel() != 1:
        fail("capture", "flag", f"{flag.dtype} of shape {tuple(flag.shape)}", "an int32 tensor of one element")
    if flag.device != device:
        fail("capture", "flag", f"on {flag.device}", f"on {device} as outputs[0]")


def _check_aliases(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], residuals: Sequence[Tensor], previous: Sequence[Tensor] | None
) -> None:
    """Residuals are written, so they may share memory with nothing but their own previous."""
    written = [extent(r) for r in residuals]
    for name, tensors in (("outputs", outputs), ("inputs", inputs), ("residuals", residuals), ("previous", previous)):
        extents = written if name == "residuals" else [extent(t) for t in tensors or ()]
        for s, (first, last) in enumerate(written):
            for k, (other_first, other_last) in enumerate(extents):
                if first < other_last and other_first < last:
                    allowed = k == s and (name == "residuals" or (name == "previous" and other_first == first))
                    if not allowed:
                        fail("capture", f"residuals[{s}]", f"in the same memory as {name}[{k}]", "memory of its own")


def _fake_capture_statistics(
    outputs: list[Tensor], inputs: list[Tensor], residuals: list[Tensor], flag: Tensor | None, previous: list[Tensor]
) -> Tensor:
    return new_statistics(residuals[0], len(outputs), kernels.STATISTICS)


CAPTURE = register(
    "capture(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] residuals, Tensor(b!)? flag) -> ()",
    _KERNELS,
    lambda outputs, inputs, residuals, flag: None,
)
CAPTURE_STATISTICS = register(
    "capture_statistics(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] residuals, Tensor(b!)? flag, "
    "Tensor[] previous) -> Tensor",
    _KERNELS,
    _fake_capture_statistics,
)
