"""The ops of a cached step, on any device: validated, registered with torch.library, sent to the right kernel.

Every function has three ways to run. On a GPU it launches the Triton kernel, on the CPU it runs the eager reference;
both are called directly, because the dispatcher costs more than the call. While torch.compile traces, or a dispatch
mode such as FakeTensorMode watches, it calls the registered op ``torch.ops.layercache.*``, so that a graph holds one
opaque node. Results have the same bits on all three. Nothing here waits for the device.

The registered ops check nothing; call the functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from layercache.errors import MissingExtraError, OpInputError
from layercache.kernels import capture as _capture
from layercache.kernels import combine as _combine
from layercache.kernels import statistics as _statistics
from layercache.kernels.tiles import accumulator_dtype, triton

OP_NAMES = ("capture", "pair_statistics", "combination_error", "linear_combination")
MAX_STREAMS = 4
MAX_TERMS = _combine.MAX_TERMS
MAX_ERROR_TERMS = 24  # non-zero coefficients in one set of combination_error

Coefficients = Sequence[float] | Tensor
CoefficientSets = Any  # host numbers [sets, terms]: nested sequences, a NumPy array or a CPU tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TENSOR_TYPES = (Tensor, torch.nn.Parameter)
_MAX_STRIDED = 2**31


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
    _check_streams("capture", "outputs", outputs, MAX_STREAMS)
    _check_like("capture", "inputs", inputs, "outputs", outputs, outputs[0].dtype)
    _check_like("capture", "residuals", residuals, "outputs", outputs, contiguous=True)
    if previous is not None:
        _check_like("capture", "previous", previous, "residuals", residuals, residuals[0].dtype, contiguous=True)
    if flag is not None:
        _check_flag(flag, outputs[0].device)
    everything = [*outputs, *inputs, *residuals, *(previous or ())]
    _check_no_grad("capture", everything)
    if _through_registry(everything):
        if previous is None:
            return _CAPTURE(outputs, inputs, residuals, flag)
        return _CAPTURE_STATISTICS(outputs, inputs, residuals, flag, previous)
    _check_aliases(outputs, inputs, residuals, previous)
    run = _capture.capture_triton if _uses_triton(outputs[0]) else _capture.capture_reference
    return run(outputs, inputs, residuals, flag, previous)


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
    _check_streams("pair_statistics", "a", a)
    _check_like("pair_statistics", "b", b, "a", a, a[0].dtype)
    everything = [*a, *b]
    _check_no_grad("pair_statistics", everything)
    if _through_registry(everything):
        return _PAIR_STATISTICS(a, b)
    run = _statistics.pair_statistics_triton if _uses_triton(a[0]) else _statistics.pair_statistics_reference
    return run(a, b)


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
    _check_kind(op, "target", target)
    _check_layout(op, "target", target, contiguous=True)
    _check_list(op, "terms", terms, 1)
    for k, term in enumerate(terms):
        _check_tensor(op, "terms", k, term, "target", target, target.dtype, contiguous=True)
    _check_no_grad(op, [target, *terms])
    rows = _coefficient_rows(coefficients, len(terms))
    if _through_registry([target, *terms]):
        return _COMBINATION_ERROR(target, terms, [c for row in rows for c in row])
    if _uses_triton(target):
        return _statistics.combination_error_triton(target, terms, rows)
    return _statistics.combination_error_reference(target, terms, rows)


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
    _check_streams(op, "bases", bases, MAX_STREAMS)
    terms = _check_residual_lists(residuals, bases)
    everything = [*bases, *(r for stream in residuals for r in stream)]
    _check_no_grad(op, everything)
    if isinstance(coefficients, Tensor):
        _check_device_coefficients(coefficients, terms, bases[0].device)
    else:
        coefficients = _host_coefficients(op, "coefficients", coefficients, terms)
    if _through_registry(everything):
        flat = everything[len(bases) :]
        if isinstance(coefficients, Tensor):
            return _LINEAR_COMBINATION(bases, flat, [], coefficients)
        return _LINEAR_COMBINATION(bases, flat, coefficients, None)
    run = _combine.linear_combination_triton if _uses_triton(bases[0]) else _combine.linear_combination_reference
    return run(bases, residuals, coefficients)


def minimum_bytes(op: str, *arguments: Any) -> int:
    """Bytes of global memory that ``op(*arguments)`` must move at least: every tensor once.

    Raises:
        OpInputError: no op of that name.
    """
    if op not in _BYTES:
        raise OpInputError(f"there is no op {op!r}; the ops are {', '.join(OP_NAMES)}")
    return _BYTES[op](*arguments)


def backend_for(op: str, device: str | torch.device) -> tuple[str, str]:
    """Which implementation ``op`` uses on ``device``: ``(backend, reason)``.

    Backends are ``"triton"``, ``"reference"`` (eager PyTorch) and ``"unavailable"``.

    Raises:
        OpInputError: no op of that name.
    """
    if op not in OP_NAMES:
        raise OpInputError(f"there is no op {op!r}; the ops are {', '.join(OP_NAMES)}")
    kind = torch.device(device).type
    if kind == "cpu":
        return "reference", "tensors on the CPU use PyTorch's own operations"
    if kind != "cuda":
        return "unavailable", f"there is no kernel for {kind!r} tensors; move them to the CPU or a CUDA or ROCm GPU"
    if triton is None:
        return "unavailable", _NO_TRITON
    return "triton", f"triton {triton.__version__}"


_NO_TRITON = (
    "triton is not installed, and tensors on a GPU need it: pip install 'layercache[triton]' (with PyTorch for ROCm: "
    "reinstall torch, which brings its own build of triton)"
)


def _uses_triton(tensor: Tensor) -> bool:
    """Whether the tensor's kernels are Triton's, after a check that they can run.

    Raises:
        MissingExtraError: a GPU tensor, and triton is not installed.
    """
    if tensor.device.type != "cuda":
        return False
    if triton is None:
        raise MissingExtraError(_NO_TRITON)
    return True


def _through_registry(tensors: Iterable[Tensor]) -> bool:
    """Whether something other than plain execution is under way, which must see one op instead of many."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(t) not in _TENSOR_TYPES or t.is_meta for t in tensors)
    )


