"""What a forward is conditioned on: it tells unnamed guidance branches, and the prompts of two loops, apart."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

Conditions = tuple[tuple[str, torch.Tensor], ...]

_IS_CONDITION = re.compile(r"encoder|text|prompt|caption|cap_feats|label|pooled|class|global_hidden|context")


@functools.cache
def _is_condition(name: str) -> bool:
    return _IS_CONDITION.search(name) is not None


def conditions_of(arguments: Mapping[str, Any]) -> Conditions:
    """The tensors of a forward that hold its prompt or label, also those in lists, with their arguments' names."""
    found: list[tuple[str, torch.Tensor]] = []
    for name, value in arguments.items():
        if value is None or not _is_condition(name):
            continue
        if isinstance(value, torch.Tensor):
            found.append((name, value))
        elif isinstance(value, (list, tuple)):
            found += [(name, item) for item in value if isinstance(item, torch.Tensor)]
    return tuple(found)


def is_on_accelerator(tensor: torch.Tensor) -> bool:
    """Whether reading its values waits for a device."""
    return tensor.device.type != "cpu"


def same(one: Conditions, other: Conditions, may_wait: bool) -> bool | None:
    """Whether two forwards are conditioned on the same; ``None`` where only reading a device would tell.

    Args:
        may_wait: values on an accelerator are compared too.
    """
    if len(one) != len(other):
        return False
    answer: bool | None = True
    for (name, a), (other_name, b) in zip(one, other, strict=True):
        if a is b:
            continue
        if name != other_name or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            continue
        if is_on_accelerator(a) and not may_wait:
            answer = None
        elif not torch.equal(a, b):
            return False
    return answer
