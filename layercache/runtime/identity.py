"""Identity of a forward: which generation, step, branch and part it belongs to, from one named source.

Sources, in this order: the caller (``cache.step``, diffusers' cache contexts), the pipeline's scheduler as it is at
that moment, the value of the timestep. Where none of them tells, the forward has no place and is computed in full.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from layercache._utils.compat import scheduler_sigmas, scheduler_step
from layercache.errors import LayerCacheWarning, ScheduleMismatchError
from layercache.models.spec import ModelSpec
from layercache.runtime.conditioning import Conditions, conditions_of, same
from layercache.runtime.forward import Forward
from layercache.runtime.timesteps import StepTally, caller_thread, time_of

TIMESTEP_TOLERANCE = 6e-3
"""bf16 holds a sigma near 1 only to 2^-9, and a timestep near 1000 to 2."""

_NAME_THEM = (
    "name what it is: `with cache.step(i, branch=..., part=...):` around the call, or `with "
    "transformer.cache_context(name):` for guidance branches"
)
NO_STEP = "neither the caller, a scheduler nor a timestep tells its step; " + _NAME_THEM
NO_BRANCH = "the model is called several times at one step and nothing tells which call this is; " + _NAME_THEM
PROMPTS_ARE_READ = (
    "every call of the transformer waits for the device to compare its prompt with those of other branches, since its "
    "tensors are made anew; " + _NAME_THEM
)
OTHER_LOOP = (
    "another thread's pipeline runs on this transformer; a cache serves one loop at a time, and several by requests: "
    "`with cache.request(name, scheduler):`"
)
OTHER_CONDITION = (
    "the pipeline runs more conditions than its guider has prepared, and nothing says what they are; " + _NAME_THEM
)
RUN_IS_OVER = (
    "the scheduler that the cache follows takes no step: another pipeline or loop uses the transformer too; enable the "
    "same plan on that pipeline as well, or name its scheduler: layercache.enable(transformer, plan, scheduler)"
)


class Generation:
    """One run of the denoising loop, unlike any other.

    Attributes:
        source: what tells its steps: ``"caller"``, ``"scheduler"`` or ``"timestep"``.
        run: the scheduler's timesteps, another object in every run; else ``None``.
        step: the newest step.
        places: of its branches and their parts.
    """

    def __init__(self, source: str, run: object = None, limit: int = 0):
        self.source, self.run, self.limit = source, run, limit
        self.step = -1
        self.places: dict[str, Place] = {}
        self.unnamed: list[Place] = []
        self.times: dict[float, int] = {}
        self.thread: object = None


class Place:
    """Where the forwards of a branch, or of a part of it, stand; the same object at every step.

    Attributes:
        generation: that it belongs to.
        branch: name of the guidance branch.
        key: of the branch and the part, unlike every other place's.
        step: of the newest forward, or -1 before the first.
        is_shared: several forwards came to it at one step, so that they cannot be distinguished any more.
    """

    __slots__ = ("branch", "conditions", "generation", "is_shared", "key", "part", "step", "thread")

    def __init__(self, generation: Generation, branch: str, key: str):
        self.generation, self.branch, self.key = generation, branch, key
        self.step, self.is_shared = -1, False
        self.conditions: Conditions | None = None
        self.thread: object = None
        self.part: object = None


class Driver:
    """A scheduler that steps the transformer's generations: a given one, or whichever a pipeline has now."""

    def __init__(self, scheduler: Any, pipeline: Any = None):
        self._scheduler, self.pipeline = scheduler, pipeline
        self.run = getattr(self.scheduler, "timesteps", None)

    @property
    def scheduler(self) -> Any:
        return self._scheduler if self.pipeline is None else getattr(self.pipeline, "scheduler", None)

    def has_begun(self) -> bool:
        """Whether its timesteps were set since this was asked last."""
        run = getattr(self.scheduler, "timesteps", None)
        before, self.run = self.run, run
        return run is not before


