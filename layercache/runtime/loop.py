"""Denoising loops of pipelines: their progress bar as beginning and end, and the threads that they run in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from threading import Lock, get_ident
from types import FrameType
from typing import Any

from torch import nn

from layercache._utils.compat import arguments_in

PATIENCE = 0.2
"""Seconds after which a thread that waits for another's forward looks whether that one is still running."""

_CALL = nn.Module._call_impl.__name__
_FRAMES = 8  # between a progress bar and the loop that asks for it: those of patches of other caches


class ForwardLock:
    """Lets one forward of a transformer run at a time; a thread that was interrupted inside its own holds up nobody.

    Args:
        interrupted: called where a forward did not come to its end.

    Attributes:
        is_under_way: the holder has begun its forward.
    """

    def __init__(self, interrupted: Callable[[], object] = lambda: None):
        self._interrupted = interrupted
        self._lock, self._taking_over, self._holder = Lock(), Lock(), 0
        self._call: tuple[int, FrameType] | None = None  # the holder's thread, and the frame of its forward
        self.is_under_way = False

    @property
    def is_held(self) -> bool:
        """Whether this thread holds it."""
        return self._holder == get_ident()

    def acquire(self) -> None:
        """Waits for the forward of another thread."""
        here = get_ident()
        if self._holder != here:
            if not self._lock.acquire(blocking=False):  # hardly ever; a time-out would cost every call
                self._wait()
            self._holder = here
        elif self.is_under_way:  # a holder that comes again was interrupted inside its forward
            self._interrupted()
        self._call = here, call_under_way()

    def _wait(self) -> None:
        while not self._lock.acquire(timeout=PATIENCE):
            call = self._call
            if call is None or is_inside(*call):
                continue
            with self._taking_over:  # of several that wait only one takes the place of the interrupted one
                if self._call is call:
                    self._holder, self._call = get_ident(), None
                    self._interrupted()
                    return

    def release(self) -> None:
        """The forward is over."""
        self.is_under_way, self._holder, self._call = False, 0, None
        self._lock.release()


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


def arguments_of_loop(pipeline: Any, owner: Any) -> Mapping[str, Any] | None:
    """What the loop that asks for a progress bar knows by name; ``None`` where it is none of this pipeline's.

    Args:
        pipeline: whose loops are followed.
        owner: of the progress bar: the pipeline, or a block, which several modular pipelines may share.
    """
    frame: Any = sys._getframe(2)
    for _ in range(_FRAMES):
        if frame is None:
            return None
        if not frame.f_globals.get("__name__", "").startswith("layercache.runtime."):
            found = frame.f_locals
            if owner is pipeline or any(value is pipeline for value in found.values()):
                return arguments_in(pipeline, found)
        frame = frame.f_back
    return None
