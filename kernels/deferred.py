"""Kernels that triton sees at the first launch: importing it takes longer than importing everything else here.

Until then a kernel stands in its module as a function; whoever defines one writes ``tl`` for ``triton.language``, which
is put there with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from threading import Lock
from typing import Any

_waiting: list[Deferred] = []
_lock = Lock()


class Deferred:
    """A function for ``triton.jit``; used like the kernel, it puts the kernels into their modules."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        self.function, self.options = function, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._kernel()[grid]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel(), name)

    def _kernel(self) -> Any:
        use_triton()
        return self.function.__globals__[self.function.__name__]


def jit(**options: Any) -> Callable[[Callable], Any]:
    """``triton.jit(**options)`` at the first launch of a kernel; modules import where triton is missing."""

    def decorate(function: Callable) -> Any:
        deferred = Deferred(function, options)
        with _lock:
            _waiting.append(deferred)
        return deferred

    return decorate


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton() -> None:
    """Compiles nothing yet, but turns every function that waits into a kernel, wherever a module names it.

    Raises:
        ImportError: triton is missing, or does not work here.
    """
    with _lock:
        if not _waiting:
            return
        import triton
        import triton.language

        kernels = {deferred: triton.jit(deferred.function, **deferred.options) for deferred in _waiting}
        for names in {id(d.function.__globals__): d.function.__globals__ for d in _waiting}.values():
            names["tl"] = triton.language
            names.update({name: kernels[v] for name, v in names.items() if isinstance(v, Deferred) and v in kernels})
        _waiting.clear()
