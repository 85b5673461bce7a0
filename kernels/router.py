"""Learning-to-Cache's router: a module's output mixed with its cached one, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .combine import as_rows
from .deferred import jit
from .launching import Launch, Planned, new_like, outline
from .tiles import (
    MAX_PROGRAMS,
    accumulator_dtype,
    lay_out_launch,
    nbytes,
    new_partials,
    offsets_at,
    plan_fold,
    share_of,
)

if TYPE_CHECKING:
    import triton.language as tl


@jit()
def _router_lerp_fwd_kernel(
    fresh_ptr,
    cached_ptr,
    beta_ptr,
    gate_ptr,
    residual_ptr,
    out_ptr,
    sizes,
    ENTRIES: tl.constexpr,
    FIELDS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
):
    """Tensors in the order of their strides: fresh, cached, out, then gate and residual, if there are any."""
    pid = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    groups, programs, _ = share_of(sizes, pid, ENTRIES, FIELDS)
    beta = tl.load(beta_ptr + sample)
    for start in range(pid * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        f_off = offsets_at(group, sample, 0, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        c_off = offsets_at(group, sample, 1, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        o_off = offsets_at(group, sample, 2, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        f = tl.load(fresh_ptr + f_off, mask=live, other=0.0).to(tl.float32)
        c = tl.load(cached_ptr + c_off, mask=live, other=0.0).to(tl.float32)
        # from the nearer end, so that 0 gives c and 1 gives f bit by bit
        o = tl.where(beta < 0.5, c + beta * (f - c), f - (1.0 - beta) * (f - c))
        if gate_ptr is not None:
            g_off = offsets_at(group, sample, 3, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
            o = tl.load(gate_ptr + g_off, mask=live, other=0.0).to(tl.float32) * o
        if residual_ptr is not None:
            x_off = offsets_at(group, sample, 4, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
            o = tl.load(residual_ptr + x_off, mask=live, other=0.0).to(tl.float32) + o
        tl.store(out_ptr + o_off, o.to(out_ptr.dtype.element_ty), mask=live)


@jit()
def _router_lerp_bwd_kernel(
    grad_ptr,
    fresh_ptr,
    cached_ptr,
    beta_ptr,
    gate_ptr,
    grad_fresh_ptr,
    partials_ptr,
    sizes,
    ENTRIES: tl.constexpr,
    FIELDS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    VEC: tl.constexpr,
    R: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Tensors in the order of their strides: grad, fresh, cached, grad_fresh, then the gate, if there is one."""
    pid = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    groups, programs, _ = share_of(sizes, pid, ENTRIES, FIELDS)
    beta = tl.load(beta_ptr + sample)
    total = tl.zeros([R], tl.float32)
    for start in range(pid * R, groups, programs * R):
        group = start + tl.arange(0, R)
        live = (group < groups)[:, None]
        g_off = offsets_at(group, sample, 0, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        f_off = offsets_at(group, sample, 1, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        c_off = offsets_at(group, sample, 2, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        d_off = offsets_at(group, sample, 3, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
        grad = tl.load(grad_ptr + g_off, mask=live, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            off = offsets_at(group, sample, 4, sizes, pid, ENTRIES, FIELDS, CONTIGUOUS, VEC)
            grad = tl.load(gate_ptr + off, mask=live, other=0.0).to(tl.float32) * grad
        f = tl.load(fresh_ptr + f_off, mask=live, other=0.0).to(tl.float32)
        c = tl.load(cached_ptr + c_off, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_fresh_ptr + d_off, (beta * grad).to(grad_fresh_ptr.dtype.element_ty), mask=live)
        total += tl.sum(grad * (f - c), 1)
    tl.store(partials_ptr + sample * MAX_PROGRAMS + pid, tl.sum(total, 0))


@Planned
def router_lerp_triton(
    fresh: Tensor,
    cached: Tensor,
    beta: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    groups: int | None = None,
) -> Callable[..., Tensor]:
    """`router_lerp_reference` in one launch.

    Args:
        groups: 16-byte groups per tile, a power of two.
    """
    if not fresh.numel():
        return lambda fresh, *others: new_like([fresh])[0]
    wide = fresh if gate is None else as_rows(gate).expand(fresh.shape)
    addressed = [fresh, cached, outline(fresh), wide, fresh if residual is None else residual]
    layout = lay_out_launch([addressed], (), groups, beta.numel())
    launch, sizes = Launch(_router_lerp_fwd_kernel, layout.grid, **layout.constants), layout.sizes

    def run(fresh, cached, beta, gate=None, residual=None):
        (out,) = new_like([fresh])
        launch(fresh, cached, beta, gate, residual, out, sizes)
        return out

    return run


@Planned
def router_lerp_backward_triton(
    grad: Tensor,
    fresh: Tensor,
    cached: Tensor,
    beta: Tensor,
    gate: Tensor | None = None,
    groups: int | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`router_lerp_backward_reference` in one launch and a second tiny one."""
    if not fresh.numel():
        return lambda grad, fresh, cached, beta, gate=None: (new_like([fresh])[0], torch.zeros_like(beta))
    samples = beta.numel()
    wide = fresh if gate is None else as_rows(gate).expand(fresh.shape)
    layout = lay_out_launch([[grad, fresh, cached, outline(fresh), wide]], (), groups, samples, sums=True)
    launch = Launch(_router_lerp_bwd_kernel, layout.grid, MAX_PROGRAMS=MAX_PROGRAMS, **layout.constants)
    sizes, fold = layout.sizes, plan_fold(layout.programs, 1, samples=samples, shape=beta.shape)

    def run(grad, fresh, cached, beta, gate=None):
        (grad_fresh,) = new_like([fresh])
        partials = new_partials(samples, fresh.device)
        launch(grad, fresh, cached, beta, gate, grad_fresh, partials, sizes)
        return grad_fresh, fold(partials)

    return run


def router_lerp_reference(
    fresh: Tensor, cached: Tensor, beta: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """``o = beta * f + (1 - beta) * c``; with a gate and a residual ``x + gate * o``.

    In fp32 (fp64 for fp64), rounded once. Computed from the nearer end, ``c + beta * (f - c)`` below one half and
    ``f - (1 - beta) * (f - c)`` from there, so that 0 gives c and 1 gives f bit by bit.

    Args:
        fresh, cached: f and c, [batch, rows, channels], last dim contiguous.
        beta: fp32 [1] or [batch] (fp64 for fp64).
        gate: [batch, 1, channels] or [batch, channels].
        residual: x, like f.

    Returns:
        A new contiguous tensor in the dtype of f.

    Source: docs/methods.md, Learning-to-Cache. Bytes: 3 S, 4 S with a residual.
    """
    accumulator = accumulator_dtype(fresh.dtype)
    f, c = fresh.to(accumulator), cached.to(accumulator)
    weight = _broadcast(beta, fresh)
    o = torch.where(weight < 0.5, c + weight * (f - c), f - (1 - weight) * (f - c))
    if gate is not None:
        o = as_rows(gate).to(accumulator) * o
    if residual is not None:
        o = residual.to(accumulator) + o
    return o.to(fresh.dtype).contiguous()


def router_lerp_backward_reference(
    grad: Tensor, fresh: Tensor, cached: Tensor, beta: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``df = beta * do`` and ``dbeta = sum do * (f - c)`` (per sample if beta is), with ``do = gate * grad``.

    Cached output and gate are constants, and the residual's gradient is ``grad`` itself.

    Returns:
        df in the dtype of f, contiguous; dbeta in the dtype and shape of beta.

    Source: docs/methods.md, Formulas of the ops. Bytes: 4 S.
    """
    accumulator = accumulator_dtype(fresh.dtype)
    inner = grad.to(accumulator)
    if gate is not None:
        inner = as_rows(gate).to(accumulator) * inner
    products = inner.double() * (fresh.to(accumulator) - cached.to(accumulator)).double()
    total = products.flatten(1).sum(1) if beta.numel() > 1 else products.sum()
    return (_broadcast(beta, fresh) * inner).to(fresh.dtype).contiguous(), total.to(beta.dtype).view(beta.shape)


def _broadcast(beta: Tensor, model: Tensor) -> Tensor:
    return beta.view(-1, *([1] * (model.dim() - 1)))


def minimum_bytes(
    fresh: Tensor, cached: Tensor, beta: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
) -> int:
    """Bytes that must move: fresh, cached, gate and residual once in, the result once out."""
    return nbytes(t for t in (fresh, cached, fresh, gate, residual) if t is not None)
