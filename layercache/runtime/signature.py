"""Shapes, dtypes and modes that what is stored was stored for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import ref

from torch import Tensor, is_inference_mode_enabled

from layercache._utils.compat import is_autocast_enabled


def shapes_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shape, dtype and device of every tensor among a forward's arguments, also in lists."""
    return tuple(map(_shape_of, arguments.values()))


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple([_shape_of(item) for item in value if isinstance(item, Tensor)])
    return value is None


class Signature:
    """Shapes, dtypes and devices of a branch's arguments, and the modes that its forwards run in.

    What comes again at the next step, such as a prompt, is known by being the same and not read anew.
    """

    def __init__(self) -> None:
        self._modes: tuple[bool, bool] | None = None
        self._shapes: list[Any] = []  # of each argument
        self._before: list[Any] = []  # constants, and weak references to tensors

    def changes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether they differ from those of the branch's previous forward; also at its first one."""
        shapes = self._shapes
        modes = is_inference_mode_enabled(), is_autocast_enabled()
        if modes == self._modes and len(arguments) == len(shapes):
            for value, before, shape in zip(arguments.values(), self._before, shapes, strict=True):  # at every step
                if value is before or (type(value) is Tensor and type(before) is ref and before() is value):
                    continue
                if _shape_of(value) != shape:
                    break
            else:
                return False
        self._modes = modes
        self._shapes = [_shape_of(value) for value in arguments.values()]
        self._before = [ref(value) if isinstance(value, Tensor) else _constant(value) for value in arguments.values()]
        return True


def _constant(value: Any) -> Any:
    """The value, or a new object for what may hold tensors, which are not kept alive."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else object()
