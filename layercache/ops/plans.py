"""Plans of calls: what the first call with arguments laid out in some way found out, for those that follow.

Checking and laying out a call costs more than all the rest that the host does for it. What comes of both depends on
how its arguments are laid out: type, dtype, shape, strides, device and alignment of every tensor, which of them share
memory, and every other argument by its value. So a call whose arguments are all like those of one that passed its
checks passes them too. Arguments of other types, tensors that ask for a gradient, traces and dispatch modes go
unplanned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from operator import add, le
from typing import Any

import torch
from torch import Tensor

from layercache.ops.checks import span

_MOST_RELATIONS = 64
_Parameter = torch.nn.Parameter
# kept here because looking them up costs as much as calling them
is_compiling, count_modes = torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack
_VALUES = frozenset((int, float, bool, str, torch.dtype, type(None)))


# All that a call depends on but for where its tensors are; the tensors; their addresses.
Call = tuple[tuple[Any, ...], list[Tensor], list[int]]


_ignored = False


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Within it every call is checked, laid out and launched by Triton's JIT function."""
    global _ignored
    before, _ignored = _ignored, True
    try:
        yield
    finally:
        _ignored = before


def read(arguments: Sequence[Any]) -> Call | None:
    """A call as plans know it; None where none may be used."""
    if _ignored or is_compiling() or count_modes() > 0:
        return None
    key: list[Any] = []
    tensors: list[Tensor] = []
    starts: list[int] = []
    try:
        if not _take_apart(arguments, key, tensors, starts) or not tensors:
            return None
    except RuntimeError:  # a tensor without memory of its own, such as a sparse one
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    return tuple(key), tensors, starts


def _take_apart(arguments: Sequence[Any], key: list[Any], tensors: list[Tensor], starts: list[int]) -> bool:
    """Adds what `read` returns; False where an argument is of a type that is not known."""
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is _Parameter:
            start = argument.data_ptr()
            tensors.append(argument)
            starts.append(start)
            strides = argument.is_contiguous() or argument.stride()  # the former takes half the time
            key += (argument.dtype, argument.shape, strides, argument.device, start & 15)
        elif kind is list or kind is tuple:
            key += (list, len(argument))
            if not _take_apart(argument, key, tensors, starts):
                return False
        elif kind in _VALUES:
            key += (kind, argument)  # 1, 1.0 and True are equal, but not to a kernel
        else:
            return False
    return True


class Plan:
    """How calls of one key run.

    Attributes:
        run: what runs them.
        checked: how the tensors of calls that passed the checks share memory, see `relation`.
    """

    __slots__ = ("_device", "_spans", "checked", "run")

    def __init__(self, run: Callable[..., Any], tensors: Sequence[Tensor]):
        self.run = run
        self.checked: set[tuple[Any, ...]] = set()
        self._device = tensors[0].get_device()
        self._spans = [span(t) for t in tensors]

    def relation(self, tensors: Sequence[Tensor], starts: Sequence[int]) -> tuple[Any, ...]:
        """Which tensors share memory: how far apart they begin, and whether they are the same object."""
        ends = list(map(add, starts, self._spans))
        if all(map(le, sorted(ends), sorted(starts)[1:])):  # each ends before the next begins
            return ()
        places = list(zip(starts, ends, tensors, strict=True))
        return tuple(
            (i, j, start - other_start, tensor is other)
            for i, (start, end, tensor) in enumerate(places)
            for j, (other_start, other_end, other) in enumerate(places[:i])
            if start < other_end and other_start < end
        )

    def approve(self, tensors: Sequence[Tensor], starts: Sequence[int]) -> None:
        """Notes that a call passed its checks."""
        if len(self.checked) >= _MOST_RELATIONS:
            self.checked.clear()
        self.checked.add(self.relation(tensors, starts))

    def is_current(self) -> bool:
        """Whether the GPU is current for which the plan was made; always on the CPU."""
        return self._device < 0 or self._device == torch.cuda.current_device()
