"""What is left of a generation in which a method decided, and the rows of a schedule that decide the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layercache.errors import CacheStateError
from layercache.schedule.schedule import Cell

Row = tuple[Cell, ...]


@dataclass(frozen=True)
class EndedRun:
    """What is left of a generation.

    Attributes:
        sigmas: its noise levels, or ``None`` where no scheduler says them.
        logs: by branch, what was decided at every step up to the last one at which it ran.
        nbytes: memory of what was stored.
        host_bytes: of it, what was in host memory.
        first: step at which the transformer began.
        is_over: whether the scheduler has taken all of its steps, whichever transformer ran the last ones.
    """

    sigmas: tuple[float, ...] | None = None
    logs: Mapping[str, list[Any]] = field(default_factory=dict)
    nbytes: int = 0
    host_bytes: int = 0
    first: int = 0
    is_over: bool = False


def whole_rows(run: EndedRun, rows: Mapping[str, Sequence[Row]]) -> tuple[range, dict[str, tuple[Row, ...]]]:
    """The steps at which the transformer ran, and by branch the rows of all steps of the run.

    Rows are empty where the transformer did not run (the other one of two did, or a picture was given), and compute
    everything where a branch did not (guidance that begins late or ends early).

    Args:
        run: that has ended.
        rows: of its logs.

    Raises:
        CacheStateError: it was broken off or is under way, nothing ran, or nothing says at which noise levels.
    """
    if not rows:
        raise CacheStateError("run a whole generation first; nothing has run yet")
    if run.sigmas is None:
        raise CacheStateError("there is no scheduler that says at which noise levels the steps ran; use a pipeline")
    steps, last = len(run.sigmas) - 1, max(map(len, rows.values()))
    if last < steps and not run.is_over:
        seen = {name: len(own) for name, own in rows.items()}
        raise CacheStateError(
            f"run a whole generation of {steps} steps first, and export behind it; steps seen so far: {seen}"
        )
    groups = len(next(iter(rows.values()))[0])
    computed: Row = (None,) * groups
    empty: Row = ({},) * groups
    found = {}
    for name, own in rows.items():
        ran = [*own[run.first :], *[computed] * (last - max(run.first, len(own)))]
        found[name] = (*[empty] * run.first, *ran, *[empty] * (steps - last))
    return range(run.first, last), found
