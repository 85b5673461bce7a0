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

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from layercache.errors import CrewError
from layercache.parallel.crew import BLOCK, Crew, crew_of_environment
from layercache.tools.report.machine import machine_info, write_json

STEP = 0.3
"""Seconds of a step of one sample, all forwards of guidance together."""
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
        self.turn, self.here, self.is_left = 0, 0, False
        self.changed = threading.Condition()

    def exchange(self, rank: int, own: bytes, size: int, clock: float) -> tuple[list[bytes], float]:
        """The values of all processes, and the time behind it."""
        with self.changed:
            turn = self.turn
            values = self.values[turn % 2]  # in turns, so that nobody overwrites what another one has not read yet
            values[rank], self.sizes[rank], self.clocks[rank] = own, size, clock
            self.here += 1
            if self.here == self.world:
                self.now = max(self.clocks) + self.latency(max(self.sizes))
                self.turn, self.here = turn + 1, 0
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.turn > turn or self.is_left, LIMIT)
            if self.turn == turn:
                raise RuntimeError("a simulated process is gone")
            return list(values), self.now

    def leave(self) -> None:
        """Nobody waits for a process that is gone."""
        with self.changed:
            self.is_left = True
            self.changed.notify_all()


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
            meeting.leave()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(meeting.world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [error for error in errors if error is not None]
    if failed:
        raise next((error for error in failed if not isinstance(error, CrewError)), failed[0])
    return found


# --- what is measured: two processes of this machine -----------------------------------------------------------


@dataclass
class Work:
    """What one sample's process does in a calibration, a fit or a search, as it was noted.

    Attributes:
        name: of the work.
        samples: that it was noted with.
        intervals: how often so many steps of a sample were followed by an exchange of so many bytes per sample.
        host_seconds: beside the model and what is done in every step, on every process alike.
    """

    name: str
    samples: int
    intervals: list[tuple[float, int, int]] = field(default_factory=list)
    host_seconds: float = 0.0

    @property
    def steps(self) -> float:
        """Of a sample, in all."""
        return sum(steps * count for steps, _, count in self.intervals)


class NotedCrew(Crew):
    """A crew that notes what is computed between its exchanges, and their bytes."""

    def __init__(self, group: Any):
        super().__init__(group)
        self.noted: list[tuple[int, int, float]] = []
        self.forwards, self.model_seconds, self.start = 0, 0.0, time.process_time()

    def _bytes_of_all(self, own: bytes) -> list[bytes]:
        host = time.process_time() - self.start - self.model_seconds
        found = super()._bytes_of_all(own)
        self.noted.append((self.forwards, max(map(len, found)), host))
        self.forwards, self.model_seconds, self.start = 0, 0.0, time.process_time()
        return found

    @contextlib.contextmanager
    def watching(self, transformer: Any) -> Iterator[None]:
        """Context in which the model's forwards are counted, and their time is left out."""
        forward = transformer.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return forward(*args, **kwargs)
            finally:
                self.forwards += 1
                self.model_seconds += time.process_time() - start

        transformer.forward = counted
        try:
            yield
        finally:
            del transformer.forward

    def calibration(self, samples: int, branches: int = 2) -> Work:
        """What was noted since the last time, of samples one after the other."""
        rows, self.noted = [(forwards / branches, size) for forwards, size, _ in self.noted], []
        counts = Counter((steps * self.world / samples, size) for steps, size in rows)
        return Work("calibrate", samples, [(*key, count) for key, count in sorted(counts.items())])

    def steps_together(self, name: str, samples: int, branches: int = 2) -> Work:
        """What was noted since the last time, of samples that take their steps together."""
        own = -(-samples // self.world)
        rows, self.noted = [(forwards / branches / own, size, host) for forwards, size, host in self.noted], []
        usual = statistics.median([host / steps for steps, _, host in rows if steps] or [0.0])
        host = sum(max(0.0, host - usual * steps) for steps, _, host in rows)
        counts = Counter((round(steps, 3), -(-size // own)) for steps, size, _ in rows)
        return Work(name, samples, [(*key, count) for key, count in sorted(counts.items())], host)


def pipeline() -> Any:
    """The bundled model with three of its blocks, one for each group: what is noted does not depend on their number."""
    from layercache.demo.pipeline import load_demo_pipeline

    pipe = load_demo_pipeline("cpu")
    del pipe.transformer.transformer_blocks[3:]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noted_work(crew: NotedCrew, steps: int) -> list[Work]:
    """A calibration, a fit of a schedule to samples, and a search, shared by two processes."""
    import layercache
    from layercache.demo.model import CLASS_NAMES
    from layercache.methods import Uniform

    pipe, found = pipeline(), []
    settings: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": steps, "progress": False}
    prompts = list(CLASS_NAMES)
    with crew.watching(pipe.transformer):
        profile = layercache.calibrate(pipe, prompts[:4], crew=crew, **settings)
        found.append(crew.calibration(4))
        schedule = Uniform(interval=2).schedule(profile.fingerprint)
        layercache.refit(pipe, schedule, prompts[:4], crew=crew, **settings)
        found.append(crew.steps_together("refit", 4))
        layercache.search(pipe, prompts[:8], crew=crew, **settings)
        found.append(crew.steps_together("search", 8))
    return found


def exchanges(crew: Crew, size: int, count: int) -> list[float]:
    """Seconds of exchanges of so many bytes, each a little after the other one."""
    value, found = os.urandom(size), []
    for _ in range(count):
        time.sleep(2e-3)
        crew.gather([0])
        start = time.perf_counter()
        crew.gather([value])
        found.append(time.perf_counter() - start)
    return found


def passes(crew: Crew, size: int, count: int) -> list[float]:
    """Seconds in which two processes pass each other so many bytes: a round of gloo's ring."""
    import torch
    import torch.distributed as dist

    own, found = torch.zeros(size, dtype=torch.uint8), []
    for _ in range(count):
        crew.gather([0])
        start = time.perf_counter()
        dist.all_gather([torch.empty_like(own), torch.empty_like(own)], own, group=crew.group)
        found.append(time.perf_counter() - start)
    return found


def _measuring(rank: int, port: int, folder: Path, steps: int, count: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    import torch

    torch.set_num_threads(1)
    crew = crew_of_environment()
    times = {str(size): exchanges(crew, size, count) for size in SIZES}
    noted = NotedCrew(crew.group)
    start = time.perf_counter()
    work = noted_work(noted, steps)
    print(f"process {rank}: {time.perf_counter() - start:.0f} s of work", flush=True)
    largest = max(size for one in work for _, size, _ in one.intervals)
    ring = {str(size): passes(crew, size, count) for size in (SIZES[-1], largest)}
    if crew.leads:
        found = {"exchange": times, "pass": ring, "work": [vars(one) for one in work], "steps": steps}
        (folder / "found.json").write_text(json.dumps(found))
    crew.close()


def measure(steps: int, count: int) -> dict[str, Any]:
    """What two processes of this machine give: seconds of exchanges, and what calibration and search exchange."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_measuring, args=(k, port, Path(folder), steps, count)) for k in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return found


# --- the simulation --------------------------------------------------------------------------------------------


class Network:
    """Seconds of an exchange of many processes, drawn from those of two.

    Short values go to the leader, and a block per process from it to all, in as many rounds as the number of processes
    has binary digits; two processes take two rounds. Of longer values the rest goes around, in a round per process.
    """

    def __init__(self, measured: dict[str, Any], world: int, seed: int, slower: float = 1.0):
        self.world, self.slower, self.numbers = world, slower, np.random.default_rng(seed)
        self.small = np.array(measured["exchange"][str(SMALL)]) / 2
        self.ring = {int(size): np.array(times) for size, times in measured["pass"].items()}
        least, most = min(self.ring), max(self.ring)
        slope = (np.median(self.ring[most]) - np.median(self.ring[least])) / max(1, most - least)
        self.byte_seconds = max(0.0, float(slope))

    def __call__(self, size: int) -> float:
        if self.world == 1:
            return 0.0
        rounds = 1 + math.ceil(math.log2(self.world))
        seconds = self.numbers.choice(self.small, rounds).sum()
        seconds += (rounds - 1) * (self.world - 2) * BLOCK * self.byte_seconds  # two processes' are in the measured
        if size > BLOCK - 8:
            nearest = min((one for one in self.ring if one >= size), default=max(self.ring))
            seconds += self.numbers.choice(self.ring[nearest], self.world - 1).sum() * max(1.0, size / nearest)
        return float(seconds) * self.slower


def processes_of(work: Work, crew: SimulatedCrew, samples: int, step: float, spread: float) -> float:
    """Runs a process's part of some work, and gives its clock behind it."""
    numbers = np.random.default_rng([crew.rank, 7])

    def compute(steps: float) -> None:
        crew.work(steps * step * (1 + spread * float(numbers.standard_normal()) if spread else 1.0))

    if work.name == "calibrate":
        bytes_of_sample = max(size for _, size, _ in work.intervals)

        def measure_sample(number: int) -> int:
            compute(work.steps)
            crew.unsent += bytes_of_sample
            return number

        crew.map(measure_sample, range(samples))
        return crew.clock
    own = len(crew.share(range(samples)))
    crew.work(work.host_seconds * samples / work.samples)
    for steps, size, count in work.intervals:
        for _ in range(count):
            compute(steps * own)
            crew.unsent += size * own
            crew.gather(range(own))
    return crew.clock


def simulated(measured: dict[str, Any], work: Work, world: int, samples: int, args: argparse.Namespace) -> dict:
    """Seconds and efficiency of some work with so many processes and samples."""
    meeting = Meeting(world, Network(measured, world, args.seed, args.slower))
    run = partial(processes_of, work, samples=samples, step=args.step, spread=args.spread)
    seconds = max(on_threads(lambda crew: run(crew=crew), meeting))
    alone = samples * (work.steps * args.step + work.host_seconds / work.samples)
    bound = samples / math.ceil(samples / world)
    return {
        "work": work.name,
        "samples": samples,
        "processes": world,
        "seconds": seconds,
        "speedup": alone / seconds,
        "efficiency": alone / seconds / world,
        "of_the_bound": alone / seconds / bound,
    }


def all_rows(measured: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every work, with the numbers of samples that it can have and of processes that they can be shared by."""
    rows = []
    for data in measured["work"]:
        work = Work(**data)
        for samples in [work.samples] if work.name == "search" else args.samples:
            for world in (world for world in args.processes if world <= samples):
                rows.append(simulated(measured, work, world, samples, args))
    return rows


def variations(measured: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """As many processes as samples, with shorter steps, slower exchanges, and steps whose time varies."""
    rows = []
    for change in ({"step": 0.05}, {"slower": 5.0}, {"spread": 0.02}):
        changed = argparse.Namespace(**vars(args) | change)
        for work in (Work(**data) for data in measured["work"]):
            samples = work.samples if work.name == "search" else max(args.samples)
            rows.append(change | simulated(measured, work, samples, samples, changed))
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path, step: float) -> Path:
    """Efficiency over the number of processes, a panel per work; what the samples themselves allow is dotted."""
    from layercache.tools.report.plots import new_figure, save_figure

    names = list(dict.fromkeys(row["work"] for row in rows))
    figure = new_figure(3.2 * len(names), 3.4)
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for samples in dict.fromkeys(row["samples"] for row in rows if row["work"] == name):
            own = [row for row in rows if row["work"] == name and row["samples"] == samples]
            worlds = [row["processes"] for row in own]
            (line,) = axis.plot(worlds, [row["efficiency"] for row in own], "o-", ms=4, label=f"{samples} samples")
            bounds = [row["efficiency"] / row["of_the_bound"] for row in own]
            axis.plot(worlds, bounds, ":", color=line.get_color(), linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{name}, {step:g} s a step", fontsize=9)
        axis.set_xlabel("processes")
        axis.set_ylim(0, 1.05)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False, loc="lower left")
    figure.axes[0].set_ylabel("efficiency")
    return save_figure(figure, path)


def say(measured: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Prints what was measured and simulated."""
    for kind in ("exchange", "pass"):
        for size, times in measured[kind].items():
            middle, high = (1e3 * float(np.quantile(times, share)) for share in (0.5, 0.99))
            print(f"{kind} of {size} bytes by two processes: {middle:.2f} ms, 99 % below {high:.2f} ms")
    for data in measured["work"]:
        work = Work(**data)
        count = sum(count for _, _, count in work.intervals)
        size = sum(size * count for _, size, count in work.intervals) / count
        print(
            f"{work.name} of {work.samples} samples: {work.steps:.0f} steps of each, {count} exchanges of {size:.0f} "
            f"bytes per sample, {work.host_seconds:.1f} s beside the model"
        )
    for row in rows:
        print(
            f"{row['work']:<18} {row['samples']:>3} samples {row['processes']:>3} processes {row['seconds']:>9.1f} s "
            f"{row['speedup']:>6.2f}x  efficiency {row['efficiency']:.3f}, {row['of_the_bound']:.3f} of the bound"
            + "".join(f", {name} {row[name]:g}" for name in ("step", "slower", "spread") if name in row)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--measure", action="store_true", help="start two processes and measure what they exchange")
    source.add_argument("--from", dest="given", type=Path, help="a file that an earlier run wrote")
    parser.add_argument("--steps", type=int, default=30, help="of a generation, where it is measured")
    parser.add_argument("--exchanges", type=int, default=300, help="that are measured, of every size")
    parser.add_argument("--step", type=float, default=STEP, help="seconds of a step of one sample")
    parser.add_argument("--spread", type=float, default=0.0, help="standard deviation of a step's time, as a share")
    parser.add_argument("--slower", type=float, default=1.0, help="factor of the measured exchanges")
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--processes", type=int, nargs="+", default=WORLDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    args = parser.parse_args()
    if args.measure:
        measured = measure(args.steps, args.exchanges) | {"machine": machine_info()}
    else:
        measured = json.loads(args.given.read_text())["measured"]
    rows, more = all_rows(measured, args), variations(measured, args)
    settings = {name: getattr(args, name) for name in ("step", "spread", "slower", "seed")}
    if args.json is not None:
        write_json(
            args.json, {"kind": "scale", "settings": settings, "rows": rows, "variations": more, "measured": measured}
        )
    if args.plot is not None:
        draw(rows, args.plot, args.step)
    say(measured, [*rows, *more])


if __name__ == "__main__":
    main()
