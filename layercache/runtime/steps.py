"""Finding out which step of which generation a forward belongs to, without asking the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layercache._utils.compat import scheduler_sigmas, scheduler_step
from layercache.errors import CacheStateError, ScheduleMismatchError

# bf16 holds a sigma near 1 only to 2^-9, and a timestep near 1000 to 2
TIMESTEP_TOLERANCE = 6e-3


MAX_CALLS = 8
"""Of the transformer in one step, where nothing names them."""

_STRANGER = (
    "the transformer is called, but the scheduler of the pipeline that the cache was enabled on takes no step: another "
    "pipeline or loop uses the transformer too; enable the same schedule on that pipeline as well, or name its "
    "scheduler: layercache.enable(transformer, schedule, scheduler)"
)


class Place:
    """Where the forwards of a branch stand; the same object at every step.

    Attributes:
        branch: its name.
        step: of the present forward, or -1 before the first.
        starts: whether that is the branch's first forward of a generation.
    """

    __slots__ = ("branch", "limit", "run", "starts", "step", "time")

    def __init__(self, branch: str):
        self.branch, self.step, self.starts = branch, -1, False
        self.run: object = None
        self.time: float | None = None
        self.limit = 0


def signature_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Shape, dtype and device of every tensor among a forward's arguments, also of those in lists."""
    found: list[Any] = []
    for name, value in sorted(arguments.items()):
        if isinstance(value, torch.Tensor):
            found += (name, value.shape, value.dtype, value.device)
        elif isinstance(value, (list, tuple)):
            found += [(name, t.shape, t.dtype, t.device) for t in value if isinstance(t, torch.Tensor)]
    return tuple(found)


class Signature:
    """Shapes, dtypes and devices that the forwards of a branch are given."""

    def __init__(self) -> None:
        self._shapes: list[Any] = []
        self._whole: tuple[Any, ...] | None = None

    def changes(self, arguments: Mapping[str, Any], starts: bool) -> bool:
        """Whether they are others now. Within a generation dtypes and devices stay, as long as the shapes do."""
        shapes: list[Any] = []
        for value in arguments.values():
            if isinstance(value, torch.Tensor):
                shapes.append(value.shape)
            elif hasattr(value, "__len__"):
                shapes.append(len(value))
        if not starts and shapes == self._shapes:
            return False
        before, self._shapes, self._whole = self._whole, shapes, signature_of(arguments)
        return self._whole != before


class StepTally:
    """The step of a sampler that keeps no counter (DDIM, CogVideoX's): its calls of ``step`` in the present run.

    Where a run begins (img2img starts in the middle) its first timestep says, which is read once per run.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self._run: Any = None
        self._begin = self._taken = 0

    def count(self) -> None:
        self._taken += 1

    def step(self, timestep: Any) -> int | None:
        """The step about to be taken; ``None`` before the sampler's timesteps are set."""
        run: Any = getattr(self.scheduler, "timesteps", None)
        if run is None or len(run) == 0:
            return None
        if run is not self._run or self._begin + self._taken >= len(run):
            self._run, self._taken = run, 0
            self._begin = _position(run, timestep)
        return self._begin + self._taken


def _position(timesteps: Any, timestep: Any) -> int:
    """Index of a timestep among a run's; 0 where the model was given something else (sigma, say)."""
    if timestep is None:
        return 0
    first = float(torch.as_tensor(timestep).reshape(-1)[0])
    found = [k for k, t in enumerate(torch.as_tensor(timesteps).tolist()) if t == first]
    return found[0] if found else 0


