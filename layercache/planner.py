"""Turning a profile into a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from layercache.errors import BudgetError
from layercache.forecast import secant_coefficients
from layercache.front import Front
from layercache.profile import StabilityProfile
from layercache.schedule import Cell, Schedule

SPANS = (1, 2, 3, 4, 5, 6)


def plan(
    profile: StabilityProfile | Front,
    budget: float | None = None,
    *,
    speedup: float | None = None,
    min_psnr: float | None = None,
    spans: Sequence[int] = SPANS,
    history: int = 3,
    max_run: int = 8,
    protect_first: int | None = None,
    protect_last: int | None = None,
    tau: float = 0.05,
    gamma: float = 1.0,
    kappa: float = 0.0,
    text_weight: float = 0.1,
    sensitivity: bool | None = None,
    method: str = "best",
) -> Schedule:
    """A schedule for a budget: from a profile by its error tables, or from a front of schedules that were run.

    From a `layercache.Front` the best of what `layercache.search` found is taken, and only ``budget``, ``speedup``
    and ``min_psnr`` count. From a profile it is planned: the error of caching group g at step i, m steps
    after its anchor and with span K, is ``(|sigma[i+1] - sigma[i]| * error(i, g, m, K)) ** gamma``; its sum is kept
    low.
    Source: methods.md §1.5 (option D), §1.6, §1.7.

    Args:
        profile: from `layercache.calibrate`, or a front from `layercache.search`.
        budget: largest share of the block time that is computed, in (0, 1].
        speedup: instead of a budget, the speedup of the whole denoising loop to reach, by the measured seconds.
        min_psnr: with a front only: the least compute that reaches this mean PSNR on its calibration pictures.
        spans: spans K of the secant to choose from; empty means plain reuse only.
        history: computed steps whose residuals are kept, the newest included.
        max_run: longest run of cached steps of a group.
        protect_first, protect_last: steps at the ends that are always computed; by default
            ``max(3, N/10)`` and 1 (2 for more than 28 steps).
        tau: smallest relative gain over plain reuse for which a span is taken.
        gamma: above 1, single large errors weigh more (peak suppression).
        kappa: standard deviations over the samples added to the mean error.
        text_weight: weight of the text stream's error.
        sensitivity: weigh every error by what it does to the velocity (`StabilityProfile.sensitivity`); by default
            if it was measured.
        method: ``"removal"``, ``"addition"``, ``"exact"``, ``"lagrangian"`` or the ``"best"`` of them; see
            ``layercache._core.solve``.

    Raises:
        BudgetError: out of range, or below what the protected steps and the longest run allow.
    """
    if isinstance(profile, Front):
        return profile.choose(budget, speedup=speedup, min_psnr=min_psnr).schedule
    if min_psnr is not None:
        raise BudgetError("min_psnr needs a front of measured schedules: run layercache.search first")
    num_steps = profile.fingerprint.num_steps
    first = max(3, math.ceil(0.1 * num_steps)) if protect_first is None else protect_first
    last = (2 if num_steps > 28 else 1) if protect_last is None else protect_last
    protected = np.zeros((num_steps, len(profile.groups)), dtype=bool)
    protected[:first] = True
    protected[max(0, num_steps - last) :] = True

    weighs = profile.has_sensitivity if sensitivity is None else sensitivity
    compute_cost = np.asarray(profile.group_seconds)
    cached_cost, target = _target(profile, budget, speedup)
    from layercache import _core

    result = _core.solve(
        weighted_errors(profile, gamma, kappa, text_weight, weighs),
        compute_cost,
        cached_cost,
        target,
        protected,
        list(spans),
        history=history,
        max_run=min(max_run, profile.max_distance),
        tau=tau,
        method=method,
    )
    if not result.feasible:
        _refuse(profile, result.spent, budget, cached_cost)
    return Schedule(
        fingerprint=profile.fingerprint,
        groups=profile.groups,
        cells=_cells(profile, result),
        group_seconds=tuple(profile.group_seconds),
        made_by={
            "method": "layercache",
            "solver": result.method,
            "budget": budget,
            "speedup": speedup,
            "spans": list(spans),
            "history": history,
            "max_run": max_run,
            "protect": [first, last],
            "tau": tau,
            "gamma": gamma,
            "kappa": kappa,
            "text_weight": text_weight,
            "sensitivity": weighs,
            "error": result.total_error,
            "samples": len(profile.samples),
        },
    )


def weighted_errors(
    profile: StabilityProfile, gamma: float, kappa: float, text_weight: float, sensitivity: bool = False
) -> np.ndarray:
    """The solver's table ``D [N, G, M+1, K+1]`` of methods.md §1.5, with sensitivity (else 1) and step weight 1."""
    step_size = np.abs(np.diff(np.asarray(profile.fingerprint.sigmas)))
    errors = profile.relative_errors(text_weight=text_weight, kappa=kappa)
    weights = profile.sensitivity()[:, :, None, None] if sensitivity else 1.0
    return np.ascontiguousarray((step_size[:, None, None, None] * weights * errors) ** gamma)


