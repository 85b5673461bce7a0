"""Clocks for calls: the host's, a GPU's, and a simulated one that shows what a measurement would take.

All three answer the same four questions, so that what plans a measurement runs the same code under each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

Calls = Iterator[Callable[[], Any]]

# Least duration of one measurement by the host's clock, whose noise is that of the whole machine.
HOST_SECONDS = 0.05
# Calls of one burst on a GPU, what they may take there, and what issuing them may take the host: the GPU sleeps
# meanwhile, and its queue holds about a thousand launches. Events are good to half a microsecond.
BURST, GPU_SECONDS, ISSUE_SECONDS = 100, 4e-3, 3e-3
# More than any GPU does in a second.
CYCLES_PER_SECOND = 2.1e9


class Clock(Protocol):
    """A way to time calls."""

    def now(self) -> float:
        """Seconds since some moment."""

    def repeats(self, calls: Calls) -> int:
        """How many calls make one measurement."""

    def seconds(self, calls: Calls, repeats: int) -> float:
        """Seconds per call, on the device that runs it."""

    def host_seconds(self, calls: Calls, repeats: int) -> float:
        """Seconds in which the host issues a call."""


def clock_of(device: torch.device) -> Clock:
    """The clock of a device's calls."""
    return CudaClock() if device.type == "cuda" else HostClock()


class HostClock:
    """The host's clock: a call ends when it returns."""

    def __init__(self, least: float = HOST_SECONDS):
        self.least = least

    def now(self) -> float:
        return time.monotonic()

    def repeats(self, calls: Calls) -> int:
        return max(1, round(self.least / max(self.seconds(calls, 3), 1e-7)))

    def seconds(self, calls: Calls, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            next(calls)()
        return (time.perf_counter() - start) / repeats

    def host_seconds(self, calls: Calls, repeats: int) -> float:
        return self.seconds(calls, repeats)


class CudaClock:
    """Events on the current stream; a sleep of the GPU lets the host get ahead, so that no gap of it is timed."""

    def now(self) -> float:
        return time.monotonic()

    def repeats(self, calls: Calls) -> int:
        return repeats_of_burst(self.seconds(calls, 3), self.host_seconds(calls, 5))

    def seconds(self, calls: Calls, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _sleep()
        start.record()
        for _ in range(repeats):
            next(calls)()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / repeats / 1e3

    def host_seconds(self, calls: Calls, repeats: int) -> float:
        samples = []
        for _ in range(3):
            _sleep()
            start = time.perf_counter()
            for _ in range(repeats):
                next(calls)()
            samples.append((time.perf_counter() - start) / repeats)
        torch.cuda.synchronize()
        return median(samples)


def repeats_of_burst(seconds: float, host_seconds: float) -> int:
    """Calls of a burst, from what one takes the GPU and the host."""
    most = min(GPU_SECONDS / max(seconds, 1e-7), ISSUE_SECONDS / max(host_seconds, 1e-7), BURST)
    return max(5, round(most))


def _sleep() -> None:
    """Waits for the GPU, then keeps it asleep for twice as long as a burst takes to issue."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2 * ISSUE_SECONDS * CYCLES_PER_SECOND))


@dataclass
class SimulatedClock:
    """A GPU's clock without a GPU: calls are not made, time is added up.

    Attributes:
        call, host: seconds that every call takes the GPU, and the host to issue.
        elapsed: seconds that have passed.
    """

    call: float
    host: float
    elapsed: float = field(default=0.0)

    def now(self) -> float:
        return self.elapsed

    def repeats(self, calls: Calls) -> int:
        return repeats_of_burst(self.seconds(calls, 3), self.host_seconds(calls, 5))

    def seconds(self, calls: Calls, repeats: int) -> float:
        self.elapsed += max(2 * ISSUE_SECONDS, repeats * self.host) + repeats * self.call
        return self.call

    def host_seconds(self, calls: Calls, repeats: int) -> float:
        self.elapsed += 3 * (max(2 * ISSUE_SECONDS, repeats * self.host) + repeats * self.call)
        return self.host
