"""Timing of the transformer's forwards, for the speedup that `report()` says."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

MOST = 512
"""Forwards that are remembered, the newest ones."""


class ForwardTimes:
    """Seconds of the newest forwards of one transformer, and which of them computed everything.

    On accelerators events are recorded beside the kernels and read when somebody asks, so that no forward waits.
    """

    def __init__(self) -> None:
        self._spans: deque[tuple[Any, Any, bool]] = deque(maxlen=MOST)
        self._start: Any = None
        self._is_first = True

    def start(self, device: torch.device) -> None:
        """A forward starts."""
        self._start = _now(device)

    def stop(self, device: torch.device, computes_all: bool) -> None:
        """It has ended; the very first one, which also pays for kernels being built, is left out."""
        end = None if self._is_first or self._start is None else _now(device)
        if end is not None:
            self._spans.append((self._start, end, computes_all))
        self._is_first, self._start = False, None

    def speedup(self) -> float | None:
        """Mean time of the forwards that computed everything over the mean of all; ``None`` before there are both.

        On accelerators this waits for the device.
        """
        seconds = [(_seconds(start, end), full) for start, end, full in list(self._spans)]
        full = [taken for taken, computes_all in seconds if computes_all]
        total = sum(taken for taken, _ in seconds)
        if not full or len(full) == len(seconds) or not total:
            return None
        return sum(full) / len(full) / (total / len(seconds))


def _now(device: torch.device) -> Any:
    """The moment, or an event of the device that will know it; ``None`` while a graph is captured."""
    if device.type == "cpu":
        return time.perf_counter()
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