def _target(profile: StabilityProfile, budget: float | None, speedup: float | None) -> tuple[np.ndarray, float]:
    """Cost of a cached cell per group, and the seconds all cells together may take."""
    if (budget is None) == (speedup is None):
        raise BudgetError("give either a budget (share of the block time, such as 0.6) or a speedup (such as 1.4)")
    num_steps, blocks = profile.fingerprint.num_steps, sum(profile.group_seconds)
    if budget is not None:
        if not 0 < budget <= 1:
            raise BudgetError(f"budget must be a share of the block time above 0 and at most 1, got {budget}")
        # the share counts computed time only; a hair more keeps rounding from costing a cell
        return np.zeros(len(profile.groups)), budget * num_steps * blocks * (1 + 1e-9)
    if not (speedup is not None and math.isfinite(speedup) and speedup >= 1):
        raise BudgetError(f"speedup must be a number of at least 1, got {speedup}")
    limit = (profile.fixed_seconds + blocks) / (profile.fixed_seconds + sum(profile.reuse_seconds))
    seconds = num_steps * ((profile.fixed_seconds + blocks) / speedup - profile.fixed_seconds)
    if seconds <= 0:
        raise BudgetError(
            f"a speedup of {speedup:g} cannot be reached: with every block cached it would be {limit:.2f}"
        )
    cached = np.minimum(np.asarray(profile.reuse_seconds), 0.99 * np.asarray(profile.group_seconds))
    return cached, seconds


def _refuse(profile: StabilityProfile, spent: float, budget: float | None, cached_cost: np.ndarray) -> None:
    num_steps, blocks = profile.fingerprint.num_steps, sum(profile.group_seconds)
    hint = (
        "protect fewer steps (protect_first, protect_last), allow longer runs (max_run), or calibrate with more steps"
    )
    if budget is not None:
        least = spent / (num_steps * blocks)
        raise BudgetError(f"budget {budget:g} cannot be met: at least {least:.3f} of the block time is needed; {hint}")
    fastest = num_steps * (profile.fixed_seconds + blocks) / (num_steps * profile.fixed_seconds + spent)
    raise BudgetError(f"that speedup cannot be reached: at most {fastest:.2f} is possible; {hint}")


def _cells(profile: StabilityProfile, result: Any) -> tuple[tuple[Cell, ...], ...]:
    """Coefficients of the solver's anchors."""
    sigmas = profile.fingerprint.sigmas
    rows = []
    for step in range(profile.fingerprint.num_steps):
        row: list[Cell] = []
        for group in range(len(profile.groups)):
            if result.cells[step, group] < 0:
                row.append(None)
                continue
            base = int(result.base[step, group])
            anchor = int(result.anchor[step, group])
            row.append(secant_coefficients(sigmas, step, anchor, base if base >= 0 else None, profile.eta))
        rows.append(tuple(row))
    return tuple(rows)
