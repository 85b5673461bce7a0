"""Recording samplings in full, and making a schedule from what was recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from layercache.errors import BudgetError, CalibrationError, MethodError
from layercache.methods.meancache import MeanCache, plan_steps, stability_deviation
from layercache.planning.fit import inner_products
from layercache.planning.sampler import LinearSampler
from layercache.planning.surrogate import FullRuns, factors_of
from layercache.planning.universal import Universal
from layercache.schedule import Fingerprint, Schedule

from .engine import Sampling, warn_once
from .groups import Groups
from .sampling import Attached, Steps, as_levels, check_sampler, is_like, linear_steps

MAX_LENGTH = 9
"""Steps of the longest interval that MeanCache plans."""


class RecordedRun:
    """One sampling that ran in full: its first latents and the velocity of every step, in the host's memory."""

    def __init__(self, fingerprint: Fingerprint, sampler: LinearSampler | None, sampler_name: str):
        self.fingerprint, self.sampler, self.sampler_name = fingerprint, sampler, sampler_name
        self.steps = Steps(fingerprint.sigmas)
        self.latents: torch.Tensor | None = None
        self.velocities: list[torch.Tensor] = []
        self.is_whole = False
        self.groups: Groups | None = None

    def options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return options

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        denoised = compute()
        if not is_like(denoised, x):
            self.steps.is_lost = True
        if self.steps.next(sigma) is not None:
            if self.latents is None:
                self.latents = x.detach().float().cpu().clone()
            self.velocities.append(((x - denoised) / as_levels(sigma, x)).detach().float().cpu())
        return denoised

    @property
    def kind(self) -> tuple[Any, ...]:
        """What runs have in common from which one schedule is made."""
        return self.fingerprint, self.sampler_name


class Recorder(Attached):
    """Records the samplings of a model.

    Args:
        keep: how many are kept, the newest.
    """

    def __init__(self, keep: int = 8):
        super().__init__()
        self.keep = keep
        self.runs: list[RecordedRun] = []

    def begin(self, sampling: Sampling) -> RecordedRun:
        check_sampler(sampling)
        return RecordedRun(sampling.fingerprint, linear_steps(sampling), sampling.sampler_name)

    def end(self, run: RecordedRun) -> None:
        if run.is_whole and run.steps.are_complete:
            self.runs = [*self.runs, run][-self.keep :]
        elif run.is_whole:
            warn_once("a sampling was not recorded: the sampler did not ask the model once per step")

    @property
    def like_newest(self) -> list[RecordedRun]:
        """Those between the noise levels of the newest one, with its sampler.

        Raises:
            CalibrationError: none was recorded.
        """
        if not self.runs:
            raise CalibrationError(
                "no sampling was recorded: connect the MODEL of LayerCache Record to a sampler, and its LATENT here"
            )
        return [run for run in self.runs if run.kind == self.runs[-1].kind]

    def __str__(self) -> str:
        return f"{len(self.runs)} samplings recorded"


def schedule_of(runs: Sequence[RecordedRun], budget: float) -> Schedule:
    """A schedule of whole steps fitted to recorded runs, which no model is called for.

    Between noise levels of flow matching, the path and the forecasts that layercache's surrogate of cached runs finds
    best; between others MeanCache's.

    Args:
        runs: of one kind.
        budget: largest share of the steps that is computed.

    Raises:
        BudgetError: no schedule computes so little.
        CalibrationError: something recorded is not finite.
        MethodError: the sampler adds noise.
    """
    prints = runs[0].fingerprint
    if not 0 < budget < 1 or budget * prints.num_steps < 1:
        raise BudgetError(f"of {prints.num_steps} steps one at least is computed; a budget of {budget} is none")
    if any(sigma > 1 + 1e-6 for sigma in prints.sigmas):
        table = stability_deviation([run.velocities for run in runs], prints.sigmas, MAX_LENGTH)
        computed, spans = plan_steps(table, math.floor(budget * prints.num_steps + 1e-9))
        schedule = MeanCache(tuple(computed), tuple(spans)).schedule(prints)
    else:
        schedule = Universal(budget=budget).planned(prints, full_runs(runs))
    pictures = sum(len(run.velocities[0]) for run in runs)
    found = {name: value for name, value in schedule.made_by.items() if name not in ("method", "measured")}
    method = "meancache" if "spans" in found else "layercache"
    return replace(schedule, made_by={"method": method, **found, "origin": f"{pictures} pictures recorded in ComfyUI"})


def full_runs(runs: Sequence[RecordedRun]) -> FullRuns:
    """What the surrogate knows of recorded runs, each picture a fold of its own."""
    grams, samplers = list[np.ndarray](), list[LinearSampler]()
    for run in runs:
        if run.sampler is None:
            raise MethodError(
                f"a schedule is fitted where the sampler adds no noise, and {run.sampler_name.removeprefix('sample_')} "
                "does, or is not linear; record runs with euler, or dpmpp_2m"
            )
        assert run.latents is not None
        own = inner_products([run.latents, *run.velocities]) / run.latents[0].numel()
        grams.append(own)
        samplers += [run.sampler] * len(own)
    every = np.concatenate(grams)
    if not np.isfinite(every).all():
        raise CalibrationError("a recorded run holds NaN or infinity; record others")
    return FullRuns(runs[0].fingerprint.sigmas, factors_of(every), tuple(samplers), tuple(range(len(every))))
