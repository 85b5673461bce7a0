"""The compiled CPU path: the references' functions on `layercache._cpu`, which sees memory and sizes, not tensors."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from layercache.errors import OpInputError
from layercache.kernels.capture import statistics_count
from layercache.kernels.combine import Matrix, Scales, as_rows
from layercache.kernels.launching import new_like
from layercache.kernels.moments import ALIGNMENT, MAX_GAMMA

SMALL = 2**18  # bytes
number_of_threads: Callable[[], int] = torch.get_num_threads  # 1 in some forked processes, see forks.py

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or why there is none.

    It leaves the symbols of OpenMP to the library that torch has loaded already, so that both share one pool of
    threads; where torch has another runtime, the compiler's own is loaded.
    """
    if os.environ.get("LAYERCACHE_CPU") == "reference":
        return None, "LAYERCACHE_CPU=reference is set"
    try:
        return importlib.import_module("layercache._cpu"), ""
    except ImportError as error:
        reason = str(error)
    try:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("layercache._cpu"), ""
    except (ImportError, OSError):
        return None, f"the compiled CPU kernels do not load ({reason})"


_cpu, UNAVAILABLE = _load()
if _cpu is not None:
    _cpu.know_torch(_DTYPES, Tensor, OpInputError)


def describe() -> str:
    """Instruction set and number of threads."""
    assert _cpu is not None
    return f"{_cpu.instruction_set()}, {torch.get_num_threads()} threads"


