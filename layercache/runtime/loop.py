"""Denoising loops of pipelines: their progress bar as beginning and end, and the threads that they run in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from threading import get_ident
from types import FrameType
from typing import Any

from torch import nn

_CALL = nn.Module._call_impl.__name__


class LoopOwner:
    """The thread whose pipeline's loop a cache serves, where several run on one transformer at a time."""

    def __init__(self) -> None:
        self._thread = 0

    def begin(self) -> bool:
        """A loop begins; whether the cache is its own, which it is unless another thread's is under way."""
        if not self._thread:
            self._thread = get_ident()
        return not self.is_another

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

    def __init__(self, bar: Any, begun: Callable[[], object], ended: Callable[[bool], None]):
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


def call_under_way() -> FrameType:
    """The frame of the module's call that this thread is in, which ends when the call does."""
    frame: FrameType = sys._getframe(1)
    while _CALL not in frame.f_code.co_name and frame.f_back is not None:  # torch.compile gives it other code
        frame = frame.f_back
    return frame


def is_inside(thread: int, call: FrameType) -> bool:
    """Whether a thread is still inside a call (`call_under_way`).

    Nothing else of its frames is looked at: reading the variables of a frame that runs in another thread frees what an
    earlier reading found, and while torch does so the frame may end, and its memory be used anew.
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame is call:
            return True
        frame = frame.f_back
    return False
