"""What every enabled cache can be asked."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from layercache.runtime.report import CacheReport


@runtime_checkable
class Cache(Protocol):
    """What ``layercache.enable`` returns, whatever the plan is."""

    def report(self) -> CacheReport:
        """What the cache did since it was enabled."""

    def reset(self) -> None:
        """Starts afresh: the next call of every branch is step 0 of a new generation."""

    def check(self) -> None:
        """Looks for NaN and infinity in what the last generation stored.

        Raises:
            NonFiniteResidualError: there were some; its ``samples`` say which pictures are not usable. The end of a
                pipeline's call tells of them by a `NonFiniteWarning`, and gives its pictures.
        """
