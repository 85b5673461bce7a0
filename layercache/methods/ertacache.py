"""ERTACache: reuse where full runs say so, less a fitted error, in steps that are shorter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch

from layercache._utils.compat import takes_euler_steps
from layercache._utils.validate import expect, expect_table
from layercache.errors import ArgumentError, MethodError, ScheduleError
from layercache.runtime.policy import PlannedMethod, check_length, check_range, warn_of_length
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Cell, Schedule, Velocity

CHANGE, MISSED, MEAN, ERROR_MEAN, PRODUCT, SQUARE = range(6)
"""Entries of `reuse_statistics`."""

TINY = 1e-30  # what did not change at all makes every error infinite


@dataclass(frozen=True)
class ERTACache(PlannedMethod):
    """Reuses the difference of velocity and latents, less its error, at steps that full runs have shown.

    `fit` makes it from full runs. Reused steps are shortened where the pipeline is called with the noise levels of
    `levels`; else they stay as they are. Source: docs/methods.md, ERTACache.

    Attributes:
        computed: the steps that are computed, ascending, step 0 first.
        shares: per step, how much of it is taken where it is reused (phi), which `levels` is made of; empty: all.
        slopes, intercepts: per step, K and B of the error ``(K v + B) / 4 + 1 / 2`` that is taken off a reused
            velocity v; empty: none is.
        num_steps: of the runs that it is for; others are refused. ``None``: not known.

    Raises:
        MethodError: on construction, for a share that is none.
        ScheduleError: on construction, for steps that do not ascend from 0.
    """

    computed: tuple[int, ...]
    shares: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    intercepts: tuple[float, ...] = ()
    num_steps: int | None = None

    name: ClassVar[str] = "ertacache"

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", tuple(map(int, self.computed)))
        if self.computed[:1] != (0,) or list(self.computed) != sorted(set(self.computed)):
            raise ScheduleError(f"computed steps must ascend from 0, got {list(self.computed)}")
        for name in ("shares", "slopes", "intercepts"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        for share in self.shares:
            check_range("shares", share, 0, 1)
        if len(self.slopes) != len(self.intercepts):
            raise MethodError("give as many slopes as intercepts", argument="intercepts")

    def schedule_of_run(self, fingerprint: Fingerprint, scheduler: Any, first: int) -> Schedule:
        if not takes_euler_steps(scheduler):
            raise MethodError(
                f"{self.name} extends velocities along Euler steps, which {type(scheduler).__name__} does not take; "
                "use a pipeline with FlowMatchEulerDiscreteScheduler, or another method"
            )
        warn_of_length("ERTACache", self._planned)
        return self.schedule(fingerprint)  # steps are those of a whole run

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        """For Euler steps between the noise levels that the run has, its own or those of `levels`."""
        expect("ERTACache.schedule", fingerprint, Fingerprint)
        steps = fingerprint.num_steps
        self._check_steps(len(fingerprint.steps))
        velocities = tuple(self._velocities(fingerprint.sigmas))
        cells: list[tuple[Cell, ...]] = [(None,) if step in self.computed else ({},) for step in range(steps)]
        blocks = ((0, fingerprint.num_blocks),)
        return Schedule(fingerprint, blocks, tuple(cells), (1.0,), {"method": self.name}, velocities)

    def levels(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """The noise levels of a run whose reused steps are shortened, from those of a run as it is; as many.

        What remains of the way behind a shortened step is shared out to the steps to come as the run's own steps are.
        The last step takes all of it. A scheduler that shifts the ``sigmas=`` of a call has to be given others, which
        it shifts to these.

        Raises:
            ScheduleError: this was fitted to runs of another number of steps.
        """
        self._check_steps(len(sigmas) - 1)
        found, longer = [float(sigmas[0])], 1.0
        for step, (here, there) in enumerate(pairwise(sigmas)):
            is_last = step == len(sigmas) - 2
            share = self.shares[step] if self.shares and not is_last and step not in self.computed else 1.0
            found.append(found[-1] - longer * share * (here - there))
            if share != 1.0:
                longer *= 1.0 + (1.0 - share) * (here - there) / (there - sigmas[-1])
        return (*found[:-1], float(sigmas[-1]))

    def _check_steps(self, steps: int) -> None:
        check_length("ERTACache", self.computed, self._planned, steps)

    @property
    def _planned(self) -> int | None:
        lengths = {len(values) for values in (self.shares, self.slopes) if values}
        return next(iter(lengths), self.num_steps)

    def _velocities(self, sigmas: Sequence[float]) -> Iterator[Velocity | None]:
        """``x + (v[a] - x[a])`` less its error, along Euler steps: a multiple of v[a], and a number."""
        anchor = 0
        along, beside = 0.0, 0.0  # displacement since the anchor, in its velocity and in ones
        for step, (here, there) in enumerate(pairwise(sigmas)):
            if step in self.computed:
                anchor, along, beside = step, there - here, 0.0
                yield None
                continue
            slope, intercept = (self.slopes[step], self.intercepts[step]) if self.slopes else (0.0, -2.0)
            kept = 1.0 - slope / 4
            scale, ones = kept * (1.0 + along), kept * beside - (intercept / 4 + 0.5)
            along, beside = along + (there - here) * scale, beside + (there - here) * ones
            yield Velocity({anchor: scale}, offset=ones)


def reuse_statistics(latents: Sequence[torch.Tensor], velocities: Sequence[torch.Tensor]) -> np.ndarray:
    """What reusing any step of a full run at any later one misses, ``[N, N, 6]``, to be averaged over runs.

    Entry ``[a, i]`` of reusing ``r[a] = v[a] - x[a]`` at step i, which gives ``v = x[i] + r[a]``: the relative L1
    change of r; the L1 error of v over the L1 change of the velocity from the step before; means of v, of its error,
    of their product and of the square of v.

    Args:
        latents: before every step.
        velocities: of every step.

    Raises:
        ArgumentError: no latents and velocities of one shape.
    """
    shapes = {getattr(one, "shape", None) for one in (*latents, *velocities)}
    if len(latents) != len(velocities) or len(shapes) != 1:
        raise ArgumentError(
            "ertacache.reuse_statistics expects latents and velocities of the same steps and shape; a trace has them: "
            "trace.latents, trace.taken"
        )
    steps = len(velocities)
    table = np.full((steps, steps, 6), np.inf)
    flat = [v.detach().cpu().float().flatten() for v in velocities]
    starts = [x.detach().cpu().float().flatten() for x in latents]
    for i in range(1, steps):
        own = flat[i] - starts[i]
        size, turned = _mean(own.abs()), _mean((flat[i] - flat[i - 1]).abs())
        for a in range(i):
            reused = starts[i] + (flat[a] - starts[a])
            error = reused - flat[i]
            missed = _mean(error.abs())
            ratios = missed / max(size, TINY), missed / max(turned, TINY)
            table[a, i] = (*ratios, _mean(reused), _mean(error), _mean(reused * error), _mean(reused.square()))
    return table


def _mean(values: torch.Tensor) -> float:
    return float(values.mean(dtype=torch.float64))


def fit(statistics: np.ndarray, threshold: float = 0.6, first: int = 1, last: int = 0) -> ERTACache:
    """The settings for runs like those measured.

    Step by step the newest computed one is reused while the relative change of ``v - x`` stays below the threshold.

    Args:
        statistics: from `reuse_statistics`, averaged over runs.
        threshold: lambda; larger values reuse more.
        first, last: steps at the beginning and the end that are computed in any case.

    Source: docs/methods.md, ERTACache.

    Raises:
        ArgumentError: no such table.
    """
    source = "mean of reuse_statistics(trace.latents, trace.taken) over full runs is one"
    table = expect_table("ertacache.fit", statistics, ("N", "N", "6"), source)
    computed, shares, slopes, intercepts = [0], [1.0], [0.0], [-2.0]
    for step in range(1, len(table)):
        entry = table[computed[-1], step]
        if step < first or step >= len(table) - last or not entry[CHANGE] < threshold:
            computed.append(step)
            shares, slopes, intercepts = [*shares, 1.0], [*slopes, 0.0], [*intercepts, -2.0]
            continue
        shares.append(float(np.clip(1.0 - entry[MISSED], 0.0, 1.0)))
        variance = entry[SQUARE] - entry[MEAN] ** 2
        covariance = entry[PRODUCT] - entry[MEAN] * entry[ERROR_MEAN]
        slopes.append(float(4 * covariance / variance) if variance > 0 else 0.0)
        intercepts.append(float(4 * (entry[ERROR_MEAN] - 0.5) - slopes[-1] * entry[MEAN]))
    return ERTACache(tuple(computed), tuple(shares), tuple(slopes), tuple(intercepts))
