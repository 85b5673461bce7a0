"""Compact storage of residuals: fp8 e4m3 codes with one power of two as the scale of each row.

Codes are made and read with integer arithmetic, so that every GPU, also one without fp8, the interpreter and the CPU
agree on every bit. The scale is the least power of two for which the row's largest number stays within 448.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .deferred import jit
from .launching import Launch, Planned, taking
from .rows import floats, load_chunk, row_offsets, share_out, store_chunk
from .tiles import nbytes

if TYPE_CHECKING:
    import triton.language as tl

# Largest row of one program.
MAX_CHANNELS = 16384


@jit()
def e4m3_to_float(code):
    """The numbers of fp8 e4m3 codes (uint8), as fp32; of NaN codes 480."""
    # sign and number where fp32 has them, with a copy of the sign between, which is masked; exponents there count from
    # 127, here from 7; what is subnormal here is so there too
    bits = ((code.to(tl.int32) << 24) >> 4) & -0x78100000
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@jit()
def float_to_e4m3(x, HARDWARE: tl.constexpr):
    """fp8 e4m3 codes of fp32 numbers within 448, to nearest, ties to even; of NaN any code."""
    if HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # at 16384 neighbouring fp32 numbers are as far apart as the smallest e4m3 numbers
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, tl.minimum(normal, 126))
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)


@jit(do_not_specialize_on_alignment=["flag_ptr"])
def _capture_compact_kernel(
    out_ptr,
    in_ptr,
    code_ptr,
    scale_ptr,
    flag_ptr,
    sizes,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    EXACT: tl.constexpr,
    VEC: tl.constexpr,
):
    rows, row_groups, batch_rows = sizes[0] >> 2, sizes[1] >> 2, sizes[2] >> 2
    flat = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    # a row beyond the last is the last once more, which is not stored
    row = tl.minimum(flat, rows - 1)
    o_own = row_offsets(row, batch_rows, sizes[3] >> 2, sizes[4] >> 2)
    i_own = row_offsets(row, batch_rows, sizes[5] >> 2, sizes[6] >> 2)
    own = row.to(tl.int64) * row_groups
    largest = tl.zeros([ROWS, GROUPS * VEC], tl.float32)
    bad, residuals = largest, ()
    for c in tl.static_range(CHUNKS):
        o = floats(load_chunk(out_ptr, o_own, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
        i = floats(load_chunk(in_ptr, i_own, row_groups, c, CHUNKS, GROUPS, VEC, EXACT))
        r = o - i
        largest = tl.maximum(largest, tl.abs(r))
        if flag_ptr is not None:
            # stays 0 as long as all are finite
            bad = tl.fma(r, 0.0, bad)
        residuals = residuals + (r,)
    if flag_ptr is not None:
        # every thread that finds one stores the same value, so no atomic is needed
        found = tl.sum(tl.reshape(bad, [ROWS, GROUPS, VEC]), 2)
        tl.store(flag_ptr + tl.zeros([ROWS, GROUPS], tl.int32), 1, mask=found != 0.0)
    # exponent of the peak, one more where its mantissa exceeds 1.75, less the 8 of 448
    field = tl.maximum(((tl.max(largest, 1)[:, None].to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
    inverse = ((254 - field) << 23).to(tl.float32, bitcast=True)
    for c in tl.static_range(CHUNKS):
        code = float_to_e4m3(residuals[c] * inverse, HARDWARE)
        store_chunk(code_ptr, own, code, flat < rows, row_groups, c, CHUNKS, GROUPS, VEC, EXACT)
    tl.store(scale_ptr + row, (field << 23).to(tl.float32, bitcast=True))


@functools.cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether the GPU turns fp32 into e4m3 itself, which gives the same codes."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


class CompactCapture(NamedTuple):
    """Arguments of a capture into codes.

    Attributes:
        outputs, inputs: streams [batch, rows, channels] or of fewer dims, last dim contiguous; may be empty.
        codes: uint8, contiguous, of outputs' shapes; written.
        scales: fp32, one number per row, contiguous; written.
        flag: int32 [1]; becomes 1 if a difference is NaN or infinite.
    """

    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]
    codes: Sequence[Tensor]
    scales: Sequence[Tensor]
    flag: Tensor | None = None


@Planned
@taking(CompactCapture)
def capture_compact_triton(a: CompactCapture) -> Callable[..., None]:
    """`capture_compact_reference` in one launch per stream."""
    parts = []
    for s, (output, before, code) in enumerate(zip(a.outputs, a.inputs, a.codes, strict=True)):
        if output.numel():
            shape = share_out([output, before], [code])
            sizes = shape.sizes(*shape.steps(output, before))
            hardware = converts_e4m3(output.device)
            launch = Launch(_capture_compact_kernel, (shape.tiles,), HARDWARE=hardware, **shape.constants)
            parts.append((s, sizes, launch))

    def run(outputs, inputs, codes, scales, flag=None):
        for s, sizes, launch in parts:
            launch(outputs[s], inputs[s], codes[s], scales[s], flag, sizes)

    return run


@taking(CompactCapture)
def capture_compact_reference(a: CompactCapture) -> None:
    """Codes and scales of ``output_s - input_s``, subtracted in fp32 and rounded once, to e4m3.

    The error of a decoded number is at most 2^-4 of it or 2^-10 of its row's scale, whichever is larger.

    Source: ours. Bytes: see `minimum_bytes`.
    """
    for output, before, code, scale in zip(a.outputs, a.inputs, a.codes, a.scales, strict=True):
        if not output.numel():
            continue
        r = output.float() - before.float()
        if a.flag is not None:
            a.flag.masked_fill_(~torch.isfinite(r).all(), 1)
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
