"""Schedules that follow from step numbers or a profile alone: uniform skips, TaylorSeer, SmoothCache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral

import numpy as np

from layercache._utils.validate import described, expect
from layercache.errors import ArgumentError
from layercache.planning.plan import errors_among, spread
from layercache.planning.profile import StabilityProfile
from layercache.runtime.policy import check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.forecast import taylor_forecast
from layercache.schedule.schedule import Cell, Schedule, Velocity


def uniform(fingerprint: Fingerprint, interval: int = 2, warmup: int = 1, cooldown: int = 0) -> Schedule:
    """Computes every ``interval``-th step and holds the velocity in between: the floor for every other method.

    Source: FORA's rule on whole steps; methods.md §11 (uniform "every n-th").

    Args:
        fingerprint: of the model and run.
        interval: 1 computes everything.
        warmup, cooldown: steps at the beginning and end that are computed.

    Raises:
        ArgumentError: no fingerprint.
        MethodError: out of range.
    """
    expect("fixed.uniform", fingerprint, Fingerprint)
    check_range("interval", interval, 1)
    steps = len(fingerprint.steps)
    _check_ends(warmup, cooldown)
    computed = [
        k for k in range(steps) if k < warmup or k >= steps - cooldown or (k - max(0, warmup - 1)) % interval == 0
    ]
    return _whole_steps(fingerprint, computed, 0, {"method": "uniform", "interval": interval})


def taylorseer_steps(num_steps: int, interval: int = 5, warmup: int = 3, stop: int | None = None) -> list[int]:
    """The steps that diffusers' TaylorSeer computes: ``i < warmup``, every ``interval``-th from there, ``i >= stop``.

    Source: methods.md §7.

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


def taylorseer(
    fingerprint: Fingerprint,
    interval: int = 5,
    order: int = 1,
    warmup: int = 3,
    stop: int | None = None,
    groups: Sequence[tuple[int, int]] | None = None,
) -> Schedule:
    """Forecasts by a Taylor series in the step number between periodic full steps.

    Args:
        fingerprint: of the model and run.
        interval: steps from one full step to the next.
        order: of the series; ``order + 1`` tensors are combined.
        warmup: steps at the beginning that are computed.
        stop: from this step on everything is computed.
        groups: block ranges whose residuals are forecast, for example one per block; by default the velocity is, as in
            diffusers' lite mode, which stores next to nothing.

    Source: methods.md §7.

    Raises:
        ArgumentError: no fingerprint.
        MethodError: out of range.
    """
    expect("fixed.taylorseer", fingerprint, Fingerprint)
    check_range("interval", interval, 1)
    check_range("order", order, 0, 7)
    check_range("warmup", warmup, 1)
    computed = taylorseer_steps(len(fingerprint.steps), interval, warmup, stop)
    metadata = {"method": "taylorseer", "interval": interval, "order": order}
    if groups is None:
        return _whole_steps(fingerprint, computed, order, metadata)
    ranges = tuple((int(lo), int(hi)) for lo, hi in groups)
    rows = tuple((cell,) * len(ranges) for cell in _forecasts(fingerprint, computed, order))
    return Schedule(fingerprint, ranges, rows, tuple(float(hi - lo) for lo, hi in ranges), metadata)


def smoothcache(profile: StabilityProfile, alpha: float = 0.08, max_distance: int = 3) -> Schedule:
    """Every group's residual is reused as far ahead as its error at the far end stays within ``alpha``.

    SmoothCache's rule, with the profile's groups in the place of its module types: from a computed step the longest
    run is taken whose last step has a relative L1 error of at most alpha; first and last step are computed.
    Source: methods.md §11.

    Args:
        profile: of full runs; its errors are ``|r_old - r_new| / |r_new|``.
        alpha: bound of the error.
        max_distance: longest run, at most the profile's.

    Raises:
        ArgumentError: no profile.
        MethodError: out of range.
    """
    expect("fixed.smoothcache", profile, StabilityProfile)
    check_range("alpha", alpha, 0)
    check_range("max_distance", max_distance, 1, profile.max_distance)
    errors = errors_among(profile.relative_errors(text_weight=0.0), profile.fingerprint.steps)[..., 0]
    columns = [_smooth(errors[:, group], alpha, max_distance) for group in range(len(profile.groups))]
    return Schedule(
        profile.fingerprint,
        profile.groups,
        spread(profile.fingerprint, list(zip(*columns, strict=True))),
        profile.group_seconds,
        {"method": "smoothcache", "alpha": alpha},
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


def _whole_steps(fingerprint: Fingerprint, computed: Sequence[int], order: int, metadata: dict) -> Schedule:
    cells = list(_forecasts(fingerprint, computed, order))
    rows: tuple[tuple[Cell, ...], ...] = tuple((None,) if cell is None else ({},) for cell in cells)
    velocities = tuple(Velocity(cell) if cell else None for cell in cells)
    return Schedule(fingerprint, ((0, fingerprint.num_blocks),), rows, (1.0,), metadata, velocities)


def _forecasts(fingerprint: Fingerprint, computed: Sequence[int], order: int) -> Iterator[dict[int, float] | None]:
    """For every step, an empty one where the transformer does not run; ``computed`` counts the steps where it does."""
    full = [fingerprint.steps[k] for k in computed]
    for step in range(fingerprint.num_steps):
        anchors = [k for k in full if k < step][::-1]
        if step not in fingerprint.steps:
            yield {}
        else:
            yield None if step in full else taylor_forecast(step, anchors, order)


def _check_ends(warmup: int, cooldown: int) -> None:
    check_range("warmup", warmup, 1)
    check_range("cooldown", cooldown, 0)
