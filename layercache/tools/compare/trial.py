"""A cache run on pictures, between full runs of the same pictures: what it gives, and how much faster it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layercache.models.registry import find_transformer
from layercache.runtime.attachment import MethodPatch
from layercache.runtime.report import CacheReport
from layercache.tools.compare.calls import PictureCalls, Pictures
from layercache.tools.compare.peers import block_calls

_READS = ("item", "tolist", "__bool__", "__float__", "__int__")
Attach = Callable[[], AbstractContextManager[Any]]


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


@dataclass
class Trial:
    """What a cache gave.

    Attributes:
        pictures: of all batches.
        seconds: of all batches, each run once.
        pairs: seconds of a full run and of the cached run beside it, of the same batch.
        used: share of the blocks' time computed; of another package's cache the share of block calls.
        reports: of our caches, at the end of every run; what it counts is of that run alone.
        operators, reads: per step of the first batch; NaN where they were not counted.
    """

    pictures: Pictures
    seconds: float
    pairs: tuple[tuple[float, float], ...]
    used: float
    reports: list[CacheReport] = field(default_factory=list)
    operators: float = float("nan")
    reads: float = float("nan")

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
        return max((report.cache_bytes for report in self.reports), default=None)


class _Runs:
    """Runs of a cache and full runs, and what they add up to."""

    def __init__(self, calls: PictureCalls, attach: Attach):
        self.calls, self.attach = calls, attach
        self.transformer = find_transformer(calls.pipeline)
        self.is_foreign = False
        self.reports: list[CacheReport] = []
        self.block_calls, self.full_block_calls = [0, 0], [0, 0]  # so many in so many generations

    def cached(self, batch: int) -> tuple[Pictures, float]:
        with self.attach() as cache:
            if cache is None:
                with block_calls(self.transformer) as counted:
                    found = self.calls.run(batch)
                _add(self.block_calls, counted[0])
                return found
            before = cache.report()
            found = self.calls.run(batch)
            self.reports.append(_since(before, cache.report()))
            return found

    def full(self, batch: int) -> float:
        """Seconds of a full run; hooks that count the blocks are on both sides or on none."""
        if not self.is_foreign:
            return self.calls.run(batch)[1]
        with block_calls(self.transformer) as counted:
            seconds = self.calls.run(batch)[1]
        _add(self.full_block_calls, counted[0])
        return seconds

    def warm_up(self, counts: bool) -> tuple[float, float]:
        """A first run, whose time does not count; operators and reads per step, where they are to be counted."""
        with self.attach() as cache:
            self.is_foreign = cache is None
            if not counts:
                self.calls.run(0)
                return float("nan"), float("nan")
            with Counter() as counter, steps_taken(self.calls.pipeline) as steps:
                self.calls.run(0)
        return counter.operators / max(1, steps[0]), counter.reads / max(1, steps[0])

    @property
    def used(self) -> float:
        if self.is_foreign:
            (cached, runs), (full, full_runs) = self.block_calls, self.full_block_calls
            return (cached / runs) / (full / full_runs) if full else float("nan")
        forwards = sum(report.forwards for report in self.reports)
        return sum(report.used * report.forwards for report in self.reports) / forwards if forwards else float("nan")


def run_trial(calls: PictureCalls, attach: Attach, repeats: int, counts: bool = False) -> Trial:
    """Runs a cache on all pictures, and full runs in turns with it.

    Each repeat is a full run and a cached run of the same batch, one right behind the other; which of them comes first
    alternates, so that a machine that grows slower or faster does not favour either. Batches take turns.

    Args:
        calls: the pictures; they were run in full before, so that full runs are warm.
        attach: a context manager around a generation, see `layercache.tools.compare.model.Entry`.
        repeats: pairs of runs whose times are compared, at least 1.
        counts: also count operators and reads, in the run that warms the cache up.
    """
    runs = _Runs(calls, attach)
    operators, reads = runs.warm_up(counts)
    number = len(calls.batches)
    pictures, seconds, pairs = [], 0.0, []
    for turn in range(max(number, repeats)):
        batch, is_pair = turn % number, turn < repeats
        full = runs.full(batch) if is_pair and turn % 2 == 0 else 0.0
        found, own = runs.cached(batch)
        if is_pair:
            pairs.append((full or runs.full(batch), own))
        if turn < number:
            pictures.append(found)
            seconds += own
    return Trial(np.concatenate(pictures), seconds, tuple(pairs), runs.used, runs.reports, operators, reads)


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


def _add(total: list[int], calls: int) -> None:
    total[0] += calls
    total[1] += 1


def _since(before: CacheReport, after: CacheReport) -> CacheReport:
    """The report of what was done since an earlier one of the same cache."""
    forwards = after.forwards - before.forwards
    if before.forwards == 0 or forwards <= 0:
        return after
    used = (after.used * after.forwards - before.used * before.forwards) / forwards
    counted = ("computed_cells", "cached_cells", "generations", "fallback_rows", "unidentified")
    more = {name: getattr(after, name) - getattr(before, name) for name in counted}
    return replace(after, used=used, forwards=forwards, **more)
