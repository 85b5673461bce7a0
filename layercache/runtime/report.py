"""The report of a cache: what was computed and reused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from layercache._utils.summaries import Rows, Summarised
from layercache.runtime.identity import Identity


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
        branches: names of the branches seen.
        source: what gave the steps of the newest generation: ``"caller"``, ``"scheduler"``, ``"timestep"``, ``"none"``.
        unidentified: forwards computed in full because nothing said their step, or which of several at one step they
            are.
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

    def _summary(self) -> tuple[str, Rows]:
        whole = {
            "an anchor was missing": self.fallback_rows,
            "nothing said their step or branch": self.unidentified,
        }
        groups = f"{self.computed_cells} computed, {self.cached_cells} reused: {self.used:.1%} of block time used"
        forwards = [f"{count} forwards because {why}" for why, count in whole.items() if count]
        return (
            f"CacheReport: {self.forwards} forwards in {self.generations} generations, "
            f"branches: {', '.join(self.branches) or '-'}",
            [
                ("groups", groups),
                ("stored", f"{self.cache_bytes / 2**20:.1f} MiB of residuals"),
                ("in full", ", ".join(forwards)),
            ],
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

    def report(self, saved: float, nbytes: int, branches: Iterable[str], identity: Identity) -> CacheReport:
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
            unidentified=identity.unidentified,
        )
