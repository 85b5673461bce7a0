"""A cache run on pictures, between full runs of the same pictures: what it gives, and how much faster it is."""

from __future__ import annotations

import platform
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layercache.models.registry import find_transformer
from layercache.parallel.crew import Crew
from layercache.runtime.attachment import MethodPatch
from layercache.runtime.report import CacheReport
from layercache.tools.compare.calls import PictureCalls, Pictures
from layercache.tools.compare.peers import block_calls

_READS = ("item", "tolist", "__bool__", "__float__", "__int__")
Attach = Callable[[], AbstractContextManager[Any]]
Look = Callable[[int, Pictures], Any]


class Counter(TorchDispatchMode):
    """Counts operators, and the host's looks at values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0
        self._originals: dict[str, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Counter:
        for name in _READS:
            self._originals[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counted(self._originals[name]))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor) -> Any:
            self.reads += 1
            return original(tensor)

        return read


@dataclass(frozen=True)
class BatchRun:
    """A cached run of a batch.

    Attributes:
        look: what was taken of its pictures.
        seconds: of the call.
        report: of our cache, of this run alone; ``None`` of another package's.
        block_calls: of another package's cache.
    """

    look: Any
    seconds: float
    report: CacheReport | None
    block_calls: int


@dataclass(frozen=True)
class Timing:
    """What the leader measured.

    Attributes:
        pairs: seconds of a full run and of the cached run beside it, of the same batch.
        seconds: of a picture, in the cached runs of the pairs.
        operators, reads: per step of the first batch; NaN where they were not counted.
        full_block_calls: calls of the blocks in a full run; NaN of our caches, where they are not counted.
    """

    pairs: tuple[tuple[float, float], ...]
    seconds: float
    operators: float
    reads: float
    full_block_calls: float


@dataclass
class Trial:
    """What a cache gave.

    Attributes:
        batches: a run of every batch, in their order.
        timing: of full and cached runs in turns.
        reports: of our caches, at the end of every run of this process; what it counts is of that run alone.
        seconds: of all batches, each run once.
    """

    batches: list[BatchRun]
    timing: Timing
    reports: list[CacheReport]
    seconds: float

    @property
    def looks(self) -> list[Any]:
        """What was taken of the pictures, by batch."""
        return [run.look for run in self.batches]

    @property
    def pairs(self) -> tuple[tuple[float, float], ...]:
        return self.timing.pairs

    @property
    def speedups(self) -> tuple[float, ...]:
        return tuple(full / cached for full, cached in self.pairs)

    @property
    def speedup(self) -> float:
        """The median of the repeats."""
        return median(self.speedups)

    @property
    def cache_bytes(self) -> int | None:
        """Memory of what was stored at most; ``None`` of another package's cache."""
        return max((run.report.cache_bytes for run in self.batches if run.report is not None), default=None)

    @property
    def forwards(self) -> int:
        """Of the transformer, in the run of every batch; 0 of another package's cache."""
        return sum(run.report.forwards for run in self.batches if run.report is not None)

    @property
    def in_full(self) -> dict[str, int]:
        """Those that computed everything although more was to be reused, by the reason."""
        found: Tally[str] = Tally()
        for run in self.batches:
            found.update(run.report.in_full if run.report is not None else {})
        return dict(found)

    @property
    def used(self) -> float:
        """Share of the blocks' time computed; of another package's cache the share of block calls."""
        reports = [run.report for run in self.batches if run.report is not None]
        if not reports:
            return sum(run.block_calls for run in self.batches) / len(self.batches) / self.timing.full_block_calls
        forwards = sum(report.forwards for report in reports)
        return sum(report.used * report.forwards for report in reports) / forwards if forwards else float("nan")


class _Runs:
    """Runs of a cache and full runs of this process, and what they gave."""

    def __init__(self, calls: PictureCalls, attach: Attach, look: Look, changed: Mapping[str, Any]):
        self.calls, self.attach, self.look, self.changed = calls, attach, look, changed
        self.transformer = find_transformer(calls.pipeline)
        self.is_foreign = False
        self.reports: list[CacheReport] = []
        self.found: dict[int, BatchRun] = {}
        self.errors: dict[int, Exception] = {}
        self.pairs: list[tuple[float, float]] = []
        self.pictures = 0  # of the pairs
        self.full_block_calls = [0, 0]  # so many in so many generations

    def warm_up(self, counts: bool) -> tuple[float, float]:
        """A first run, whose time does not count; operators and reads per step, where they are to be counted."""
        with self.attach() as cache:
            self.is_foreign = cache is None
            if not counts:
                self.calls.run(0, self.changed)
                return float("nan"), float("nan")
            with Counter() as counter, steps_taken(self.calls.pipeline) as steps:
                self.calls.run(0, self.changed)
        return counter.operators / max(1, steps[0]), counter.reads / max(1, steps[0])

    def run(self, batch: int) -> BatchRun:
        """The run of a batch, if it was made or failed already; or a run now."""
        if batch in self.errors:
            raise self.errors[batch]
        if batch not in self.found:
            self._cached(batch)
        return self.found[batch]

    def try_run(self, batch: int) -> None:
        """Runs a batch ahead of its turn; `run` raises what it raised."""
        try:
            self.run(batch)
        except Exception as error:
            self.errors[batch] = error

    def try_pair(self, batch: int, full_first: bool) -> None:
        """A full and a cached run of a batch, one right behind the other; `run` raises what they raised."""
        if self.errors:
            return
        try:
            full = self._full(batch) if full_first else 0.0
            own = self._cached(batch)
            self.pairs.append((full or self._full(batch), own))
        except Exception as error:
            self.errors[batch] = error
        low, high = self.calls.batches[batch]
        self.pictures += high - low

    def timing(self, counted: tuple[float, float]) -> Timing:
        seconds = sum(cached for _, cached in self.pairs) / max(1, self.pictures)
        calls, runs = self.full_block_calls
        return Timing(tuple(self.pairs), seconds, *counted, calls / runs if calls else float("nan"))

    def _cached(self, batch: int) -> float:
        """Seconds of a cached run; the first one of a batch is kept."""
        calls, report = 0, None
        with self.attach() as cache:
            if cache is None:
                with block_calls(self.transformer) as counted:
                    pictures, seconds = self.calls.run(batch, self.changed)
                calls = counted[0]
            else:
                before = cache.report()
                pictures, seconds = self.calls.run(batch, self.changed)
                report = _since(before, cache.report())
                self.reports.append(report)
        if batch not in self.found:
            self.found[batch] = BatchRun(self.look(batch, pictures), seconds, report, calls)
        return seconds

    def _full(self, batch: int) -> float:
        """Seconds of a full run; hooks that count the blocks are on both sides or on none."""
        if not self.is_foreign:
            return self.calls.run(batch)[1]
        with block_calls(self.transformer) as counted:
            seconds = self.calls.run(batch)[1]
        self.full_block_calls[0] += counted[0]
        self.full_block_calls[1] += 1
        return seconds


