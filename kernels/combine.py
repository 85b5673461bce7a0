"""Linear combinations of tensors: what a cached run of groups costs, and every other forecast.

One kernel serves all forms: M outputs, each a linear combination of the same K inputs, for several streams at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .compact import decode_reference, e4m3_to_float
from .deferred import jit
from .launching import Launch, Planned, new_like, outline, taking
from .tiles import (
    accumulator_dtype,
    by_launch,
    lay_out_launch,
    nbytes,
    of_entry,
    offsets_at,
    row_of,
    share_of,
    size_of_entry,
    taken,
)

if TYPE_CHECKING:
    import triton.language as tl

MAX_TERMS = 8
MAX_INPUTS = MAX_TERMS + 1
MAX_OUTPUTS = 6

Matrix = Sequence[Sequence["float | None"]]
# Per stream and input the scales of its codes, or None where it holds numbers.
Scales = Sequence[Sequence["Tensor | None"]]


@jit(do_not_specialize_on_alignment=["coefficients_ptr"])
def _linear_map_kernel(
    in_ptrs,
    out_ptrs,
    gate_ptrs,
    scale_ptrs,
    coefficients,
    factors,
    coefficients_ptr,
    sizes,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    USED: tl.constexpr,
    CODED: tl.constexpr,
    BASE: tl.constexpr,
    ENTRIES: tl.constexpr,
    FIELDS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
):
    """Pointers are entry-major. Bit ``m * INPUTS + k`` of ``USED`` says whether output m has a term in input k, and bit
    k of ``CODED`` whether input k holds codes, whose scales are among ``scale_ptrs``.

    Coefficients, output-major, are host numbers (an integer 0 where ``USED`` says no) or, with ``coefficients_ptr``,
    read from the device. With ``BASE`` (one output) input 0 has no coefficient, also in that order, and all others are
    multiplied by the gate, if there is one.
    """
    pid = tl.program_id(0).to(tl.int64)
    groups, programs, program = share_of(sizes, pid, ENTRIES, FIELDS)
    for start in range(program * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        inputs = ()
        for k in tl.static_range(INPUTS):
            x_ptr = of_entry(in_ptrs, k, INPUTS, sizes, pid, ENTRIES, FIELDS)
            off = offsets_at(group, 0, k, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
            if (CODED >> k) & 1:
                code = tl.load(x_ptr + off, mask=live, other=0)
                scale_ptr = of_entry(scale_ptrs, k, INPUTS, sizes, pid, ENTRIES, FIELDS)
                row = row_of(group, size_of_entry(3, sizes, pid, ENTRIES, FIELDS))[:, None]
                x = e4m3_to_float(code) * tl.load(scale_ptr + row, mask=live, other=0.0)
            else:
                x = tl.load(x_ptr + off, mask=live, other=0.0).to(tl.float32)
            inputs = inputs + (x,)
        for m in tl.static_range(OUTPUTS):
            if BASE and gate_ptrs is None:
                y = inputs[0]
            else:
                y = tl.zeros([R, VEC], tl.float32)
            for k in tl.static_range(1 if BASE else 0, INPUTS):
                if (USED >> (m * INPUTS + k)) & 1:
                    if coefficients_ptr is None:
                        y += coefficients[m * INPUTS + k - (1 if BASE else 0)] * inputs[k]
                    else:
                        y += tl.load(coefficients_ptr + m * INPUTS + k - (1 if BASE else 0)) * inputs[k]
            if factors is not None:
                y = y * factors[m]
            if gate_ptrs is not None:
                gate_ptr = of_entry(gate_ptrs, 0, 1, sizes, pid, ENTRIES, FIELDS)
                off = offsets_at(group, 0, INPUTS + OUTPUTS, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
                gate = tl.load(gate_ptr + off, mask=live, other=0.0).to(tl.float32)
                y = inputs[0] + gate * y
            y_ptr = of_entry(out_ptrs, m, OUTPUTS, sizes, pid, ENTRIES, FIELDS)
            off = offsets_at(group, 0, INPUTS + m, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
            tl.store(y_ptr + off, y.to(y_ptr.dtype.element_ty), mask=live)


class Combination(NamedTuple):
    """Arguments of linear combinations of residuals.

    Attributes:
        bases: x_s [batch, rows, channels] or of fewer dims, last dim contiguous; may be empty.
        residuals: per stream its r_sk, contiguous, of x_s's shape, 1 to 8 of them and as many for every stream.
        coefficients: c_k, host numbers or fp32 [terms]; used in fp32.
        results: written instead of new tensors; last dim contiguous; each may be its base.
        gates: g_s [batch, 1, channels] or [batch, channels], broadcast over the rows.
        scales: then residuals are codes of `compact` (uint8), and these fp32 [rows] their scales.
    """

    bases: Sequence[Tensor]
    residuals: Sequence[Sequence[Tensor]]
    coefficients: Sequence[float] | Tensor
    results: Sequence[Tensor] | None = None
    gates: Sequence[Tensor] | None = None
    scales: Sequence[Sequence[Tensor]] | None = None


class LinearMap(NamedTuple):
    """Arguments of a linear map of tensors.

    Attributes:
        inputs: per stream its x_sk of one shape, last dim contiguous; dtypes may differ between k, not between s.
        outputs: per stream its y_sm, likewise; written.
        matrix: M [outputs, inputs], host numbers with None where an input is not used, or fp32 on the device.
        factors: f_m, host numbers; by default 1.
        scales: per stream and input, where it holds codes of `compact` (uint8), fp32 [rows]; None elsewhere.
    """

    inputs: Sequence[Sequence[Tensor]]
    outputs: Sequence[Sequence[Tensor]]
    matrix: Matrix | Tensor
    factors: Sequence[float] | None = None
    scales: Scales | None = None


@Planned
@taking(Combination)
def linear_combination_triton(a: Combination, groups: int | None = None) -> Callable[..., list[Tensor]]:
    """`linear_combination_reference` in one launch per eight streams.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    on_device = isinstance(a.coefficients, Tensor)
    inputs = [(x, *stream) for x, stream in zip(a.bases, a.residuals, strict=True)]
    outputs = [(y,) for y in a.results or map(outline, a.bases)]
    coded = None if a.scales is None else [False, *[True] * len(a.scales[0])]
    launch = _plan(inputs, outputs, [True] * len(inputs[0]), a.gates, coded, True, groups)

    def run(bases, residuals, coefficients, results=None, gates=None, scales=None):
        results = new_like(bases) if results is None else list(results)
        launch(
            [(x, *stream) for x, stream in zip(bases, residuals, strict=True)],
            [(y,) for y in results],
            None if on_device else tuple(map(float, coefficients)),
            None,
            coefficients if on_device else None,
            gates,
            None if scales is None else [(None, *stream) for stream in scales],
        )
        return results

    return run


