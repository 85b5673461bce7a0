"""Compact storage of residuals: fp8 e4m3 codes with one power of two as the scale of each row.

Codes are made and read with integer arithmetic, so that every GPU, also one without fp8, the interpreter and the CPU
agree on every bit. The scale is the least power of two for which the row's largest number stays within 448.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .deferred import jit
from .launching import enqueue
from .tiles import OPTIONS, nbytes, on_device_of, power_of_two, row_strides, vector_width

if TYPE_CHECKING:
    import triton.language as tl

# Largest row of one program.
MAX_CHANNELS = 16384


@jit()
def e4m3_to_float(code):
    """The numbers of fp8 e4m3 codes (uint8), as fp32; of NaN codes 480."""
    bits = code.to(tl.int32)
    exponent = (bits >> 3) & 15
    normal = (((bits & 127) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    small = (bits & 7).to(tl.float32) * 0.001953125
    size = tl.where(exponent > 0, normal, small)
    return tl.where(bits > 127, -size, size)


@jit()
def float_to_e4m3(x):
    """fp8 e4m3 codes of fp32 numbers within 448, to nearest, ties to even; of NaN any code."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # at 16384 neighbouring fp32 numbers are as far apart as the smallest e4m3 numbers
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, tl.minimum(normal, 126))
    return tl.where(x < 0, code + 128, code).to(tl.uint8)


@jit(do_not_specialize=["rows", "batch_rows", "o_batch", "o_row", "i_batch", "i_row", "row_groups"])
def _capture_compact_kernel(
    out_ptr,
    in_ptr,
    code_ptr,
    scale_ptr,
    flag_ptr,
    row_groups,
    batch_rows,
    o_batch,
    o_row,
    i_batch,
    i_row,
    GROUPS: tl.constexpr,
    VEC: tl.constexpr,
):
    """One row per program; strides in groups."""
    row = tl.program_id(0).to(tl.int64)
    batch = (row.to(tl.int32) // batch_rows).to(tl.int64)
    group = tl.arange(0, GROUPS)
    live = (group < row_groups)[:, None]
    off = group[:, None] * VEC + tl.arange(0, VEC)[None, :]
    within = row - batch * batch_rows
    o = tl.load(out_ptr + (batch * o_batch + within * o_row) * VEC + off, mask=live, other=0.0).to(tl.float32)
    i = tl.load(in_ptr + (batch * i_batch + within * i_row) * VEC + off, mask=live, other=0.0).to(tl.float32)
    r = o - i
    size = tl.abs(r)
    peak = tl.max(tl.max(size, 1), 0)
    if flag_ptr is not None:
        bad = tl.sum(tl.sum(tl.where(size < float("inf"), 0.0, 1.0), 1), 0)
        tl.store(flag_ptr, 1, mask=bad > 0)
    # exponent of the peak, one more where its mantissa exceeds 1.75, less the 8 of 448
    field = tl.maximum(((peak.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
    inverse = ((254 - field) << 23).to(tl.float32, bitcast=True)
    tl.store(code_ptr + row * row_groups * VEC + off, float_to_e4m3(r * inverse), mask=live)
    tl.store(scale_ptr + row, (field << 23).to(tl.float32, bitcast=True))


def capture_compact_triton(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    flag: Tensor | None = None,
) -> None:
    """`capture_compact_reference` in one launch per stream."""
    for output, before, code, scale in zip(outputs, inputs, codes, scales, strict=True):
        if not output.numel():
            continue
        channels = output.shape[-1]
        width = vector_width((output, before), (code,))
        if channels % width:
            width = 1
        groups = channels // width
        rows = output.shape[-2] if output.dim() > 1 else 1
        strides = [step // width for t in (output, before) for step in row_strides(t)]
        with on_device_of(output):
            enqueue(
                _capture_compact_kernel,
                (scale.numel(),),
                output,
                before,
                code,
                scale,
                flag,
                groups,
                rows,
                *strides,
                GROUPS=power_of_two(groups),
                VEC=width,
                **{**OPTIONS, "num_warps": 4 if channels <= 4096 else 8},
            )


def capture_compact_reference(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    flag: Tensor | None = None,
) -> None:
    """Codes and scales of ``output_s - input_s``, subtracted in fp32 and rounded once, to e4m3.

    Args:
        outputs, inputs: streams [batch, rows, channels] or of fewer dims, last dim contiguous; may be empty.
        codes: uint8, contiguous, of outputs' shapes; written.
        scales: fp32, one number per row, contiguous; written.
        flag: int32 [1]; becomes 1 if a difference is NaN or infinite.

    The error of a decoded number is at most 2^-4 of it or 2^-10 of its row's scale, whichever is larger.

    Source: ours. Bytes: see `minimum_bytes`.
    """
    for output, before, code, scale in zip(outputs, inputs, codes, scales, strict=True):
        if not output.numel():
            continue
        r = output.float() - before.float()
        if flag is not None:
            flag.masked_fill_(~torch.isfinite(r).all(), 1)
        rows = r.reshape(-1, r.shape[-1])
        # NaN must not become the peak of its row on one device and not on another
        peak = torch.nan_to_num(rows.abs(), nan=0.0, posinf=torch.inf).amax(1)
        field = (((peak.view(torch.int32) + 0x1FFFFF) >> 23) - 8).clamp(min=1)
        scale.view(-1).copy_((field << 23).view(torch.float32))
        inverse = ((254 - field) << 23).view(torch.float32)
        scaled = (rows * inverse[:, None]).clamp(-448, 448)
        code.view(-1, r.shape[-1]).copy_(scaled.to(torch.float8_e4m3fn).view(torch.uint8))


def decode_reference(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """The numbers of codes and their rows' scales, fp32 of ``shape``."""
    numbers = codes.view(torch.float8_e4m3fn).float().view(-1, shape[-1]) if codes.numel() else codes.float()
    return (numbers * scales.view(-1, 1)).view(shape) if codes.numel() else numbers.view(shape)


def minimum_bytes(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    flag: Tensor | None = None,
) -> int:
    """Bytes that must move: outputs and inputs once in, codes and scales once out, 2.5 S for 16-bit streams."""
    return nbytes(outputs) + nbytes(inputs) + nbytes(codes) + nbytes(scales)
