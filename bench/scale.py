"""Up to 64 processes that share out calibration and search, simulated: how much of their time is of use.

    python bench/scale.py --measure --json bench/results/scale.json --plot bench/results/scale.png
    python bench/scale.py --from bench/results/scale.json --step 0.3          # simulated again from what was measured

``--measure`` starts two processes on this machine. They exchange values of several sizes, whose times are kept, and
share a calibration and a search of the bundled model, of which is noted what they compute between two exchanges and how
much each sends. The simulation then runs that sequence on threads, one per process, through `layercache.parallel`'s own
`Crew`; only what a step takes, and the exchange of bytes, is replaced by a clock per thread. Nothing waits, so hours of
64 GPUs take seconds, and the same seed gives the same figures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from layercache.errors import CrewError
from layercache.parallel.crew import Crew

STEP = 0.3
"""Seconds of a step of one sample, all forwards of guidance together: Qwen-Image on one GPU."""
SMALL = 512
"""Bytes of a value whose exchange takes no second round."""
SIZES = (SMALL, 2048, 16384)
SAMPLES, WORLDS = (8, 16, 24, 64), (1, 2, 4, 8, 16, 24, 32, 64)
LIMIT = 600.0  # seconds that a thread waits for the others


# --- simulated processes ---------------------------------------------------------------------------------------


class Meeting:
    """Where simulated processes exchange values; all leave with the same time on their clocks.

    Args:
        world: how many there are.
        latency: seconds of an exchange in which the largest value has so many bytes.
    """

    def __init__(self, world: int, latency: Callable[[int], float] = lambda size: 0.0):
        self.world, self.latency, self.now = world, latency, 0.0
        self.values = [[b""] * world, [b""] * world]
        self.clocks, self.sizes = [0.0] * world, [0] * world
        self.turns = [0] * world
        self.barrier = threading.Barrier(world, action=self._all_are_here, timeout=LIMIT)

    def exchange(self, rank: int, own: bytes, size: int, clock: float) -> tuple[list[bytes], float]:
        """The values of all processes, and the time behind it."""
        turn = self.turns[rank] = self.turns[rank] + 1
        values = self.values[turn % 2]  # in turns, so that nobody overwrites what another one has not read yet
        values[rank], self.sizes[rank], self.clocks[rank] = own, size, clock
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RuntimeError("a simulated process is gone") from error
        return list(values), self.now

    def _all_are_here(self) -> None:
        self.now = max(self.clocks) + self.latency(max(self.sizes))


class SimulatedCrew(Crew):
    """A crew whose processes are threads, with a clock each.

    Attributes:
        clock: seconds since the beginning.
        unsent: bytes that the next value has besides its own, so that a large one need not be made.
    """

    def __init__(self, meeting: Meeting, rank: int):
        super().__init__()
        self.meeting, self.rank, self.world = meeting, rank, meeting.world
        self.clock, self.unsent = 0.0, 0

    def work(self, seconds: float) -> None:
        """Lets so much time pass."""
        self.clock += seconds

    def _bytes_of_all(self, own: bytes) -> list[bytes]:
        size, self.unsent = len(own) + self.unsent, 0
        found, self.clock = self.meeting.exchange(self.rank, own, size, self.clock)
        return found


def on_threads(task: Callable[[SimulatedCrew], Any], meeting: Meeting) -> list[Any]:
    """What a task gives on every simulated process, by rank; the first error is raised."""
    found: list[Any] = [None] * meeting.world
    errors: list[BaseException | None] = [None] * meeting.world

    def run(rank: int) -> None:
        try:
            found[rank] = task(SimulatedCrew(meeting, rank))
        except BaseException as error:
            errors[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(meeting.world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [error for error in errors if error is not None]
    if failed:
        raise next((error for error in failed if not isinstance(error, CrewError)), failed[0])
    return found
