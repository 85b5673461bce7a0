"""The one table of calls of ops: those that are measured, and forms that only tests need; their inputs in any layout.

A test runs a case by one implementation and by another, or on two devices, and compares with `assert_alike`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from layercache import ops
from layercache.ops.dispatch import Kernels
from layercache.tools.bench.case import Case, Inputs
from layercache.tools.bench.cases import CASES

LAYOUTS = ("dense", "strided", "misaligned")
# By op, how many of the inputs may be strided; of the others none.
STRIDED = {"capture": 2, "capture_compact": 2, "pair_statistics": 2, "row_statistics": 2, "linear_combination": 1}
STRIDED |= {"linear_map": 9, "router_lerp": 3, "modulate": 1, "combine_guidance": 2}
# Whose results come of a sum over a row, so that their last bit is not the same everywhere.
ROUNDED = {"modulate", "align", "combine_guidance"}
# Of those, cases whose first result is exact all the same.
EXACT = {"modulate in full", "guidance"}


def _flag(i: Inputs) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=i.gate.device)


def _captured(compared: bool, **how: Any) -> Callable[[Inputs], list[Tensor]]:
    def run(i: Inputs) -> list[Tensor]:
        flag, previous = _flag(i), [i.x[2], i.text[2]] if compared else None
        written = [i.out[0], i.text[3]]
        sums = ops.capture([i.x[0], i.text[0]], [i.x[1], i.text[1]], written, flag, previous, **how)
        return [*written, flag, *([] if sums is None else [sums])]

    return run


def _many_sets(i: Inputs) -> Tensor:
    """More that begin with the same term than are looked at together, others between them."""
    many = [[0.5 * k if j == k else 1.5 * (j == 0) for j in range(5)] for k in (1, 2, 3, 4, 1, 2, 3)]
    many[5:5] = [[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, -1.0, 0.0, 0.0]]
    return ops.combination_error(i.x[0], i.x[1:], many)


def _in_place(i: Inputs) -> list[Tensor]:
    """Five terms, coefficients on the device, a gate, and the result in the place of its base."""
    numbers, base = torch.tensor([1.3, -0.7, 0.1, 2.0, -0.4], device=i.gate.device), i.x[0].clone()
    return ops.linear_combination([base], [i.x[1:]], numbers, results=[base], gates=[i.gate.squeeze(1)])


def _codes(i: Inputs) -> dict[str, Any]:
    codes, scales = torch.empty_like(i.x[1], dtype=torch.uint8), i.x[1].new_empty(i.x[1].shape[:-1]).float()
    ops.capture_compact([i.x[1]], [i.x[0]], [codes], [scales])
    return {"codes": codes, "scales": scales}


def _codes_reused(i: Inputs) -> list[Tensor]:
    """Two terms of codes, and a linear map that has codes among its inputs."""
    codes, scales = _codes(i).values()
    (y,) = ops.linear_combination([i.x[0]], [[codes, codes]], [0.5, -2.0], scales=[[scales, scales]])
    matrix: list[list[float | None]] = [[1.0, 2.0, None], [None, 0.5, -1.0]]
    ops.linear_map([[i.x[0], codes, i.x[1]]], [i.out], matrix, [1.0, 4.0], [[None, scales, None]])
    return [scales, y, *i.out]


def _per_sample(i: Inputs) -> list[Tensor]:
    """Result and gradients with a gate, a residual and one weight for each entry of the batch."""
    fresh = i.x[0].detach().requires_grad_()
    beta = torch.linspace(0.1, 0.9, len(fresh), device=fresh.device).requires_grad_()
    out = ops.router_lerp(fresh, i.x[1].mul(0.5), beta, i.gate.squeeze(1), i.x[2])
    return [out.detach(), *torch.autograd.grad(out, [fresh, beta], i.x[2])]


def _modulated(i: Inputs) -> list[Tensor]:
    """With everything that modulate takes, the result in the place of the previous one."""
    z, y, v, third = i.x[2].clone(), i.out[0], i.gate.squeeze(1), i.gate.shape[-1] // 3
    _, sums = ops.modulate(
        i.x[0], v, i.gate, residuals=i.x[1:2], coefficients=[0.5], previous=z, segments=[third] if third else [],
        eps=1e-5, weight=v.select(0, 0), bias=v.select(0, -1), result=z, stream=y,
    )  # fmt: skip
    assert sums is not None
    return [y, z, sums]


def _modulated_codes(i: Inputs) -> Tensor:
    codes, scales = _codes(i).values()
    return ops.modulate(i.x[0], i.gate, i.gate, residuals=[codes], coefficients=[0.5], scales=[scales])[0]


def _decided(i: Inputs) -> list[Tensor]:
    numbers, flag = [i.gate.new_full((1,), number, dtype=torch.float32) for number in (0.2, 1.0, 0.1)], _flag(i)
    ops.decide(*numbers, flag, [1.0, 0.5], 2.0)
    return [numbers[2], flag]


def _case(name: str, op: str, tensors: int, run: Callable[[Inputs], Any], **others: Any) -> Case:
    """A form that is not measured; in float64 it runs by its reference."""
    return Case(name, op, tensors, run, run, passes=0, **others)


# In between they take every argument of every op.
UNMEASURED = (
    _case("capture of samples", "capture", 4, _captured(True, per_sample=True), outputs=1, text=True),
    _case("capture and norms of samples", "capture", 4, _captured(False, statistics=True, per_sample=True),
          outputs=1, text=True),
    _case("errors of many sets", "combination_error", 6, _many_sets),
    _case("gated reuse in place", "linear_combination", 6, _in_place),
    _case("codes reused", "linear_map", 2, _codes_reused, outputs=2),
    _case("pairs of samples", "pair_statistics", 4, lambda i: ops.pair_statistics(i.x[:2], i.x[2:], per_sample=True)),
    _case("eleven tensors", "gram", 11, lambda i: ops.gram(i.x)),
    _case("router lerp of samples", "router_lerp", 3, _per_sample, gradient=True),
    _case("modulate in full", "modulate", 3, _modulated, outputs=1),
    _case("modulate codes", "modulate", 2, _modulated_codes),
    _case("guidance", "combine_guidance", 2, lambda i: ops.combine_guidance(i.x[0], i.x[1], 4.0)),
    _case("row statistics of samples", "row_statistics", 2, lambda i: ops.row_statistics(i.x[0], i.x[1], True)),
    _case("decide", "decide", 1, _decided),
)  # fmt: skip
OP_CASES = (*CASES, *UNMEASURED)


def named(*names: str) -> list[Case]:
    return [case for case in OP_CASES if case.name in names]


def inputs_of(case: Case, shape: tuple[int, int, int], dtype: torch.dtype, layout: str = "dense") -> Inputs:
    """Inputs on the CPU, one channel a thousand times larger, as hidden states have.

    Those that may be are slices along the rows where the layout is ``"strided"``, and all are off by one element from
    alignment where it is ``"misaligned"``.
    """
    inputs = case.inputs(shape, dtype, torch.device("cpu"))
    for tensors in (inputs.x, inputs.text):
        for k, tensor in enumerate(tensors):
            tensor[..., shape[-1] // 2] *= 1e3
            batch, rows, channels = tensor.shape
            if layout == "strided" and k < STRIDED.get(case.op, 0):
                tensors[k] = tensor.new_zeros((batch, rows + k + 1, channels))[:, k + 1 :].copy_(tensor)
            if layout == "misaligned":
                tensors[k] = tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    return inputs


def copied(inputs: Inputs, device: str = "cpu") -> Inputs:
    """The same numbers with the same strides, in memory of their own, which begins at the same alignment."""

    def copy(tensor: Tensor) -> Tensor:
        whole = tensor.new_empty(tensor.untyped_storage().nbytes() // tensor.element_size(), device=device)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)

    lists = [list(map(copy, tensors)) for tensors in (inputs.x, inputs.text)]
    extra = {name: copy(tensor) for name, tensor in inputs.extra.items()}
    return Inputs(*lists, copy(inputs.gate), list(map(copy, inputs.out)), extra)


def results_of(case: Case, inputs: Inputs) -> list[Tensor]:
    """All that the case writes or returns."""
    with torch.set_grad_enabled(case.gradient):
        found = case.ours(inputs)
    return [t.detach().clone() for t in ([found] if isinstance(found, Tensor) else found)]


@contextlib.contextmanager
def by(implementation: str) -> Iterator[None]:
    """Within it all ops run by their ``reference``, or another of the implementations that `Kernels` have."""
    before = Kernels.choose
    Kernels.choose = lambda self, tensor: getattr(self, implementation)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Kernels.choose = before  # type: ignore[method-assign]


def assert_alike(case: Case, found: list[Tensor], expected: list[Tensor]) -> None:
    """Tensors bit by bit, unless a sum over a row is in them; sums to 2e-5 of the largest beside them."""
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        a, b, whole = a.cpu(), b.cpu(), a.dim() == 3
        assert a.dtype == b.dtype and a.shape == b.shape
        exact = case.op not in ROUNDED or (k == 0 and case.name in EXACT)
        if not a.dtype.is_floating_point or (whole and exact):
            assert torch.equal(a, b)
            continue
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.double().nan_to_num(), b.double().nan_to_num()
        # statistics of results that may differ by their last bit
        step = (1 if whole else 4) * torch.finfo(found[0].dtype).eps if case.op in ROUNDED else 0.0
        size = b.abs().amax(-1, keepdim=True) if b.numel() else b
        assert ((a - b).abs() <= (2e-5 + step) * size + 1e-30).all()
