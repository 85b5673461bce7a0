"""Executing a method whose schedule follows from the steps of a run alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from layercache._utils.compat import count_levels, has_run, scheduler_sigmas, scheduler_step
from layercache.errors import CacheStateError, MethodError
from layercache.models.registry import count_blocks, expert_settings, fingerprint_of
from layercache.models.spec import ModelSpec
from layercache.runtime.forward import Forward
from layercache.runtime.groups import ScheduleRouter
from layercache.runtime.identity import RUN_IS_OVER, Identity
from layercache.runtime.modules import ModuleScheduleRouter, module_units
from layercache.runtime.policy import PlannedMethod, PlannedModules
from layercache.runtime.report import CacheReport, Counts, summed
from layercache.runtime.router import Router
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule

MOST_SCHEDULES = 8  # kept, of runs with other steps, noise levels or samplers


class PlannedRouter(Router):
    """Makes the schedule of the run that the pipeline is at, and routes by it until the noise levels change."""

    schedule_source = "cache.schedule gives what it runs by, once a generation has begun"

    def __init__(
        self,
        transformer: nn.Module,
        spec: ModelSpec,
        method: PlannedMethod,
        scheduler: Any,
        storage: str = "same",
        offload: int = 0,
    ):
        super().__init__(transformer, spec, [(0, count_blocks(transformer))])
        if scheduler is None:
            raise MethodError(
                f"{type(method).__name__} is planned from the noise levels of a run: enable it on the pipeline, or "
                "enable its schedule: method.schedule(fingerprint)"
            )
        self.method, self.takes_experts = method, method.replaces_velocity
        self.identity = Identity(spec, scheduler)
        self._storage, self.offload = storage, offload
        self._run: object = None
        self._refused: object = None  # a run that the method has no schedule for
        self._router: Any = None  # of the present run's schedule
        self._schedules: dict[Any, Any] = {}  # by what they were made for
        self._past: list[CacheReport] = []  # of the schedules before the present one, as one

    def has(self, method: PlannedMethod) -> bool:
        """Whether it is what this method is enabled with."""
        return type(self.method) is type(method) and self.method == method

    @property
    def storage_name(self) -> str:
        return self._storage

    def for_call(self) -> Router:
        scheduler, run = self.identity.current(), self.identity.run
        if run is self._run and self._router is not None:
            return self._router
        if run is not None and run is self._refused:  # what else is asked of it before the run ends
            return self
        count, step = count_levels(scheduler), scheduler_step(scheduler) or 0
        if not count:
            raise MethodError(
                f"{type(self.method).__name__} needs the noise levels of the run, and "
                f"{type(scheduler).__name__} has none"
            )
        if step >= count - 1 or not has_run(scheduler):
            return self._router or self
        sigmas = scheduler_sigmas(scheduler) or ()  # waits for the device, once in a run
        self._refused = run
        schedule = self._schedule_of(scheduler, sigmas, step)
        if self._router is None or schedule is not self._router.schedule:
            self.end_generation()
            router = self._router_of(schedule)
            self._past += [] if self._router is None else [self._router.counted()]
            self._past = [summed(self._past, self._past[-1])] if self._past else []
            self._router = router
            self._router.identity.drivers = self.identity.drivers
        self._run, self._refused = run, None
        return self._router

    def _router_of(self, schedule: Any) -> Any:
        if isinstance(schedule, ModuleSchedule):
            return ModuleScheduleRouter(self.transformer, self.spec, schedule, None, self.offload)
        return ScheduleRouter(self.transformer, self.spec, schedule, None, self._storage, self.offload)

    def begin(self, forward: Forward) -> None:
        """A forward where no run is under way is computed in full."""
        self.identity.leave_unidentified(RUN_IS_OVER)

    def _schedule_of(self, scheduler: Any, sigmas: tuple[float, ...], first: int) -> Schedule | ModuleSchedule:
        """Of a run that begins with step ``first``; of the newest runs they are kept."""
        key = type(scheduler), repr(getattr(scheduler, "config", None)), sigmas, first
        found = self._schedules.pop(key, None)
        if found is None:
            fingerprint = fingerprint_of(self.transformer, sigmas, ())
            turns = expert_settings(self.attachment.pipeline)
            fingerprint = replace(fingerprint, settings={**fingerprint.settings, **turns})
            if isinstance(self.method, PlannedModules):
                units = tuple(unit.name for unit in module_units(self.transformer, self.spec))
                found = self.method.module_schedule(fingerprint.starting_at(first), units)
            else:
                found = self.method.schedule_of_run(fingerprint, scheduler, first)
        self._schedules[key] = found
        if len(self._schedules) > MOST_SCHEDULES:
            del self._schedules[next(iter(self._schedules))]
        return found

    @property
    def schedule(self) -> Any:
        """The schedule of the present run: a `Schedule`, or a `ModuleSchedule` of a method of modules.

        Raises:
            CacheStateError: nothing has run yet.
        """
        if self._router is None:
            raise CacheStateError("the schedule is made when the first generation begins; nothing has run yet")
        return self._router.schedule

    @property
    def replaces_velocity(self) -> bool:
        return self.method.replaces_velocity or not isinstance(self.method, PlannedModules)  # it may: known at a run

    def end_generation(self, completed: bool = True) -> None:
        if self._router is not None:
            self._router.end_generation(completed)

    def free(self) -> None:
        if self._router is not None:
            self._router.free()

    def finish(self) -> None:
        if self._router is not None:
            self._router.finish()

    def check(self) -> None:
        if self._router is not None:
            self._router.check()

    def report(self) -> CacheReport:
        """What was done since the cache was enabled, by all schedules."""
        if self._router is None:
            return Counts().report(0.0, 0, (), self.identity)
        newest = self._router.report()
        return summed([*self._past, newest], newest)