@Planned
@taking(LinearMap)
def linear_map_triton(a: LinearMap, groups: int | None = None) -> Callable[..., None]:
    """`linear_map_reference` in one launch per eight streams.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    on_device = isinstance(a.matrix, Tensor)
    flat = [1.0] * (len(a.inputs[0]) * len(a.outputs[0])) if on_device else [c for row in a.matrix for c in row]
    coded = None if a.scales is None else [t is not None for t in a.scales[0]]
    launch = _plan(a.inputs, a.outputs, [c is not None for c in flat], None, coded, False, groups)

    def run(inputs, outputs, matrix, factors=None, scales=None):
        launch(
            inputs,
            outputs,
            None if on_device else tuple(0 if c is None else float(c) for row in matrix for c in row),
            None if factors is None else tuple(map(float, factors)),
            matrix if on_device else None,
            None,
            scales,
        )

    return run


def _plan(
    inputs: Sequence[Sequence[Tensor]],
    outputs: Sequence[Sequence[Tensor]],
    known: Sequence[bool],
    gates: Sequence[Tensor] | None,
    coded: Sequence[bool] | None,
    base: bool,
    groups: int | None,
) -> Callable[..., None]:
    """Launches for all streams that are not empty."""
    parts = []
    for some in by_launch([s for s, stream in enumerate(inputs) if stream[0].numel()]):
        addressed = [[*inputs[s], *outputs[s]] for s in some]
        if gates is not None:
            for s, tensors in zip(some, addressed, strict=True):
                tensors.append(as_rows(gates[s]).expand(inputs[s][0].shape))
        # codes of one byte come in groups of 16, whatever the rest
        layout = lay_out_launch(addressed, (), groups, rows=coded is not None)
        launch = Launch(
            _linear_map_kernel,
            layout.grid,
            INPUTS=len(inputs[0]),
            OUTPUTS=len(outputs[0]),
            USED=sum(is_used << bit for bit, is_used in enumerate(known)),
            CODED=sum(is_code << k for k, is_code in enumerate(coded or ())),
            BASE=base,
            **layout.constants,
        )
        parts.append((some, layout.sizes, launch))

    def run(inputs, outputs, coefficients, factors, on_device, gates, scales):
        for some, sizes, launch in parts:
            launch(
                tuple([t for s in some for t in inputs[s]]),
                tuple([t for s in some for t in outputs[s]]),
                None if gates is None else taken(gates, some),
                None if scales is None else tuple([t for s in some for t in _pointers(scales[s], outputs[s][0])]),
                coefficients,
                factors,
                on_device,
                sizes,
            )

    return run


def _pointers(scales: Sequence[Tensor | None], instead: Tensor) -> list[Tensor]:
    """Something for every input, also where there is no scale, which is never read."""
    known = [t for t in scales if t is not None]
    return [(known or [instead])[0] if t is None else t for t in scales]


def as_rows(gate: Tensor) -> Tensor:
    """A gate [B, D] or [B, 1, D] as [B, 1, D]."""
    return gate.unsqueeze(1) if gate.dim() == 2 else gate


@taking(Combination)
def linear_combination_reference(a: Combination) -> list[Tensor]:
    """``y_s = x_s + sum_k c_k r_sk``, in fp32 (fp64 for fp64) in the order of k, rounded once at the end.

    Every product is rounded before it is added. With one term and coefficient 1 the result is ``torch.add(x, r)``
    bit by bit. A further term with coefficient 0 changes nothing, except that -0.0 becomes 0.0 and that NaN or
    infinity in the term gives NaN. With a gate the sum starts at 0 and ``y_s = x_s + g_s * sum``.

    Returns:
        New contiguous tensors in the dtype of the bases, or ``results``.

    Source: docs/methods.md, Formulas of the ops. Bytes: see `minimum_bytes`.
    """
    values = a.coefficients.tolist() if isinstance(a.coefficients, Tensor) else [float(c) for c in a.coefficients]
    results = new_like(a.bases) if a.results is None else list(a.results)
    for s, (x, terms, y) in enumerate(zip(a.bases, a.residuals, results, strict=True)):
        if a.scales is not None:
            terms = [decode_reference(code, scale, x.shape) for code, scale in zip(terms, a.scales[s], strict=True)]
        _combine(x, terms, values, y, None if a.gates is None else as_rows(a.gates[s]))
    return results


def _combine(x: Tensor, terms: Sequence[Tensor], coefficients: Sequence[float], y: Tensor, gate: Tensor | None) -> None:
    if gate is None and len(terms) == 1 and coefficients[0] == 1.0 and terms[0].dtype == x.dtype == y.dtype:
        torch.add(x, terms[0], out=y)
        return
    accumulator = accumulator_dtype(x.dtype)
    base = x.to(accumulator, copy=True)
    total = base if gate is None else torch.zeros_like(base)
    # multiplied by 1 after the coefficient: a multiply-add can then be fused only where that rounds the same
    one = torch.ones((), dtype=accumulator, device=x.device)
    for r, c in zip(terms, coefficients, strict=True):
        torch.addcmul(total, r, one, value=c, out=total)
    y.copy_(total if gate is None else base + gate.to(accumulator) * total)


@taking(LinearMap)
def linear_map_reference(a: LinearMap) -> None:
    """``y_sm = f_m * sum_k M_mk x_sk``, in fp32 (fp64 for fp64), in the order of k from 0, rounded once at the end.

    All inputs are read before an output is written, so an output may be one of its own stream's inputs.

    Source: docs/methods.md, Formulas of the ops. Bytes: see `map_minimum_bytes`.
    """
    rows = a.matrix.tolist() if isinstance(a.matrix, Tensor) else a.matrix
    for s, (stream, written) in enumerate(zip(a.inputs, a.outputs, strict=True)):
        accumulator = accumulator_dtype(written[0].dtype)
        own = [None] * len(stream) if a.scales is None else a.scales[s]
        values = [
            x.to(accumulator) if scale is None else decode_reference(x, scale, x.shape)
            for x, scale in zip(stream, own, strict=True)
        ]
        sums = []
        for m, row in enumerate(rows):
            total = torch.zeros(stream[0].shape, dtype=accumulator, device=stream[0].device)
            for x, c in zip(values, row, strict=True):
                if c is not None:
                    total += torch.tensor(c, dtype=accumulator) * x
            sums.append(total if a.factors is None else total * torch.tensor(a.factors[m], dtype=accumulator))
        for y, total in zip(written, sums, strict=True):
            y.copy_(total)


def minimum_bytes(
    bases: Sequence[Tensor],
    residuals: Sequence[Sequence[Tensor]],
    coefficients: object = None,
    results: Sequence[Tensor] | None = None,
    gates: Sequence[Tensor] | None = None,
    scales: Sequence[Sequence[Tensor]] | None = None,
) -> int:
    """Bytes that must move: bases, residuals, gates and scales once in, results once out, (terms + 2) S."""
    written = nbytes(results or bases)
    extra = nbytes(gates or ()) + sum(nbytes(stream) for stream in scales or ())
    return nbytes(bases) + written + extra + sum(nbytes(terms) for terms in residuals)


def map_minimum_bytes(
    inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Sequence[Tensor]], matrix: object = None, *others: object
) -> int:
    """Bytes that must move: every input once in, every output once out."""
    return sum(nbytes(tensors) for tensors in (*inputs, *outputs))
