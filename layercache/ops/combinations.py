"""Linear combinations of stored residuals, and of anything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.kernels import combine as kernels
from layercache.kernels.combine import Combination, LinearMap
from layercache.kernels.launching import taking
from layercache.ops import native
from layercache.ops.checks import (
    MAX_STREAMS,
    check_dense,
    check_gate,
    check_kind,
    check_list,
    check_no_grad,
    check_scales,
    check_streams,
    check_tensor,
    check_written,
    describe,
    fail,
    host_coefficients,
    layout,
)
from layercache.ops.dispatch import Kernels, register, through_registry

Coefficients = Sequence[float] | Tensor


def linear_combination(
    bases: Sequence[Tensor],
    residuals: Sequence[Sequence[Tensor]],
    coefficients: Coefficients,
    results: Sequence[Tensor] | None = None,
    gates: Sequence[Tensor] | None = None,
    scales: Sequence[Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """``y_s = x_s + g_s * sum_k c_k r_sk`` for all streams, in one launch.

    Summed in fp32 in the order of k, every product rounded before it is added, the sum rounded once. One term with
    coefficient 1 is ``torch.add(x, r)`` bit by bit. A further term with coefficient 0 changes nothing, except that
    -0.0 becomes 0.0 and that NaN or infinity in the term gives NaN.

    Args:
        bases: x_s, 1 to 8 streams [batch, rows, channels] of one dtype; last dim contiguous, the others may be
            strided; may be empty.
        residuals: for every stream its r_sk, contiguous, of x_s's shape, all of one dtype; 1 to 8, as many for each.
        coefficients: c_k for all streams: finite host numbers, or an fp32 tensor [terms] on the same device, whose
            values a compiled graph does not depend on.
        results: written instead of new tensors; of the bases' shapes and dtype, last dim contiguous; each may be its
            own base, and otherwise shares no memory with any argument.
        gates: g_s [batch, 1, channels] or [batch, channels], one for every stream; by default 1.
        scales: when the residuals are codes of `capture_compact` (uint8): their scales, fp32, one number per row.

    Returns:
        New contiguous tensors in the dtype of the bases, or ``results``.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: (terms + 2) S; codes count half of 16-bit terms.
    """
    given = bases, residuals, coefficients, results, gates, scales
    found = COMBINATION_KERNELS.again(given)
    return COMBINATION_KERNELS.first(given) if found is NotImplemented else found


@taking(Combination)
def _check_combination(a: Combination) -> tuple[Any, ...]:
    op, streams = "linear_combination", len(a.bases)
    check_streams(op, "bases", a.bases, MAX_STREAMS)
    terms = _check_residual_lists(a.residuals, a.bases, a.scales)
    everything = [*a.bases, *(r for stream in a.residuals for r in stream)]
    if a.gates is not None:
        check_list(op, "gates", a.gates, streams, streams)
        for s, gate in enumerate(a.gates):
            check_gate(op, f"gates[{s}]", gate, getattr(a.gates[0], "dtype", None), a.bases[s], f"bases[{s}]")
        everything += a.gates
    check_no_grad(op, everything)
    coefficients = a.coefficients
    if isinstance(coefficients, Tensor):
        check_device_coefficients(op, coefficients, (terms,), a.bases[0].device)
    else:
        coefficients = host_coefficients(op, "coefficients", coefficients, terms)
    if a.results is not None:
        check_list(op, "results", a.results, streams, streams)
        for s, result in enumerate(a.results):
            check_tensor(op, "results", s, result, f"bases[{s}]", a.bases[s], a.bases[0].dtype)
    return *a[:2], coefficients, *a[3:]


@taking(Combination)
def _check_combination_memory(a: Combination) -> None:
    if a.results is not None:
        others = [("gates", list(a.gates or ()))]
        others += [("residuals", [r for stream in a.residuals for r in stream])]
        others += [("scales", [t for stream in a.scales or () for t in stream])]
        others += [("coefficients", [a.coefficients] if isinstance(a.coefficients, Tensor) else [])]
        check_written("linear_combination", "results", a.results, "bases", [[x] for x in a.bases], others)


def restore(
    bases: list[Tensor], residuals: list[list[Tensor]], coefficients: Coefficients, results: list[Tensor] | None
) -> list[Tensor]:
    """`linear_combination` without a look at its arguments, for residuals that were allocated to fit."""
    if through_registry(bases):
        return _call_combination(bases, residuals, coefficients, results)
    run = COMBINATION_KERNELS.choose(bases[0])
    if run != COMBINATION_KERNELS.launch:
        return run(bases, residuals, coefficients, results)
    on_device = coefficients if isinstance(coefficients, Tensor) else None
    by = bases, results, on_device, len(residuals[0]), residuals[0][0].dtype
    return COMBINATION_KERNELS.launch_fitting(by, bases, residuals, coefficients, results)


def linear_map(
    inputs: Sequence[Sequence[Tensor]],
    outputs: Sequence[Sequence[Tensor]],
    matrix: Sequence[Sequence[float | None]] | Tensor,
    factors: Sequence[float] | None = None,
    scales: Sequence[Sequence[Tensor | None]] | None = None,
) -> None:
    """Writes ``y_sm = f_m * sum_k M_mk x_sk`` for all streams, in one launch that reads every input once.

    Summed in fp32 in the order of k, every product rounded before it is added, the factor applied last, the result
    rounded once. All inputs of an element are read before an output is written, so an output may be one of the inputs.

    Args:
        inputs: per stream (1 to 8) its x_sk (1 to 9) of one shape [batch, rows, channels]; last dim contiguous, the
            others may be strided; dtypes may differ between k, not between streams; may be empty.
        outputs: per stream its y_sm (1 to 6), likewise; each may be an input of its own stream, and otherwise shares
            no memory with any argument.
        matrix: M [outputs, inputs], finite host numbers with None where an input is not used; or fp32 on the device.
        factors: f_m, finite host numbers; by default 1; not with a matrix on the device.
        scales: per stream and input, where it holds codes of `capture_compact` (uint8): their scales, fp32, one number
            per row; None for inputs that hold numbers.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: every input once in, every output once out.
    """
    given = inputs, outputs, matrix, factors, scales
    if MAP_KERNELS.again(given) is NotImplemented:
        MAP_KERNELS.first(given)


@taking(LinearMap)
def _check_map(a: LinearMap) -> tuple[Any, ...]:
    op, matrix, factors = "linear_map", a.matrix, a.factors
    count, results = _check_map_tensors(a.inputs, a.outputs, a.scales)
    check_no_grad(op, [t for stream in (*a.inputs, *a.outputs) for t in stream])
    rows = _check_matrix(matrix, count, results, a.inputs[0][0].device)
    if factors is not None:
        if isinstance(matrix, Tensor):
            fail(op, "factors", "given with a matrix on the device", "the factors multiplied into that matrix")
        factors = host_coefficients(op, "factors", factors, results)
    return *a[:2], matrix if isinstance(matrix, Tensor) else rows, factors, a.scales


@taking(LinearMap)
def _check_map_memory(a: LinearMap) -> None:
    written = [y for stream in a.outputs for y in stream]
    own = [a.inputs[k // len(a.outputs[0])] for k in range(len(written))]
    others = [("scales", [t for stream in a.scales or () for t in stream if t is not None])]
    others += [("matrix", [a.matrix] if isinstance(a.matrix, Tensor) else [])]
    check_written("linear_map", "outputs", written, "inputs", own, others)


@taking(LinearMap)
def _call_map(a: LinearMap) -> None:
    """linear_map through torch.library."""
    flat_inputs, flat_outputs = ([t for stream in streams for t in stream] for streams in a[:2])
    flat = [] if isinstance(a.matrix, Tensor) else [c for row in a.matrix for c in row]
    values, used = [c or 0.0 for c in flat], [c is not None for c in flat]
    on_device = a.matrix if isinstance(a.matrix, Tensor) else None
    flat_scales = [t for stream in a.scales or () for t in stream]
    LINEAR_MAP(flat_inputs, flat_outputs, len(a.inputs), values, used, list(a.factors or ()), on_device, flat_scales)


def _check_map_tensors(inputs: Any, outputs: Any, scales: Any) -> tuple[int, int]:
    """Streams of linear_map; the numbers of inputs and outputs."""
    op = "linear_map"
    for name, streams, most in (("inputs", inputs, kernels.MAX_INPUTS), ("outputs", outputs, kernels.MAX_OUTPUTS)):
        if not isinstance(streams, (list, tuple)) or not 1 <= len(streams) <= MAX_STREAMS:
            fail(op, name, describe(streams), f"a list of 1 to {MAX_STREAMS} streams, a list of tensors each")
        if len(streams) != len(inputs):
            fail(op, name, describe(streams), f"{len(inputs)} streams as inputs")
        for s, stream in enumerate(streams):
            check_list(op, f"{name}[{s}]", stream, 1, most)
            if len(stream) != len(streams[0]):
                fail(op, f"{name}[{s}]", describe(stream), f"{len(streams[0])} tensors as {name}[0]")
            for k, tensor in enumerate(stream):
                coded = name == "inputs" and scales is not None and _scale(scales, s, k, len(stream)) is not None
                if not coded:
                    check_kind(op, f"{name}[{s}][{k}]", tensor)
                dtype = torch.uint8 if coded else getattr(streams[0][k], "dtype", None)
                check_tensor(op, f"{name}[{s}]", k, tensor, f"inputs[{s}][0]", inputs[s][0], dtype, contiguous=coded)
                if coded:
                    check_scales(op, f"scales[{s}][{k}]", scales[s][k], tensor)
    doubles = [t.dtype == torch.float64 for streams in (inputs, outputs) for stream in streams for t in stream]
    if any(doubles) and not all(doubles):
        fail(op, "inputs", "float64 beside another dtype", "float64 for all or for none")
    return len(inputs[0]), len(outputs[0])


def _scale(scales: Any, stream: int, index: int, count: int) -> Any:
    """The scale of an input, after a look at the lists."""
    op = "linear_map"
    if not isinstance(scales, (list, tuple)) or stream >= len(scales) or not isinstance(scales[stream], (list, tuple)):
        fail(op, "scales", describe(scales), "a list of tensors or None for every stream")
    if len(scales[stream]) != count:
        fail(op, f"scales[{stream}]", describe(scales[stream]), f"{count} entries, one per input")
    return scales[stream][index]


def _check_matrix(matrix: Any, inputs: int, outputs: int, device: torch.device) -> list[list[float | None]]:
    op = "linear_map"
    if isinstance(matrix, Tensor):
        check_device_coefficients(op, matrix, (outputs, inputs), device, "matrix")
        return []
    if not isinstance(matrix, (list, tuple)) or len(matrix) != outputs:
        fail(op, "matrix", describe(matrix), f"{outputs} rows, one per output")
    rows: list[list[float | None]] = []
    for m, row in enumerate(matrix):
        if not isinstance(row, (list, tuple)):
            fail(op, f"matrix[{m}]", describe(row), f"a list of {inputs} numbers or None, one per input")
        filled = host_coefficients(op, f"matrix[{m}]", [0.0 if c is None else c for c in row], inputs)
        rows.append([None if c is None else value for c, value in zip(row, filled, strict=True)])
    return rows


def _check_residual_lists(residuals: Any, bases: Sequence[Tensor], scales: Any) -> int:
    """Residuals of linear_combination and their scales; the number of terms."""
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
            if scales is None:
                check_kind(op, "residuals[0][0]", stream[0])
            dtype = torch.uint8 if scales is not None else stream[0].dtype
        for k, residual in enumerate(stream):
            check_tensor(op, f"residuals[{s}]", k, residual, f"bases[{s}]", bases[s], dtype, contiguous=True)
    if dtype != bases[0].dtype and torch.float64 in (dtype, bases[0].dtype):
        fail(op, "residuals[0][0]", dtype, f"float64 only with float64 bases, here {bases[0].dtype}")
    if scales is not None:
        _check_scales(scales, residuals)
    return len(residuals[0])


def _check_scales(scales: Any, residuals: Sequence[Sequence[Tensor]]) -> None:
    op = "linear_combination"
    check_list(op, "scales", scales, len(residuals), len(residuals))
    for s, stream in enumerate(scales):
        check_list(op, f"scales[{s}]", stream, len(residuals[s]), len(residuals[s]))
        for k, scale in enumerate(stream):
            check_scales(op, f"scales[{s}][{k}]", scale, residuals[s][k])


def check_device_coefficients(
    op: str, coefficients: Tensor, shape: tuple[int, ...], device: torch.device, name: str = "coefficients"
) -> None:
    check_dense(op, name, coefficients)
    if coefficients.dtype != torch.float32 or coefficients.dim() != len(shape) or not coefficients.is_contiguous():
        expected = "float32, of one dim and contiguous" if len(shape) == 1 else "float32, of two dims and contiguous"
        fail(op, name, f"{coefficients.dtype} {layout(coefficients)}", expected)
    if tuple(coefficients.shape) != shape:
        numbers = " x ".join(map(str, coefficients.shape))
        fail(op, name, f"{numbers} numbers", " x ".join(map(str, shape)) + ", one per term")
    if coefficients.device != device:
        fail(op, name, f"on {coefficients.device}", f"on {device} as the tensors, or host numbers")


@taking(Combination)
def _call_combination(a: Combination) -> list[Tensor]:
    """linear_combination through torch.library, where it is two ops: one may not return what the other writes."""
    flat = [r for stream in a.residuals for r in stream]
    host, on_device = ([], a.coefficients) if isinstance(a.coefficients, Tensor) else (a.coefficients, None)
    others = (list(a.gates or ()), [scale for stream in a.scales or () for scale in stream])
    if a.results is None:
        return LINEAR_COMBINATION(a.bases, flat, host, on_device, *others)
    LINEAR_COMBINATION_OUT(a.results, a.bases, flat, host, on_device, *others)
    return list(a.results)


def _rows(op: str, name: str, flat: list[Any], streams: int) -> list[list[Any]]:
    """Per stream its tensors; a schema can hold flat lists only."""
    each, rest = divmod(len(flat), max(streams, 1))
    if rest:
        fail(op, name, describe(flat), f"as many for each of {streams} streams")
    return [flat[k : k + each] for k in range(0, len(flat), each)] if each else []


def host_or_device(op: str, host: list[float], on_device: Tensor | None) -> Any:
    """Coefficients as an op takes them: host numbers, or a tensor."""
    if on_device is not None and host:
        fail(op, "device_coefficients", "given beside host numbers", "one of the two")
    return host if on_device is None else on_device


def _take_combination(
    results: list[Tensor] | None,
    bases: list[Tensor],
    residuals: list[Tensor],
    host: list[float],
    on_device: Tensor | None,
    gates: list[Tensor],
    scales: list[Tensor],
) -> tuple[Any, ...]:
    op, streams = "linear_combination", len(bases)
    coefficients = host_or_device(op, host, on_device)
    nested = _rows(op, "scales", scales, streams) or None
    return bases, _rows(op, "residuals", residuals, streams), coefficients, results, gates or None, nested


def _take_map(
    inputs: list[Tensor],
    outputs: list[Tensor],
    streams: int,
    values: list[float],
    used: list[bool],
    factors: list[float],
    on_device: Tensor | None,
    scales: list[Tensor | None],
) -> tuple[Any, ...]:
    op = "linear_map"
    if len(values) != len(used):
        fail(op, "used", describe(used), f"{len(values)} entries, one per entry of matrix")
    if streams < 1:
        fail(op, "streams", streams, "1 or more")
    nested, written = _rows(op, "inputs", inputs, streams), _rows(op, "outputs", outputs, streams)
    count = len(inputs) // streams
    flat = [value if use else None for value, use in zip(values, used, strict=True)]
    matrix = host_or_device(op, flat, on_device)  # type: ignore[arg-type]
    if on_device is None:
        matrix = [flat[k : k + count] for k in range(0, len(flat), count)] if count else []
    return nested, written, matrix, factors or None, _rows(op, "scales", scales, streams) or None


COMBINATION_KERNELS = Kernels(
    _check_combination,
    kernels.linear_combination_triton,
    kernels.linear_combination_reference,
    native.if_available(native.linear_combination),
    _check_combination_memory,
    _call_combination,
    plans_on_cpu=True,
)
LINEAR_COMBINATION = register(
    "linear_combination(Tensor[] bases, Tensor[] residuals, float[] coefficients, Tensor? device_coefficients, "
    "Tensor[] gates, Tensor[] scales) -> Tensor[]",
    COMBINATION_KERNELS,
    lambda bases, *others: [x.new_empty(x.shape) for x in bases],
    lambda *arguments: _take_combination(None, *arguments),
)
LINEAR_COMBINATION_OUT = register(
    "linear_combination_out(Tensor(a!)[] results, Tensor[] bases, Tensor[] residuals, float[] coefficients, "
    "Tensor? device_coefficients, Tensor[] gates, Tensor[] scales) -> ()",
    COMBINATION_KERNELS,
    lambda *arguments: None,
    _take_combination,
    lambda found, *arguments: None,
)
MAP_KERNELS = Kernels(
    _check_map,
    kernels.linear_map_triton,
    kernels.linear_map_reference,
    native.if_available(native.linear_map),
    _check_map_memory,
    _call_map,
    plans_on_cpu=True,
)
LINEAR_MAP = register(
    "linear_map(Tensor[] inputs, Tensor(a!)[] outputs, int streams, float[] matrix, bool[] used, float[] factors, "
    "Tensor? device_matrix, Tensor?[] scales) -> ()",
    MAP_KERNELS,
    lambda *arguments: None,
    _take_map,
)