def host_number(value: Any) -> float | None:
    """A timestep as a float where reading it asks no device, else ``None``."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel() > 0:
        first = value.detach().reshape(-1)[:1].tolist()
        return float(first[0])
    return None


@dataclass
class StepCounter:
    """Counts the steps of each branch.

    The step comes, in this order, from the cache context (``step_index``), from the counter of the
    pipeline's scheduler, or from counting the calls of the branch modulo the number of steps; then a
    timestep that rises (when it can be read without asking a device) starts a generation anew.

    Branches are distinguished by the name of the cache context; without one, by the order of the calls
    within a step.

    Attributes:
        sigmas: noise levels of the run; ``None`` takes whatever the scheduler has (calibration).
        scheduler: the pipeline's scheduler, if there is a pipeline; of several pipelines that share the transformer,
            that of the one whose run began last.
        tallies: count the steps of schedulers that do not count them themselves, by the scheduler's id.
    """

    sigmas: Sequence[float] | None = None
    scheduler: Any = None
    check: Any = None
    tallies: dict[int, StepTally] = field(default_factory=dict)
    _sharers: list[Any] = field(default_factory=list)
    _runs: dict[int, object] = field(default_factory=dict)
    _branches: dict[str, Place] = field(default_factory=dict)
    _unnamed: tuple[object, int] = (None, -1)

    @property
    def run(self) -> object:
        """The scheduler's timesteps: another object in every generation."""
        return getattr(self.scheduler, "timesteps", None)

    def share(self, scheduler: Any) -> None:
        """Another pipeline's scheduler drives the same transformer."""
        for one in (self.scheduler, scheduler):
            if all(one is not known for known in self._sharers):
                self._sharers.append(one)
                self._runs[id(one)] = getattr(one, "timesteps", None)

    def _find_driver(self) -> None:
        """Of several schedulers, takes the one whose timesteps were set last."""
        for one in self._sharers:
            run = getattr(one, "timesteps", None)
            if run is not self._runs[id(one)]:
                self._runs[id(one)] = run
                self.scheduler = one

    @property
    def num_steps(self) -> int | None:
        return None if self.sigmas is None else len(self.sigmas) - 1

    def reset(self) -> None:
        """Forgets everything: the next call of every branch starts a generation."""
        self._branches.clear()
        self._unnamed = (None, -1)

    def locate(self, branch: str | None, hint: int | None, timestep: Any = None) -> Place:
        """The place of the call that is about to run.

        Args:
            branch: name of the cache context, or ``None``.
            hint: ``step_index`` of the cache context, or ``None``.
            timestep: the transformer's timestep argument.

        Raises:
            ScheduleMismatchError: the run has other steps or noise levels than `sigmas`.
            CacheStateError: the scheduler's run is over, or it does not move: another one drives the transformer.
        """
        if self._sharers:
            self._find_driver()
        counted = scheduler_step(self.scheduler) if self.scheduler is not None else None
        if counted is None and self.tallies and id(self.scheduler) in self.tallies:
            counted = self.tallies[id(self.scheduler)].step(timestep)
        if counted is not None:
            return self._from_scheduler(branch, counted if hint is None else hint)
        if hint is not None:
            return self._from_hint(branch or "all", hint)
        return self._from_counting(branch, host_number(timestep))

    @property
    def taken(self) -> int | None:
        """How many steps of its run the scheduler has taken; ``None`` where it does not count them."""
        return None if self.scheduler is None else scheduler_step(self.scheduler)

    def _from_scheduler(self, branch: str | None, step: int) -> Place:
        run = self.scheduler.timesteps
        name = branch or self._unnamed_branch((id(run), step))
        place = self._place_of(name)
        starts = place.run is not run or step < place.step
        if starts:
            self._check_run()
            # a pipeline that begins in the middle may have cut its timesteps
            place.limit = max(len(run), len(getattr(self.scheduler, "sigmas", ())) - 1)
        if step >= place.limit:
            raise CacheStateError(_STRANGER)
        place.run, place.step, place.starts = run, step, starts
        if self.sigmas is not None and not 0 <= step < len(self.sigmas) - 1:
            self._check_step(step)
        return place

    def _place_of(self, branch: str) -> Place:
        place = self._branches.get(branch)
        if place is None:
            place = self._branches[branch] = Place(branch)
        return place

    def _from_hint(self, name: str, step: int) -> Place:
        place = self._place_of(name)
        place.starts = step < place.step or place.step < 0
        place.step = step
        self._check_step(step)
        return place

    def _from_counting(self, branch: str | None, time: float | None) -> Place:
        name = branch or (self._unnamed_branch(time) if time is not None else "all")
        place = self._place_of(name)
        step = place.step + 1
        rose = time is not None and place.time is not None and time > place.time
        if rose or (self.num_steps is not None and step >= self.num_steps):
            step = 0
        place.step, place.time, place.starts = step, time, step == 0
        if time is not None:
            self._check_time(step, time)
        return place

    def _unnamed_branch(self, moment: object) -> str:
        """Calls at one moment are the guidance branches in their order."""
        before, calls = self._unnamed
        calls = calls + 1 if before == moment else 0
        if calls >= MAX_CALLS:
            raise CacheStateError(_STRANGER)
        self._unnamed = (moment, calls)
        return f"call {calls}"

    def _check_run(self) -> None:
        sigmas = scheduler_sigmas(self.scheduler)
        if sigmas is not None and self.check is not None:
            self.check(sigmas)

    def _check_step(self, step: int) -> None:
        if self.num_steps is not None and not 0 <= step < self.num_steps:
            raise ScheduleMismatchError(
                f"step {step} lies outside the {self.num_steps} steps of the schedule; calibrate and plan for this run"
            )

    def _check_time(self, step: int, time: float) -> None:
        if self.sigmas is None:
            return
        expected = self.sigmas[step]
        if min(abs(time - expected), abs(time / 1000 - expected)) > TIMESTEP_TOLERANCE:
            raise ScheduleMismatchError(
                f"step {step} of the schedule has sigma {expected:.4f}, but the transformer was called with timestep "
                f"{time:.4f}; run the {self.num_steps} steps the schedule was made for, or calibrate and plan again "
                "(after an interrupted run of a bare transformer call cache.reset())"
            )
