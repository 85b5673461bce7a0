"""Kernels of caches for diffusion transformers: store a residual, measure how it changed, add and extend it.

Tensors are [batch, rows, channels] or of fewer dims, in fp32, fp16 or bf16. Sums are in fp32. On GPUs every op is
one or two launches of Triton kernels; elsewhere plain PyTorch. Nothing here has a gradient or waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._namespace import NAMESPACE
from .capture import capture_reference, capture_triton
from .combine import linear_combination_reference, linear_combination_triton
from .deferred import has_triton
from .guidance import guidance_reference, guidance_triton
from .moments import gram_reference, gram_triton
from .statistics import pair_statistics_reference, pair_statistics_triton

__all__ = ["capture", "gram", "guidance", "linear_combination", "pair_statistics"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_library = torch.library.Library(NAMESPACE, "DEF")  # of this build alone, so that others can be loaded beside it


def _either(tensor: Tensor, triton: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    launches = tensor.device.type != "cpu" or (_INTERPRETED and has_triton())
    return triton if launches and tensor.dtype != torch.float64 else reference


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As the kernels take them: channels side by side."""
    return [t if t.dim() and t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CPU", "CUDA", "XPU"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _linear_combination(bases: list[Tensor], residuals: list[Tensor], coefficients: list[float]) -> list[Tensor]:
    count = len(coefficients)
    terms = [t.contiguous() for t in residuals]
    streams = [terms[s * count : (s + 1) * count] for s in range(len(bases))]
    run = _either(bases[0], linear_combination_triton, linear_combination_reference)
    return run(_rows(bases), streams, tuple(coefficients))


def _capture(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    residuals = _like(outputs)
    _either(outputs[0], capture_triton, capture_reference)(_rows(outputs), _rows(inputs), residuals)
    return residuals


def _pair_statistics(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return _either(a[0], pair_statistics_triton, pair_statistics_reference)(_rows(a), _rows(b))


def _gram(tensors: list[Tensor]) -> Tensor:
    return _either(tensors[0], gram_triton, gram_reference)([t.contiguous() for t in tensors])


def _guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: bool) -> Tensor:
    return _either(cond, guidance_triton, guidance_reference)(*_rows((cond, uncond)), scale, rescale)


def _sums(tensor: Tensor, *shape: int) -> Tensor:
    return tensor.new_empty(shape, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)


_combine_op = _register(
    "linear_combination(Tensor[] bases, Tensor[] residuals, float[] coefficients) -> Tensor[]",
    _linear_combination,
    lambda bases, residuals, coefficients: _like(bases),
)
_capture_op = _register(
    "capture(Tensor[] outputs, Tensor[] inputs) -> Tensor[]", _capture, lambda outputs, inputs: _like(outputs)
)
_pair_op = _register(
    "pair_statistics(Tensor[] a, Tensor[] b) -> Tensor", _pair_statistics, lambda a, b: _sums(a[0], len(a), 8)
)
_gram_op = _register(
    "gram(Tensor[] tensors) -> Tensor", _gram, lambda tensors: _sums(tensors[0], len(tensors), len(tensors))
)
_guidance_op = _register(
    "guidance(Tensor cond, Tensor uncond, float scale, bool rescale) -> Tensor",
    _guidance,
    lambda cond, uncond, scale, rescale: _like([cond])[0],
)


def linear_combination(
    bases: Sequence[Tensor], residuals: Sequence[Sequence[Tensor]], coefficients: Sequence[float]
) -> list[Tensor]:
    """``x_s + sum_k c_k r_sk`` for all streams s in one launch, rounded once.

    Args:
        bases: x_s, all of one dtype.
        residuals: per stream its r_sk, of x_s's shape: 1 to 8 of them, as many for every stream.
        coefficients: c_k.

    Raises:
        ValueError: the numbers of streams or of terms differ.
    """
    if len(residuals) != len(bases) or any(len(stream) != len(coefficients) for stream in residuals):
        raise ValueError("linear_combination takes a list of residuals per base, and a coefficient per residual")
    return _combine_op(list(bases), [r for stream in residuals for r in stream], [float(c) for c in coefficients])


def capture(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Residuals ``output_s - input_s`` of all streams in one launch."""
    return _capture_op(list(outputs), list(inputs))


def pair_statistics(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Per pair ``{sum|a-b|, sum|a|, sum|b|, sum (a-b)^2, sum a^2, sum b^2, sum a*b, max|a-b|}``, fp32 [pairs, 8]."""
    return _pair_op(list(a), list(b))


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """``G_ij = sum x_i * x_j`` of tensors of one shape and dtype, fp32 [n, n]."""
    return _gram_op(list(tensors))


def guidance(cond: Tensor, uncond: Tensor, scale: float, rescale: bool = False) -> Tensor:
    """``v = uncond + scale * (cond - uncond)``; with ``rescale`` each row has the norm of that of ``cond``."""
    return _guidance_op(cond, uncond, float(scale), bool(rescale))