def if_available(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function, or ``None`` where the extension is missing."""
    return None if _cpu is None else function


def by_samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors whose first dim counts samples."""
    return [t if t.dim() == 3 else t.reshape(t.shape[0], 1, -1) for t in tensors]


def _sums(rows: int, columns: int) -> Tensor:
    return torch.empty((rows, columns), dtype=torch.float32, device="cpu")


def capture(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    flag: Tensor | None = None,
    previous: Sequence[Tensor] | None = None,
    statistics: bool = False,
    per_sample: bool = False,
) -> Tensor | None:
    if flag is None and previous is None and not statistics and _is_small(outputs[0], residuals[0]):
        for s, output in enumerate(outputs):
            torch.sub(output, inputs[s], out=residuals[s])
        return None
    count = statistics_count(previous, statistics)
    samples, lists = 1, [outputs, inputs, residuals, previous or ()]
    if per_sample and count:
        samples, lists = outputs[0].shape[0], [by_samples(tensors) for tensors in lists]
    sums = _sums(len(outputs) * samples, count) if count else None
    bad = _cpu.capture(*lists, count, samples, flag is not None, number_of_threads(), sums)  # type: ignore
    if bad and flag is not None:
        flag.fill_(1)
    return sums


def capture_compact(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    flag: Tensor | None = None,
) -> None:
    threads = number_of_threads()
    for streams in zip(outputs, inputs, codes, scales, strict=True):
        bad = _cpu.capture_compact(*list(streams), flag is not None, threads)  # type: ignore[union-attr]
        if bad and flag is not None:
            flag.fill_(1)


def pair_statistics(a: Sequence[Tensor], b: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    samples = 1
    if per_sample:
        samples, a, b = a[0].shape[0], by_samples(a), by_samples(b)
    sums = _sums(len(a) * samples, 8)
    _cpu.pair_statistics(a, b, samples, number_of_threads(), sums)  # type: ignore[union-attr]
    return sums


def linear_combination(
    bases: Sequence[Tensor],
    residuals: Sequence[Sequence[Tensor]],
    coefficients: Sequence[float] | Tensor,
    results: Sequence[Tensor] | None = None,
    gates: Sequence[Tensor] | None = None,
    scales: Sequence[Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    values = coefficients.tolist() if isinstance(coefficients, Tensor) else coefficients
    if len(values) == 1 and values[0] == 1.0 and gates is None and scales is None:
        if _is_small(bases[0], residuals[0][0]):
            return [
                _sum_of_two(x, residuals[s][0], None if results is None else results[s]) for s, x in enumerate(bases)
            ]
    results = new_like(bases) if results is None else list(results)
    threads = number_of_threads()
    for s, (x, terms, y) in enumerate(zip(bases, residuals, results, strict=True)):
        gate = None if gates is None else as_rows(gates[s])
        scale = [] if scales is None else [None, *list(scales[s])]
        inputs = [x, *terms]
        _cpu.linear_map(inputs, [y], [1.0, *values], [], True, gate, scale, threads)  # type: ignore[union-attr]
    return results


def _is_small(tensor: Tensor, other: Tensor) -> bool:
    """Whether PyTorch's own sums and differences of these two are as fast, and take less to call."""
    return tensor.nbytes < SMALL and tensor.dtype == other.dtype


def _sum_of_two(x: Tensor, r: Tensor, result: Tensor | None) -> Tensor:
    if result is None:
        if x.is_contiguous():
            return torch.add(x, r)
        (result,) = new_like([x])
    return torch.add(x, r, out=result)


def linear_map(
    inputs: Sequence[Sequence[Tensor]],
    outputs: Sequence[Sequence[Tensor]],
    matrix: Matrix | Tensor,
    factors: Sequence[float] | None = None,
    scales: Scales | None = None,
) -> None:
    rows = matrix.tolist() if isinstance(matrix, Tensor) else matrix
    flat = [c for row in rows for c in row]
    threads = number_of_threads()
    for s, (stream, written) in enumerate(zip(inputs, outputs, strict=True)):
        lists = list(stream), list(written)
        scale = [] if scales is None else list(map(_optional, scales[s]))
        _cpu.linear_map(*lists, flat, list(factors or ()), False, None, scale, threads)  # type: ignore[union-attr]


def combination_error(target: Tensor, terms: Sequence[Tensor], coefficients: Sequence[Sequence[float]]) -> Tensor:
    flat = [c for row in coefficients for c in row]
    sums = _sums(len(coefficients), 4)
    _cpu.combination_error(target, terms, flat, number_of_threads(), sums)  # type: ignore[union-attr]
    return sums


def gram(tensors: Sequence[Tensor]) -> Tensor:
    sums = _sums(len(tensors), len(tensors))
    _cpu.gram(tensors, number_of_threads(), sums)  # type: ignore[union-attr]
    return sums


def align(x: Tensor, y: Tensor, probes: Sequence[Tensor], residuals: Sequence[Tensor]) -> Tensor:
    flat = [c for row in ALIGNMENT for c in row]
    tensors = [y, x, probes[1], probes[0]]
    sums = _cpu.linear_sums(tensors, flat, number_of_threads())  # type: ignore[union-attr]
    gamma = min(sums[0] / sums[2], MAX_GAMMA) if sums[2] > 0 and sums[0] > sums[2] else 1.0
    return linear_combination([x], [[residuals[1], residuals[0]]], [1.0 - gamma, gamma])[0]


def _optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor


def router_lerp(
    fresh: Tensor, cached: Tensor, beta: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    (out,) = new_like([fresh])
    gate = None if gate is None else as_rows(gate)
    inputs = fresh, cached, beta.reshape(-1).tolist(), _optional(gate), _optional(residual)
    _cpu.router_lerp(*inputs, out, number_of_threads())  # type: ignore[union-attr]
    return out


def router_lerp_backward(
    grad: Tensor, fresh: Tensor, cached: Tensor, beta: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    (out,) = new_like([fresh])
    gate = None if gate is None else as_rows(gate)
    inputs = grad, fresh, cached, beta.reshape(-1).tolist(), _optional(gate)
    sums = _cpu.router_lerp_backward(*inputs, out, number_of_threads())  # type: ignore[union-attr]
    return out, torch.tensor(sums, dtype=torch.float64, device="cpu").to(beta.dtype).view(beta.shape)


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
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
    z = new_like([x])[0] if result is None else result
    values = coefficients.tolist() if isinstance(coefficients, Tensor) else list(coefficients)
    bounds = [0, *segments, x.shape[-1]]
    sums = None if previous is None else _sums(len(bounds) - 1, 8)
    _cpu.modulate(  # type: ignore[union-attr]
        *[x, as_rows(scale), as_rows(shift), z],
        list(residuals),
        values,
        *map(_optional, (previous, weight, bias, stream)),
        bounds,
        eps,
        list(scales or ()),
        number_of_threads(),
        sums,
    )
    return z, sums


def guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: bool) -> Tensor:
    (out,) = new_like([cond])
    _cpu.guidance(cond, uncond, scale, rescale, out, number_of_threads())  # type: ignore[union-attr]
    return out


def row_statistics(a: Tensor, b: Tensor, per_sample: bool = False) -> Tensor:
    samples = a.shape[0] if per_sample else 1
    sums = _cpu.row_statistics(a, b, samples, number_of_threads())  # type: ignore[union-attr]
    rows = a.numel() // a.shape[-1] // samples
    return _from_row_sums(torch.tensor(sums, dtype=torch.float64, device="cpu").view(samples, 3), rows).float()


def _from_row_sums(sums: Tensor, rows: int) -> Tensor:
    """The three results from sums of ``q - 1``, ``(q - 1)^2`` and ``1 - cos`` over rows."""
    mean = sums[:, 0] / rows
    variance = (
        (sums[:, 1] - rows * mean * mean).clamp(min=0) / (rows - 1) if rows > 1 else torch.full_like(mean, torch.nan)
    )
    return torch.stack([1 + mean, variance.sqrt(), sums[:, 2] / rows], dim=1)


def decide(
    numerator: Tensor,
    denominator: Tensor,
    accumulated: Tensor,
    flag: Tensor,
    polynomial: Sequence[float],
    threshold: float,
) -> None:
    flag.fill_(_cpu.decide(numerator, denominator, accumulated, list(polynomial), threshold))  # type: ignore[union-attr]
