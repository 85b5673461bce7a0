"""Timing of the transformer's forwards, for the speedup that `report()` says."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
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
        self._spans: deque[tuple[Any, Any, bool, Any]] = deque(maxlen=MOST)
        self._beside: tuple[Any, Any] | None = None
        self._start: Any = None
        self._is_first = True

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """What runs here belongs to the forward that starts next, and would not be run without a cache."""
        start = moment(device)
        yield
        self._beside = start, moment(device)

    def start(self, device: torch.device) -> None:
        """A forward starts."""
        self._start = moment(device)

    def stop(self, device: torch.device, computes_all: bool) -> None:
        """It has ended; the very first one, which also pays for kernels being built, is left out."""
        end = None if self._is_first or self._start is None else moment(device)
        if end is not None:
            self._spans.append((self._start, end, computes_all, self._beside))
        self._is_first, self._start, self._beside = False, None, None

    def speedup(self) -> float | None:
        """Mean time of the forwards that computed everything over the mean of all; ``None`` before there are both.

        On accelerators this waits for the device.
        """
        spans = list(self._spans)
        seconds = [(seconds_between(start, end), full) for start, end, full, _ in spans]
        full = [taken for taken, computes_all in seconds if computes_all]
        total = sum(taken for taken, _ in seconds)
        total += sum(seconds_between(*beside) for *_, beside in spans if beside is not None)
        if not full or len(full) == len(seconds) or not total:
            return None
        return sum(full) / len(full) / (total / len(seconds))


def device_of(latents: Any) -> torch.device:
    """Where latents are, a tensor or a list of one per picture: offloaded weights may be elsewhere."""
    first = latents[0] if isinstance(latents, list) and latents else latents
    return first.device if isinstance(first, torch.Tensor) else torch.device("cpu")
