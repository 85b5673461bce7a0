"""Coefficients of a velocity forecast, fitted to what would have been right (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from layercache._utils.validate import expect
from layercache.errors import CalibrationError, ScheduleError
from layercache.planning.profile import StabilityProfile
from layercache.schedule.forecast import Cells
from layercache.schedule.schedule import Schedule, Velocity

TARGETS = ("none", "open", "teacher", "steer")
SOLVES = 3
CHUNK = 1 << 15
WEIGHT_FLOOR = 1e-3
"""Of the mean square that is missed, added to every picture's: one that is met exactly does not outweigh all others."""


@dataclass(frozen=True)
class Forecast:
    """Which velocities are combined at a step, and what their coefficients are fitted to.

    ``v = F_0 + sum_k d_k (F_k - F_0) + b F_0 + a x``: F are the newest velocities the model gave, newest first (a
    computed step's own is its F_0), x the latents of the step. The ridge pulls d, b and a to 0, that is to F_0.
    Source: docs/methods.md, Fitted forecasts.

    Attributes:
        target: ``"none"``: the newest velocity as it is; ``"open"``: the full run's velocity, from the full run's
            older ones; ``"teacher"``: the full run's velocity, from those of the cached run; ``"steer"``: the velocity
            that takes the cached run's latents to where the full run's are one step later, where the sampler's steps
            are linear in it.
        terms: how many velocities, at most 8.
        latents: whether x is a term.
        free_sum: whether b is fitted; otherwise the coefficients of the velocities sum to 1.
        everywhere: whether computed steps are corrected too (``"steer"`` only).
        ridge: relative to the mean square of each term.
        weighting: q of the weights ``w_p = (|missed_p|^2 + floor)^-q`` of the pictures p, found in three solves. 0 fits
            the mean square, in which pictures that have gone astray count most; 1 fits the mean of its logarithm, that
            is, the mean PSNR.
    """

    target: str = "steer"
    terms: int = 4
    latents: bool = True
    free_sum: bool = True
    everywhere: bool = True
    ridge: float = 1e-5
    weighting: float = 0.0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ScheduleError(
                f"unknown target {self.target!r}; choose one of {', '.join(TARGETS)}", argument="target"
            )
        if not 1 <= self.terms <= 8:
            raise ScheduleError(f"a forecast takes 1 to 8 velocities, got {self.terms}", argument="terms")
        if not self.ridge > 0:
            raise ScheduleError(f"the ridge must be above 0, got {self.ridge}", argument="ridge")
        if not 0 <= self.weighting <= 1:
            raise ScheduleError(f"the weighting must be from 0 to 1, got {self.weighting}", argument="weighting")

    @property
    def name(self) -> str:
        if self.target == "none":
            return "hold"
        extras = ("+x" if self.latents else "") + ("+b" if self.free_sum else "")
        extras += f" q={self.weighting:g}" if self.weighting else ""
        return f"{self.target}{'-all' if self.everywhere and self.target == 'steer' else ''} n={self.terms}{extras}"


HOLD = Forecast("none", terms=1, latents=False, free_sum=False, everywhere=False)


def products_of(
    step: int,
    features: Sequence[Sequence[torch.Tensor]],
    latents: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
) -> list[np.ndarray]:
    """Mean products, over the elements, of velocities, latents and target, per sample ``[B, n + 2, n + 2]``.

    Args:
        step: for messages.
        features: per sample, n velocities, ``[B, ...]`` each.
        latents: per sample.
        targets: per sample, what the velocity should have been.

    Raises:
        CalibrationError: a velocity or target is not finite.
    """
    samples = list(zip(features, latents, targets, strict=True))
    found = [inner_products([*own, x, target]) / x[0].numel() for own, x, target in samples]
    if not all(np.isfinite(products).all() for products in found):
        raise CalibrationError(f"a velocity at step {step} is NaN or infinite; no forecast can be fitted to this run")
    return found


def solve_velocity(forecast: Forecast, sources: Sequence[int], products: np.ndarray) -> Velocity:
    """The combination of velocities that comes nearest to the targets, over all pictures and elements.

    A matrix without full rank (one picture, equal velocities, velocities of zero) gives the shortest correction.

    Args:
        forecast: what may be combined.
        sources: the step of each velocity, newest first.
        products: `products_of` the pictures.
    """
    names = [("d", k) for k in range(1, len(sources))]
    names += [("b", 0)] if forecast.free_sum else []
    names += [("a", 0)] if forecast.latents else []
    if not names:
        return Velocity({sources[0]: 1.0})
    # rows give the terms, and the target less F_0, of F_0, F_1, .., x and the target
    count = len(sources)
    rows = np.zeros((len(names) + 1, count + 2))
    for row, (kind, k) in zip(rows, names, strict=False):
        row[{"d": k, "b": 0, "a": count}[kind]] = 1.0
        row[0] -= kind == "d"
    rows[-1, [0, -1]] = -1.0, 1.0
    found = rows @ products @ rows.T
    solution = dict(zip(names, solve_weighted(found, forecast.ridge, forecast.weighting), strict=True))
    coefficients = {source: solution.get(("d", k), 0.0) for k, source in enumerate(sources)}
    coefficients[sources[0]] = 1.0 - sum(coefficients.values()) + solution.get(("b", 0), 0.0)
    return Velocity(coefficients, float(solution.get(("a", 0), 0.0)))


