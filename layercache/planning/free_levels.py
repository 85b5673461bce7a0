"""`layercache.search(..., sigmas="free")`: the noise levels of a searched path moved, under the same target (ours).

Between two computed steps the latents move by combinations of velocities that are there already, so a path says at
which levels the model is asked. The full run's are a grid; here they leave it, one after the other, as long as
simulated runs come nearer to the full run's end. Source: docs/methods.md, Free noise levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from layercache.planning.front import quality
from layercache.planning.noise_levels import DIGITS, GivenLevels, are_between, descend, simulated
from layercache.planning.whole_steps import Tried, WholeStepSearch

GAIN = 0.5
"""In dB of expected quality: moved levels that promise less are not worth an argument of the call."""


class FreeLevels:
    """Moves the noise levels of the best path of every budget, and runs it there.

    Levels are found in the simulation, where the forecasts of each half of the pictures are fitted to the other half.
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
            sigmas = None if best is None else self.search.rollouts.crew.agree(self.found(best))
            if best is None or sigmas is None:
                self.search.note_cost(count)
                continue
            rollouts = self.search.rollouts.moved(self.given.levels(sigmas), sigmas)
            moved = WholeStepSearch(rollouts, self.search.seconds, tail=self.search.tail, answers=self.search.answers)
            tried = moved.run_path(best.computed, best.forecast, f"{best.origin}, noise levels moved")
            if tried.quality > best.quality + GAIN:
                self.kept.append(tried)
            yield tried

    def found(self, best: Tried) -> tuple[float, ...] | None:
        """The ``sigmas=`` of the moved levels of a path; ``None`` where none are better."""
        search, own = self.search, self.given.own
        runs, answers, everyone = search.full_runs, search.answers, list(range(len(search.full_runs)))
        halves = [everyone[::2], everyone[1::2] or everyone]
        if answers is None:
            return None

        def score(moved: Sequence[float]) -> float:
            levels = self.given.levels(placed(own, best.computed, moved))
            if not are_between(levels, runs.sigmas):
                return float("-inf")
            at = [*np.asarray(levels[:-1])[best.computed].tolist(), levels[-1]]
            psnr = [
                simulated(runs, answers, at, best.forecast, fitted)[judged]
                for fitted, judged in zip(halves, reversed(halves), strict=True)
            ]
            return quality(np.concatenate(psnr).tolist(), search.tail)

        free = [step for step in np.flatnonzero(best.computed).tolist() if step]
        found = placed(own, best.computed, descend(own, score, free))
        return None if np.allclose(found, own, atol=10**-DIGITS) else found


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
