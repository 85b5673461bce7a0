"""Executing a method that decides about whole steps before they run."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import scheduler_sigmas, takes_euler_steps
from layercache.errors import CacheStateError, MethodError, NonFiniteResidualError
from layercache.models.registry import count_blocks, fingerprint_of
from layercache.models.spec import ModelSpec
from layercache.runtime.forward import Forward
from layercache.runtime.policy import Run, StepDecider, StepMethod
from layercache.runtime.report import CacheReport, Counts
from layercache.runtime.router import Router
from layercache.runtime.samples import Excluded, bad_samples
from layercache.runtime.steps import StepCounter
from layercache.runtime.velocity import combine
from layercache.schedule.memory_plan import COMPUTE, REUSE, GroupAction
from layercache.schedule.schedule import Cell, Schedule, Velocity


class StepRouter(Router):
    """Skips whole steps by a `StepMethod`; this is what ``layercache.enable`` returns for one."""

    def __init__(self, transformer: nn.Module, spec: ModelSpec, method: StepMethod, scheduler: Any):
        super().__init__(transformer, spec, [(0, count_blocks(transformer))])
        if not takes_euler_steps(scheduler):
            raise MethodError(
                f"{method.name} extends velocities along Euler steps, which "
                f"{'no scheduler' if scheduler is None else type(scheduler).__name__} takes; use a pipeline with "
                "FlowMatchEulerDiscreteScheduler, or another method"
            )
        self._stream = tuple(inspect.signature(type(transformer).forward).parameters)[1]
        self.method = method
        self.steps = StepCounter(scheduler=scheduler)
        self.log: list[Velocity | None] = []
        self.branches: list[str] = []
        self._decider: StepDecider
        self._sigmas: tuple[float, ...] = ()
        self._step = -1
        self._velocity: torch.Tensor | None = None
        self._signature: tuple[Any, ...] = ()
        self._excluded = Excluded()
        self._inputs: torch.Tensor | None = None
        self._counts = Counts()

    def begin(self, forward: Forward) -> None:
        place = self.steps.locate(forward.branch, forward.step, None)
        inputs = forward.arguments[self._stream]
        if place.branch not in self.branches:
            self.branches.append(place.branch)
        signature = (inputs.shape, inputs.dtype, inputs.device)
        if place.branch == self.branches[0]:
            if place.starts or signature != self._signature:
                self._start(place.step, signature)
            self._decide(place.step, inputs)
        rule = self.log[place.step]
        self._counts.note(reused=rule is not None)
        self.open((GroupAction(COMPUTE if rule is None else REUSE),))

    def _start(self, step: int, signature: tuple[Any, ...]) -> None:
        self._sigmas = scheduler_sigmas(self.steps.scheduler) or ()
        self._decider = self.method.decider(Run(len(self._sigmas) - 1, self._sigmas))
        self._signature = signature
        self._velocity = None
        self._excluded = Excluded()
        self.log = [None] * step
        self._counts.generations += step == 0

    def _decide(self, step: int, inputs: torch.Tensor) -> None:
        decider, self._inputs = self._decider, inputs
        decider.observe(self._excluded.without(inputs))
        numbers = None if decider.must_compute(step) else decider.numbers()
        self._excluded.note(numbers)
        reuses = numbers is not None and decider.may_reuse(numbers)
        del self.log[step:]
        self.log += [None] * (step - len(self.log)) + [decider.velocity(step) if reuses else None]
        self._step = step

    @property
    def replaces_velocity(self) -> bool:
        return True

    def replace_velocity(self, step: int, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The model's velocity, or the stored one extended.

        Raises:
            CacheStateError: the sampler steps where the transformer was not called.
        """
        if step != self._step:
            raise CacheStateError(
                f"the scheduler takes step {step}, but the transformer was last called for step {self._step}; "
                f"{self.method.name} needs one scheduler, stepped once after every call of the transformer"
            )
        rule = self.log[step]
        if rule is None:
            self._record(step, velocity)
            if self._velocity is None or self._velocity.shape != velocity.shape:
                self._velocity = velocity.clone()
            else:
                self._velocity.copy_(velocity)
            return velocity
        assert self._velocity is not None
        return combine([self._velocity], list(rule.terms.values()), None)

    def _record(self, step: int, velocity: torch.Tensor) -> None:
        """Tells the decider what the model gave, without samples that are NaN; what it saw of those is forgotten."""
        excluded, is_first = self._excluded, self._velocity is None
        if excluded.is_due and len(velocity) > 1 and excluded.look(velocity) and is_first:
            assert self._inputs is not None
            self._decider = self.method.decider(Run(len(self._sigmas) - 1, self._sigmas))
            self._decider.observe(excluded.without(self._inputs))
        self._inputs = None
        self._decider.record(step, excluded.without(velocity))

    def reset(self) -> None:
        """Starts afresh: the next call is step 0 of a new generation."""
        self.steps.reset()
        self._signature, self.log = (), []

    def check(self) -> None:
        """Looks at the stored velocity.

        Raises:
            NonFiniteResidualError: it holds NaN or infinity, also where a warning told so at the end of a pipeline's
                call.
        """
        self.raise_told()
        if self._velocity is not None and not bool(torch.isfinite(self._velocity).all()):
            samples = bad_samples(self._velocity)
            self._velocity = None
            raise NonFiniteResidualError.of("a stored velocity", samples)

    @property
    def decisions(self) -> dict[str, tuple[bool, ...]]:
        """Of the last generation, per branch and step: whether the model ran."""
        return {name: tuple(rule is None for rule in self.log) for name in self.branches}

    def export_schedule(self) -> Schedule:
        """The decisions of the last generation as a schedule; running it gives the same bits without deciding.

        Raises:
            CacheStateError: no generation was finished.
        """
        steps = len(self._sigmas) - 1
        if steps < 1 or len(self.log) != steps:
            raise CacheStateError(f"run a whole generation first; steps seen so far: {len(self.log)}")
        prints = fingerprint_of(self.transformer, self._sigmas, self.branches)
        cells: tuple[tuple[Cell, ...], ...] = tuple((None,) if rule is None else ({},) for rule in self.log)
        metadata = {"method": self.method.name, "settings": repr(self.method)}
        return Schedule(prints, ((0, prints.num_blocks),), cells, (1.0,), metadata, tuple(self.log))

    def report(self) -> CacheReport:
        """What the cache did since it was enabled."""
        stored = 0 if self._velocity is None else self._velocity.nbytes
        return self._counts.report(1.0, stored + (self._decider.nbytes if self.log else 0), self.branches)
