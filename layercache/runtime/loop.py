"""A pipeline's progress bar as the beginning and end of its denoising loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class DenoisingLoop:
    """A progress bar that tells when it is left: by return, exception, interruption or a closed generator.

    Args:
        bar: of the pipeline; everything else is asked of it.
        ended: called with whether the loop ran to its end.
    """

    def __init__(self, bar: Any, ended: Callable[[bool], None]):
        self._bar, self._ended = bar, ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> Any:
        self._ended(kind is None)
        return self._bar.__exit__(kind, *rest)

    def __len__(self) -> int:
        return len(self._bar)

    def __iter__(self) -> Iterator[Any]:
        completed = False
        try:
            yield from self._bar
            completed = True
        finally:
            self._ended(completed)
