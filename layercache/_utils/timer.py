"""Clocks: moments of a device that nobody waits for, the parts of a forward, and waiting where it is meant."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch


def moment(device: torch.device) -> Any:
    """Now, on the host's clock or as an event of a CUDA device; ``None`` where there is neither.

    Another accelerator has no event here, and none may be recorded for timing while a graph is captured.
    """
    if device.type == "cpu":
        return time.perf_counter()
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one `moment` to another of the same device; waits for the later event."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def synchronise(device: torch.device) -> None:
    """Waits until a CUDA device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Attributes the time between marks to labels.

    On a CUDA device the marks are events on the current stream, read only by `totals`; elsewhere the
    host clock.
    """

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else torch.device("cpu")
        self._marks: list[tuple[object, Any]] = []

    def mark(self, label: object) -> None:
        """From now until the next mark the time belongs to ``label``."""
        self._marks.append((label, moment(self._device)))

    def totals(self) -> dict[object, float]:
        """Seconds per label; waits for the device and forgets the marks."""
        seconds: dict[object, float] = defaultdict(float)
        for (label, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[label] += seconds_between(start, end)
        self._marks.clear()
        return dict(seconds)
