"""Checks of arguments that the ops share. Each names the op, the argument, what it is and what it should be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from layercache.errors import OpInputError

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLOAT32_MAX = torch.finfo(torch.float32).max
MAX_STREAMS = 8
MAX_STRIDED = 2**31
_DENSE = torch.strided


def fail(op: str, argument: str, found: object, expected: str) -> NoReturn:
    raise OpInputError(f"{op}: {argument} is {found}; expected {expected}")


def describe(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"


def layout(tensor: Tensor) -> str:
    return f"of shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}"


def check_list(op: str, name: str, tensors: Any, least: int, most: int | None = None) -> None:
    if not isinstance(tensors, (list, tuple)) or len(tensors) < least or (most is not None and len(tensors) > most):
        expected = f"{least} or more" if most is None else str(least) if most == least else f"{least} to {most}"
        fail(op, name, describe(tensors), f"a list of {expected} tensors")


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not _DENSE:
        fail(op, name, tensor.layout, "a dense tensor")


def check_kind(op: str, name: str, tensor: Any) -> None:
    """Type, dtype and device of a tensor that sets them for others."""
    if not isinstance(tensor, Tensor):
        fail(op, name, describe(tensor), "a tensor")
    if tensor.layout is not _DENSE:
        check_dense(op, name, tensor)
    if tensor.dtype not in FLOATS:
        fail(op, name, tensor.dtype, "bfloat16, float16 or float32 (on the CPU also float64)")
    if not (tensor.is_cuda or tensor.is_cpu or tensor.is_meta):
        fail(op, name, f"on {tensor.device}", "a tensor on the CPU or a CUDA or ROCm GPU")
    if tensor.is_cuda and tensor.dtype == torch.float64:
        fail(op, name, "float64 on a GPU", "float32 or a narrower dtype; kernels compute in float32")


def check_layout(op: str, name: str, tensor: Tensor, contiguous: bool) -> None:
    if tensor.is_contiguous():
        return
    if contiguous:
        fail(op, name, layout(tensor), "a contiguous tensor")
    if tensor.dim() not in (2, 3) or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        fail(op, name, layout(tensor), "a contiguous tensor, or one of 2 or 3 dims whose last is contiguous")
    if tensor.numel() >= MAX_STRIDED:
        fail(op, name, f"strided with {tensor.numel()} elements", "fewer than 2^31, or a contiguous tensor")


def check_tensor(
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
    if not isinstance(tensor, Tensor) or dtype != torch.uint8:
        check_kind(op, name, tensor)
    check_dense(op, name, tensor)
    if tensor.shape != model.shape:
        fail(op, name, f"of shape {tuple(tensor.shape)}", f"{tuple(model.shape)} as {model_name}")
    if tensor.device != model.device:
        fail(op, name, f"on {tensor.device}", f"on {model.device} as {model_name}")
    if dtype is not None and tensor.dtype != dtype:
        fail(op, name, tensor.dtype, f"{dtype}, one dtype for all")
    check_layout(op, name, tensor, contiguous)


def check_streams(op: str, name: str, tensors: Any, most: int | None = None) -> None:
    """A list of tensors of one dtype and device."""
    check_list(op, name, tensors, 1, most)
    check_kind(op, f"{name}[0]", tensors[0])
    for s, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            fail(op, f"{name}[{s}]", describe(tensor), "a tensor")
        if tensor.dtype != tensors[0].dtype:
            fail(op, f"{name}[{s}]", tensor.dtype, f"{tensors[0].dtype} as {name}[0]")
        if tensor.device != tensors[0].device:
            fail(op, f"{name}[{s}]", f"on {tensor.device}", f"on {tensors[0].device} as {name}[0]")
        if not tensor.is_contiguous():
            check_layout(op, f"{name}[{s}]", tensor, contiguous=False)


def check_like(
    op: str,
    name: str,
    tensors: Any,
    model_name: str,
    models: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    contiguous: bool = False,
) -> None:
    """A list against the list whose shapes it must have; without ``dtype`` any, but one for all."""
    check_list(op, name, tensors, len(models), len(models))
    if dtype is None:
        check_kind(op, f"{name}[0]", tensors[0])
        dtype = tensors[0].dtype
    for s, tensor in enumerate(tensors):
        check_tensor(op, name, s, tensor, model_name, models[s], dtype, contiguous)


def host_coefficients(op: str, name: str, coefficients: Iterable[float], terms: int) -> list[float]:
    """Finite host numbers as floats, none of them beyond what fp32 holds, in which kernels compute."""
    try:
        values = [float(c) for c in coefficients]
    except (TypeError, ValueError):
        raise OpInputError(f"{op}: {name} is {coefficients!r}; expected {terms} numbers") from None
    if len(values) != terms:
        fail(op, name, f"{len(values)} numbers", f"{terms}, one per term")
    for value in values:
        if not abs(value) <= FLOAT32_MAX:  # nor is NaN
            fail(op, name, values, "finite numbers, at most 3.4e38 in size")
    return values


def check_no_grad(op: str, tensors: Iterable[Tensor]) -> None:
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:  # a generator would cost more than all the rest
        if tensor.requires_grad:
            raise OpInputError(
                f"{op}: a tensor requires grad and grad mode is on; expected inference, no op here has a gradient: "
                "call it under torch.no_grad()"
            )


def extent(tensor: Tensor) -> tuple[int, int]:
    """First address and the one after the last; of an empty tensor both are the same."""
    start = tensor.data_ptr()
    return start, start + span(tensor)


def span(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return elements * tensor.element_size()


def check_gate(op: str, name: str, gate: Any, dtype: Any, model: Tensor, model_name: str) -> None:
    """A gate [batch, 1, channels] or [batch, channels] that is broadcast over the rows of ``model``."""
    check_kind(op, name, gate)
    if gate.dtype != model.dtype and torch.float64 in (gate.dtype, model.dtype):
        fail(op, name, gate.dtype, f"float64 only with float64 {model_name}, here {model.dtype}")
    if model.dim() != 3:
        fail(op, model_name, f"of shape {tuple(model.shape)}", f"[batch, rows, channels] beside {name}")
    batch, _, channels = model.shape
    if tuple(gate.shape) not in ((batch, 1, channels), (batch, channels)):
        fail(op, name, f"of shape {tuple(gate.shape)}", f"({batch}, 1, {channels}) or ({batch}, {channels})")
    if gate.dtype != dtype:
        fail(op, name, gate.dtype, f"{dtype}, one dtype for all")
    if gate.device != model.device:
        fail(op, name, f"on {gate.device}", f"on {model.device} as {model_name}")
    if channels > 1 and gate.stride(-1) != 1:
        fail(op, name, layout(gate), "a tensor whose last dim is contiguous")


def check_written(
    op: str,
    name: str,
    written: Sequence[Tensor],
    own_name: str,
    own: Sequence[Sequence[Tensor]],
    others: Sequence[tuple[str, Sequence[Tensor]]],
) -> None:
    """Tensors that are written share memory with nothing, except exactly with a tensor in their own list."""
    read = [(own_name, t) for t in {id(t): t for stream in own for t in stream}.values()]
    read += [(other, t) for other, tensors in others for t in tensors]
    for s, target in enumerate(written):
        if not target.is_contiguous() and _repeats(target):
            fail(op, f"{name}[{s}]", layout(target), "a tensor that has every element in memory of its own")
        for k, other_target in enumerate(written):
            if k != s and overlap(target, other_target):
                fail(op, f"{name}[{s}]", f"in the same memory as {name}[{k}]", "memory of its own")
        for other, tensor in read:
            if overlap(target, tensor) and not _same_place(target, tensor, own[s]):
                fail(op, f"{name}[{s}]", f"in the same memory as one of {other}", "memory of its own")


def _repeats(tensor: Tensor) -> bool:
    """Whether several elements may be in one place, as in an expanded tensor."""
    dims = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach = 0  # of the last element of the dims so far
    for stride, size in dims:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _same_place(written: Tensor, tensor: Tensor, own: Sequence[Tensor]) -> bool:
    """Whether a written tensor is, element by element, one of its own."""
    same = written.data_ptr() == tensor.data_ptr() and written.stride() == tensor.stride()
    return same and written.dtype == tensor.dtype and any(tensor is t for t in own)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory; slices of one tensor along rows or channels do not."""
    (first, last), (other_first, other_last) = extent(a), extent(b)
    if first >= other_last or other_first >= last:
        return False
    if a.dim() != b.dim() or a.stride() != b.stride() or a.element_size() != b.element_size():
        return True
    size = a.element_size()
    for dim in range(a.dim() - 1, 0, -1):
        # what lies between two entries of the dim outside this one: the two take turns in it
        period = a.stride(dim - 1) * size
        inner_a, inner_b = (extent(t[(0,) * dim]) for t in (a, b))
        length_a, length_b = inner_a[1] - inner_a[0], inner_b[1] - inner_b[0]
        if period < max(length_a, length_b) or any(a.stride(d) * size % period for d in range(dim - 1)):
            continue
        distance = (other_first - first) % period
        if distance >= length_a and period - distance >= length_b:
            return False
    return True


def check_batches(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Tensors that share their first dim, for statistics per sample."""
    for s, tensor in enumerate(tensors):
        if tensor.dim() < 2 or tensor.shape[0] != tensors[0].shape[0]:
            fail(op, f"{name}[{s}]", f"of shape {tuple(tensor.shape)}", "samples first, as many in every tensor")
        if not tensor.is_contiguous() and tensor.dim() != 3:
            fail(op, f"{name}[{s}]", layout(tensor), "[batch, rows, channels], or a contiguous tensor")


def check_scales(op: str, name: str, scale: Any, model: Tensor) -> None:
    """Scales of codes of the shape of ``model``: one number per row."""
    if isinstance(scale, Tensor):
        check_dense(op, name, scale)
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or not scale.is_contiguous():
        found = f"{scale.dtype} {layout(scale)}" if isinstance(scale, Tensor) else describe(scale)
        fail(op, name, found, "a contiguous float32 tensor")
    if scale.device != model.device:
        fail(op, name, f"on {scale.device}", f"on {model.device}")
    rows = math.prod(model.shape[:-1])
    if scale.numel() != rows:
        fail(op, name, f"{scale.numel()} numbers", f"{rows}, one per row")
