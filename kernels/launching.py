"""Launches that are made again without looking anew for what they launch.

Of a call, Triton's JIT function finds the binary, and the launcher of a kernel here finds grid, sizes and compile-time
arguments: most of what the host needs. All of it depends on how the tensors are laid out, not on where they are. So a
launcher is a plan, made of arguments once, and called with them and with any others that are laid out in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

# Whose compiled kernels take all parameters by position, also those known to the compiler; look at
# `JITFunction.run` and `CompiledKernel` before adding one.
_KNOWN_TRITON = ((3, 6), (3, 9))

if TYPE_CHECKING:
    from typing import Concatenate, ParamSpec  # which Python 3.9 lacks, where Hugging Face's kernels also run

    P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")


def taking(arguments: Callable[P, A]) -> Callable[[Callable[Concatenate[A, ...], R]], Callable[P, R]]:
    """A function of an op's arguments as one that takes them one by one, by the names and defaults that they declare.

    Args:
        arguments: a NamedTuple. What is not among its fields, such as ``groups``, goes to the function by name.
    """

    def decorate(function: Callable[Concatenate[A, ...], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def taken(*given: Any, **options: Any) -> R:
            if not options:
                return function(arguments(*given))  # type: ignore[call-arg]
            own = {name: options.pop(name) for name in arguments._fields if name in options}  # type: ignore[attr-defined]
            return function(arguments(*given, **own), **options)

        taken.__wrapped__ = arguments  # whose signature it has
        return taken

    return decorate


class Launch:
    """A kernel with its grid and compile-time arguments, called with the others by position.

    The first call goes through Triton's JIT function. Later ones launch the binary that it chose, so they must be for
    arguments it would choose the same for: the same device, dtypes, integers and places of None, and addresses that
    are multiples of 16 where those of the first call were. Numbers (float) and memory may be any.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], **constants: Any):
        self._kernel, self._constants = kernel, constants
        self._grid = (*grid, 1, 1)[:3]
        self._kept: tuple[Any, ...] | None = None

    def __call__(self, *arguments: Any) -> None:
        kept = self._kept
        if kept is None or is_watched():
            compiled = self._kernel[self._grid](*arguments, **self._constants)
            if kept is None and compiled is not None and keeps_kernels():  # the interpreter compiles nothing
                self._keep(compiled, len(arguments))
            return
        run, head, tail, current_stream, device = kept
        # neither metadata nor hooks
        run(*self._grid, current_stream(device), *head, None, None, None, *arguments, *tail)

    def _keep(self, compiled: Any, count: int) -> None:
        driver = _triton().runtime.driver.active
        tail = [self._constants[name] for name in self._kernel.arg_names[count:]]
        head = compiled.function, compiled.packed_metadata
        self._kept = compiled.run, head, tail, driver.get_current_stream, driver.get_current_device()


@functools.cache
def _triton() -> Any:
    return importlib.import_module("triton")


@functools.cache
def keeps_kernels() -> bool:
    """Whether this version of Triton is one whose compiled kernels we know how to launch."""
    first, last = _KNOWN_TRITON
    return first <= tuple(map(int, _triton().__version__.split(".")[:2])) <= last


def is_watched() -> bool:
    """Whether something, such as Proton, wants to hear of launches, or to have probes in kernels."""
    knobs = _triton().knobs
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # a hook or None, in later versions a list of hooks
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or _probes(knobs.compilation))


def _probes(compilation: Any) -> str:
    return getattr(compilation, "instrumentation_mode", "")


class Planned:
    """A launcher that makes a plan for its arguments and follows it once.

    Args:
        plan: takes the arguments of an op, the first of which is a tensor or a list of tensors, and maybe ``groups``;
            what it returns takes the same without ``groups``, or others laid out in the same way. It may look at all
            but the values of numbers (float) and the contents of tensors, and keeps neither numbers nor tensors.
    """

    def __init__(self, plan: Callable[..., Callable[..., Any]]):
        self.plan = plan
        functools.update_wrapper(self, plan)

    def __call__(self, *arguments: Any, groups: int | None = None, **options: Any) -> Any:
        size = {} if groups is None else {"groups": groups}
        with on_device_of(first_tensor(arguments)):
            return self.plan(*arguments, **options, **size)(*arguments, **options)


def first_tensor(arguments: Any) -> Tensor:
    while not isinstance(arguments, Tensor):
        arguments = arguments[0]
    return arguments


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one; free when it already is."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor, not initialised, whose address is a multiple of 16."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def new_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous tensors of these shapes and dtypes, not initialised."""
    return [new(t.shape, t.dtype, t.device) for t in tensors]


def outline(tensor: Tensor) -> Tensor:
    """What `new_like` will make of it, without its memory."""
    return new(tensor.shape, tensor.dtype, torch.device("meta"))
