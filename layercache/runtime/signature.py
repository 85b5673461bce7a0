"""Shapes, dtypes and modes that what is stored was stored for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def shapes_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shape, dtype and device of every tensor among a forward's arguments, also of those in lists."""
    found: list[Any] = []
    for name, value in sorted(arguments.items()):
        if isinstance(value, torch.Tensor):
            found.append((name, value.shape, value.dtype, value.device))
        elif isinstance(value, (list, tuple)):
            found += [(name, t.shape, t.dtype, t.device) for t in value if isinstance(t, torch.Tensor)]
    return tuple(found)


class Signature:
    """Shapes, dtypes and devices of a branch's arguments, and the modes that its forwards run in."""

    def __init__(self) -> None:
        self._now: list[Any] | None = None

    def changes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether they are others than at the branch's forward before; also at its first one."""
        now: list[Any] = [torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]
        for value in arguments.values():
            if isinstance(value, torch.Tensor):
                now += (value.shape, value.dtype, value.device)
            elif isinstance(value, (list, tuple)):
                now += [(t.shape, t.dtype, t.device) if isinstance(t, torch.Tensor) else None for t in value]
        before, self._now = self._now, now
        return now != before
