"""`layercache.search(..., sigmas="free")`: the noise levels of a searched path moved, forecasts on top (ours).

Between two computed steps the latents move by combinations of velocities that are there already, so a path says at
which levels the model is asked: some of the full run's. Here they are those at which as many full steps without a cache
would end nearest to the full run. Source: docs/methods.md, Free noise levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from layercache.planning.noise_levels import DIGITS, GivenLevels, best_levels
from layercache.planning.whole_steps import Tried, WholeStepSearch

GAIN = 0.5
"""In dB of expected quality: moved levels that promise less are not worth an argument of the call."""


class FreeLevels:
    """Moves the noise levels of the best path of every budget, and runs it there with its forecasts fitted.

    The run is kept where pictures left out of its forecasts are expected to have `GAIN` more than by the path as it
    was.

    Args:
        search: that has run.
        given: the noise levels of its calls.

    Attributes:
        kept: the runs that were better.
    """

    def __init__(self, search: WholeStepSearch, given: GivenLevels):
        self.search, self.given = search, given
        self.kept: list[Tried] = []

    def run(self, counts: Sequence[int]) -> Iterator[Tried]:
        """Runs moved levels for each of these numbers of computed steps; yields every run."""
        for count in sorted(counts):
            own = [one for one in self.search.tried if one.computed.sum() == count]
            best = max(own, key=lambda one: one.quality, default=None)
            sigmas = None if best is None else self.search.rollouts.crew.agree(self.found(best.computed))
            if best is None or sigmas is None:
                self.search.note_cost(count)
                continue
            rollouts = self.search.rollouts.moved(self.given.levels(sigmas), sigmas)
            moved = WholeStepSearch(rollouts, self.search.seconds, tail=self.search.tail, answers=self.search.answers)
            tried = moved.run_path(best.computed, best.forecast, f"{best.origin}, noise levels moved")
            if tried.quality > best.quality + GAIN:
                self.kept.append(tried)
            yield tried

    def found(self, path: np.ndarray) -> tuple[float, ...] | None:
        """The ``sigmas=`` of the moved levels of a path, ``[N]``; ``None`` where nothing is known of such models."""
        search, own = self.search, self.given.own
        if search.assumed is None:
            return None
        steps = np.flatnonzero(path)

        def place(moved: Sequence[float]) -> tuple[float, ...]:
            sigmas = np.asarray(own)
            sigmas[steps] = moved
            return placed(own, path, sigmas.tolist())

        def levels_of(moved: Sequence[float]) -> list[float]:
            levels = self.given.levels(place(moved))
            return [*(levels[step] for step in steps), levels[-1]]

        evenly = np.interp(np.arange(len(steps)) * len(own) / len(steps), np.arange(len(own) + 1), [*own, 0.0])
        return place(best_levels(search.full_runs, search.assumed, levels_of, evenly.tolist(), search.tail))


def placed(own: Sequence[float], path: np.ndarray, sigmas: Sequence[float]) -> tuple[float, ...]:
    """Levels with those of skipped steps where they were between the computed ones beside them.

    Args:
        own: levels before anything was moved, as the call is given them.
        path: which steps are computed, ``[N]``; the first one is.
        sigmas: with those of computed steps moved.
    """
    before, after = [*own, 0.0], [*sigmas, 0.0]
    found = list(sigmas)
    for lo, hi in pairwise([*np.flatnonzero(path).tolist(), len(own)]):
        for step in range(lo + 1, hi):
            share = (before[step] - before[lo]) / (before[hi] - before[lo])
            found[step] = round(after[lo] + share * (after[hi] - after[lo]), DIGITS)
    return tuple(found)