def run_trial(
    calls: PictureCalls,
    attach: Attach,
    repeats: int,
    counts: bool = False,
    look: Look = lambda batch, pictures: pictures,
    crew: Crew | None = None,
    alone: bool = False,
    changed: Mapping[str, Any] | None = None,
) -> Trial | None:
    """Runs a cache on all pictures, and full runs in turns with it.

    Each repeat is a full run and a cached run of the same batch, one right behind the other; which of them comes first
    alternates, so that a machine that grows slower or faster does not favour either. Batches take turns.

    The processes of a crew share out the batches. Times are the leader's, of its own batches, and so is the result;
    the others get ``None``.

    Args:
        calls: the pictures; they were run in full before, so that full runs are warm.
        attach: a context manager around a generation, see `layercache.tools.compare.model.Entry`.
        repeats: pairs of runs whose times are compared, at least 1.
        counts: also count operators and reads, in the run that warms the cache up.
        look: what is taken of a batch's pictures; it is sent to the leader.
        crew: processes that share out the batches, at most one per batch.
        alone: the other processes wait while the leader times (`shares_device`).
        changed: arguments of the cached runs' calls that take the place of the others.

    Raises:
        BaseException: the error of the first batch that failed, on all processes.
    """
    crew = crew or Crew()
    runs = _Runs(calls, attach, look, changed or {})
    own = crew.share(range(len(calls.batches)))
    counted = float("nan"), float("nan")
    with crew.together():
        if crew.leads:
            counted = runs.warm_up(counts)
    for turn in range(repeats):
        with crew.together():  # in every turn, so that none waits for longer than that
            if crew.leads:
                runs.try_pair(own[turn % len(own)], turn % 2 == 0)
            elif not alone and turn < len(own):
                runs.try_run(own[turn])
    batches: list[BatchRun] = []
    crew.map(runs.run, range(len(calls.batches)), lambda batch, run: batches.append(run), keep=False)
    if not crew.leads:
        return None
    timing = runs.timing(counted)
    seconds = timing.seconds * calls.batches[-1][1] if alone else sum(run.seconds for run in batches)
    return Trial(batches, timing, runs.reports, seconds)


def shares_device(pipeline: Any, crew: Crew) -> bool:
    """Whether other processes run on what the leader runs on, its GPU or its machine's CPUs, and disturb its times."""
    device = torch.device(getattr(pipeline, "device", "cpu"))
    name = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else device.type
    places = crew.gather([f"{platform.node()} {name}"])
    return places.count(places[0]) > 1


@contextmanager
def steps_taken(pipeline: Any) -> Iterator[list[int]]:
    """Counts the sampler's steps; copies of the sampler (LTX-2 makes one for the sound) do not count."""
    scheduler, steps = pipeline.scheduler, [0]
    before = {name: value for name, value in vars(scheduler).items() if name == "step"}
    original = scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        return original(*args, **kwargs)

    vars(scheduler)["step"] = MethodPatch(scheduler, "step", step)
    try:
        yield steps
    finally:
        del vars(scheduler)["step"]
        vars(scheduler).update(before)


def _since(before: CacheReport, after: CacheReport) -> CacheReport:
    """The report of what was done since an earlier one of the same cache."""
    forwards = after.forwards - before.forwards
    if before.forwards == 0 or forwards <= 0:
        return after
    used = (after.used * after.forwards - before.used * before.forwards) / forwards
    counted = ("computed_cells", "cached_cells", "generations", "fallback_rows", "unidentified")
    more = {name: getattr(after, name) - getattr(before, name) for name in counted}
    in_full = {reason: count - before.in_full.get(reason, 0) for reason, count in after.in_full.items()}
    in_full = {reason: count for reason, count in in_full.items() if count}
    return replace(after, used=used, forwards=forwards, in_full=in_full, **more)
