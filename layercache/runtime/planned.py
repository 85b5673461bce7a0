"""Executing a method whose schedule follows from the steps of a run alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from layercache._utils.compat import scheduler_sigmas, scheduler_step
from layercache.errors import CacheStateError, MethodError
from layercache.models.registry import count_blocks, fingerprint_of
from layercache.models.spec import ModelSpec
from layercache.runtime.groups import ScheduleRouter
from layercache.runtime.identity import Identity
from layercache.runtime.policy import PlannedMethod
from layercache.runtime.report import CacheReport, Counts
from layercache.runtime.router import Router
from layercache.schedule.schedule import Schedule


class PlannedRouter(Router):
    """Makes the schedule of the run that the pipeline is at, and routes by it until the noise levels change."""

    def __init__(
        self, transformer: nn.Module, spec: ModelSpec, method: PlannedMethod, scheduler: Any, storage: str = "same"
    ):
        super().__init__(transformer, spec, [(0, count_blocks(transformer))])
        if scheduler is None:
            raise MethodError(
                f"{type(method).__name__} is planned from the noise levels of a run: enable it on the pipeline, or "
                "enable its schedule: method.schedule(fingerprint)"
            )
        self.method = method
        self.identity = Identity(spec, scheduler)
        self._storage = storage
        self._run: object = None
        self._router: ScheduleRouter | None = None
        self._made_for: object = None

    def for_call(self) -> Router:
        scheduler, run = self.identity.current(), self.identity.run
        if run is not self._run or self._router is None:
            sigmas = scheduler_sigmas(scheduler)
            if not sigmas:
                raise MethodError(
                    f"{type(self.method).__name__} needs the noise levels of the run, and "
                    f"{type(scheduler).__name__} has none"
                )
            made_for = type(scheduler), tuple(sigmas), scheduler_step(scheduler) or 0
            if self._router is None or made_for != self._made_for:
                self.end_generation()
                self._router = self._new_router(scheduler, *made_for[1:])
                self._made_for = made_for
            self._run = run
        return self._router

    def _new_router(self, scheduler: Any, sigmas: tuple[float, ...], first: int) -> ScheduleRouter:
        """Of a run that begins with step ``first``."""
        fingerprint = fingerprint_of(self.transformer, sigmas, ())
        if first:
            fingerprint = replace(fingerprint, steps_run=tuple(range(first, len(sigmas) - 1)))
        schedule = self.method.schedule_of_run(fingerprint, scheduler)
        router = ScheduleRouter(self.transformer, self.spec, schedule, storage=self._storage)
        router.identity.drivers = self.identity.drivers
        return router

    @property
    def schedule(self) -> Schedule:
        """The schedule of the present run.

        Raises:
            CacheStateError: nothing has run yet.
        """
        if self._router is None:
            raise CacheStateError("the schedule is made when the first generation begins; nothing has run yet")
        return self._router.schedule

    @property
    def replaces_velocity(self) -> bool:
        return True  # whether a run's schedule does is known when it begins

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
        """What was done by the present schedule."""
        if self._router is None:
            return Counts().report(0.0, 0, (), self.identity)
        return self._router.report()
