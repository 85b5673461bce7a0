"""Timing the parts of a forward without stopping the device."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Timer:
    """Attributes the time between marks to labels.

    On a CUDA device the marks are events on the current stream, read only by `totals`; elsewhere the
    host clock.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[object, torch.cuda.Event | float]] = []

    def mark(self, label: object) -> None:
        """From now until the next mark the time belongs to ``label``."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((label, event))
        else:
            self._marks.append((label, time.perf_counter()))

    def totals(self) -> dict[object, float]:
        """Seconds per label; waits for the device and forgets the marks."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[object, float] = defaultdict(float)
        for (label, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(start, float) and isinstance(end, float):
                seconds[label] += end - start
            else:
                seconds[label] += start.elapsed_time(end) / 1000  # type: ignore[union-attr,arg-type]
        self._marks.clear()
        return dict(seconds)
