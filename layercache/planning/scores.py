"""Scores of cells and steps: where computing helps most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from layercache.planning.fit import HOLD, Forecast, solve_ridge
from layercache.planning.plan import weighted_errors
from layercache.planning.profile import StabilityProfile, readable
from layercache.planning.rollout import Rollout, Rollouts, skipping
from layercache.schedule.forecast import secant_coefficients
from layercache.schedule.schedule import Schedule


def cell_needs(profile: StabilityProfile, schedule: Schedule) -> np.ndarray:
    """Weighted error of reusing the newest computed residual, ``[N, G]``; of computed cells, if they were cached."""
    errors = weighted_errors(profile, 1.0, 0.0, 0.1)
    needs = np.full(errors.shape[:2], np.inf)
    for step in range(1, schedule.num_steps):
        for group in range(len(schedule.groups)):
            anchor = max(k for k in range(step) if schedule.cells[k][group] is None)
            needs[step, group] = errors[step, group, min(step - anchor, profile.max_distance), 0]
    return needs


def velocity_errors(rollouts: Rollouts, max_distance: int = 8, max_span: int = 6) -> np.ndarray:
    """The solver's table for whole steps, ``[N, 1, max_distance + 1, max_span + 1]``, from the full runs' velocities.

    ``|sigma[i+1] - sigma[i]| * mean |(1 + c) v[a] - c v[b] - v[i]|`` as for residuals of groups (methods.md §1.5).
    """
    sigmas, steps = rollouts.sigmas, rollouts.num_steps
    table = np.full((steps, 1, max_distance + 1, max_span + 1), np.inf)
    for step, distance, span in np.argwhere(readable(steps, max_distance, max_span)).tolist():
        anchor = step - distance
        terms = secant_coefficients(sigmas, step, anchor, anchor - span if span else None)
        errors = [
            float((sum(c * trace.taken[s] for s, c in terms.items()) - trace.taken[step]).abs().mean())
            for trace in rollouts.full
        ]
        table[step, 0, distance, span] = abs(sigmas[step + 1] - sigmas[step]) * np.mean(errors)
    return table


def step_weights(rollouts: Rollouts, probes: int = 10) -> np.ndarray:
    """What an error of the velocity becomes by the end of the run, relative to the other steps, ``phi [N]``, mean 1.

    At each probed step alone the velocity of the step before is held; ``phi`` is how far the final latents move, over
    how far the step moved them. Steps in between are interpolated. Source: methods.md §1.5, option C.
    """
    sigmas, steps = rollouts.sigmas, rollouts.num_steps
    full = Rollout(Schedule.compute_all(rollouts.fingerprint), (), rollouts.full)
    probed = sorted({round(step) for step in np.linspace(1, steps - 1, probes)})
    found = []
    for step in probed:
        others = [k for k in range(steps) if k != step]
        rollout = rollouts.run(skipping(rollouts.fingerprint, others), HOLD, start=full, first=step)
        moved = introduced = 0.0
        for trace, reference in zip(rollout.traces, rollouts.full, strict=True):
            end, true_end = (t.after(steps - 1, sigmas) for t in (trace, reference))
            moved += float((end - true_end).float().abs().mean())
            introduced += float((trace.taken[step] - reference.taken[step]).float().abs().mean())
        found.append(moved / max(introduced * abs(sigmas[step + 1] - sigmas[step]), 1e-30))
    weights = np.interp(np.arange(steps), probed, found)
    return weights / weights.mean()


def step_needs(rollout: Rollout, rollouts: Rollouts, forecast: Forecast) -> np.ndarray:
    """How far a step's velocity is from any forecast of it, times the length of the step, ``[N]``.

    Of a skipped step: what its forecast missed. Of a computed one: what the forecast would have missed without it.
    """
    sigmas, needs = rollouts.sigmas, np.zeros(rollouts.num_steps)
    for step in range(rollouts.num_steps):
        length = sigmas[step + 1] - sigmas[step]
        sources = [k for k in range(step - 1, -1, -1) if rollout.traces[0].raw[k] is not None][: forecast.terms]
        if not sources:
            needs[step] = math.inf
            continue
        missed = 0.0
        for trace, full in zip(rollout.traces, rollouts.full, strict=True):
            if trace.raw[step] is None:
                target = (full.after(step, sigmas) - trace.latents[step]) / length
                left = trace.taken[step] - target
            else:
                left = _left_over([trace.raw[k] for k in sources], trace.latents[step], trace.raw[step])
            missed += float(left.float().pow(2).mean())
        needs[step] = abs(length) * math.sqrt(missed / len(rollout.traces))
    return needs


def _left_over(features: Sequence[Any], latents: torch.Tensor, target: Any) -> torch.Tensor:
    """What is left of the target after the best combination of the features."""
    columns = torch.stack([t.float().flatten() for t in (*features, latents)])
    gram, right = columns @ columns.T, columns @ target.float().flatten()
    weights = solve_ridge(gram.double().cpu().numpy(), right.double().cpu().numpy(), 1e-6)
    return target.float().flatten() - columns.T @ torch.tensor(weights, dtype=torch.float32, device=columns.device)
