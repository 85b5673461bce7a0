"""Schedules that follow from step numbers or a profile alone: uniform skips, TaylorSeer, SmoothCache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from layercache._utils.validate import described, expect
from layercache.errors import ArgumentError
from layercache.planning.plan import errors_among, spread
from layercache.planning.profile import StabilityProfile
from layercache.runtime.policy import PlannedMethod, by_name, check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.forecast import taylor_forecast
from layercache.schedule.schedule import Cell, Schedule, Velocity


@by_name
@dataclass(frozen=True, kw_only=True)
class Uniform(PlannedMethod):
    """Computes every ``interval``-th step and holds the velocity in between: the floor for every other method.

    Source: docs/methods.md, FORA.

    Attributes:
        interval: 1 computes everything.
        warmup, cooldown: steps at the beginning and end that are computed.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    interval: int = 2
    warmup: int = 1
    cooldown: int = 0

    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        check_range("interval", self.interval, 1)
        check_range("warmup", self.warmup, 1)
        check_range("cooldown", self.cooldown, 0)

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        expect("Uniform.schedule", fingerprint, Fingerprint)
        steps = len(fingerprint.steps)
        first, last = self.warmup, steps - self.cooldown
        computed = [k for k in range(steps) if k < first or k >= last or (k - first + 1) % self.interval == 0]
        cells = list(forecasts(fingerprint, computed, 0))
        return schedule_of(fingerprint, cells, {"method": self.name, "interval": self.interval})


def taylorseer_steps(num_steps: int, interval: int = 5, warmup: int = 3, stop: int | None = None) -> list[int]:
    """The steps that diffusers' TaylorSeer computes: ``i < warmup``, every ``interval``-th from there, ``i >= stop``.

    Source: docs/methods.md, TaylorSeer.

    Raises:
        ArgumentError: no number of steps.
    """
    if not isinstance(num_steps, Integral):
        raise ArgumentError(
            f"fixed.taylorseer_steps expects a number of steps, got {described(num_steps)}; a fingerprint has it: "
            "fingerprint.num_steps",
            argument="num_steps",
        )
    return [
        step
        for step in range(num_steps)
        if step < warmup or (step - warmup - 1) % interval == 0 or (stop is not None and step >= stop)
    ]


