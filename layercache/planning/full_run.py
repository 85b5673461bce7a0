"""The router of a full run, and what it recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.compiler import is_dynamo_compiling

from layercache._utils.compat import scheduler_sigmas
from layercache._utils.timer import Timer
from layercache.errors import CacheStateError, CalibrationError
from layercache.models.registry import EXPERTS
from layercache.models.spec import ModelSpec
from layercache.planning.sampler import LinearSampler
from layercache.planning.trace import Trace, on_host
from layercache.runtime.blocks import BlockPass
from layercache.runtime.forward import Forward
from layercache.runtime.recording import RecordingRouter


@dataclass(frozen=True)
class FullSample:
    """A sample's full run.

    Attributes:
        trace: in the host's memory; of the steps that the run took, the first of which may be one in the middle.
        pictures: ``[B, ...]`` in 0..1.
        branches: bytes of the streams, image and text, by guidance branch.
        seconds: of a step: in the blocks, and in the rest of the model.
        sigmas: noise levels of all steps, and the last one.
        sampler: its steps; ``None`` where they are not linear in the velocities.
        further: of a model with several outputs (video and sound), the trace of each behind the first.
    """

    trace: Trace
    pictures: np.ndarray
    branches: Mapping[str, tuple[int, int]]
    seconds: tuple[float, float]
    sigmas: tuple[float, ...]
    sampler: LinearSampler | None
    further: tuple[Trace, ...] = ()

    @property
    def traces(self) -> tuple[Trace, ...]:
        """Of all outputs."""
        return (self.trace, *self.further)

    @property
    def num_steps(self) -> int:
        """Steps that were taken."""
        return len(self.trace.taken)

    @property
    def nbytes(self) -> int:
        """Of latents and velocities."""
        return sum(t.nbytes for trace in self.traces for t in (*trace.latents, *trace.taken))

    @property
    def facts(self) -> RunFacts:
        """What is known of it without its tensors."""
        latents = tuple(trace.latents[0].nbytes for trace in self.traces)
        return RunFacts(self.num_steps, self.branches, self.seconds, self.sigmas, self.sampler, latents)


@dataclass(frozen=True)
class RunFacts:
    """What all processes of a crew know of a sample's full run; attributes as of `FullSample`.

    Attributes:
        latent_bytes: of the latents of each output.
    """

    num_steps: int
    branches: Mapping[str, tuple[int, int]]
    seconds: tuple[float, float]
    sigmas: tuple[float, ...]
    sampler: LinearSampler | None
    latent_bytes: tuple[int, ...]


class _TimedPass(BlockPass):
    """Marks where the blocks begin and end in time."""

    router: FullRun
    watches = True

    def opened(self, group: int) -> None:
        if not is_dynamo_compiling():
            self.router.clock.mark(("blocks", self.router.step_index))

    def computed(self, group: int) -> None:
        if not is_dynamo_compiling():
            self.router.clock.mark(("rest", self.router.step_index))


class FullRun(RecordingRouter):
    """Records a generation that is computed in full.

    Attributes:
        trace: latents and velocities, in the host's memory; on a GPU they are there once it is synchronised.
        branches: bytes of the streams, image and text, by guidance branch.
        sigmas: noise levels of all steps and the last one, from the first step on.
        first: step that the run began with; not 0 of one that begins in the middle (img2img).
    """

    takes_experts = True

    def __init__(self, transformer: Any, spec: ModelSpec, scheduler: Any):
        super().__init__(transformer, spec, scheduler)
        self.trace, *self.further = (Trace() for _ in spec.leaves)
        self.branches: dict[str, tuple[int, int]] = {}
        self._bytes = 0, 0
        self.sigmas: tuple[float, ...] = ()
        self.first = 0
        self.clock = Timer(next(self.transformer.parameters()).device)
        self._sampler: LinearSampler | None = None
        self._forwards: list[int] = []
        self._conditions: tuple[str, ...] = ()

    def new_pass(self) -> BlockPass:
        return _TimedPass(self)

    def begin(self, forward: Forward) -> None:
        """A forward begins.

        Raises:
            CacheStateError: the guider of a modular pipeline begins or ends in the middle of the run.
        """
        if forward.conditions != self._conditions and self._conditions:
            raise CacheStateError(
                f"the guider's conditions change in the middle of the run, from {', '.join(self._conditions)} to "
                f"{', '.join(forward.conditions) or 'none'}, and velocities of one guidance say nothing of another's: "
                "take layercache.calibrate, or a method that needs no recorded runs"
            )
        self._conditions = forward.conditions
        super().begin(forward)
        is_compiled = forward.dry_run is not None  # a graph has no clocks: all of it counts as blocks
        self.clock.mark(("blocks" if is_compiled else "rest", self.step_index))

    def after(self, output: Any, rerun: Callable[[], Any]) -> None:
        self.clock.mark("outside")
        self.branches[self.branch] = self._bytes

    def look(self, group: int, before: Any, after: Any) -> None:
        image, text = after  # a compiled graph would be of one branch if it read which one this is
        self._bytes = (image.nbytes, 0 if text is None else text.nbytes)

    def note_step(self, velocity: torch.Tensor, latents: torch.Tensor, output: int = 0) -> None:
        """The sampler of an output is about to take a step."""
        if output:
            self.further[output - 1].add(on_host(latents), on_host(velocity))
            return
        scheduler = self.identity.scheduler
        self._forwards.append(self.forwards)
        if not self.trace.raw:
            self.sigmas, self.first = scheduler_sigmas(scheduler) or (), self.step_index
            self._sampler = LinearSampler.of(scheduler, len(self.sigmas) - 1 - self.first)
        self.trace.add(on_host(latents), on_host(velocity))

    def sample(self, pictures: np.ndarray) -> FullSample:
        """What was recorded of a generation that gave these pictures, ``[B, ...]``; waits for the device.

        Raises:
            CalibrationError: the sampler took other steps than its noise levels say, or another model ran some.
        """
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # `on_host`
        steps, trace = len(self.sigmas) - 1, self.trace
        if not trace.raw or len(trace.raw) != steps - self.first:
            began = f" from step {self.first} on" if self.first else ""
            raise CalibrationError(
                f"the sampler was stepped {len(trace.raw)} times{began} for {steps} steps; rollouts need a scheduler "
                "with noise levels that is stepped once per step, to the last one"
            )
        _check_alone(self._forwards)
        for one in (trace, *self.further):
            if len(one.raw) != len(trace.raw):
                raise CalibrationError(
                    f"the sampler of the model's second output was stepped {len(one.raw)} times, that of its first "
                    f"{len(trace.raw)} times: rollouts need a copy of the scheduler for it, as diffusers makes one"
                )
            one.taken = [velocity for velocity in one.raw if velocity is not None]
        sampler = self._sampler
        if sampler is not None and not all(sampler.is_of(one) for one in (trace, *self.further)):
            sampler = None
        return FullSample(
            trace, pictures, self.branches, self._seconds(steps), self.sigmas, sampler, tuple(self.further)
        )

    def _seconds(self, num_steps: int) -> tuple[float, float]:
        """Median seconds of a step, in the blocks and in the rest of the model, over the steps that were timed."""
        totals = self.clock.totals()
        steps = [step for step in range(num_steps) if ("blocks", step) in totals]
        if not steps:
            raise CalibrationError(
                f"no step was run by the pipeline's {EXPERTS[0]}, on which steps are timed: let it run one at least "
                "(boundary_ratio), or take a method that needs no calibration"
            )
        blocks, rest = ([totals.get((part, step), 0.0) for step in steps] for part in ("blocks", "rest"))
        return median(blocks), median(rest)


def _check_alone(forwards: Sequence[int]) -> None:
    """``forwards`` of the transformer until the end of each step: they rise, unless another one runs the step."""
    others = [str(step) for step, (before, now) in enumerate(pairwise([0, *forwards])) if before == now]
    if others:
        raise CalibrationError(
            f"the pipeline runs a transformer at step {', '.join(others)} that is none of its {' and '.join(EXPERTS)}, "
            "and rollouts (search, refitting, comparisons) follow those"
        )
