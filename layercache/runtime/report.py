"""The report of a cache: what was computed and reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from layercache._utils.summaries import Rows, Summarised
from layercache.runtime.identity import Identity

NOT_STORED = (
    "something that the step would have reused was not stored: the run or its branch began in the middle, or its "
    "shapes changed"
)
TO_LEARN = "it was recorded, to learn from"


@dataclass(frozen=True, repr=False)
class CacheReport(Summarised):
    """What a cache did since it was enabled.

    Attributes:
        used: share of the block time computed, by the schedule's measured seconds per group (1.0 before a run).
        computed_cells, cached_cells: groups computed and reused, over all forwards.
        generations: generations begun, counted on the branch that began most.
        forwards: calls of the transformer.
        fallback_rows: forwards that computed everything because a residual they would have read was not
            there (a run that began in the middle, or changed its shape).
        cache_bytes: memory of the stored residuals of all branches, and of the stored velocities, in
            the newest generation.
        host_bytes: of these, what is kept in host memory (``offload`` of `layercache.enable`).
        staged_bytes: the most that was on the device at a time of what is kept in host memory.
        branches: names of the branches seen.
        source: what gave the steps of the newest generation: ``"caller"``, ``"scheduler"``, ``"timestep"``, ``"none"``.
        unidentified: forwards computed in full because nothing said their step, or which of several at one step they
            are.
        speedup: measured on the newest forwards of the transformer: the mean time of those that computed everything
            over the mean of all; ``None`` before there are both.
        expected_psnr: mean and 10 % quantile of the PSNR in dB that other pictures are expected to have, where a search
            or what was learnt knows it.
        in_full: forwards that computed everything although more was to be reused, by the reason.
    """

    used: float
    computed_cells: int
    cached_cells: int
    generations: int
    forwards: int
    fallback_rows: int
    cache_bytes: int
    branches: tuple[str, ...]
    source: str = "none"
    unidentified: int = 0
    speedup: float | None = None
    expected_psnr: tuple[float, float] | None = None
    in_full: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    staged_bytes: int = 0

    @property
    def device_bytes(self) -> int:
        """Memory of the device: what is stored there, and what passes through it."""
        return self.cache_bytes - self.host_bytes + self.staged_bytes

    def _summary(self) -> tuple[str, Rows]:
        groups = f"{self.computed_cells} computed, {self.cached_cells} reused: {self.used:.1%} of block time used; "
        groups += f"{self.cache_bytes / 2**20:.1f} MiB stored"
        if self.host_bytes:
            groups += f", {self.host_bytes / 2**20:.1f} MiB of them in host memory"
        speedup = "" if self.speedup is None else f"{self.speedup:.2f}x, measured on the transformer's forwards"
        expected = "" if self.expected_psnr is None else "{:.1f} dB, worst tenth {:.1f} dB".format(*self.expected_psnr)
        in_full = "; ".join(f"{count} forwards because {why}" for why, count in self.in_full.items())
        return (
            f"CacheReport: {self.forwards} forwards in {self.generations} generations, "
            f"branches: {', '.join(self.branches) or '-'}",
            [
                ("groups", groups),
                ("speedup", speedup),
                ("expected", expected),
                ("in full", in_full),
            ],
        )


def summed(reports: Sequence[CacheReport], newest: CacheReport) -> CacheReport:
    """What several routers did, one after the other; memory, source and expectation are of the newest."""
    forwards = sum(one.forwards for one in reports)
    in_full: Counter[str] = Counter()
    for one in reports:
        in_full.update(one.in_full)
    return CacheReport(
        used=sum(one.forwards * one.used for one in reports) / forwards if forwards else 1.0,
        computed_cells=sum(one.computed_cells for one in reports),
        cached_cells=sum(one.cached_cells for one in reports),
        generations=sum(one.generations for one in reports),
        forwards=forwards,
        fallback_rows=sum(one.fallback_rows for one in reports),
        cache_bytes=newest.cache_bytes,
        host_bytes=newest.host_bytes,
        staged_bytes=max(one.staged_bytes for one in reports),
        branches=tuple(dict.fromkeys(name for one in reports for name in one.branches)),
        source=newest.source,
        unidentified=sum(one.unidentified for one in reports),
        speedup=newest.speedup,
        expected_psnr=newest.expected_psnr,
        in_full=in_full,
    )


@dataclass
class Counts:
    """What a router counts from forward to forward.

    Attributes:
        computed, reused: forwards that computed, and that reused.
        fallbacks: forwards that computed everything because something they would have read was not there.
    """

    computed: int = 0
    reused: int = 0
    fallbacks: int = 0

    @property
    def forwards(self) -> int:
        return self.computed + self.reused

    def note(self, reused: bool) -> None:
        """One more forward."""
        if reused:
            self.reused += 1
        else:
            self.computed += 1

    def report(
        self, saved: float, nbytes: int, branches: Iterable[str], identity: Identity, speedup: float | None = None
    ) -> CacheReport:
        """The report of a router whose forwards either compute everything or leave out the share ``saved``."""
        return CacheReport(
            used=1.0 - self.reused * saved / self.forwards if self.forwards else 1.0,
            computed_cells=self.computed,
            cached_cells=self.reused,
            generations=identity.count,
            forwards=self.forwards,
            fallback_rows=self.fallbacks,
            cache_bytes=nbytes,
            branches=tuple(branches),
            source=identity.source,
            unidentified=identity.unidentified.total(),
            speedup=speedup,
            in_full=reasons(identity, self.fallbacks),
        )


def reasons(identity: Identity, fallbacks: int) -> dict[str, int]:
    """Why forwards computed everything, and how many."""
    missing = {NOT_STORED: fallbacks} if fallbacks else {}
    return missing | dict(identity.unidentified)
