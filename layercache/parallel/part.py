"""Work for fewer processes than a crew has: the first of them do it, the others wait for as long as it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from layercache.parallel.crew import Crew

T = TypeVar("T")
R = TypeVar("R")


def by_first(crew: Crew, count: int, function: Callable[[Crew], R]) -> R:
    """What a function gives that the first ``count`` processes run as a crew of their own; on all processes.

    The others take part in every exchange of theirs, so none waits longer than for one of them.

    Args:
        crew: of all processes.
        count: how many are to run it, at least 1; all of them where there are no more.
        function: gives the same result on every process that runs it; the first one's is sent to the others.

    Raises:
        BaseException: what the function raised, on all processes.
    """
    if count >= crew.world:
        return function(crew)
    with crew.together():
        part = _Part(crew, count)
        if crew.rank < count:
            result = function(part)
            part.end(result)
            return result
        while True:
            is_over, value = crew._exchange((False, None))[0]
            if is_over:
                return value


class _Part(Crew):
    """The first processes of a crew."""

    def __init__(self, whole: Crew, count: int):
        super().__init__()
        self._whole, self.rank, self.world = whole, whole.rank, count

    def gather(self, own: Sequence[T]) -> list[T]:
        if self.world == 1:
            self._exchange(None)  # the others' sign that this one is at work
        return super().gather(own)

    def end(self, result: Any) -> None:
        """Lets the others go on, with the result."""
        self._whole._exchange((True, result if self.leads else None))

    def _exchange(self, value: Any, error: BaseException | None = None) -> list[Any]:
        try:
            return [found for _, found in self._whole._exchange((False, value), error)[: self.world]]
        except BaseException:
            self._shared_error = self._whole._shared_error
            raise
