"""A pipeline's progress bar as the beginning and end of its denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any


class LoopOwner:
    """The thread whose pipeline's loop a cache serves, where several run on one transformer at a time."""

    def __init__(self) -> None:
        self._thread = 0

    def begin(self) -> None:
        """A loop begins; the cache is its own unless another thread's is under way."""
        if not self._thread:
            self._thread = get_ident()

    def end(self) -> bool:
        """A loop has ended; whether the cache was its own."""
        is_own = self._thread == get_ident()
        if is_own:
            self._thread = 0
        return is_own

    @property
    def is_another(self) -> bool:
        """Whether another thread's loop is under way."""
        return self._thread not in (0, get_ident())


class DenoisingLoop:
    """A progress bar that tells when it is left: by return, exception, interruption or a closed generator.

    Args:
        bar: of the pipeline; everything else is asked of it.
        begun: called when the loop begins.
        ended: called with whether the loop ran to its end.
    """

    def __init__(self, bar: Any, begun: Callable[[], None], ended: Callable[[bool], None]):
        self._bar, self._begun, self._ended = bar, begun, ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __enter__(self) -> Any:
        self._begun()
        return self._bar.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> Any:
        self._ended(kind is None)
        return self._bar.__exit__(kind, *rest)

    def __len__(self) -> int:
        return len(self._bar)

    def __iter__(self) -> Iterator[Any]:
        completed = False
        self._begun()
        try:
            yield from self._bar
            completed = True
        finally:
            self._ended(completed)
