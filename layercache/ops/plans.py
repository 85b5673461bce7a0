"""Plans of calls: what the first call with arguments laid out in some way found out, for those that follow.

Checking and laying out a call costs more than all the rest that the host does for it. What comes of both depends on
how its arguments are laid out: type, dtype, shape, strides, device and alignment of every tensor, which of them share
memory, and every other argument by its value. So a call whose arguments are all like those of one that passed its
checks passes them too. Arguments of other types, tensors that ask for a gradient, traces and dispatch modes go
unplanned.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from layercache.ops.checks import span

_MOST_RELATIONS = 64
_Parameter = torch.nn.Parameter
_VALUES = frozenset((int, float, bool, type(None)))


class Call:
    """Arguments of one call, taken apart.

    Attributes:
        key: all that a call depends on, but for where its tensors are.
        tensors, starts: its tensors and their addresses.
    """

    __slots__ = ("key", "starts", "tensors")

    def __init__(self) -> None:
        self.key: Any = []
        self.tensors: list[Tensor] = []
        self.starts: list[int] = []

    def read(self, arguments: Sequence[Any]) -> bool:
        """Adds arguments; False where one is of a type that is not known."""
        key, starts = self.key, self.starts
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor or kind is _Parameter:
                start = argument.data_ptr()
                starts.append(start)
                self.tensors.append(argument)
                key.append((argument.dtype, argument.shape, argument.stride(), argument.device, start & 15))
            elif kind is list or kind is tuple:
                key.append(("list", len(argument)))
                if not self.read(argument):
                    return False
            elif kind in _VALUES:
                key.append(argument)
            else:
                return False
        return True


class _Thread(threading.local):
    ignored = False


_thread = _Thread()


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Within it every call of this thread is checked, laid out and launched by Triton's JIT function."""
    _thread.ignored = True
    try:
        yield
    finally:
        _thread.ignored = False


def read(arguments: Sequence[Any]) -> Call | None:
    """A call as plans know it; None where none may be used."""
    if _thread.ignored or torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    call = Call()
    try:
        if not call.read(arguments) or not call.tensors:
            return None
    except RuntimeError:  # a tensor without memory of its own, such as a sparse one
        return None
    if torch.is_grad_enabled() and any([t.requires_grad for t in call.tensors]):
        return None
    call.key = tuple(call.key)
    return call


class Plan:
    """How calls of one key run.

    Attributes:
        run: what runs them.
        device: index of the GPU that must be current; -1 on the CPU.
        checked: how the tensors of calls that passed the checks share memory, see `relation`.
    """

    __slots__ = ("_spans", "checked", "device", "run")

    def __init__(self, run: Callable[..., Any], call: Call):
        self.run = run
        self.device = call.tensors[0].get_device()
        self.checked: set[tuple[Any, ...]] = set()
        self._spans = [span(t) for t in call.tensors]

    def relation(self, call: Call) -> tuple[Any, ...]:
        """Which tensors share memory: how far apart they begin, and whether they are the same object."""
        end = 0
        for start, size in sorted(zip(call.starts, self._spans, strict=True)):
            if start < end:
                break
            end = start + size
        else:
            return ()
        ends = [start + size for start, size in zip(call.starts, self._spans, strict=True)]
        places = list(zip(call.starts, ends, call.tensors, strict=True))
        return tuple(
            (i, j, start - other_start, tensor is other)
            for i, (start, end, tensor) in enumerate(places)
            for j, (other_start, other_end, other) in enumerate(places[:i])
            if start < other_end and other_start < end
        )

    def approve(self, call: Call) -> None:
        """Notes that a call passed its checks."""
        if len(self.checked) >= _MOST_RELATIONS:
            self.checked.clear()
        self.checked.add(self.relation(call))

    def is_current(self) -> bool:
        """Whether the GPU is current for which the plan was made."""
        return self.device < 0 or self.device == torch.cuda.current_device()
