"""Shapes, dtypes and modes that what is stored was stored for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def shapes_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shape, dtype and device of every tensor among a forward's arguments, also of those in lists."""
    found: list[Any] = []
    for name, value in arguments.items():  # at every step
        if isinstance(value, torch.Tensor):
            found += (name, value.shape, value.dtype, value.device)
        elif isinstance(value, (list, tuple)):
            found += [(name, t.shape, t.dtype, t.device) for t in value if isinstance(t, torch.Tensor)]
    return tuple(found)


class Signature:
    """Shapes, dtypes and devices of a branch's arguments, and the modes that its forwards run in."""

    def __init__(self) -> None:
        self._now: tuple[Any, ...] = ()

    def changes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether they are others than at the branch's forward before; also at its first one."""
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        before, self._now = self._now, (modes, shapes_of(arguments))
        return self._now != before
