"""Shapes, dtypes and modes that what is stored was stored for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from layercache._utils.compat import is_autocast_enabled


def shapes_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shape and dtype of every tensor among a forward's arguments, also in lists, and the first one's device."""
    found: list[Any] = []
    device = None
    for value in arguments.values():  # at every step
        if isinstance(value, torch.Tensor):
            found += (value.shape, value.dtype)
            device = device or value.device
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, torch.Tensor):
                    found += (item.shape, item.dtype)
                    device = device or item.device
        else:
            found.append(value is None)
    return device, *found


class Signature:
    """Shapes, dtypes and devices of a branch's arguments, and the modes that its forwards run in."""

    def __init__(self) -> None:
        self._now: tuple[Any, ...] = ()

    def changes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether they are others than at the branch's forward before; also at its first one."""
        before = self._now
        self._now = torch.is_inference_mode_enabled(), is_autocast_enabled(), shapes_of(arguments)
        return self._now != before
