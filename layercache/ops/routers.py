"""Learning-to-Cache's router, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layercache.errors import OpInputError
from layercache.kernels import router as kernels
from layercache.ops import native
from layercache.ops.checks import check_dense, check_gate, check_kind, check_layout, check_tensor, fail
from layercache.ops.dispatch import Kernels, register, through_registry


def router_lerp(
    fresh: Tensor, cached: Tensor, beta: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """``o = beta * fresh + (1 - beta) * cached``; with a gate and a residual ``residual + gate * o``; differentiable.

    In fp32, rounded once. A beta of 0 gives ``cached`` and 1 gives ``fresh`` bit by bit. Gradients reach ``fresh``,
    ``beta`` and ``residual``; cached output and gate are constants.

    Args:
        fresh, cached: a module's output now and when it was last computed, [batch, rows, channels] of one dtype; last
            dim contiguous, the others may be strided; may be empty.
        beta: fp32 on the same device (fp64 for fp64), one number, or one per entry of the batch.
        gate: [batch, 1, channels] or [batch, channels], in the dtype of ``fresh``.
        residual: like ``fresh``.

    Returns:
        A new contiguous tensor in the dtype of ``fresh``.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Learning-to-Cache. Bytes: 3 S, with a residual 4 S; backward 4 S.
    """
    given = fresh, cached, beta, gate, residual
    found = FORWARD_KERNELS.again(given)
    if found is not NotImplemented:
        return found
    with_gradient = torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in given)
    if with_gradient and not through_registry(given):
        return _RouterLerp.apply(*_check(*given))
    return FORWARD_KERNELS.first(given)


def _check(
    fresh: Any, cached: Any, beta: Any, gate: Any, residual: Any, op: str = "router_lerp"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    check_kind(op, "fresh", fresh)
    if fresh.dim() != 3:
        fail(op, "fresh", f"of shape {tuple(fresh.shape)}", "[batch, rows, channels]")
    check_layout(op, "fresh", fresh, contiguous=False)
    check_tensor(op, "cached", 0, cached, "fresh", fresh, fresh.dtype)
    if residual is not None:
        check_tensor(op, "residual", 0, residual, "fresh", fresh, fresh.dtype)
    if gate is not None:
        check_gate(op, "gate", gate, fresh.dtype, fresh, "fresh")
    if isinstance(beta, Tensor):
        check_dense(op, "beta", beta)
    if not isinstance(beta, Tensor) or beta.dtype != _beta_dtype(fresh) or beta.device != fresh.device:
        found = f"{beta.dtype} on {beta.device}" if isinstance(beta, Tensor) else f"a {type(beta).__name__}"
        fail(op, "beta", found, f"a {_beta_dtype(fresh)} tensor on {fresh.device}")
    if beta.numel() not in (1, fresh.shape[0]) or not beta.is_contiguous():
        fail(
            op, "beta", f"of shape {tuple(beta.shape)}", f"one number, or {fresh.shape[0]}, one per entry of the batch"
        )
    if torch.is_grad_enabled():
        for name, constant in (("cached", cached), ("gate", gate)):
            if constant is not None and constant.requires_grad:
                raise OpInputError(f"{op}: {name} requires grad, but gets none here; pass {name}.detach()")
    return fresh, cached, beta, gate, residual


def _check_backward(grad: Any, fresh: Any, cached: Any, beta: Any, gate: Any) -> tuple[Any, ...]:
    op = "router_lerp_backward"
    with torch.no_grad():
        _check(fresh, cached, beta, gate, None, op)
    check_tensor(op, "grad", 0, grad, "fresh", fresh, fresh.dtype)
    return grad, fresh, cached, beta, gate


def _beta_dtype(fresh: Tensor) -> torch.dtype:
    return torch.float64 if fresh.dtype == torch.float64 else torch.float32


def _contiguous_rows(grad: Tensor) -> Tensor:
    """Autograd may hand over expanded gradients, whose last dim is not contiguous."""
    return grad if grad.is_contiguous() or (grad.dim() == 3 and grad.stride(-1) == 1) else grad.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    fresh, cached, beta, gate, residual = inputs
    ctx.save_for_backward(fresh, cached, beta, gate)
    ctx.has_residual = residual is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    fresh, cached, beta, gate = ctx.saved_tensors
    rows = _contiguous_rows(grad)
    if through_registry([rows, fresh]):
        grad_fresh, grad_beta = ROUTER_LERP_BACKWARD(rows, fresh, cached, beta, gate)
    else:
        grad_fresh, grad_beta = BACKWARD_KERNELS(rows, fresh, cached, beta, gate)
    return grad_fresh, None, grad_beta, None, grad if ctx.has_residual else None


class _RouterLerp(torch.autograd.Function):
    """For plain execution: the registry's autograd costs three times as much."""

    @staticmethod
    def forward(fresh, cached, beta, gate, residual):  # type: ignore[no-untyped-def]
        return FORWARD_KERNELS(fresh, cached, beta, gate, residual)

    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


FORWARD_KERNELS = Kernels(
    _check, kernels.router_lerp_triton, kernels.router_lerp_reference, native.if_available(native.router_lerp)
)
register(
    "router_lerp(Tensor fresh, Tensor cached, Tensor beta, Tensor? gate, Tensor? residual) -> Tensor",
    FORWARD_KERNELS,
    lambda fresh, *others: fresh.new_empty(fresh.shape),
)
BACKWARD_KERNELS = Kernels(
    _check_backward,
    kernels.router_lerp_backward_triton,
    kernels.router_lerp_backward_reference,
    native.if_available(native.router_lerp_backward),
)
ROUTER_LERP_BACKWARD = register(
    "router_lerp_backward(Tensor grad, Tensor fresh, Tensor cached, Tensor beta, Tensor? gate) -> (Tensor, Tensor)",
    BACKWARD_KERNELS,
    lambda grad, fresh, cached, beta, gate: (fresh.new_empty(fresh.shape), torch.empty_like(beta)),
)
torch.library.register_autograd("layercache::router_lerp", _backward, setup_context=_save)
