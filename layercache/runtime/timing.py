"""Timing of the transformer's forwards, for the speedup that `report()` says."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from layercache._utils.timer import moment, seconds_between

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
        self._start = moment(device)

    def stop(self, device: torch.device, computes_all: bool) -> None:
        """It has ended; the very first one, which also pays for kernels being built, is left out."""
        end = None if self._is_first or self._start is None else moment(device)
        if end is not None:
            self._spans.append((self._start, end, computes_all))
        self._is_first, self._start = False, None

    def speedup(self) -> float | None:
        """Mean time of the forwards that computed everything over the mean of all; ``None`` before there are both.

        On accelerators this waits for the device.
        """
        seconds = [(seconds_between(start, end), full) for start, end, full in list(self._spans)]
        full = [taken for taken, computes_all in seconds if computes_all]
        total = sum(taken for taken, _ in seconds)
        if not full or len(full) == len(seconds) or not total:
            return None
        return sum(full) / len(full) / (total / len(seconds))
