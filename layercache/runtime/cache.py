"""What every enabled cache can be asked."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from layercache.runtime.report import CacheReport


@runtime_checkable
class Cache(Protocol):
    """What ``layercache.enable`` returns, whatever the plan is."""

    def report(self) -> CacheReport:
        """What the cache did since it was enabled."""

    def reset(self) -> None:
        """Starts afresh: the next forward begins a new generation."""

    def step(
        self, index: int | None = None, *, branch: str | None = None, part: Hashable = None
    ) -> AbstractContextManager[None]:
        """Forwards in this ``with`` block belong to this step, guidance branch and part of the picture."""

    def check(self) -> None:
        """Looks for NaN and infinity in what the last generation stored.

        Raises:
            NonFiniteResidualError: there were some; its ``samples`` say which pictures are not usable. The end of a
                pipeline's call tells of them by a `NonFiniteWarning`, and gives its pictures.
        """