@by_name
@dataclass(frozen=True, kw_only=True)
class TaylorSeer(PlannedMethod):
    """Forecasts by a Taylor series in the step number between periodic full steps.

    Source: docs/methods.md, TaylorSeer.

    Attributes:
        interval: steps from one full step to the next.
        order: of the series; ``order + 1`` tensors are combined.
        warmup: steps at the beginning that are computed.
        stop: from this step on everything is computed.
        groups: block ranges whose residuals are forecast, for example one per block; by default the velocity is, as in
            diffusers' lite mode, which stores next to nothing.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    interval: int = 5
    order: int = 1
    warmup: int = 3
    stop: int | None = None
    groups: tuple[tuple[int, int], ...] | None = None

    name: ClassVar[str] = "taylorseer"

    def __post_init__(self) -> None:
        check_range("interval", self.interval, 1)
        check_range("order", self.order, 0, 7)
        check_range("warmup", self.warmup, 1)

    @property
    def replaces_velocity(self) -> bool:
        return self.groups is None

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        expect("TaylorSeer.schedule", fingerprint, Fingerprint)
        computed = taylorseer_steps(len(fingerprint.steps), self.interval, self.warmup, self.stop)
        metadata: dict[str, Any] = {"method": self.name, "interval": self.interval, "order": self.order}
        metadata |= {"warmup": self.warmup} | ({} if self.stop is None else {"stop": self.stop})
        return schedule_of(fingerprint, list(forecasts(fingerprint, computed, self.order)), metadata, self.groups)


@by_name
@dataclass(frozen=True, kw_only=True)
class SmoothCache:
    """Reuses every group's residual as far ahead as its error at the far end stays within ``alpha``.

    SmoothCache's rule, with the profile's groups in the place of its module types: from a computed step the longest
    run is taken whose last step has a relative L1 error of at most alpha; first and last step are computed.
    Source: docs/methods.md, SmoothCache.

    Attributes:
        alpha: bound of the error ``|r_old - r_new| / |r_new|``.
        max_distance: longest run, at most the profile's.

    Raises:
        MethodError: on construction, when a setting is out of range.
    """

    alpha: float = 0.08
    max_distance: int = 3

    name: ClassVar[str] = "smoothcache"

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0)
        check_range("max_distance", self.max_distance, 1)

    def schedule(self, profile: StabilityProfile) -> Schedule:
        """The schedule from a profile of full runs.

        Raises:
            ArgumentError: no profile.
            MethodError: ``max_distance`` is more than the profile measured.
        """
        expect("SmoothCache.schedule", profile, StabilityProfile)
        check_range("max_distance", self.max_distance, 1, profile.max_distance)
        errors = errors_among(profile.relative_errors(text_weight=0.0), profile.fingerprint.steps)[..., 0]
        columns = [_smooth(errors[:, group], self.alpha, self.max_distance) for group in range(len(profile.groups))]
        return Schedule(
            profile.fingerprint,
            profile.groups,
            spread(profile.fingerprint, list(zip(*columns, strict=True))),
            profile.group_seconds,
            {"method": self.name, "alpha": self.alpha},
        )


def _smooth(errors: np.ndarray, alpha: float, longest: int) -> list[Cell]:
    """``errors [N, M + 1]``: of step i from an anchor so many steps before."""
    steps = len(errors)
    cells: list[Cell] = []
    while len(cells) < steps:
        anchor = len(cells)
        ends = (j for j in range(longest, 0, -1) if anchor + j < steps and errors[anchor + j, j] <= alpha)
        cells += [None, *[{anchor: 1.0}] * next(ends, 0)]
    cells[-1] = None
    return cells


def schedule_of(
    fingerprint: Fingerprint,
    cells: Sequence[Cell],
    metadata: dict[str, Any],
    groups: Sequence[tuple[int, int]] | None = None,
) -> Schedule:
    """The schedule in which every group does the same, or velocities take the place of skipped steps.

    Args:
        fingerprint: of the run.
        cells: per step ``None`` where it is computed, else what is combined; empty where the transformer does not run.
        metadata: how it was made.
        groups: block ranges whose residuals are combined; by default velocities are.
    """
    if groups is not None:
        ranges = tuple((int(lo), int(hi)) for lo, hi in groups)
        every = tuple((cell,) * len(ranges) for cell in cells)
        return Schedule(fingerprint, ranges, every, tuple(float(hi - lo) for lo, hi in ranges), metadata)
    rows: tuple[tuple[Cell, ...], ...] = tuple((None,) if cell is None else ({},) for cell in cells)
    velocities = tuple(Velocity(cell) if cell else None for cell in cells)
    return Schedule(fingerprint, ((0, fingerprint.num_blocks),), rows, (1.0,), metadata, velocities)


def forecasts(fingerprint: Fingerprint, computed: Sequence[int], order: int) -> Iterator[dict[int, float] | None]:
    """For every step, an empty one where the transformer does not run; ``computed`` counts the steps where it does."""
    full = [fingerprint.steps[k] for k in computed]
    for step in range(fingerprint.num_steps):
        anchors = [k for k in full if k < step][::-1]
        if step not in fingerprint.steps:
            yield {}
        else:
            yield None if step in full else taylor_forecast(step, anchors, order)


# The functions of version 0.1, which the classes took the place of.


def uniform(fingerprint: Fingerprint, interval: int = 2, warmup: int = 1, cooldown: int = 0) -> Schedule:
    """`Uniform` as a schedule."""
    return Uniform(interval=interval, warmup=warmup, cooldown=cooldown).schedule(fingerprint)


def taylorseer(
    fingerprint: Fingerprint,
    interval: int = 5,
    order: int = 1,
    warmup: int = 3,
    stop: int | None = None,
    groups: Sequence[tuple[int, int]] | None = None,
) -> Schedule:
    """`TaylorSeer` as a schedule."""
    ranges = None if groups is None else tuple(groups)
    method = TaylorSeer(interval=interval, order=order, warmup=warmup, stop=stop, groups=ranges)
    return method.schedule(fingerprint)


def smoothcache(profile: StabilityProfile, alpha: float = 0.08, max_distance: int = 3) -> Schedule:
    """`SmoothCache` as a schedule."""
    return SmoothCache(alpha=alpha, max_distance=max_distance).schedule(profile)
