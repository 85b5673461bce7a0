"""Learning-to-Cache: one learned number per module and cache step says whether its last output will do.

Every ``period``-th step is computed, the others are cache steps. While a router is trained, a module gives
``beta * fresh + (1 - beta) * cached`` there, ``beta = sigmoid(theta)``, and theta is moved so that the frozen model's
output changes little while few betas stay large. Afterwards a module is computed where beta is above a threshold, and
its last output is taken elsewhere.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

from layercache._utils.validate import expect
from layercache.errors import MethodError
from layercache.methods import l2c_training
from layercache.methods.full_runs import generate_once, transformer_of
from layercache.methods.l2c_training import CLAMP as CLAMP
from layercache.methods.l2c_training import Training
from layercache.models.registry import fingerprint_of, spec_for
from layercache.parallel.crew import Crew
from layercache.planning.search_files import digest_of, model_identity
from layercache.runtime.attachment import attach
from layercache.runtime.policy import check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.module_schedule import ModuleSchedule, reusing

_log = logging.getLogger("layercache")


@dataclass(frozen=True)
class LearningToCache:
    """Learns by gradient descent which modules to cache at the steps between those that are computed.

    Source: docs/methods.md, Learning-to-Cache.

    The published rates (1e-3 to 1e-2, over tens of thousands of updates) and penalties (1e-6 to 5e-6)
    are for data sets of noised pictures; these are for a few dozen generations.

    Attributes:
        penalty: lambda, weight of the sum of all betas of a step beside the mean squared error.
        learning_rate: of AdamW, without weight decay.
        rounds: generations that are learned from; each has an update per cache step and branch.
        seed: of theta and of the first generation, the others follow.
        by_cost: betas count by the measured cost of their module (mean 1); otherwise all the same, as published.
        shifted: for single-step DPM-Solver-2 (KDPM2), whose steps are a point of the outer grid and a midpoint in turn:
            the outer points but the first are cache steps and take what the midpoint before them gave.
        straight_through: betas above it count as 1 and the others as 0 in training too, with the gradient of beta
            itself (published code, off by default); ``None`` interpolates.
        period: from one computed step to the next; 2, as published, makes every second step a cache step. At a cache
            step behind another one, what is cached of a module is what it gave there, computed or not.
    """

    SOURCE: ClassVar[str] = "the class is in the same module"

    penalty: float = 1e-4
    learning_rate: float = 0.1
    rounds: int = 24
    seed: int = 0
    by_cost: bool = True
    shifted: bool = False
    straight_through: float | None = None
    period: int = 2

    name: ClassVar[str] = "l2c"

    def __post_init__(self) -> None:
        check_range("penalty", self.penalty, 0)
        check_range("rounds", self.rounds, 1)
        check_range("seed", self.seed, 0)
        check_range("period", self.period, 2)
        if self.period != int(self.period):
            raise MethodError(f"period must be a whole number, got {self.period}", argument="period")
        if self.straight_through is not None:
            check_range("straight_through", self.straight_through, 0, 1)
        if not 0 < self.learning_rate < math.inf:
            raise MethodError(
                f"learning_rate must be a number above 0, got {self.learning_rate}", argument="learning_rate"
            )
        if self.penalty == math.inf:
            raise MethodError("penalty must be a finite number, got inf", argument="penalty")

    def cache_places(self, num_steps: int) -> list[int]:
        """The cache steps among so many steps at which the transformer runs, by their numbers from 0."""
        first = int(self.shifted)
        return [place for place in range(first, num_steps) if (place - first) % self.period]

    def train(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
        crew: Crew | None = None,
        transformer: str = "transformer",
        **call: Any,
    ) -> LearnedRouter:
        """Learns which modules can be cached between computed steps, from the pipeline's own generations.

        Instead of noised pictures of a data set the model's own trajectories are learned from, every cache step of
        every generation in turn; nothing but a pipeline is needed, with flow matching or with DDIM (DiT). The model's
        weights are not touched. Where sound leaves the model too, its mean squared error is added to the picture's.
        An update holds the activations of one forward; ``pipe.transformer.enable_gradient_checkpointing()`` trades
        most of them for a further forward.

        Args:
            pipe: a diffusers pipeline whose model is called once per step and branch.
            prompts: one per round, in turn; a list is a batch.
            checkpoint: a file that is written after every round; a training that was stopped or killed goes on from it
                to the same result.
            progress: show a progress bar with the losses and the time that is left.
            crew: processes that train together, each with the whole pipeline. In a round each makes a generation of its
                own, the prompts and seeds in turn over all of them, and every update takes their mean gradient: the
                same router on all, and another one than by one process.
            transformer: of a pipeline with several, the component (Wan 2.2: ``"transformer_2"`` runs the later steps).
            call: arguments of every call, such as ``num_inference_steps``.

        Raises:
            MethodError: no prompts, or no cache step among so few steps.
            UnsupportedModelError: no pipeline, or no gradient passes through the model.
            ScheduleMismatchError: the checkpoint belongs to another training, or the processes do not have the same.
            CrewError: a process of the crew is gone.
        """
        if not prompts:
            raise MethodError("a router is trained on at least one prompt")
        model, crew = transformer_of(pipe, transformer), crew or Crew()
        with crew.together():
            training = Training(model, spec_for(model), getattr(pipe, "scheduler", None), self, crew)
            about = [asdict(self) | {"rounds": None}, list(prompts), dict(sorted(call.items())), transformer]
            digest = digest_of([model_identity(pipe), *about, crew.world])
            crew.check_same(digest, "another model, other prompts or other settings")
            losses = l2c_training.resume(training, checkpoint, digest)
            attachment = attach(pipe, training)
            try:
                with l2c_training.frozen(model), self._progress(losses, progress and crew.leads) as bar:
                    for number in range(len(losses), self.rounds):
                        self._round(pipe, training, number, prompts, call, losses)
                        l2c_training.save(training, checkpoint, digest, losses)
                        bar.set_postfix_str(_figures(losses[-1], len(training.units)))
                        bar.update()
            finally:
                attachment.detach()
        return self._learned(model, training, losses)

    def _progress(self, losses: list[tuple[float, float]], shown: bool) -> Any:
        form = "{desc}: {n_fmt} of {total_fmt} |{bar}| {elapsed}, {remaining} left{postfix}"
        done = len(losses)
        return tqdm(total=self.rounds, initial=done, desc="training", disable=not shown, bar_format=form, unit="round")

    def _round(
        self,
        pipe: Any,
        training: Training,
        number: int,
        prompts: Sequence[Any],
        call: dict[str, Any],
        losses: list[tuple[float, float]],
    ) -> None:
        crew = training.crew
        sample = number * crew.world + crew.rank
        with l2c_training.seeded(self.seed + sample, training.device):
            generate_once(pipe, prompts[sample % len(prompts)], self.seed + sample, call)
        losses.append(training.take_sums())
        if crew.leads:
            _log.info("router, round %d of %d: %s", number + 1, self.rounds, _figures(losses[-1], len(training.units)))

    def _learned(self, model: Any, training: Training, losses: list[tuple[float, float]]) -> LearnedRouter:
        own = sorted(training.steps_run)
        rows = [row.detach() for row in training.theta[: len(self.cache_places(len(own)))]]
        if not rows:
            raise MethodError(l2c_training.too_few(self))
        return LearnedRouter(
            fingerprint_of(model, training.sigmas, training.branches, own),
            tuple(unit.name for unit in training.units),
            torch.stack(rows),
            training.seconds,
            losses,
            self.shifted,
            self.period,
        )


def _figures(loss: tuple[float, float], units: int) -> str:
    return f"error {loss[0]:.2e}, {loss[1]:.1f} of {units} modules"


@dataclass
class LearnedRouter:
    """What a training found.

    Attributes:
        fingerprint: of the model and run.
        units: names of the modules.
        theta: ``[cache steps, units]``, fp32.
        seconds: measured seconds of every module.
        losses: per round, means over its updates: squared error, and sum of betas.
        shifted, period: see `LearningToCache`.
    """

    SOURCE: ClassVar[str] = "LearningToCache().train(pipe, prompts) gives one"

    fingerprint: Fingerprint
    units: tuple[str, ...]
    theta: torch.Tensor
    seconds: tuple[float, ...]
    losses: list[tuple[float, float]] = field(default_factory=list)
    shifted: bool = False
    period: int = 2

    @property
    def beta(self) -> torch.Tensor:
        return torch.sigmoid(self.theta)

    def schedule(self, threshold: float | None = None, budget: float | None = None) -> ModuleSchedule:
        """The hard decisions: computed where beta is above ``threshold`` (0.1 if nothing is given).

        Args:
            threshold: published ones are 0.1 and 0.9.
            budget: instead of a threshold, share of the modules' time: the smallest betas are cached until it is kept.

        Raises:
            MethodError: both are given, or the budget is below what the computed steps alone need.
        """
        if threshold is not None and budget is not None:
            raise MethodError("give a threshold or a budget, not both")
        limit = 0.1 if threshold is None else threshold
        if budget is not None:
            limit = self._limit_for(budget)
        own = self.fingerprint.steps
        places = LearningToCache(shifted=self.shifted, period=self.period).cache_places(len(own))
        cached = {
            own[place]: [unit for unit, b in zip(self.units, row, strict=True) if not b > limit]
            for place, row in zip(places, self.beta.tolist(), strict=True)
        }
        found = reusing(self.fingerprint, self.units, cached, self.seconds)
        return replace(found, made_by={"method": "learning-to-cache", "threshold": limit, "period": self.period})

    def _limit_for(self, budget: float) -> float:
        """The least threshold whose schedule keeps to the budget."""
        for limit in [-1.0, *sorted(set(self.beta.flatten().tolist()))]:
            if self.schedule(threshold=limit).used <= budget + 1e-9:
                return limit
        least = self.schedule(threshold=1.0).used
        cached = "every second step" if self.period == 2 else f"{self.period - 1} steps of {self.period}"
        raise MethodError(
            f"a budget of {budget:g} cannot be met: caching {cached} needs {least:.3f} at least",
            argument="budget",
        )


def random_router(router: LearnedRouter, seed: int = 0) -> LearnedRouter:
    """The same betas in another order within every cache step: as many modules cached, but not the learned ones.

    Raises:
        ArgumentError: no learned router.
    """
    expect("l2c.random_router", router, LearnedRouter)
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = [row[torch.randperm(len(row), generator=generator)] for row in router.theta]
    return replace(router, theta=torch.stack(rows), losses=[])


# Names of version 0.1, which the class took the place of.
Settings = LearningToCache


def train(
    pipe: Any,
    prompts: Sequence[Any],
    settings: LearningToCache | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> LearnedRouter:
    """`LearningToCache.train` of these settings."""
    return (settings or LearningToCache()).train(pipe, prompts, checkpoint, progress, **call)
