"""The ops of a cached step, on any device: validated, registered with torch.library, sent to the right kernel.

Results have the same bits directly, under a dispatch mode and in a compiled graph. Nothing here waits for the device.
The registered ops ``torch.ops.layercache.*`` check their arguments as the functions do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from layercache.errors import OpInputError
from layercache.kernels import capture as _capture_kernels
from layercache.kernels import combine as _combine_kernels
from layercache.kernels import compact as _compact_kernels
from layercache.kernels import decisions as _decision_kernels
from layercache.kernels import guidance as _guidance_kernels
from layercache.kernels import modulate as _modulate_kernels
from layercache.kernels import moments as _moments_kernels
from layercache.kernels import router as _router_kernels
from layercache.kernels import statistics as _statistics_kernels
from layercache.ops import dispatch, forks, native
from layercache.ops.checks import MAX_STREAMS
from layercache.ops.combinations import linear_combination, linear_map
from layercache.ops.combinations import restore as restore
from layercache.ops.forecasts import (
    accumulate,
    add_forecast,
    capture_slope,
    euler_step,
    finite_difference,
    mean_velocity,
    newton_coefficients,
    taylor_coefficients,
    taylor_forecast,
    taylor_update,
)
from layercache.ops.modulation import combine_guidance, decide, modulate, row_statistics
from layercache.ops.residuals import capture, capture_compact
from layercache.ops.residuals import store as store
from layercache.ops.routers import router_lerp
from layercache.ops.statistics import MAX_ERROR_TERMS, align, combination_error, gram, pair_statistics

__all__ = [
    "MAX_ERROR_TERMS",
    "MAX_STREAMS",
    "MAX_TERMS",
    "OP_NAMES",
    "accumulate",
    "add_forecast",
    "align",
    "backend_for",
    "capture",
    "capture_compact",
    "capture_slope",
    "combination_error",
    "combine_guidance",
    "decide",
    "euler_step",
    "finite_difference",
    "gram",
    "linear_combination",
    "linear_map",
    "mean_velocity",
    "minimum_bytes",
    "modulate",
    "newton_coefficients",
    "pair_statistics",
    "router_lerp",
    "row_statistics",
    "taylor_coefficients",
    "taylor_forecast",
    "taylor_update",
]

MAX_TERMS = _combine_kernels.MAX_TERMS

forks.register()

_BYTES: dict[str, Callable[..., int]] = {
    "capture": _capture_kernels.minimum_bytes,
    "capture_compact": _compact_kernels.minimum_bytes,
    "pair_statistics": _statistics_kernels.pair_minimum_bytes,
    "combination_error": _statistics_kernels.combination_minimum_bytes,
    "linear_combination": _combine_kernels.minimum_bytes,
    "linear_map": _combine_kernels.map_minimum_bytes,
    "gram": _moments_kernels.gram_minimum_bytes,
    "align": _moments_kernels.align_minimum_bytes,
    "router_lerp": _router_kernels.minimum_bytes,
    "modulate": _modulate_kernels.minimum_bytes,
    "combine_guidance": _guidance_kernels.minimum_bytes,
    "row_statistics": _decision_kernels.minimum_bytes,
}
OP_NAMES = tuple(_BYTES)


def minimum_bytes(op: str, *arguments: Any, **options: Any) -> int:
    """Bytes of global memory that ``op(*arguments)`` must move at least: every tensor once.

    Raises:
        OpInputError: no op of that name.
    """
    if op not in _BYTES:
        raise OpInputError(f"there is no op {op!r}; the ops are {', '.join(OP_NAMES)}")
    return _BYTES[op](*arguments, **options)


def backend_for(op: str, device: str | torch.device) -> tuple[str, str]:
    """Which implementation ``op`` uses on ``device``: ``(backend, reason)``.

    Backends are ``"triton"``, ``"native"`` (compiled for the CPU), ``"reference"`` (eager PyTorch) and
    ``"unavailable"``. float64 tensors always take the reference.

    Raises:
        OpInputError: no op of that name.
    """
    if op not in OP_NAMES:
        raise OpInputError(f"there is no op {op!r}; the ops are {', '.join(OP_NAMES)}")
    kind = torch.device(device).type
    if kind == "cpu":
        if native.UNAVAILABLE:
            return "reference", f"{native.UNAVAILABLE}: PyTorch's own operations take their place"
        return "native", native.describe()
    if kind != "cuda":
        return "unavailable", f"there is no kernel for {kind!r} tensors; move them to the CPU or a CUDA or ROCm GPU"
    if trouble := dispatch.trouble_with_triton():
        return "unavailable", trouble
    return "triton", f"triton {importlib.import_module('triton').__version__}"
