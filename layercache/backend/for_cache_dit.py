"""DBCache and TaylorSeer of cache-dit on our ops.

The probe's residual is not subtracted until it is compared, and then both happen in one pass; the two streams behind
the middle blocks are stored in one launch, and added in one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from cache_dit.caching.cache_blocks.pattern_base import CachedBlocks_Pattern_Base
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager
from cache_dit.caching.cache_contexts.calibrators.taylorseer import TaylorSeerState
from torch import Tensor

from layercache import ops
from layercache._utils.tensors import dense
from layercache.backend.patching import Replacement
from layercache.backend.primitives import apply_residuals, capture, differences
from layercache.ops.checks import FLOATS
from layercache.ops.forecasts import taylor_coefficients
from layercache.ops.pending import Pending

_WAITING = "_layercache_waiting"
MOST_DERIVATIVES = 7  # of a series, with the values themselves; one launch writes six


def replacements(sync: str) -> list[Replacement]:
    blocks, manager = CachedBlocks_Pattern_Base, CachedContextManager
    get_residual, similarity = blocks._get_Fn_residual, manager.similarity
    set_buffer, apply_cache = manager.set_Fn_buffer, manager.apply_cache
    derivative, approximate = TaylorSeerState.derivative, TaylorSeerState.approximate

    def residual_of(self: Any, original_hidden_states: Tensor, hidden_states: Tensor) -> Tensor:
        same_shape = original_hidden_states.shape == hidden_states.shape
        if not same_shape or original_hidden_states.device != hidden_states.device:
            return get_residual(self, original_hidden_states, hidden_states)
        residual = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        setattr(residual, _WAITING, (hidden_states, original_hidden_states))
        return residual

    def compare(
        self: Any, t1: Tensor, t2: Tensor, *, threshold: float, parallelized: bool = False, prefix: str = "Fn"
    ) -> bool:
        plain = 0.0 < threshold < 1.0 and t1.shape == t2.shape and self.get_important_condition_threshold() <= 0.0
        follows = self.enable_separate_cfg() and self.is_separate_cfg_step() and not self.cfg_diff_compute_separate()
        if not plain or (follows and self.get_current_step_residual_diff() is not None):
            _settle(t2)
            return similarity(self, t1, t2, threshold=threshold, parallelized=parallelized, prefix=prefix)
        sums = _sums(t1, t2)
        if parallelized:
            dist.all_reduce(sums)
        difference = _number(self, sums[0] / sums[1], sync, prefix)
        if difference is None:
            return False
        self.add_residual_diff(difference)
        return difference < threshold

    def keep(self: Any, buffer: Tensor, prefix: str = "Fn") -> None:
        if buffer is not None:
            _settle(buffer)
        set_buffer(self, buffer, prefix)

    def add(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        prefix: str = "Bn",
        encoder_prefix: str = "Bn_encoder",
    ) -> tuple[Tensor, Tensor | None]:
        both = encoder_hidden_states is not None
        if not self.is_cache_residual() or (both and not self.is_encoder_cache_residual()):
            return apply_cache(self, hidden_states, encoder_hidden_states, prefix, encoder_prefix)
        stored = [self.get_Bn_buffer(prefix) if "Bn" in prefix else self.get_Fn_buffer(prefix)]
        streams = [hidden_states]
        if both:
            beside = self.get_Bn_encoder_buffer if "Bn" in encoder_prefix else self.get_Fn_encoder_buffer
            residual = beside(encoder_prefix)
            if residual is not None:
                streams.append(encoder_hidden_states)  # type: ignore[arg-type]
                stored.append(residual)
        assert stored[0] is not None, f"{prefix}_buffer must be set before"
        found = apply_residuals([dense(t) for t in streams], [dense(r) for r in stored])
        return found[0], found[1] if len(found) == 2 else encoder_hidden_states

    def derivatives(state: Any, value: Any) -> list[Any]:
        elapsed = state.current_step - state.last_non_approximated_step
        if elapsed and _takes([value, *(d for d in state.state["dY_prev"] if d is not None)]):
            return _derivative(state, value)
        return derivative(state, value)

    def approximation(state: Any) -> Any:
        known = [d for d in state.state["dY_current"] if d is not None]
        return _approximate(state, known) if known and _takes(known) else approximate(state)

    disable = torch.compiler.disable
    return [
        (blocks, "_get_Fn_residual", disable(residual_of)),
        (blocks, "call_Mn_blocks", _call_middle),
        (manager, "similarity", disable(compare)),
        (manager, "set_Fn_buffer", disable(keep)),
        (manager, "apply_cache", disable(add)),
        (TaylorSeerState, "derivative", disable(derivatives)),
        (TaylorSeerState, "approximate", disable(approximation)),
    ]


def _settle(residual: Tensor) -> None:
    """Subtracts what was put off."""
    waiting = residual.__dict__.pop(_WAITING, None)
    if waiting is not None:
        output, before = waiting
        ops.capture([dense(output)], [dense(before)], [residual])


def _sums(previous: Tensor, residual: Tensor) -> Tensor:
    """``sum|previous - residual|`` and ``sum|previous|``; subtracts on the way what was put off."""
    waiting = residual.__dict__.pop(_WAITING, None)
    if waiting is None:
        return ops.pair_statistics([dense(previous)], [dense(residual)])[0, :2].contiguous()
    output, before = waiting
    found = ops.capture([dense(output)], [dense(before)], [residual], previous=[dense(previous)])
    assert found is not None
    return found[0, 2:6:2].contiguous()


def _number(manager: Any, difference: Tensor, sync: str, prefix: str) -> float | None:
    if sync == "step":
        return float(difference)
    waiting = manager.__dict__.setdefault("_layercache_pending", {})
    key = id(manager.get_context()), prefix, manager.is_separate_cfg_step()
    before, waiting[key] = waiting.get(key), Pending(difference)
    return before.value()[0] if before is not None and before.ready() else None


def _call_middle(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None, *args: Any, **kwargs: Any
) -> Any:
    image, text = hidden_states, encoder_hidden_states
    for block in self._Mn_blocks():
        output = block(image, text, *args, **kwargs)
        image, text = self._process_block_outputs(output, text)
    image = image.contiguous()
    both = text is not None and encoder_hidden_states is not None
    text = text.contiguous() if both else text  # type: ignore[union-attr]
    outputs, inputs = ([image, text], [hidden_states, encoder_hidden_states]) if both else ([image], [hidden_states])
    residuals = capture(outputs, [dense(t) for t in inputs])  # type: ignore[arg-type]
    return image, text, residuals[0], residuals[1] if both else None


def _takes(values: list[Any]) -> bool:
    """Whether the ops take a series: tensors with dims, all of one kind, and no more than one launch reads.

    cache-dit also takes NumPy scalars, tensors without dims and whatever else can be added.
    """
    first = values[0]
    return len(values) <= MOST_DERIVATIVES and all(
        isinstance(value, Tensor)
        and value.dtype in FLOATS
        and (value.dtype, value.device) == (first.dtype, first.device)
        and (value.is_cpu or (value.is_cuda and value.dtype != torch.float64))
        and value.layout == torch.strided
        and value.dim() > 0
        and value.numel() > 0
        and not (value.requires_grad and torch.is_grad_enabled())
        for value in values
    )


def _derivative(state: Any, tensor: Tensor) -> list[Tensor | None]:
    elapsed = state.current_step - state.last_non_approximated_step
    older = state.state["dY_prev"]
    if older[0] is not None and older[0].shape != tensor.shape:
        state.reset()
        older = state.state["dY_prev"]
    known = 0
    while known < state.n_derivatives and older[known] is not None and state.current_step > 1:
        known += 1
    derivatives = differences(tensor, older[:known], elapsed, tensor.dtype) if known else []
    return [tensor, *derivatives, *[None] * (state.n_derivatives - known)]


def _approximate(state: Any, known: list[Tensor]) -> Tensor:
    elapsed = state.current_step - state.last_non_approximated_step
    return ops.taylor_forecast([dense(d) for d in known], taylor_coefficients(len(known) - 1, float(elapsed)))