class Identity:
    """Finds the place of every forward.

    Args:
        spec: of the transformer; names the argument that holds sigma, if any does.
        scheduler: that steps the transformer; ``None`` for a loop without one.
        sigmas: noise levels of the schedule that is run; ``None`` for any.
        check: called with the noise levels of every run that begins; raises where they are others.
        num_steps: of a run, where it is known without noise levels.

    Attributes:
        drivers: the schedulers; of several, the one whose run began last is followed.
        tallies: count the steps of schedulers that do not count them themselves, by the scheduler's id.
        generation: the present one.
        count: generations begun.
        unidentified: forwards without a place, by the reason.
        reason: why the newest of them has none: `NO_STEP`, `NO_BRANCH` or `RUN_IS_OVER`.
        is_held: the first driver's loop is under way (`lead`).
        any_thread: forwards of one loop may come from several threads, as those of a request do.
        source: of the newest generation; ``"none"`` before the first.
    """

    def __init__(
        self,
        spec: ModelSpec,
        scheduler: Any = None,
        sigmas: Sequence[float] | None = None,
        check: Callable[[Sequence[float]], None] | None = None,
        num_steps: int | None = None,
    ):
        self.spec, self.sigmas, self.check = spec, sigmas, check
        self.num_steps = num_steps if sigmas is None else len(sigmas) - 1
        self.drivers: list[Driver] = [] if scheduler is None else [Driver(scheduler)]
        self.tallies: dict[int, StepTally] = {}
        self.generation: Generation | None = None
        self.count = 0
        self.unidentified: Counter[str] = Counter()
        self.source = "none"
        self.reason = ""
        self.any_thread = self.is_held = False
        self._warned: set[str] = set()

    @property
    def scheduler(self) -> Any:
        """The scheduler that steps the present generation, or ``None``."""
        return self.drivers[0].scheduler if self.drivers else None

    @property
    def taken(self) -> int | None:
        """How many steps of its run the scheduler has taken; ``None`` where it does not count them."""
        scheduler = self.scheduler
        return None if scheduler is None else scheduler_step(scheduler)

    @property
    def is_over(self) -> bool:
        """Whether the scheduler has taken all steps of the present generation."""
        generation, taken = self.generation, self.taken
        if generation is None or taken is None or generation.run is None or generation.run is not self.run:
            return False
        return taken >= generation.limit

    @property
    def run(self) -> object:
        """The scheduler's timesteps: another object in every run."""
        return getattr(self.scheduler, "timesteps", None)

    def follow(self, pipeline: Any) -> None:
        """The scheduler is whichever this pipeline has, at every moment; other pipelines' go on being followed."""
        fixed = [d for d in self.drivers if d.pipeline is None and d.scheduler is pipeline.scheduler]
        for driver in fixed:
            self.drivers.remove(driver)
        if all(driver.pipeline is not pipeline for driver in self.drivers):
            self.drivers.append(Driver(None, pipeline))

    def follows(self, pipeline: Any, scheduler: Any) -> bool:
        """Whether this pipeline, or a loop with this scheduler, is followed already."""
        if pipeline is None:
            return any(driver.scheduler is scheduler for driver in self.drivers)
        return any(driver.pipeline is pipeline for driver in self.drivers)

    def share(self, scheduler: Any) -> None:
        """One more scheduler steps the transformer."""
        if all(driver.scheduler is not scheduler for driver in self.drivers):
            self.drivers.append(Driver(scheduler))

    def reset(self) -> None:
        """The present generation is over: the next forward begins another."""
        self.generation = None

    def locate(self, forward: Forward) -> Place | None:
        """The place of the forward that is about to run, behind `current`; ``None`` where nothing tells it.

        Raises:
            ScheduleMismatchError: the run has other steps or noise levels than the schedule.
        """
        scheduler = self.scheduler
        counted = None if scheduler is None else scheduler_step(scheduler)
        if counted is None and self.tallies and id(scheduler) in self.tallies:
            counted = self.tallies[id(scheduler)].step(forward.timestep(self.spec))
        if counted is not None:
            return self._by_scheduler(forward, scheduler, counted if forward.step is None else forward.step)
        if forward.step is not None:
            return self._by_caller(forward, forward.step)
        return self._by_time(forward)

    def current(self) -> Any:
        """The scheduler to go by now: of several, the one whose timesteps were set last; ``None`` without one.

        While a pipeline's loop runs it is that pipeline's.
        """
        if len(self.drivers) > 1 and not self.is_held:
            for driver in list(self.drivers):
                if driver.has_begun():
                    self.drivers.remove(driver)
                    self.drivers.insert(0, driver)
        return self.scheduler

    def lead(self, pipeline: Any) -> None:
        """A pipeline's loop begins: its scheduler is gone by until `is_held` is unset."""
        for driver in [one for one in self.drivers if one.pipeline is pipeline]:
            driver.has_begun()
            self.drivers.remove(driver)
            self.drivers.insert(0, driver)
            self.is_held = True

    # --- the sources ---

    def _by_scheduler(self, forward: Forward, scheduler: Any, step: int) -> Place | None:
        generation, run = self.generation, scheduler.timesteps
        if generation is None or generation.run is not run or step < generation.step:
            if self.check is not None and (sigmas := scheduler_sigmas(scheduler)) is not None:
                self.check(sigmas)
            # a pipeline that begins in the middle may have cut its timesteps
            limit = max(len(run), len(getattr(scheduler, "sigmas", ())) - 1)
            if step >= limit:
                self.leave_unidentified(RUN_IS_OVER)
                return None
            generation = self._begin("scheduler", run, limit)
        if step >= generation.limit:
            self.leave_unidentified(RUN_IS_OVER)
            return None
        if self.sigmas is not None and not 0 <= step < len(self.sigmas) - 1:
            self._check_step(step)
        return self._visit(generation, self._place_in(generation, forward), step)

    def _by_caller(self, forward: Forward, step: int) -> Place | None:
        self._check_step(step)
        return self._in_loop(forward, step, "caller")

    def _by_time(self, forward: Forward) -> Place | None:
        time = time_of(forward.timestep(self.spec), self._warn)
        if time is None:
            self.leave_unidentified(NO_STEP)
            return None
        step = self._step_of(time)
        place = self._in_loop(forward, self._first_step(time) if step is None else step, "timestep", step is None)
        assert self.generation is not None
        self.generation.times[time] = self.generation.step if place is None else place.step
        return place

    def _in_loop(self, forward: Forward, step: int, source: str, begins: bool = False) -> Place | None:
        """Of a loop whose runs no scheduler tells apart: a branch steps on by one at a time, or begins anew.

        Args:
            begins: the moment belongs to no step of the present generation.
        """
        generation = self.generation
        if begins or generation is None or generation.source != source or step > generation.step + 1:
            return self._begin_in_loop(forward, step, source)
        if step < generation.step and not self._lags(generation, forward):
            return self._begin_in_loop(forward, step, source)
        place = self._place_in(generation, forward)
        if place.step > step or (place.step >= 0 and self._is_another(place, forward)):
            return self._begin_in_loop(forward, step, source)
        self._note(place, forward)
        return self._visit(generation, place, step)

    def _lags(self, generation: Generation, forward: Forward) -> bool:
        """Whether a forward of an earlier step than the newest is of a branch that another thread or task runs."""
        place = None if forward.branch is None else generation.places.get(forward.key)
        here = caller_thread()
        return place is not None and place.thread == here and generation.thread != here

    def _begin_in_loop(self, forward: Forward, step: int, source: str) -> Place | None:
        generation = self._begin(source)
        generation.step = step
        place = self._place_in(generation, forward)
        self._note(place, forward)
        return self._visit(generation, place, step)

    def _is_another(self, place: Place, forward: Forward) -> bool:
        """Whether a forward is of another loop than the branch's earlier ones: by its thread, or its conditions."""
        if not self.any_thread and place.thread != caller_thread():
            return True
        before = place.conditions
        return before is not None and same(conditions_of(forward.arguments), before, may_wait=False) is False

    def _note(self, place: Place, forward: Forward) -> None:
        place.thread = place.generation.thread = caller_thread()
        if place.conditions is None:
            place.conditions = conditions_of(forward.arguments)

    # --- generations and places ---

    def _begin(self, source: str, run: object = None, limit: int = 0) -> Generation:
        self.generation = Generation(source, run, limit)
        self.source = source
        self.count += 1
        return self.generation

    def _place_in(self, generation: Generation, forward: Forward) -> Place:
        """The place of a forward's branch, or a new one."""
        if forward.branch is None:
            return self._unnamed(generation, forward)
        key = forward.branch if forward.part is None else forward.key  # the usual case, without two calls
        place = generation.places.get(key)
        return self._new_place(generation, forward.branch, key) if place is None else place

    def _new_place(self, generation: Generation, branch: str, key: str) -> Place:
        place = generation.places[key] = Place(generation, branch, key)
        return place

    def _unnamed(self, generation: Generation, forward: Forward) -> Place:
        """The place of a forward without a name: of the one branch that is given the same prompt, or a new one."""
        conditions = conditions_of(forward.arguments)
        places = generation.unnamed
        found = [same(conditions, place.conditions or (), may_wait=False) for place in places]
        waits = None in found and True not in found
        if waits:  # other tensors than any branch had before: only their values tell
            found = [same(conditions, place.conditions or (), may_wait=True) for place in places]
        equal = [place for place, is_same in zip(places, found, strict=True) if is_same]
        if waits and equal:
            self._warn(PROMPTS_ARE_READ)
        own = [place for place in equal if place.part == forward.part]
        if own:
            return own[0]
        branches = {place.branch for place in generation.unnamed}
        name = equal[0].branch if equal else f"call {len(branches)}"
        place = self._new_place(generation, name, forward.key_of(name))
        place.conditions, place.part = conditions, forward.part
        generation.unnamed.append(place)
        return place

    def _visit(self, generation: Generation, place: Place, step: int) -> Place | None:
        """Notes that a forward comes to a place at a step; at the same one once more, nothing tells them apart."""
        if step > generation.step:
            generation.step = step
        if place.step == step:
            place.is_shared = True
        place.step = step
        if not place.is_shared:
            return place
        self.leave_unidentified(NO_BRANCH)
        return None

    def leave_unidentified(self, reason: str) -> None:
        """Counts a forward without a place, and warns of the first."""
        self.unidentified[reason] += 1
        self.reason = reason
        self._warn(f"a forward was computed in full, because {reason}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, LayerCacheWarning, stacklevel=2)

    # --- steps ---

    def _step_of(self, time: float) -> int | None:
        """The step of a time in the present generation: one of those seen, or the next; else ``None``."""
        generation = self.generation
        if generation is None or generation.source != "timestep":
            return None
        if time in generation.times:
            return generation.times[time]
        step = generation.step + 1
        if self.num_steps is not None and step >= self.num_steps:
            return None
        if self._knows_sigmas:
            return step if self._is_near(time, step) else None
        return step if self._goes_on(generation, time) else None

    def _goes_on(self, generation: Generation, time: float) -> bool:
        """Whether a time lies behind those seen; sigma falls, other clocks may rise."""
        first, *more = generation.times
        falls = first > next(reversed(more)) if more else self.spec.timestep is not None or time < first
        last = next(reversed(generation.times))
        return time < last if falls else time > last

    @property
    def _knows_sigmas(self) -> bool:
        return self.sigmas is not None and self.spec.timestep is not None

    def _is_near(self, time: float, step: int) -> bool:
        assert self.sigmas is not None
        expected = self.sigmas[step]
        return min(abs(time - expected), abs(time / 1000 - expected)) <= TIMESTEP_TOLERANCE

    def _first_step(self, time: float) -> int:
        """Of a generation that begins in a loop: 0, or where its first noise level stands among the schedule's."""
        if not self._knows_sigmas:
            return 0
        assert self.sigmas is not None and self.num_steps is not None
        for step in range(self.num_steps):
            if self._is_near(time, step):
                return step
        raise ScheduleMismatchError(
            f"the transformer was called with timestep {time:.4f}, and no step of the schedule has such a sigma (they "
            f"begin at {self.sigmas[0]:.4f}); run the {self.num_steps} steps the schedule was made for, or calibrate "
            "and plan again"
        )

    def _check_step(self, step: int) -> None:
        if self.num_steps is not None and not 0 <= step < self.num_steps:
            raise ScheduleMismatchError(
                f"step {step} lies outside the {self.num_steps} steps of the schedule; calibrate and plan for this run"
            )
