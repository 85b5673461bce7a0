"""Calls on a GPU that were made before, repeated by `layercache._launch` without Triton's launcher.

The first call with arguments of a layout goes through checks, layout and Triton, and is written down; later ones fill
in addresses and numbers and hand the kernels to the CUDA driver: some 2 microseconds instead of 30. A call is repeated
only where all that decides what is launched is in the layout, see csrc/launch/signature.hpp.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layercache.kernels.launching import Recording

_CUDA = 2  # DLPack's number
_LIBRARY = "libcuda.so.1"


class Repeats:
    """Calls of one op.

    Attributes:
        again: returns what the same call returned before, made again; NotImplemented where there was none.
    """

    def __init__(self) -> None:
        self.again: Callable[..., Any] = _never
        self._calls: Any = None

    def record(self, run: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Makes a call by ``run`` and keeps it, if it can be repeated."""
        if self._calls is None and trouble() is None:
            self._calls = open_calls()
            self.again = self._calls.repeat
        signature = None if self._calls is None else self._calls.look(*arguments)
        if signature is None:
            return run(*arguments)
        with Recording() as recording, _Watch() as watch:
            result = run(*arguments)
        faithful = recording.faithful and not watch.others
        launches: list[Any] = []
        made: list[Any] = []
        if faithful:
            launches = [
                (r.compiled.function, r.grid, r.threads, r.compiled.metadata.shared, r.arguments, r.hidden)
                for r in recording.launches
            ]
            made = [(t, (tuple(t.shape),), {"dtype": t.dtype, "device": t.device}) for t in recording.made]
        kept = [r.compiled for r in recording.launches]
        self._calls.keep(signature, launches, made, result, kept, faithful)
        return result

    @property
    def kept(self) -> int:
        """How many calls are written down."""
        return 0 if self._calls is None else len(self._calls)


class _Watch(TorchDispatchMode):
    """Sees whether a call computes with anything but its own kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.others = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.others |= not func.is_view and func is not torch.ops.aten.empty.memory_format
        return func(*args, **(kwargs or {}))


def _never(*arguments: Any) -> Any:
    return NotImplemented


def open_calls(library: str = _LIBRARY, device_type: int = _CUDA) -> Any:
    """An empty set of calls.

    Raises:
        ImportError, RuntimeError: see `trouble`.
    """
    return importlib.import_module("layercache._launch").Calls(torch, library, device_type)


@functools.cache
def trouble() -> str | None:
    """Why every launch goes through Triton's launcher here; None where calls are repeated."""
    if os.environ.get("LAYERCACHE_LAUNCH") == "triton":
        return "LAYERCACHE_LAUNCH=triton is set"
    if torch.version.cuda is None:
        return "only CUDA's driver is known"
    try:
        if not follows_streams(open_calls()):
            return "this build of torch does not tell through DLPack which stream is current"
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


def follows_streams(calls: Any) -> bool:
    """Whether launches would be put on the stream that is current, as far as the default and one other tell."""
    device = torch.cuda.current_device()
    side = torch.cuda.Stream()
    found = [calls.stream(device) == torch.cuda.current_stream().cuda_stream]
    with torch.cuda.stream(side):
        found.append(calls.stream(device) == side.cuda_stream)
    return all(found)
