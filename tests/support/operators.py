"""What reaches the dispatcher: every operator that runs, with the size of what it reads and writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")


class Operator(NamedTuple):
    """One that ran.

    Attributes:
        name: such as ``"aten::add"``.
        first: entries of its first argument where that is a list, as the streams of our ops are; 0 otherwise.
        given: elements of the tensor that it gives; 0 where that is none, or several.
        largest: elements of the largest tensor that it reads or writes.
        view: gives what it was given, seen in another shape.
        copies_to_device: asked for a copy on a named device.
    """

    name: str
    first: int
    given: int
    largest: int
    view: bool
    copies_to_device: bool

    @property
    def ours(self) -> str:
        """Its name in ``layercache.ops``; empty for others."""
        return self.name.removeprefix("layercache::") if self.name.startswith("layercache::") else ""

    @property
    def reads_back(self) -> bool:
        """Whether the host waits for a value."""
        return self.copies_to_device or (not self.ours and any(word in self.name for word in HOST_READS))


class Operators(TorchDispatchMode):
    """Lists the operators that run inside a ``with`` block.

    Attributes:
        seen: all of them, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Operator] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(cls.__name__ == "DTensor" for cls in types):
            return NotImplemented  # it comes again with what it is made of
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name, tensors = function._schema.name, [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
        aliases = [given.alias_info for given in function._schema.returns]
        self.seen.append(
            Operator(
                name,
                first=len(args[0]) if args and isinstance(args[0], (list, tuple)) else 0,
                given=result.numel() if torch.is_tensor(result) else 0,
                largest=max((t.numel() for t in tensors), default=0),
                view=any(info is not None and not info.is_write for info in aliases),
                copies_to_device=name == "aten::_to_copy" and kwargs.get("device") is not None,
            )
        )
        return result

    @property
    def ours(self) -> list[str]:
        """Names of our ops."""
        return [operator.ours for operator in self.seen if operator.ours]

    @property
    def host_reads(self) -> list[str]:
        return [operator.name for operator in self.seen if operator.reads_back]

    def giving(self, elements: int) -> Counter[str]:
        """Operators other than ours by name that write a tensor of so many elements."""
        return Counter(o.name for o in self.seen if o.given == elements and not (o.ours or o.reads_back or o.view))


def touching(operators: Sequence[Operator], elements: int) -> list[Operator]:
    """Those of ``operators`` that read or write a tensor of so many elements or more."""
    return [o for o in operators if o.largest >= elements and not o.view and "empty" not in o.name]
