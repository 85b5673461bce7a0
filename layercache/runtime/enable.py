"""Putting a router into a transformer and taking it out again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, overload

from torch import nn

from layercache.errors import CacheStateError, MethodError
from layercache.methods.easycache import EasyCache
from layercache.models.registry import config_hash, count_blocks, find_transformer, spec_for
from layercache.runtime.attachment import attach, attachment_of
from layercache.runtime.dynamic import DynamicRouter
from layercache.runtime.groups import ScheduleRouter
from layercache.runtime.modules import ModuleScheduleRouter
from layercache.runtime.policy import DynamicMethod
from layercache.runtime.whole_step import StepRouter
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule

Plan = Schedule | DynamicMethod | EasyCache | ModuleSchedule
Cache = ScheduleRouter | DynamicRouter | StepRouter | ModuleScheduleRouter


@overload
def enable(target: Any, plan: Schedule, scheduler: Any = None, **options: Any) -> ScheduleRouter: ...


@overload
def enable(target: Any, plan: DynamicMethod, scheduler: Any = None, **options: Any) -> DynamicRouter: ...


@overload
def enable(target: Any, plan: EasyCache, scheduler: Any = None, **options: Any) -> StepRouter: ...


@overload
def enable(target: Any, plan: ModuleSchedule, scheduler: Any = None, **options: Any) -> ModuleScheduleRouter: ...


def enable(  # type: ignore[misc]  # the overloads leave the options to this one
    target: Any,
    plan: Plan,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
) -> Cache:
    """Runs ``target`` by ``plan`` from now on.

    Args:
        target: a diffusers pipeline, or a transformer. With a pipeline the steps are read from its
            scheduler; a bare transformer is counted, one call per branch and step. A second pipeline that shares the
            transformer joins the cache when the same schedule is enabled on it.
        plan: a schedule made for this transformer (`layercache.plan`), one of single modules (InvarDiff,
            Learning-to-Cache), or a method that decides as it runs (`layercache.methods`).
        scheduler: the sampler of your own loop around a bare transformer; a pipeline brings its own.
        num_steps: of your own loop without a scheduler, for methods that ask for it.
        process_group: processes that work on one generation together (context or tensor parallelism): a method that
            decides as it runs decides by the sums over all of them. Without one no process waits for another.
        storage: of the residuals of blocks: ``"same"`` dtype as the streams, ``"float32"``, or ``"compact"``, which
            halves their memory (`layercache.slots.Storage`).

    Returns:
        The cache: ``report()``, ``reset()``, ``check()``; of a method also ``decisions`` and ``export_schedule()``.

    Raises:
        UnsupportedModelError: the transformer is of an unknown class.
        ScheduleMismatchError: the schedule was made for another model.
        CacheStateError: a cache is already enabled, or the schedule changes velocities and there is no scheduler.
        MethodError: the method cannot work on this model, or ``plan`` is something else.

    All errors are classes of `layercache.errors`.
    """
    transformer = find_transformer(target)
    spec = spec_for(transformer)
    _check_plan(plan)
    scheduler = getattr(target, "scheduler", None) if scheduler is None else scheduler
    if isinstance(plan, Schedule):
        return _enable_schedule(target, plan, transformer, scheduler, storage)
    if storage != "same" and not isinstance(plan, DynamicMethod):
        raise CacheStateError(
            f"storage={storage!r} is for residuals of groups; {type(plan).__name__} stores others, leave it out"
        )
    router: StepRouter | DynamicRouter | ModuleScheduleRouter
    if isinstance(plan, EasyCache):
        router = StepRouter(transformer, spec, plan, scheduler)
    elif isinstance(plan, ModuleSchedule):
        _check_fingerprint(plan.fingerprint, transformer)
        router = ModuleScheduleRouter(transformer, spec, plan, scheduler)
    else:
        router = DynamicRouter(transformer, spec, plan, scheduler, num_steps, process_group, storage)
    attach(target, router)
    return router


def _check_plan(plan: Any) -> None:
    if isinstance(plan, Schedule | DynamicMethod | EasyCache | ModuleSchedule):
        return
    kind = plan.__name__ if isinstance(plan, type) else type(plan).__name__
    if isinstance(plan, type):
        hint = f"give an instance: {kind}()"
    elif isinstance(plan, str | os.PathLike):
        hint = "load the file first: layercache.Schedule.load(path)"
    elif kind in ("StabilityProfile", "Front"):
        hint = f"plan with it first: layercache.plan({kind.lower()}, budget=0.6)"
    else:
        hint = "see layercache.plan"
    raise MethodError(f"expected a schedule or a method of layercache.methods, got {kind}; {hint}")


def _check_fingerprint(fingerprint: Fingerprint, transformer: nn.Module) -> None:
    fingerprint.check_model(type(transformer).__name__, config_hash(transformer), count_blocks(transformer))


def _enable_schedule(
    target: Any, schedule: Schedule, transformer: nn.Module, scheduler: Any, storage: str
) -> ScheduleRouter:
    _check_fingerprint(schedule.fingerprint, transformer)
    shared = attachment_of(transformer)
    if shared is not None and isinstance(shared.router, ScheduleRouter) and shared.router.schedule == schedule:
        if scheduler is not None and scheduler is not shared.router.steps.scheduler:
            shared.share(None if isinstance(target, nn.Module) else target, scheduler)
            return shared.router
    ends = hasattr(target, "maybe_free_model_hooks")
    router = ScheduleRouter(transformer, spec_for(transformer), schedule, scheduler, ends, storage)
    if router.replaces_velocity and not hasattr(scheduler, "step_index"):
        raise CacheStateError(
            "this schedule changes velocities on their way to the sampler: enable it on the pipeline, or name the "
            "scheduler of your own loop: layercache.enable(transformer, schedule, scheduler)"
        )
    attach(target, router)
    return router


def disable(target: Any) -> None:
    """Restores the transformer exactly; stored residuals are freed.

    Raises:
        CacheStateError: no cache is enabled.
    """
    attachment = attachment_of(find_transformer(target))
    if attachment is None:
        raise CacheStateError("no layercache cache is enabled here")
    attachment.detach()


@overload
def enabled(
    target: Any, plan: Schedule, scheduler: Any = None, **options: Any
) -> AbstractContextManager[ScheduleRouter]: ...


@overload
def enabled(
    target: Any, plan: DynamicMethod, scheduler: Any = None, **options: Any
) -> AbstractContextManager[DynamicRouter]: ...


@overload
def enabled(
    target: Any, plan: EasyCache, scheduler: Any = None, **options: Any
) -> AbstractContextManager[StepRouter]: ...


@overload
def enabled(
    target: Any, plan: ModuleSchedule, scheduler: Any = None, **options: Any
) -> AbstractContextManager[ModuleScheduleRouter]: ...


def enabled(  # type: ignore[misc]  # the overloads leave the options to this one
    target: Any,
    plan: Plan,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
) -> AbstractContextManager[Any]:
    """``enable`` for the length of a ``with`` block.

    Raises:
        NonFiniteResidualError: at the end, when a stored residual held NaN or infinity.
    """
    options = {"scheduler": scheduler, "num_steps": num_steps, "process_group": process_group, "storage": storage}
    return _enabled(target, plan, options)


@contextmanager
def _enabled(target: Any, plan: Plan, options: dict[str, Any]) -> Iterator[Cache]:
    cache = enable(target, plan, **options)  # type: ignore[call-overload]
    try:
        yield cache
        cache.check()
    finally:
        disable(target)
