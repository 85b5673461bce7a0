"""Coefficients of a forecast: how stored residuals combine into the residual of a cached step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from layercache._utils.validate import expect
from layercache.errors import ScheduleError
from layercache.schedule.schedule import Cell, Schedule

Cells = tuple[tuple[Cell, ...], ...]

COEFFICIENT_LIMIT = 4.0
FORECASTS = ("hold", "secant", "newton", "taylor")


def secant_coefficients(
    sigmas: Sequence[float],
    step: int,
    anchor: int,
    base: int | None = None,
    eta: float = 1.0,
) -> dict[int, float]:
    """Coefficient of each stored residual in the prediction at ``step``, keyed by the step that stored it.

    Plain reuse (``base is None``) is ``{anchor: 1}``. With a second anchor ``base < anchor`` the residual
    is extended along the secant: ``{anchor: 1 + c, base: -c}`` with
    ``c = eta * (sigma[step] - sigma[anchor]) / (sigma[anchor] - sigma[base])``, limited to 4 because
    rounding noise of the stored residuals grows with it. Exact for residuals linear in sigma.
    Two evaluations at one sigma (second-order samplers have them) give no slope: the newer one is reused.
    Source: docs/methods.md, Secant forecast.

    Raises:
        ScheduleError: the steps are out of order, or a noise level is not finite.
    """
    if not anchor < step or (base is not None and not 0 <= base < anchor):
        raise ScheduleError(f"anchors must be older than step {step}, newest first: got {anchor} and {base}")
    if base is None:
        return {anchor: 1.0}
    _check_levels(sigmas, (step, anchor, base))
    gap = sigmas[anchor] - sigmas[base]
    if gap == 0:
        return {anchor: 1.0}
    c = min(eta * (sigmas[step] - sigmas[anchor]) / gap, COEFFICIENT_LIMIT)
    return {anchor: 1.0 + c, base: -c}


def newton_forecast(sigmas: Sequence[float], step: int, anchors: Sequence[int]) -> dict[int, float]:
    """The polynomial in sigma through the residuals of all anchors, at ``step``: ``{anchor: coefficient}``.

    ``c_k = prod_{j != k} (sigma[step] - sigma[j]) / (sigma[k] - sigma[j])``; exact for polynomials of degree
    ``len(anchors) - 1``. Where rounding noise would grow by more than a secant's may (sum of ``|c_k|`` above 9), the
    oldest anchor is left out. Source: docs/methods.md, Secant forecast.

    Args:
        sigmas: noise levels.
        step: the cached step.
        anchors: earlier steps, newest first, one at least.

    Raises:
        ScheduleError: the steps are out of order, two anchors share one sigma, or a noise level is not finite.
    """
    _check_anchors(step, anchors)
    _check_levels(sigmas, (step, *anchors))
    nodes = [sigmas[anchor] for anchor in anchors]
    if len(set(nodes)) != len(nodes):
        raise ScheduleError(f"two of the steps {list(anchors)} have the same sigma; no polynomial through both")
    x = sigmas[step]
    coefficients = {
        anchor: math.prod((x - other) / (node - other) for other in nodes if other != node)
        for anchor, node in zip(anchors, nodes, strict=True)
    }
    if sum(map(abs, coefficients.values())) > 1 + 2 * COEFFICIENT_LIMIT:
        return newton_forecast(sigmas, step, anchors[:-1])
    return coefficients


def taylor_forecast(step: int, anchors: Sequence[int], order: int) -> dict[int, float]:
    """TaylorSeer's forecast as coefficients of the stored residuals: ``sum_q F_q x^q / q!``, ``x = step - anchors[0]``.

    ``F_q`` are its finite differences: at every anchor each order is divided by the distance, in steps, to the anchor
    before, which equals derivatives for even spacing only. Source: docs/methods.md, TaylorSeer.

    Args:
        step: the cached step.
        anchors: earlier steps, newest first, one at least; those beyond ``order + 1`` are not looked at.
        order: highest difference; fewer where there are not so many anchors.

    Raises:
        ScheduleError: the steps are out of order, or the order is negative.
    """
    _check_anchors(step, anchors)
    if order < 0:
        raise ScheduleError(f"the order of a Taylor forecast must be at least 0, got {order}", argument="order")
    used = list(anchors[: order + 1])[::-1]
    factors: list[dict[int, float]] = []
    for position, anchor in enumerate(used):
        updated = [{anchor: 1.0}]
        for old in factors:
            distance = anchor - used[position - 1]
            newest = updated[-1]
            updated.append({k: (newest.get(k, 0.0) - old.get(k, 0.0)) / distance for k in {**newest, **old}})
        factors = updated
    x = step - anchors[0]
    total: dict[int, float] = {}
    for q, factor in enumerate(factors):
        for anchor, value in factor.items():
            total[anchor] = total.get(anchor, 0.0) + value * x**q / math.factorial(q)
    return total


def reforecast(schedule: Schedule, kind: str, order: int = 1, eta: float = 1.0) -> Schedule:
    """The same computed cells with other forecasts in between.

    Args:
        schedule: cells that skip whole steps stay as they are.
        kind: ``"hold"``, ``"secant"`` (through the last two anchors, damped by ``eta``), ``"newton"`` or ``"taylor"``.
        order: of Newton and Taylor: so many anchors more than one are read.
        eta: damping of the secant.

    Raises:
        ArgumentError: no schedule.
        ScheduleError: unknown kind.
    """
    expect("reforecast", schedule, Schedule)
    if kind not in FORECASTS:
        raise ScheduleError(f"unknown forecast {kind!r}; choose one of {', '.join(FORECASTS)}", argument="kind")
    sigmas = schedule.fingerprint.sigmas

    def forecast(cells: Cells, step: int, group: int) -> dict[int, float]:
        anchors = [k for k in range(step - 1, -1, -1) if cells[k][group] is None]
        if kind == "newton":
            return newton_forecast(sigmas, step, anchors[: order + 1])
        if kind == "taylor":
            return taylor_forecast(step, anchors, order)
        base = anchors[1] if kind == "secant" and len(anchors) > 1 else None
        return secant_coefficients(sigmas, step, anchors[0], base, eta)

    def changed(cells: Cells) -> Cells:
        return tuple(
            tuple(forecast(cells, step, group) if cell else cell for group, cell in enumerate(row))
            for step, row in enumerate(cells)
        )

    metadata = {"forecast": kind, "order": order if kind in ("newton", "taylor") else None, "eta": eta}
    return replace(
        schedule,
        cells=changed(schedule.cells),
        branch_cells={name: changed(cells) for name, cells in schedule.branch_cells.items()},
        made_by={**schedule.made_by, **metadata},
    )


def _check_anchors(step: int, anchors: Sequence[int]) -> None:
    if not anchors or any(b >= a for a, b in pairwise([step, *anchors])) or anchors[-1] < 0:
        raise ScheduleError(f"anchors must be older than step {step}, newest first: got {list(anchors)}")


def _check_levels(sigmas: Sequence[float], steps: Sequence[int]) -> None:
    for step in steps:
        if not math.isfinite(sigmas[step]):
            raise ScheduleError(f"noise levels must be finite numbers, that of step {step} is {sigmas[step]}")