def _fail(op: str, argument: str, found: object, expected: str) -> NoReturn:
    raise OpInputError(f"{op}: {argument} is {found}; expected {expected}")


def _describe(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"


def _layout(tensor: Tensor) -> str:
    return f"of shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}"


def _check_list(op: str, name: str, tensors: Any, least: int, most: int | None = None) -> None:
    if not isinstance(tensors, (list, tuple)) or len(tensors) < least or (most is not None and len(tensors) > most):
        expected = f"{least} or more" if most is None else str(least) if most == least else f"{least} to {most}"
        _fail(op, name, _describe(tensors), f"a list of {expected} tensors")


def _check_kind(op: str, name: str, tensor: Any) -> None:
    """Type, dtype and device of a tensor that sets them for others."""
    if not isinstance(tensor, Tensor):
        _fail(op, name, _describe(tensor), "a tensor")
    if tensor.dtype not in _FLOATS:
        _fail(op, name, tensor.dtype, "bfloat16, float16 or float32 (on the CPU also float64)")
    if not (tensor.is_cuda or tensor.is_cpu or tensor.is_meta):
        _fail(op, name, f"on {tensor.device}", "a tensor on the CPU or a CUDA or ROCm GPU")
    if tensor.is_cuda and tensor.dtype == torch.float64:
        _fail(op, name, "float64 on a GPU", "float32 or a narrower dtype; kernels compute in float32")


def _check_layout(op: str, name: str, tensor: Tensor, contiguous: bool) -> None:
    if tensor.is_contiguous():
        return
    if contiguous:
        _fail(op, name, _layout(tensor), "a contiguous tensor")
    if tensor.dim() not in (2, 3) or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        _fail(op, name, _layout(tensor), "a contiguous tensor, or one of 2 or 3 dims whose last is contiguous")
    if tensor.numel() >= _MAX_STRIDED:
        _fail(op, name, f"strided with {tensor.numel()} elements", "fewer than 2^31, or a contiguous tensor")


def _check_tensor(
    op: str,
    name: str,
    index: int,
    tensor: Any,
    model_name: str,
    model: Tensor,
    dtype: torch.dtype | None,
    contiguous: bool = False,
) -> None:
    """One tensor of a list against the one whose shape and device it must have; any dtype if that is None."""
    # the usual case first and in one breath: this runs for every tensor of every launch
    if (
        isinstance(tensor, Tensor)
        and tensor.shape == model.shape
        and tensor.device == model.device
        and tensor.dtype == dtype
        and tensor.is_contiguous()
    ):
        return
    name = f"{name}[{index}]"
    _check_kind(op, name, tensor)
    if tensor.shape != model.shape:
        _fail(op, name, f"of shape {tuple(tensor.shape)}", f"{tuple(model.shape)} as {model_name}")
    if tensor.device != model.device:
        _fail(op, name, f"on {tensor.device}", f"on {model.device} as {model_name}")
    if dtype is not None and tensor.dtype != dtype:
        _fail(op, name, tensor.dtype, f"{dtype}, one dtype for all")
    _check_layout(op, name, tensor, contiguous)


def _check_streams(op: str, name: str, tensors: Any, most: int | None = None) -> None:
    """A list of tensors of one dtype and device."""
    _check_list(op, name, tensors, 1, most)
    _check_kind(op, f"{name}[0]", tensors[0])
    for s, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            _fail(op, f"{name}[{s}]", _describe(tensor), "a tensor")
        if tensor.dtype != tensors[0].dtype:
            _fail(op, f"{name}[{s}]", tensor.dtype, f"{tensors[0].dtype} as {name}[0]")
        if tensor.device != tensors[0].device:
            _fail(op, f"{name}[{s}]", f"on {tensor.device}", f"on {tensors[0].device} as {name}[0]")
        if not tensor.is_contiguous():
            _check_layout(op, f"{name}[{s}]", tensor, contiguous=False)


def _check_like(
    op: str,
    name: str,
    tensors: Any,
    model_name: str,
    models: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    contiguous: bool = False,
) -> None:
    """A list against the list whose shapes it must have; without ``dtype`` any, but one for all."""
    _check_list(op, name, tensors, len(models), len(models))
    if dtype is None:
        _check_kind(op, f"{name}[0]", tensors[0])
        dtype = tensors[0].dtype
    for s, tensor in enumerate(tensors):
        _check_tensor(op, name, s, tensor, model_name, models[s], dtype, contiguous)


def _check_residual_lists(residuals: Any, bases: Sequence[Tensor]) -> int:
    """Residuals of linear_combination; the number of terms."""
    op = "linear_combination"
    if not isinstance(residuals, (list, tuple)) or len(residuals) != len(bases):
        _fail(op, "residuals", _describe(residuals), f"a list of {len(bases)}, one list of residuals per stream")
    dtype = None
    for s, stream in enumerate(residuals):
        if not isinstance(stream, (list, tuple)) or not 1 <= len(stream) <= MAX_TERMS:
            _fail(op, f"residuals[{s}]", _describe(stream), f"a list of at least 1 and at most {MAX_TERMS} terms")
        if len(stream) != len(residuals[0]):
            _fail(op, f"residuals[{s}]", _describe(stream), f"{len(residuals[0])} terms as residuals[0]")
        if dtype is None:
            _check_kind(op, "residuals[0][0]", stream[0])
            dtype = stream[0].dtype
        for k, residual in enumerate(stream):
            _check_tensor(op, f"residuals[{s}]", k, residual, f"bases[{s}]", bases[s], dtype, contiguous=True)
    if dtype != bases[0].dtype and torch.float64 in (dtype, bases[0].dtype):
        _fail(op, "residuals[0][0]", dtype, f"float64 only with float64 bases, here {bases[0].dtype}")
    return len(residuals[0])


def _check_flag(flag: Any, device: torch.device) -> None:
    if not isinstance(flag, Tensor):
        _fail("capture", "flag", f"a {type(flag).__name__}", "an int32 tensor of one element, or None")
    if flag.dtype != torch.int32 or flag.numel() != 1:
        _fail("capture", "flag", f"{flag.dtype} of shape {tuple(flag.shape)}", "an int32 tensor of one element")
    if flag.device != device:
        _fail("capture", "flag", f"on {flag.device}", f"on {device} as outputs[0]")


def _check_device_coefficients(coefficients: Tensor, terms: int, device: torch.device) -> None:
    op, name = "linear_combination", "coefficients"
    if coefficients.dtype != torch.float32 or coefficients.dim() != 1 or not coefficients.is_contiguous():
        _fail(op, name, f"{coefficients.dtype} {_layout(coefficients)}", "float32, of one dim and contiguous")
    if coefficients.shape[0] != terms:
        _fail(op, name, f"{coefficients.shape[0]} numbers", f"{terms}, one per term")
    if coefficients.device != device:
        _fail(op, name, f"on {coefficients.device}", f"on {device} as bases[0], or host numbers")


def _host_coefficients(op: str, name: str, coefficients: Iterable[float], terms: int) -> list[float]:
    """Finite host numbers as floats."""
    try:
        values = [float(c) for c in coefficients]
    except (TypeError, ValueError):
        raise OpInputError(f"{op}: {name} is {coefficients!r}; expected {terms} numbers") from None
    if len(values) != terms:
        _fail(op, name, f"{len(values)} numbers", f"{terms}, one per term")
    if not all(map(math.isfinite, values)):
        _fail(op, name, values, "finite numbers")
    return values


def _coefficient_rows(coefficients: CoefficientSets, terms: int) -> list[list[float]]:
    """Coefficient sets as lists of floats."""
    op = "combination_error"
    if isinstance(coefficients, Tensor) and coefficients.device.type != "cpu":
        _fail(op, "coefficients", f"on {coefficients.device}", "numbers on the host; reading them would wait")
    sets = coefficients.tolist() if hasattr(coefficients, "tolist") else coefficients
    if not isinstance(sets, (list, tuple)) or not sets:
        _fail(op, "coefficients", _describe(sets), f"sets of {terms} numbers, at least one set")
    rows = [_host_coefficients(op, f"coefficients[{s}]", row, terms) for s, row in enumerate(sets)]
    for s, row in enumerate(rows):
        used = sum(c != 0 for c in row)
        if used > MAX_ERROR_TERMS:
            _fail(op, f"coefficients[{s}]", f"{used} numbers that are not zero", f"at most {MAX_ERROR_TERMS}")
    return rows


def _check_no_grad(op: str, tensors: Iterable[Tensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise OpInputError(
            f"{op}: a tensor requires grad and grad mode is on; expected inference, no op here has a gradient: "
            "call it under torch.no_grad()"
        )


def _check_aliases(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], residuals: Sequence[Tensor], previous: Sequence[Tensor] | None
) -> None:
    """Residuals are written, so they may share memory with nothing but their own previous."""
    written = [_extent(r) for r in residuals]
    for name, tensors in (("outputs", outputs), ("inputs", inputs), ("residuals", residuals), ("previous", previous)):
        extents = written if name == "residuals" else [_extent(t) for t in tensors or ()]
        for s, (first, last) in enumerate(written):
            for k, (other_first, other_last) in enumerate(extents):
                if first < other_last and other_first < last:
                    allowed = k == s and (name == "residuals" or (name == "previous" and other_first == first))
                    if not allowed:
                        _fail("capture", f"residuals[{s}]", f"in the same memory as {name}[{k}]", "memory of its own")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First address and the one after the last; of an empty tensor both are the same."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + span * tensor.element_size()


_LIBRARY = torch.library.Library("layercache", "DEF")


def _register(schema: str, on_gpu: Callable, on_cpu: Callable, fake: Callable) -> Any:
    """Defines one op with its two kernels and its fake; the overload that calls it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_gpu, "CUDA")
    _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"layercache::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.layercache, name).default


def _with_triton(launcher: Callable) -> Callable:
    def run(*arguments: Any) -> Any:
        if triton is None:
            raise MissingExtraError(_NO_TRITON)
        return launcher(*arguments)

    return run


def _by_rows(implementation: Callable) -> Callable:
    """combination_error with the flat coefficients a schema can hold."""

    def run(target: Tensor, terms: list[Tensor], coefficients: list[float]) -> Tensor:
        q = len(terms)
        return implementation(target, terms, [coefficients[k : k + q] for k in range(0, len(coefficients), q)])

    return run


def _by_streams(implementation: Callable) -> Callable:
    """linear_combination with the flat residuals a schema can hold."""

    def run(bases: list[Tensor], residuals: list[Tensor], host: list[float], on_device: Tensor | None) -> list[Tensor]:
        q = len(residuals) // len(bases)
        streams = [residuals[k : k + q] for k in range(0, len(residuals), q)]
        return implementation(bases, streams, host if on_device is None else on_device)

    return run


def _fake_capture_statistics(
    outputs: list[Tensor], inputs: list[Tensor], residuals: list[Tensor], flag: Tensor | None, previous: list[Tensor]
) -> Tensor:
    return _new_statistics(residuals[0], len(outputs), _capture.STATISTICS)


def _fake_pair_statistics(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return _new_statistics(a[0], len(a), _statistics.PAIR_STATISTICS)


def _fake_combination_error(target: Tensor, terms: list[Tensor], coefficients: list[float]) -> Tensor:
    return _new_statistics(target, len(coefficients) // len(terms), _statistics.ERROR_STATISTICS)


def _fake_linear_combination(
    bases: list[Tensor], residuals: list[Tensor], coefficients: list[float], device_coefficients: Tensor | None
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in bases]


def _new_statistics(model: Tensor, rows: int, columns: int) -> Tensor:
    return model.new_empty((rows, columns), dtype=accumulator_dtype(model.dtype))


_CAPTURE = _register(
    "capture(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] residuals, Tensor(b!)? flag) -> ()",
    _with_triton(_capture.capture_triton),
    _capture.capture_reference,
    lambda outputs, inputs, residuals, flag: None,
)
_CAPTURE_STATISTICS = _register(
    "capture_statistics(Tensor[] outputs, Tensor[] inputs, Tensor(a!)[] residuals, Tensor(b!)? flag, "
    "Tensor[] previous) -> Tensor",
    _with_triton(_capture.capture_triton),
    _capture.capture_reference,
    _fake_capture_statistics,
)
_PAIR_STATISTICS = _register(
    "pair_statistics(Tensor[] a, Tensor[] b) -> Tensor",
    _with_triton(_statistics.pair_statistics_triton),
    _statistics.pair_statistics_reference,
    _fake_pair_statistics,
)
_COMBINATION_ERROR = _register(
    "combination_error(Tensor target, Tensor[] terms, float[] coefficients) -> Tensor",
    _with_triton(_by_rows(_statistics.combination_error_triton)),
    _by_rows(_statistics.combination_error_reference),
    _fake_combination_error,
)
_LINEAR_COMBINATION = _register(
    "linear_combination(Tensor[] bases, Tensor[] residuals, float[] coefficients, Tensor? device_coefficients) "
    "-> Tensor[]",
    _with_triton(_by_streams(_combine.linear_combination_triton)),
    _by_streams(_combine.linear_combination_reference),
    _fake_linear_combination,
)
_BYTES: dict[str, Callable[..., int]] = {
    "capture": _capture.minimum_bytes,
    "pair_statistics": _statistics.pair_minimum_bytes,
    "combination_error": _statistics.combination_minimum_bytes,
    "linear_combination": _combine.minimum_bytes,
}
