"""FirstBlockCache and TaylorSeer of diffusers on our ops.

A first-block cache compares and stores its probe in one pass, stores both streams of the tail in one launch, and adds
them in one. A Taylor expansion is one launch per tensor, to update and to predict.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import first_block_cache, taylorseer_cache
from torch import Tensor

from layercache import ops
from layercache._utils.tensors import dense
from layercache.backend.patching import Replacement
from layercache.backend.primitives import as_rows, capture, differences, probe
from layercache.ops.forecasts import taylor_coefficients
from layercache.ops.pending import Pending


def replacements(sync: str) -> list[Replacement]:
    def head(hook: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run_head(hook, sync, args, kwargs)

    return [
        (first_block_cache.FBCHeadBlockHook, "new_forward", head),
        (first_block_cache.FBCBlockHook, "new_forward", _run_block),
        (taylorseer_cache.TaylorSeerState, "update", _update),
        (taylorseer_cache.TaylorSeerState, "predict", torch.compiler.disable(_predict)),
    ]


def _argument(hook: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return hook._metadata._get_parameter_from_args_kwargs(name, args, kwargs)


def _streams(hook: Any, output: Any) -> list[Tensor]:
    """Image, and text where the block gives it."""
    if not isinstance(output, tuple):
        return [output]
    found = [output[hook._metadata.return_hidden_states_index]]
    if hook._metadata.return_encoder_hidden_states_index is not None:
        found.append(output[hook._metadata.return_encoder_hidden_states_index])
    return found


def _like(hook: Any, output: Any, streams: list[Tensor]) -> Any:
    """The streams as the block gives them."""
    if not isinstance(output, tuple):
        return streams[0]
    parts = list(output)
    parts[hook._metadata.return_hidden_states_index] = streams[0]
    if len(streams) == 2:
        parts[hook._metadata.return_encoder_hidden_states_index] = streams[1]
    return tuple(parts)


def _run_head(hook: Any, sync: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    before = _argument(hook, "hidden_states", args, kwargs)
    output = hook.fn_ref.original_forward(*args, **kwargs)
    state = hook.state_manager.get_state()
    streams = _streams(hook, output)
    previous = state.head_block_residual
    residual, change = _probe(streams[0], before, previous)
    state.should_compute = _must_compute(state, change, hook.threshold, sync)
    if not state.should_compute:
        stored = [r for r in state.tail_block_residuals if r is not None]
        return _like(hook, output, _added(streams, stored))
    state.head_block_output = streams
    state.head_block_residual = residual
    return output


def _probe(output: Tensor, before: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if previous is not None and previous.shape != output.shape:
        raise ValueError(f"the probe has shape {tuple(output.shape)} after {tuple(previous.shape)}; reset the cache")
    return probe(dense(output), dense(before), previous)


@torch.compiler.disable
def _must_compute(state: Any, change: Tensor | None, threshold: float, sync: str) -> bool:
    if sync == "step":
        return change is None or float(change) > threshold
    pending = getattr(state, "_layercache_pending", None)
    state._layercache_pending = None if change is None else Pending(change)
    if pending is None or state.tail_block_residuals is None or not pending.ready():
        return True
    return pending.value()[0] > threshold


def _added(streams: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    advanced, others = streams[: len(residuals)], streams[len(residuals) :]
    if not _same_shapes(advanced, residuals):
        return [stream + residual for stream, residual in zip(advanced, residuals, strict=True)] + others
    return ops.linear_combination([dense(stream) for stream in advanced], [[r] for r in residuals], (1.0,)) + others


def _same_shapes(streams: list[Tensor], others: list[Tensor]) -> bool:
    """False where blocks arrange their stream otherwise in between (Latte), which diffusers lets torch broadcast."""
    return all(stream.shape == other.shape for stream, other in zip(streams, others, strict=True))


def _run_block(hook: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    state = hook.state_manager.get_state()
    if state.should_compute:
        output = hook.fn_ref.original_forward(*args, **kwargs)
        if hook.is_tail:
            streams = _streams(hook, output)
            before = state.head_block_output[: len(streams)]
            if _same_shapes(streams, before):
                residuals = capture([dense(t) for t in streams], [dense(t) for t in before])
            else:
                residuals = [after - first for after, first in zip(streams, before, strict=True)]
            state.tail_block_residuals = (residuals[0], residuals[1] if len(residuals) == 2 else None)
        return output
    image = _argument(hook, "hidden_states", args, kwargs)
    if hook._metadata.return_encoder_hidden_states_index is None:
        return image
    passed: list[Any] = [None, None]
    passed[hook._metadata.return_hidden_states_index] = image
    passed[hook._metadata.return_encoder_hidden_states_index] = _argument(hook, "encoder_hidden_states", args, kwargs)
    return tuple(passed)


@torch.compiler.disable
def _update(state: Any, outputs: tuple[Tensor, ...]) -> None:
    state.module_dtypes = tuple(output.dtype for output in outputs)
    state.device = outputs[0].device
    if state.is_inactive:
        state.inactive_shapes = tuple(output.shape for output in outputs)
        state.last_update_step = state.current_step
        return
    elapsed = None if state.last_update_step is None else state.current_step - state.last_update_step
    if elapsed == 0:
        raise ValueError("Delta step cannot be zero for TaylorSeer update.")
    for index, features in enumerate(outputs):
        older = state.taylor_factors.get(index, {}) if elapsed else {}
        state.taylor_factors[index] = _differences(
            features, older, elapsed, state.max_order, state.taylor_factors_dtype
        )
    state.last_update_step = state.current_step


def _differences(
    features: Tensor, older: dict[int, Tensor], elapsed: int | None, order: int, dtype: torch.dtype
) -> dict[int, Tensor]:
    """F_0 .. F_m, from the old ones; as many as there is something to take a difference with."""
    known = 0
    while elapsed and known < order and known in older and older[known].shape == features.shape:
        known += 1
    if not known:
        return {0: features.to(dtype)}
    kept = [older[q] for q in range(1, known + 1) if q in older]
    derivatives = differences(features, [older[q] for q in range(known)], elapsed or 1, dtype, kept)
    return dict(enumerate([features.to(dtype), *derivatives]))


def _predict(state: Any) -> list[Tensor]:
    if state.last_update_step is None:
        raise ValueError("Cannot predict without prior initialization/update.")
    if state.is_inactive:
        if state.inactive_shapes is None:
            raise ValueError("Inactive shapes not set during prediction.")
        shapes = zip(state.inactive_shapes, state.module_dtypes, strict=False)
        return [torch.zeros(shape, dtype=dtype, device=state.device) for shape, dtype in shapes]
    if not state.taylor_factors:
        raise ValueError("Taylor factors empty during prediction.")
    offset = float(state.current_step - state.last_update_step)
    found = []
    for index, dtype in zip(state.taylor_factors, state.module_dtypes, strict=False):
        factors = list(state.taylor_factors[index].values())
        result = torch.empty_like(factors[0], dtype=dtype, memory_format=torch.contiguous_format)
        coefficients: list[list[float | None]] = [list(taylor_coefficients(len(factors) - 1, offset))]
        ops.linear_map([[as_rows(f) for f in factors]], [[as_rows(result)]], coefficients)
        found.append(result)
    return found
