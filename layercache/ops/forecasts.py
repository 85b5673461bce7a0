"""The forecasts of the methods, each one launch: rows of coefficients for `linear_map` and `linear_combination`.

Coefficients are computed in fp64 on the host, from sigmas or step numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layercache.errors import OpInputError
from layercache.ops.combinations import linear_combination, linear_map


def finite_difference(newer: Tensor, older: Tensor, inverse_step: float) -> Tensor:
    """``j = (newer - older) * inverse_step``: the slope between two anchors a distance apart.

    Args:
        newer, older: [batch, rows, channels] of one dtype.
        inverse_step: ``1 / (sigma_newer - sigma_older)``.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: 3 S.
    """
    slope = torch.empty_like(newer, memory_format=torch.contiguous_format)
    linear_map([[newer, older]], [[slope]], [[1.0, -1.0]], [inverse_step])
    return slope


def capture_slope(
    output: Tensor, before: Tensor, older: Tensor, residual: Tensor, slope: Tensor, inverse_step: float
) -> None:
    """Residual and slope in one pass: ``r = output - before``, ``j = (r - older) * inverse_step``.

    The slope is that of the residual before it is rounded.

    Args:
        output, before: of the group, [batch, rows, channels].
        older: residual of the older anchor.
        residual, slope: written; ``slope`` may be ``older``.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: 5 S.
    """
    matrix: list[list[float | None]] = [[1.0, -1.0, None], [1.0, -1.0, -1.0]]
    linear_map([[output, before, older]], [[residual, slope]], matrix, [1.0, inverse_step])


def taylor_update(feature: Tensor, derivatives: Sequence[Tensor], inverse_steps: Sequence[float]) -> None:
    """Backward differences, in place: ``F_0 = feature``, ``F_q+1 = (F_q - old F_q) * inverse_steps[q]``.

    Args:
        feature: the module's output or residual, [batch, rows, channels].
        derivatives: F_0 .. F_m, m from 0 to 5; all but the last are read, all are written.
        inverse_steps: m numbers: the same ``1 / (steps since the last update)`` for TaylorSeer, one per order for
            Newton's divided differences.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, TaylorSeer. Bytes: (2m + 2) S.
    """
    order = len(derivatives) - 1
    if len(inverse_steps) != order:
        raise OpInputError(
            f"taylor_update: inverse_steps is {len(inverse_steps)} numbers; expected {order}, one less than derivatives"
        )
    # row q, before its factor, is (row q-1 with its factor) minus the old F_q-1
    rows: list[list[float | None]] = [[1.0, *([None] * order)]]
    factors = [1.0]
    for q, inverse in enumerate(inverse_steps):
        row = [None if c is None else c * factors[-1] for c in rows[-1]]
        row[q + 1] = -1.0
        rows.append(row)
        factors.append(float(inverse))
    linear_map([[feature, *derivatives[:-1]]], [list(derivatives)], rows, factors)


def taylor_coefficients(order: int, offset: float) -> list[float]:
    """``offset^q / q!`` for q from 0 to ``order``. Source: docs/methods.md, Formulas of the ops."""
    return [offset**q / math.factorial(q) for q in range(order + 1)]


def newton_coefficients(order: int, offset: float, steps: Sequence[float]) -> list[float]:
    """Newton's form: 1, x, x (x + h_1), x (x + h_1) (x + h_1 + h_2), ... for divided differences.

    Args:
        offset: x, from the newest anchor.
        steps: h_1, h_2, ...: distances between the newest anchor and the next, and so on; ``order - 1`` of them.
    """
    values, node = [1.0], 0.0
    for q in range(order):
        values.append(values[-1] * (offset + node))
        node += steps[q] if q < len(steps) else 0.0
    return values


def taylor_forecast(derivatives: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """``f = sum_q c_q F_q``, a new tensor.

    Args:
        derivatives: F_0 .. F_m as `taylor_update` left them.
        coefficients: of `taylor_coefficients` or `newton_coefficients`.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: (m + 2) S. To add the forecast to a stream, gated or not, use
    ``linear_combination([x], [derivatives], coefficients, gates=[gate])``: (m + 3) S.
    """
    forecast = torch.empty_like(derivatives[0], memory_format=torch.contiguous_format)
    linear_map([list(derivatives)], [[forecast]], [list(coefficients)])
    return forecast


def mean_velocity(
    velocity: Tensor,
    latent: Tensor,
    older_latent: Tensor,
    older_velocity: Tensor,
    inverse_step: float,
    weight: float,
    sigma_step: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """MeanCache: ``u = velocity + weight * ((latent - older_latent) * inverse_step - older_velocity)``.

    Args:
        velocity: of the last computed step; its dtype is that of u.
        latent, older_latent: now and at the start of the JVP span; any dtype.
        older_velocity: of the step the span starts at.
        inverse_step: ``1 / (sigma - sigma_older)``.
        weight: ``(sigma_next - sigma) / (sigma - sigma_older)`` as released, ``(s - t) / (t - r)`` as in the paper.
        sigma_step: if given, also returns ``latent + sigma_step * u`` in the latent's dtype, of u before it is rounded.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, MeanCache. Bytes: 5 S, one more with ``sigma_step``.
    """
    slope = weight * inverse_step
    mean = [1.0, slope, -slope, -weight]
    result = torch.empty_like(velocity, memory_format=torch.contiguous_format)
    inputs = [[velocity, latent, older_latent, older_velocity]]
    if sigma_step is None:
        linear_map(inputs, [[result]], [mean])
        return result, None
    moved = [sigma_step * c for c in mean]
    moved[1] += 1.0
    following = torch.empty_like(latent, memory_format=torch.contiguous_format)
    linear_map(inputs, [[result, following]], [mean, moved])
    return result, following


def accumulate(total: Tensor, residual: Tensor, weight: float) -> None:
    """``total += weight * residual``, in place.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: 3 S.
    """
    linear_map([[total, residual]], [[total]], [[1.0, weight]])


def euler_step(latent: Tensor, velocity: Tensor, sigma_step: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``latent + sigma_step * velocity`` in fp32 arithmetic: in the latent's dtype, and in ``dtype`` for the model.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: about 3 S.
    """
    moved = torch.empty_like(latent, memory_format=torch.contiguous_format)
    for_model = torch.empty_like(moved, dtype=dtype)
    row = [1.0, sigma_step]
    linear_map([[latent, velocity]], [[moved, for_model]], [row, row])
    return moved, for_model


def add_forecast(stream: Tensor, derivatives: Sequence[Tensor], coefficients: Sequence[float], gate: Tensor) -> Tensor:
    """``stream + gate * sum_q c_q F_q``, a new tensor: a forecast module output behind its gate.

    Raises:
        OpInputError: names the argument, what it is, and what it should be.

    Source: docs/methods.md, Formulas of the ops. Bytes: (m + 3) S.
    """
    return linear_combination([stream], [list(derivatives)], coefficients, gates=[gate])[0]
