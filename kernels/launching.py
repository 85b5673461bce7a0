"""Launches, and how they are written down so that the same call can be made again without Triton's launcher.

Triton works out at every launch what it launches, and the launcher of a kernel here how its streams are laid out:
together some 25 microseconds, of which the GPU needs none. Both depend on the layout of the tensors alone. So a call
may be recorded, and `layercache.ops.repeating` repeats it for other tensors laid out alike.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_PARAMETER = re.compile(r"^\s*\.param\s+(.*?)\s*,?\s*$", re.MULTILINE)
# Triton appends pointers to scratch memory; kernels that need none get null.
_MOST_HIDDEN = 2


@dataclass(frozen=True)
class Recorded:
    """One launch: the kernel as compiled, its grid, and its arguments one by one, without those known to the compiler.

    Attributes:
        hidden: pointers that Triton appends, all of them null.
    """

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    hidden: int

    @property
    def threads(self) -> int:
        return 32 * int(self.compiled.metadata.num_warps)


@dataclass
class Recording:
    """What a call launches and allocates.

    Attributes:
        made: new tensors, in order.
        faithful: whether nothing happened that is not written down here.
    """

    launches: list[Recorded] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    faithful: bool = True

    def __enter__(self) -> Recording:
        _thread.recording = self
        return self

    def __exit__(self, *error: object) -> None:
        _thread.recording = None


class _Thread(threading.local):
    recording: Recording | None = None


_thread = _Thread()


def enqueue(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``; all arguments that are not compile-time constants by position."""
    compiled = kernel[tuple(grid)](*arguments, **constants)
    if (recording := _thread.recording) is not None:
        found = _record(compiled, grid, arguments)
        if found is None:
            recording.faithful = False
        else:
            recording.launches.append(found)


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor, not initialised."""
    made = torch.empty(tuple(shape), dtype=dtype, device=device)
    if (recording := _thread.recording) is not None:
        recording.made.append(made)
    return made


def new_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors of these shapes and dtypes, not initialised."""
    return [new(t.shape, t.dtype, t.device) for t in tensors]


def _record(compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> Recorded | None:
    """The launch, if parameters are all that it needs, and PTX declares just these."""
    if compiled is None or not _is_plain(compiled.metadata):  # the interpreter compiles nothing
        return None
    flat = tuple(_flat(arguments))
    declared = declared_parameters(compiled)
    hidden = len(declared) - len(flat)
    if not declared or not 0 <= hidden <= _MOST_HIDDEN:
        return None
    if declared != [*map(_kind, flat), *(["u64"] * hidden)]:
        return None
    x, y, z = (*grid, 1, 1)[:3]
    return Recorded(compiled, (x, y, z), flat, hidden)


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    """Arguments as the kernel gets them: tuples one by one, nothing for None."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        elif argument is not None:
            yield argument


def _kind(argument: Any) -> str:
    """Type of the parameter that Triton makes of an argument, in PTX."""
    if isinstance(argument, Tensor):
        return "u64"
    return "f32" if isinstance(argument, float) else "u32" if -(2**31) <= argument < 2**31 else "u64"


def declared_parameters(compiled: Any) -> list[str]:
    """Types of a compiled kernel's parameters in PTX, such as u64; none where it is not for CUDA."""
    head = compiled.asm.get("ptx", "").partition(".entry")[2].partition(")")[0]
    # .param .u64 .ptr .global .align 1 name: the type comes first, a structure of bytes is none that is known here
    return [match[1].split()[0].lstrip(".") for match in _PARAMETER.finditer(head)]


def _is_plain(metadata: Any) -> bool:
    """Whether a grid, threads and shared memory are all there is to say about the launch."""
    special = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    return getattr(metadata, "num_ctas", 1) == 1 and not any(getattr(metadata, name, 0) for name in special)
