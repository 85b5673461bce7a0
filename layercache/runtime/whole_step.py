"""Executing a method that decides about whole steps before they run."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import scheduler_sigmas, takes_euler_steps
from layercache.errors import CacheStateError, MethodError, NonFiniteResidualError
from layercache.models.registry import count_blocks, fingerprint_of
from layercache.models.spec import ModelSpec
from layercache.runtime.forward import Forward
from layercache.runtime.identity import NO_BRANCH, Identity
from layercache.runtime.identity import Place as ForwardPlace
from layercache.runtime.offload import HostTensor, Transfers, host_bytes, prefetch
from layercache.runtime.policy import Run, StepDecider, StepMethod
from layercache.runtime.report import CacheReport, Counts
from layercache.runtime.router import Router
from layercache.runtime.samples import Excluded, bad_samples
from layercache.runtime.velocity import combine, require_one_shape
from layercache.schedule.memory_plan import COMPUTE, REUSE, GroupAction
from layercache.schedule.schedule import Cell, Schedule, Velocity


@dataclass(frozen=True)
class EndedStepRun:
    """What is left of a generation: noise levels, decisions, branches and how much memory it took."""

    sigmas: tuple[float, ...] = ()
    log: tuple[Velocity | None, ...] = ()
    branches: tuple[str, ...] = ()
    nbytes: int = 0
    host_bytes: int = 0


Stored = torch.Tensor | HostTensor


@dataclass
class StepRun:
    """What a method has seen and decided in one generation, about whole steps of all branches.

    Attributes:
        step: that was decided last, or -1.
        velocity: of the newest computed step.
        further: of the same, of the outputs behind the first.
        inputs: of the newest step, until the sampler takes it.
        excluded: samples of the batch that are NaN.
    """

    sigmas: tuple[float, ...]
    decider: StepDecider
    step: int = -1
    log: list[Velocity | None] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    velocity: Stored | None = None
    further: dict[int, Stored] = field(default_factory=dict)
    inputs: torch.Tensor | None = None
    signature: tuple[Any, ...] = ()
    excluded: Excluded = field(default_factory=Excluded)

    @property
    def stored(self) -> list[Stored]:
        return [*self.further.values(), *([] if self.velocity is None else [self.velocity])]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.stored) + (self.decider.nbytes if self.log else 0)

    def ended(self) -> EndedStepRun:
        return EndedStepRun(self.sigmas, tuple(self.log), tuple(self.branches), self.nbytes, host_bytes(self.stored))


class StepRouter(Router):
    """Skips whole steps by a `StepMethod`; this is what ``layercache.enable`` returns for one."""

    takes_experts = True
    schedule_source = "cache.export_schedule() gives what was decided, once a generation has run"

    def __init__(self, transformer: nn.Module, spec: ModelSpec, method: StepMethod, scheduler: Any, offload: int = 0):
        super().__init__(transformer, spec, [(0, count_blocks(transformer))])
        if not takes_euler_steps(scheduler):
            raise MethodError(
                f"{method.name} extends velocities along Euler steps, which "
                f"{'no scheduler' if scheduler is None else type(scheduler).__name__} takes; use a pipeline with "
                "FlowMatchEulerDiscreteScheduler, or another method"
            )
        self._stream = tuple(inspect.signature(type(transformer).forward).parameters)[1]
        self.method, self.offload = method, offload
        self._transfers = Transfers() if offload else None
        self.identity = Identity(spec, scheduler)
        self._run: StepRun | None = None
        self._ended = EndedStepRun()
        self._counts = Counts()

    def begin(self, forward: Forward) -> None:
        place = self.locate(forward)
        run = self._run
        if run is None or (place is None and self.identity.reason is not NO_BRANCH):
            self._counts.note(reused=False)  # nothing tells the step
            return
        if place is not None and place.key not in run.branches:
            run.branches.append(place.key)
        assert self.generation is not None
        step = self.generation.step
        if step != run.step:
            self._decide(run, step, _joined(forward.arguments[self._stream]), forward.conditions)
        rule = run.log[step]
        self._counts.note(reused=rule is not None)
        self.open((GroupAction(COMPUTE if rule is None else REUSE),))

    def begin_generation(self, place: ForwardPlace) -> None:
        self._run = self._new_run()

    def _new_run(self) -> StepRun:
        scheduler = self.identity.scheduler
        if not takes_euler_steps(scheduler):
            raise MethodError(
                f"{self.method.name} extends velocities along Euler steps, which {type(scheduler).__name__} does not "
                "take: the pipeline's scheduler was replaced; enable another method"
            )
        sigmas = scheduler_sigmas(scheduler) or ()
        return StepRun(sigmas, self._new_decider(sigmas))

    def _new_decider(self, sigmas: tuple[float, ...]) -> StepDecider:
        return self.method.decider(Run(len(sigmas) - 1, sigmas))

    def drop_generation(self) -> None:
        run, self._run = self._run, None
        assert run is not None
        self._ended = run.ended()

    def _decide(self, run: StepRun, step: int, inputs: torch.Tensor, conditions: tuple[str, ...]) -> None:
        """Decides about a step when its first forward comes, for all its forwards."""
        signature = (inputs.shape, inputs.dtype, inputs.device, torch.is_inference_mode_enabled(), conditions)
        if signature != run.signature:  # nothing that is stored is of this shape, or of these conditions
            run.decider, run.velocity, run.signature = self._new_decider(run.sigmas), None, signature
            run.excluded = Excluded()
        run.inputs = inputs
        run.decider.observe(run.excluded.without(inputs))
        must = run.velocity is None or run.decider.must_compute(step)
        numbers = None if must else run.decider.numbers()
        run.excluded.note(numbers)
        reuses = numbers is not None and run.decider.may_reuse(numbers)
        del run.log[step:]
        run.log += [None] * (step - len(run.log)) + [run.decider.velocity(step) if reuses else None]
        run.step = step
        if reuses:
            prefetch(run.stored)

    @property
    def replaces_velocity(self) -> bool:
        return True

    @property
    def skips_step(self) -> bool:
        run = self._run
        return run is not None and run.step >= 0 and run.log[run.step] is not None

    def replace_velocity(
        self, step: int, velocity: torch.Tensor, latents: torch.Tensor, output: int = 0
    ) -> torch.Tensor:
        """The model's velocity, or the stored one extended; the first output's are looked at.

        Raises:
            CacheStateError: the sampler steps where the transformer was not called.
        """
        run = self._run
        if run is None or step != run.step:
            raise CacheStateError(
                f"the scheduler takes step {step}, but the transformer was last called for step "
                f"{-1 if run is None else run.step}; "
                f"{self.method.name} needs one scheduler, stepped once after every call of the transformer"
            )
        rule = run.log[step]
        if output:
            if rule is None:
                run.further[output] = self._copied(run.further.get(output), velocity)
                return velocity
            return self._extended(run.further[output], rule, velocity)
        if rule is None:
            self._record(run, step, velocity)
            run.velocity = self._copied(run.velocity, velocity)
            return velocity
        assert run.velocity is not None
        run.inputs = None  # the pipeline's, which nothing else may hold any more
        return self._extended(run.velocity, rule, velocity)

    def _copied(self, before: Stored | None, velocity: torch.Tensor) -> Stored:
        """A copy of what the model gave, in the memory of the one before."""
        if self._transfers is not None:
            self._transfers.settle()
            kept = before if isinstance(before, HostTensor) else HostTensor(self._transfers)
            kept.put_copy(velocity)
            return kept
        if not isinstance(before, torch.Tensor) or before.shape != velocity.shape:
            return velocity.clone()
        return before.copy_(velocity)

    def _extended(self, stored: Stored, rule: Velocity, given: torch.Tensor) -> torch.Tensor:
        """A stored velocity times its coefficient, for a step whose output is of the shape of ``given``."""
        velocity = stored.fetch() if isinstance(stored, HostTensor) else stored
        require_one_shape([given, velocity])
        found: torch.Tensor = combine([velocity], list(rule.terms.values()), None)
        if self._transfers is not None:
            self._transfers.unstage(velocity)
        return found

    def _record(self, run: StepRun, step: int, velocity: torch.Tensor) -> None:
        """Tells the decider what the model gave, without samples that are NaN; what it saw of those is forgotten."""
        excluded, is_first = run.excluded, run.velocity is None
        if excluded.is_due and len(velocity) > 1 and excluded.look(velocity) and is_first:
            assert run.inputs is not None
            run.decider = self._new_decider(run.sigmas)
            run.decider.observe(excluded.without(run.inputs))
        run.inputs = None
        run.decider.record(step, excluded.without(velocity))

    def find_fault(self) -> NonFiniteResidualError | None:
        """Looks at the stored velocity."""
        velocity = None if self._run is None else self._run.velocity
        velocity = velocity.settled() if isinstance(velocity, HostTensor) else velocity
        samples = set[int]() if velocity is None else bad_samples(velocity)
        return NonFiniteResidualError.of("a stored velocity", samples) if samples else None

    @property
    def _newest(self) -> EndedStepRun:
        """Of the present generation, or of the last one."""
        return self._ended if self._run is None else self._run.ended()

    @property
    def decisions(self) -> dict[str, tuple[bool, ...]]:
        """Of the last generation, per branch and step: whether the model ran."""
        run = self._newest
        return {name: tuple(rule is None for rule in run.log) for name in run.branches}

    def export_schedule(self) -> Schedule:
        """The decisions of the last generation as a schedule; running it gives the same bits without deciding.

        Raises:
            CacheStateError: no generation was finished.
        """
        run = self._newest
        log, steps = run.log, len(run.sigmas) - 1
        if steps < 1 or len(log) != steps:
            raise CacheStateError(f"run a whole generation first; steps seen so far: {len(log)}")
        prints = fingerprint_of(self.transformer, run.sigmas, run.branches)
        cells: tuple[tuple[Cell, ...], ...] = tuple((None,) if rule is None else ({},) for rule in log)
        metadata = {"method": self.method.name, "settings": repr(self.method)}
        return Schedule(prints, ((0, prints.num_blocks),), cells, (1.0,), metadata, tuple(log))

    def report(self) -> CacheReport:
        """What the cache did since it was enabled."""
        run = self._newest
        report = self._counts.report(1.0, run.nbytes, run.branches, self.identity, self.measured_speedup)
        staged = 0 if self._transfers is None else self._transfers.peak
        return replace(report, host_bytes=run.host_bytes, staged_bytes=staged)


def _joined(latents: Any) -> torch.Tensor:
    """The latents that a model is given, as one tensor; some take a list of samples, whose sizes may differ."""
    if isinstance(latents, torch.Tensor):
        return latents
    one_size = len({sample.shape for sample in latents}) == 1
    return torch.stack(list(latents)) if one_size else torch.cat([sample.flatten() for sample in latents])[None]
