"""Schedules from other models' full runs, for models on which nothing was measured (ours).

A few full runs of several models are shipped, as their velocities at many noise levels in a basis that keeps inner
products. Interpolated to the noise levels of a run, they are what the surrogate needs to choose a path and to fit its
forecasts: no model is called. Forecasts depend on the data and the sampler more than on the network, and transfer.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from layercache._utils.files import write_atomically
from layercache._utils.validate import expect
from layercache.errors import BudgetError, MethodError
from layercache.planning.fit import Forecast
from layercache.planning.noise_levels import interpolation
from layercache.planning.sampler import LinearSampler
from layercache.planning.surrogate import Answers, FullRuns, explored, starts, surrogate_of
from layercache.planning.whole_steps import TAIL, TERMS, dense_starts, deviations_for, stress_of, weighting_of
from layercache.runtime.policy import PlannedMethod
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Cell, Schedule, Velocity

FILE = Path(__file__).with_name("universal.safetensors")
SIMULATIONS = 400


@dataclass(frozen=True, eq=False)
class ModelRuns:
    """Full runs of several models with Euler steps between many noise levels.

    Attributes:
        sigmas: G + 1 noise levels, from 1 to 0.
        factors: A of the inner products ``A A^T`` of first latents and velocities, mean over the elements,
            ``[P, G + 1, rank]``.
        models: hashes of their architectures (`layercache.models.registry.config_hash`).
        folds: per picture, which of the models it is of.
    """

    sigmas: np.ndarray
    factors: np.ndarray
    models: tuple[str, ...]
    folds: tuple[int, ...]

    @classmethod
    def load(cls, path: Path = FILE) -> ModelRuns:
        """From a file that bench/universal.py wrote; by default the one that is shipped."""
        with safe_open(path, "numpy") as file:
            sigmas, factors, folds = (file.get_tensor(name) for name in ("sigmas", "factors", "folds"))
            models = json.loads(file.metadata()["models"])
        return cls(sigmas, factors.astype(np.float64), tuple(models), tuple(folds.tolist()))

    def save(self, path: Path) -> None:
        """Writes it, with factors in float32."""
        tensors = {
            "sigmas": self.sigmas,
            "factors": self.factors.astype(np.float32),
            "folds": np.array(self.folds, dtype=np.int32),
        }
        write_atomically(path, lambda place: save_file(tensors, place, {"models": json.dumps(self.models)}))

    def without(self, model: str) -> ModelRuns:
        """Those of models of other architectures than this one."""
        kept = [picture for picture, fold in enumerate(self.folds) if self.models[fold] != model]
        return replace(self, factors=self.factors[kept], folds=tuple(self.folds[picture] for picture in kept))

    def at(self, sigmas: Sequence[float], sampler: LinearSampler) -> FullRuns:
        """The runs between other noise levels, those of a model being one fold.

        Args:
            sigmas: N + 1 noise levels of flow matching, falling; the first may be below 1.
            sampler: of N steps.
        """
        levels = np.asarray(sigmas[:-1], float)
        rows = np.zeros((len(levels) + 1, len(self.sigmas)))
        rows[0, 0] = 1.0  # first latents, less what the steps down to the first noise level take away
        rows[0, 1:] = np.minimum(np.maximum(self.sigmas[1:], levels[0]) - self.sigmas[:-1], 0.0)
        rows[1:, 1:] = interpolation(self.sigmas[:-1], levels)
        return FullRuns(tuple(sigmas), rows @ self.factors, (sampler,) * len(self.factors), self.folds)


@functools.lru_cache(maxsize=1)
def shipped() -> ModelRuns:
    """The full runs that are part of the package."""
    return ModelRuns.load()


@dataclass(frozen=True, kw_only=True)
class Universal(PlannedMethod):
    """A schedule of whole steps for any flow-matching model, made from other models' full runs.

    Made anew for other noise levels or another sampler, which takes seconds on a CPU. Nothing is measured on the model
    that it is enabled on: `layercache.search` and ``layercache.enable(pipe, budget=..., learn=4)`` do that.

    Source: ours; docs/planning.md.

    Attributes:
        budget: largest share of the steps that is computed, one at least.
        seed: of the order in which paths are tried in the surrogate.

    Raises:
        BudgetError: on construction, for a budget out of range.
    """

    budget: float = 0.5
    seed: int = 0

    name: ClassVar[str] = "universal"

    def __post_init__(self) -> None:
        if not 0 < self.budget < 1:
            raise BudgetError(f"a budget is a share above 0 and below 1, got {self.budget}", argument="budget")

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        """For Euler steps between the run's noise levels.

        Raises:
            ArgumentError: no fingerprint.
            MethodError: the noise levels are not those of flow matching, or repeated.
        """
        expect("Universal.schedule", fingerprint, Fingerprint)
        return self.schedule_for(fingerprint, LinearSampler.euler(_run_of(fingerprint)))

    def schedule_of_run(self, fingerprint: Fingerprint, scheduler: Any, first: int) -> Schedule:
        fingerprint = fingerprint.starting_at(first)
        sampler = LinearSampler.of(scheduler, len(_run_of(fingerprint)) - 1)
        if sampler is None:
            raise MethodError(
                f"a universal schedule needs a sampler whose steps are linear in the velocity, of some length, without "
                f"noise of their own, and those of {type(scheduler).__name__} are not; take FBCache, or another sampler"
            )
        return self.schedule_for(fingerprint, sampler)

    def schedule_for(self, fingerprint: Fingerprint, sampler: LinearSampler, runs: ModelRuns | None = None) -> Schedule:
        """For a sampler's steps, from other models' full runs: of those that are shipped, or of these.

        Noise levels that rise (Mochi's are shares of data) are mirrored, with velocities of the other sign.
        """
        sigmas, levels = _run_of(fingerprint), fingerprint.sigmas
        rises = levels[0] < levels[-1]
        if rises:
            sigmas, levels = (tuple(1.0 - level for level in these) for these in (sigmas, levels))
            sampler = replace(sampler, weights=-sampler.weights)
        if not -1e-6 < min(levels) <= max(levels) < 1 + 1e-6 or any(b > a for a, b in pairwise(levels)):
            raise MethodError(
                "a universal schedule is for flow matching, whose noise levels fall from 1 at the most to 0, and this "
                f"run has {fingerprint.sigmas[0]:.3f} to {fingerprint.sigmas[-1]:.3f}; take FBCache, or "
                "`layercache.search`"
            )
        if not np.diag(sampler.weights).all():
            raise MethodError(
                "noise levels are repeated, as Heun's sampler does: enable the method on the pipeline, whose sampler "
                "says what its steps are"
            )
        others = (runs or shipped()).without(fingerprint.config_hash)
        return self.planned(fingerprint, others.at(sigmas, sampler), -1.0 if rises else 1.0)

    def planned(self, fingerprint: Fingerprint, runs: FullRuns, sign: float = 1.0) -> Schedule:
        """From full runs between the fingerprint's noise levels: the surrogate's best path, and its forecasts.

        Args:
            fingerprint: of the model and run.
            runs: the full runs.
            sign: of the model's velocities in terms of those of the full runs.
        """
        steps = runs.num_steps
        count = max(1, math.floor(self.budget * steps + 1e-9))  # the first one in any case
        first = fingerprint.num_steps - steps
        path, forecasts = self._found(runs, count)
        cells: list[tuple[Cell, ...]] = [(None,) if computed else ({},) for computed in [False] * first + path.tolist()]
        return Schedule(
            fingerprint,
            ((0, fingerprint.num_blocks),),
            tuple(cells),
            (1.0,),
            {"method": self.name, "budget": self.budget, "measured": "on other models"},
            (*[None] * first, *_velocities(path, forecasts, first, sign)),
        )

    def _found(self, runs: FullRuns, count: int) -> tuple[np.ndarray, list[list[float]]]:
        """The surrogate's best path with so many computed steps, and its forecasts."""
        share = count / runs.num_steps
        dense = dense_starts(count, share)[-1]
        answers = Answers.usual(runs.sigmas, len(runs))
        assert answers is not None
        forecast = Forecast("steer", terms=TERMS, weighting=weighting_of(share))
        begins = [path for _, path in starts(deviations_for(runs, count), runs.sigmas, count, dense)]
        surrogate = surrogate_of(runs, answers, forecast, stress_of(share))
        paths = explored(surrogate, runs, begins, dense, SIMULATIONS, self.seed, TAIL)
        return paths[0], surrogate_of(runs, answers, forecast).forecasts(paths[:1])


def _run_of(fingerprint: Fingerprint) -> tuple[float, ...]:
    """Noise levels of the steps that are run, and the last one; a run may begin in the middle (img2img)."""
    first = fingerprint.steps_run[0] if fingerprint.steps_run else 0
    return fingerprint.sigmas[first:]


def _velocities(
    path: np.ndarray, forecasts: Sequence[Sequence[float]], first: int, sign: float
) -> list[Velocity | None]:
    """The forecasts as a schedule has them, of a run that begins with step ``first``."""
    found: list[Velocity | None] = []
    computed: list[int] = []
    for step, coefficients in enumerate(forecasts):
        if path[step]:
            computed = [step + first, *computed]
        terms = dict(zip(computed, coefficients[:-1], strict=False))
        found.append(Velocity(terms, sign * coefficients[-1]) if coefficients else None)
    return found
