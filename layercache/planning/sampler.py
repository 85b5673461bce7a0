"""`LinearSampler`: what a sampler's steps do to latents, as far as they are linear in the velocities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layercache.planning.trace import Trace, near

NEGLIGIBLE = 1e-6
"""Share of a step's largest weight below which another is rounding."""


@dataclass(frozen=True, eq=False)
class LinearSampler:
    """Deterministic steps ``x_{i+1} = keep_i x_i + sum_{k <= i} weights[i, k] v_k``.

    v_k is what the sampler was given as the model's output at step k. Euler has ``keep_i = 1`` and
    ``weights[i, i] = sigma_{i+1} - sigma_i``; multi-step samplers (UniPC, DPM++) and Heun's second evaluation also take
    the outputs of earlier steps.

    Attributes:
        keep: ``[N]``.
        weights: ``[N, N]``, lower triangular; its diagonal is nowhere 0.
    """

    keep: np.ndarray
    weights: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.keep)

    @classmethod
    def euler(cls, sigmas: Sequence[float]) -> LinearSampler:
        """Euler steps between N + 1 noise levels."""
        return cls(np.ones(len(sigmas) - 1), np.diag(np.diff(np.asarray(sigmas, float))))

    @classmethod
    def of(cls, scheduler: Any, num_steps: int) -> LinearSampler | None:
        """The sampler's response to unit impulses, one element of small latents each: first latents, every velocity.

        Args:
            scheduler: as it is before its first step; it is left so.
            num_steps: how many steps it will take, the last of its timesteps.

        Returns:
            ``None`` where the sampler cannot take such latents, or some velocity does not act at once.
        """
        scheduler = copy.deepcopy(scheduler)
        scheduler.__dict__.pop("step", None)  # of a run that is paused at its steps
        tensors = {name: value.cpu() for name, value in vars(scheduler).items() if isinstance(value, torch.Tensor)}
        vars(scheduler).update(tensors)  # as the impulses are, wherever the pipeline's are
        impulses = torch.eye(num_steps + 1, dtype=torch.float32)[:, None, :, None]
        latents, found = impulses[num_steps], [impulses[num_steps]]
        timesteps = torch.as_tensor(scheduler.timesteps)[-num_steps:]
        try:
            with torch.random.fork_rng(devices=[]):  # a sampler that adds noise draws it
                for velocity, timestep in zip(impulses, timesteps, strict=False):
                    latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                    found.append(latents)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it wants latents of another shape, or is used up
            return None
        response = torch.stack(found).double().cpu().numpy().reshape(len(found), -1)
        return None if response.shape != (num_steps + 1, num_steps + 1) else cls._of_response(response)

    @classmethod
    def _of_response(cls, response: np.ndarray) -> LinearSampler | None:
        """From latents in terms of the velocities and, last, of the first latents, ``[N + 1, N + 1]``."""
        first = response[:, -1]
        if not np.isfinite(response).all() or not (np.abs(first[:-1]) > NEGLIGIBLE).all():
            return None
        keep = first[1:] / first[:-1]
        weights = response[1:, :-1] - keep[:, None] * response[:-1, :-1]
        weights[np.abs(weights) <= NEGLIGIBLE * np.abs(weights).max(axis=1, keepdims=True)] = 0.0
        return cls(keep, weights) if np.diag(weights).all() and not np.triu(weights, 1).any() else None

    def before(self, trace: Trace, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Where a step would take the latents were its velocity 0."""
        base = latents if self.keep[step] == 1 else latents * float(self.keep[step])
        for k in np.flatnonzero(self.weights[step, :step]).tolist():
            base = base + float(self.weights[step, k]) * near(trace.taken[k], latents)
        return base

    def after(self, trace: Trace, step: int) -> torch.Tensor:
        """Latents of a run behind a step."""
        if step + 1 < len(trace.latents):
            return trace.latents[step + 1]
        return self.before(trace, step, trace.latents[step]) + float(self.weights[step, step]) * trace.taken[step]

    def wanted(self, trace: Trace, full: Trace, step: int) -> torch.Tensor:
        """The velocity that takes a run's latents to where the full run's are one step later."""
        latents = trace.latents[step]
        base = self.before(trace, step, latents)
        return (near(self.after(full, step), latents) - base) / float(self.weights[step, step])

    def is_of(self, trace: Trace) -> bool:
        """Whether a run took these steps, within rounding."""
        for step in range(len(trace.latents) - 1):
            there = trace.latents[step + 1].float()
            here = self.before(trace, step, trace.latents[step].float())
            error = here + float(self.weights[step, step]) * trace.taken[step].float() - there
            tolerance = 1e-4 if trace.latents[step + 1].dtype == torch.float32 else 4e-3
            if not error.norm() <= tolerance * there.norm():
                return False
        return True
