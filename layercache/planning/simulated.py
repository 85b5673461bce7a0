"""`Simulated`: pictures that are simulated step by step beside those that a schedule is run on (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layercache.planning.surrogate import Answers, FullRuns
from layercache.schedule.schedule import Velocity


class Simulated:
    """Cached runs of pictures of which only the full runs are known, as the surrogate has them (csrc/surrogate.hpp).

    They take every step with the forecast that is fitted to them and to the pictures that really run, all together.

    Args:
        runs: the full runs.
        answers: to drift.
        given: what the model gives without drift, ``[P, N, rank]``; by default the full runs' velocities.
    """

    def __init__(self, runs: FullRuns, answers: Answers, given: np.ndarray | None = None):
        steps = runs.num_steps
        across = np.zeros((len(runs), steps + 1, steps))  # one direction a step, across all that the full runs span
        vectors = np.concatenate([runs.vectors, across], axis=2)
        self.velocities, self.full = vectors[:, 1:], vectors[:, 0]
        self.given = self.velocities if given is None else np.concatenate([given, across[:, 1:]], axis=2)
        self.kappa, self.eta = answers.kappa[..., None], answers.eta[..., None]
        self.keep = np.stack([sampler.keep for sampler in runs.samplers])[..., None]
        self.weights = np.stack([sampler.weights for sampler in runs.samplers])
        self.latents = self.full
        self.made: dict[int, np.ndarray] = {}  # by step, what the model gave
        self.off = np.zeros_like(self.velocities)  # velocities taken, less the full runs'

    def compute(self, step: int) -> None:
        """The model's answer at a step."""
        drift = self.latents - self.full
        answer = self.kappa[:, step] * drift
        answer[:, step - self.velocities.shape[1]] += self.eta[:, step, 0] * np.linalg.norm(drift, axis=1)
        self.made[step] = self.given[:, step] + answer

    def products(self, step: int, sources: Sequence[int]) -> np.ndarray:
        """Inner products of velocities, latents and the velocity that leads back, ``[P, n + 2, n + 2]``, as a fit has.

        Args:
            step: that is about to be taken.
            sources: computed steps, the newest first.
        """
        wanted = self.velocities[:, step] - self._ahead(step) / self.weights[:, step, step, None]
        vectors = np.stack([*(self.made[source] for source in sources), self.latents, wanted], axis=1)
        return np.asarray(vectors @ vectors.transpose(0, 2, 1))

    def take(self, step: int, velocity: Velocity | None) -> None:
        """Takes a step with this forecast, or, where there is none, with what was computed."""
        if velocity is None:
            taken = self.made[step]
        else:
            taken = velocity.latents * self.latents
            taken = taken + sum(value * self.made[source] for source, value in velocity.terms.items())
        ahead = self._ahead(step)
        self.off[:, step] = taken - self.velocities[:, step]
        weights = self.weights[:, step, : step + 1]
        self.full = self.keep[:, step] * self.full + np.einsum("pk,pke->pe", weights, self.velocities[:, : step + 1])
        self.latents = self.full + ahead + weights[:, -1, None] * self.off[:, step]

    def _ahead(self, step: int) -> np.ndarray:
        """The drift behind a step, were its velocity the full run's."""
        back = np.einsum("pk,pke->pe", self.weights[:, step, :step], self.off[:, :step])
        return np.asarray(self.keep[:, step] * (self.latents - self.full) + back)