def inner_products(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Inner products of a sample's tensors ``[B, ...]``, per picture: ``[B, T, T]``, float64."""
    flat = [t.flatten(1) if t.dim() > 1 else t[None] for t in tensors]
    # on a CPU as much at a time as stays in its caches
    size = flat[0].shape[1] if flat[0].is_cuda else CHUNK
    total: Any = 0.0
    for parts in zip(*(t.split(size, dim=1) for t in flat), strict=True):
        matrix = torch.stack([part.double() for part in parts], dim=1)
        total = total + matrix @ matrix.mT
    return np.asarray(total.cpu().numpy())


def solve_weighted(products: np.ndarray, ridge: float, weighting: float) -> list[float]:
    """`solve_ridge` over pictures, each weighted by ``(|missed|^2 + floor)^-weighting``, which takes `SOLVES` solves.

    Args:
        products: inner products of the terms and, last, the target, ``[P, terms + 1, terms + 1]``.
        ridge: relative to the mean square of each term.
        weighting: 0 for equal weights.
    """
    weights = np.ones(len(products))
    for _ in range(SOLVES if weighting else 1):
        summed = np.tensordot(weights, products, 1)
        solution = solve_ridge(summed[:-1, :-1], summed[:-1, -1], ridge)
        left = np.array([*solution, -1.0])
        missed = np.maximum(np.einsum("k,pkl,l->p", left, products, left), 0.0)
        if not missed.mean() > 0:
            break
        weights = (missed / missed.mean() + WEIGHT_FLOOR) ** -weighting
        weights *= len(weights) / weights.sum()
    return solution


def fit_residuals(
    profile: StabilityProfile, schedule: Schedule, terms: int = 2, free_sum: bool = True, ridge: float = 1e-3
) -> Schedule:
    """The same computed cells, with the forecasts between them fitted to the residuals of the full runs.

    ``r = F_0 + sum_k d_k (F_k - F_0) + b F_0`` as for velocities, F being the residuals of the newest computed steps of
    the group; least squares over samples, elements and (where they share cells) branches of the image stream, from the
    profile's inner products. The text stream takes the same coefficients. Source: docs/methods.md, Fitted forecasts.

    Args:
        profile: what the schedule was planned from.
        schedule: cells that skip whole steps stay as they are.
        terms: how many residuals are combined at most; each more costs memory.
        free_sum: whether b is fitted.
        ridge: relative to the mean square of each term.

    Raises:
        ArgumentError: no profile, or no schedule.
        CalibrationError: the profile has no inner products.
        ScheduleError: terms out of range.
    """
    expect("fit_residuals", profile, StabilityProfile)
    expect("fit_residuals", schedule, Schedule)
    if not 1 <= terms <= 8:
        raise ScheduleError(f"a forecast takes 1 to 8 residuals, got {terms}", argument="terms")

    def fitted(cells: Cells, branch: int | None) -> Cells:
        return tuple(
            tuple(fit(cells, step, group, branch) if cell else cell for group, cell in enumerate(row))
            for step, row in enumerate(cells)
        )

    def fit(cells: Cells, step: int, group: int, branch: int | None) -> dict[int, float]:
        gram = profile.gram(step, group, branch)
        older = [k for k in range(step - 1, max(-1, step - len(gram)), -1) if cells[k][group] is None][:terms]
        return _fit_from_gram(gram, step, older, free_sum, ridge)

    names = profile.fingerprint.branches
    return replace(
        schedule,
        cells=fitted(schedule.cells, 0 if schedule.branch_cells else None),
        branch_cells={name: fitted(cells, names.index(name)) for name, cells in schedule.branch_cells.items()},
        made_by={**schedule.made_by, "forecast": "fitted", "terms": terms},
    )


def _fit_from_gram(gram: np.ndarray, step: int, older: Sequence[int], free_sum: bool, ridge: float) -> dict[int, float]:
    """Coefficients by step, from inner products of the residuals of ``step, step - 1, ...``."""
    at = [step - k for k in older]
    # rows are F_k - F_0 and F_0 in terms of the residuals; the target is r - F_0
    rows = np.zeros((len(at) - 1 + free_sum, len(gram)))
    for row, k in zip(rows, at[1:], strict=False):
        row[k], row[at[0]] = 1.0, -1.0
    if free_sum:
        rows[-1, at[0]] = 1.0
    target = np.zeros(len(gram))
    target[0], target[at[0]] = 1.0, -1.0
    solution = solve_ridge(rows @ gram @ rows.T, rows @ gram @ target, ridge) if len(rows) else []
    found = {k: float(solution[n]) for n, k in enumerate(older[1:])}
    return {older[0]: 1.0 - sum(found.values()) + (float(solution[-1]) if free_sum else 0.0), **found}


def solve_ridge(gram: np.ndarray, right: np.ndarray, ridge: float) -> list[float]:
    """``argmin ||A d - t||^2 + ridge * sum_k g_kk d_k^2`` from ``G = A^T A`` and ``A^T t``; terms of zero get 0.

    Raises:
        CalibrationError: ``G`` is no matrix of inner products.
    """
    scale = np.sqrt(np.diag(gram))
    used = scale > 1e-12 * max(scale.max(initial=0.0), 1e-30)
    solution = np.zeros(len(right))
    if used.any():
        scaled = gram[np.ix_(used, used)] / np.outer(scale[used], scale[used])
        system = scaled + ridge * np.eye(used.sum())
        try:
            solution[used] = np.linalg.solve(system, right[used] / scale[used]) / scale[used]
        except np.linalg.LinAlgError as error:
            raise CalibrationError(f"the inner products are none of residuals ({error}); calibrate again") from error
    return [float(value) for value in solution]
