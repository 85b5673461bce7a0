"""One forward of the transformer, as its router is asked about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward that is about to start.

    Attributes:
        branch: name of the cache context it runs in, or ``None``.
        step: ``step_index`` of that context, or ``None``.
        arguments: all arguments of the transformer, by name.
        dry_run: runs the same forward once outside the compiled graph; ``None`` where nothing is compiled.
    """

    branch: str | None
    step: int | None
    arguments: Mapping[str, Any]
    dry_run: Callable[[], Any] | None = None
