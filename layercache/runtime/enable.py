"""Enabling a plan on a pipeline or transformer, and disabling it again."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from layercache._utils.compat import tells_steps
from layercache.errors import (
    BudgetError,
    CacheStateError,
    MethodError,
    NonFiniteResidualError,
    NonFiniteWarning,
)
from layercache.models.registry import (
    config_hash,
    count_blocks,
    expert_settings,
    experts_of,
    find_transformer,
    spec_for,
)
from layercache.runtime.attachment import attach, attachment_of
from layercache.runtime.cache import Cache
from layercache.runtime.dynamic import DynamicRouter
from layercache.runtime.levels import check_levels
from layercache.runtime.modules import ModuleScheduleRouter, module_units
from layercache.runtime.offload import check_offload
from layercache.runtime.planned import PlannedRouter
from layercache.runtime.policy import DynamicMethod, PlannedMethod, PlannedModules, RowMethod, StepMethod
from layercache.runtime.requests import ScheduleCache
from layercache.runtime.rows import RowRouter
from layercache.runtime.target import Target
from layercache.runtime.whole_step import StepRouter
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule

_log = logging.getLogger("layercache")


@overload
def enable(
    pipe: Any, plan: Schedule, scheduler: Any = None, *, storage: str = "same", offload: bool | int = False
) -> ScheduleCache: ...


@overload
def enable(
    pipe: Any,
    plan: DynamicMethod,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
    *,
    offload: bool | int = False,
) -> DynamicRouter: ...


@overload
def enable(
    pipe: Any, plan: PlannedMethod, scheduler: Any = None, *, storage: str = "same", offload: bool | int = False
) -> PlannedRouter: ...


@overload
def enable(pipe: Any, plan: StepMethod, scheduler: Any = None, *, offload: bool | int = False) -> StepRouter: ...


@overload
def enable(
    pipe: Any,
    plan: RowMethod,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
    *,
    offload: bool | int = False,
) -> RowRouter: ...


@overload
def enable(
    pipe: Any, plan: ModuleSchedule, scheduler: Any = None, *, offload: bool | int = False
) -> ModuleScheduleRouter: ...


@overload
def enable(
    pipe: Any,
    plan: Any,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
    *,
    offload: bool | int = False,
) -> Cache: ...


@overload
def enable(
    pipe: Any,
    *,
    budget: float | None = None,
    speedup: float | None = None,
    min_psnr: float | None = None,
    learn: int | str | None = None,
    offload: bool | int = False,
) -> Cache: ...


def enable(
    pipe: Any,
    plan: Any = None,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
    *,
    budget: float | None = None,
    speedup: float | None = None,
    min_psnr: float | None = None,
    learn: int | str | None = None,
    offload: bool | int = False,
) -> Cache:
    """Runs a pipeline by ``plan`` from now on; without one, by what is known of the model, or needs no calibration.

    Args:
        pipe: a diffusers pipeline, or a transformer. With a pipeline the steps are read from its
            scheduler; a bare transformer is counted, one call per branch and step. A second pipeline that shares the
            transformer joins the cache when the same schedule, planned method or target is enabled on it. Where it runs
            two transformers in turns (Wan 2.2), schedules and methods that skip whole steps are of both, on one cache.
        plan: a schedule made for this transformer (`layercache.plan`), one of single modules (InvarDiff,
            Learning-to-Cache), or a method that decides as it runs (`layercache.methods`).
        scheduler: the sampler of your own loop around a bare transformer; a pipeline brings its own.
        num_steps: of your own loop without a scheduler, for methods that ask for it.
        process_group: processes that work on one generation together (context or tensor parallelism): a method that
            decides as it runs decides by the sums over all of them. Without one no process waits for another.
        storage: of the residuals of blocks: ``"same"`` dtype as the streams, ``"float32"``, or ``"compact"``, which
            halves their memory (`layercache.runtime.storage.Storage`).
        budget, speedup, min_psnr: without a plan, what is wanted: the largest share of the block time that is
            computed, the speedup of the denoising loop (1.5 where nothing is said), or the mean PSNR in dB that other
            pictures should have. What was learnt before of this model, settings and target is taken from the user's
            data folder, else a method that needs no calibration (`layercache.methods.automatic`).
        learn: how many generations run in full and are recorded first; a schedule is fitted to them before the next
            one, and kept in the user's data folder (`layercache.planning.learn`). 4 for ``min_psnr``, else 0 by
            default; ``"more"``: four more, though a schedule is known, to refine it.
        offload: keeps everything that is stored between steps (residuals, velocities, outputs of modules) in host
            memory, pinned where there is CUDA; it is brought back just before it is read. A number of at least 2:
            residuals come back in so many slices of the tokens, so that the device never holds a whole one of them.
            What a dynamic method remembers to decide by stays on the device. Not for a transformer that is compiled
            whole.

    Returns:
        The cache: ``report()``, ``reset()``, ``check()``; of a method also ``decisions`` and ``export_schedule()``.

    Raises:
        UnsupportedModelError: the transformer is of an unknown class.
        ScheduleMismatchError: the schedule was made for another model.
        CacheStateError: a cache is already enabled, the schedule changes velocities and there is no scheduler, or
            ``offload`` is neither a truth value nor a number of slices.
        MethodError: the method cannot work on this model (one that replaces velocities: a bare transformer with two
            outputs), or ``plan`` is something else.
        BudgetError: several of budget, speedup and min_psnr, one beside a plan, or one that is out of range.

    All errors are classes of `layercache.errors`.
    """
    targets = {"budget": budget, "speedup": speedup, "min_psnr": min_psnr}
    if plan is None:
        plan = Target(**targets, learn=learn)
    elif any(value is not None for value in targets.values()):
        raise BudgetError("give a plan, or a target to find one for, not both (layercache.plan takes targets)")
    transformer = find_transformer(pipe)
    scheduler = getattr(pipe, "scheduler", None) if scheduler is None else scheduler
    setting = Setting(pipe, transformer, scheduler, num_steps, process_group, storage, check_offload(offload))
    router = make_router(plan, setting)
    attached = attachment_of(transformer)
    if attached is None or attached.root is not router:
        attach(pipe, router)
        _log.info("%s runs by %s", type(transformer).__name__, type(plan).__name__)
    return router


@dataclass(frozen=True)
class Setting:
    """What a plan is enabled on, and the options of `enable`."""

    pipe: Any
    transformer: nn.Module
    scheduler: Any = None
    num_steps: int | None = None
    process_group: Any = None
    storage: str = "same"
    offload: int = 0

    def check_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Raises `ScheduleMismatchError` unless the schedule was made for this model."""
        model = self.transformer
        fingerprint.check_model(type(model).__name__, config_hash(model), count_blocks(model))

    def check_velocities(self, name: str) -> None:
        """Raises `MethodError` where velocities that the plan replaces are not all there is to replace."""
        model = type(self.transformer).__name__
        if len(spec_for(self.transformer).leaves) > 1 and isinstance(self.pipe, nn.Module):
            raise MethodError(
                f"{name} replaces the velocity that the sampler gets, and {model} gives two outputs, each with a "
                "sampler of its own, of which a loop around the bare transformer names one: enable it on the pipeline, "
                "or take a method or schedule that reuses groups of blocks (FBCache, MagCache, layercache.plan)"
            )

    def check_experts(self, plan: Schedule) -> None:
        """Raises `MethodError` where a schedule with velocities reuses groups too, of one transformer of several.

        Warns:
            LayerCacheWarning: the pipeline turns to its other transformer at another step than was measured.
        """
        experts = [] if isinstance(self.pipe, nn.Module) else list(experts_of(self.pipe))
        if len(experts) > 1 and plan.takes_experts:
            plan.fingerprint.warn_of(expert_settings(self.pipe))
        elif len(experts) > 1 and not plan.fingerprint.steps_run:
            raise MethodError(
                f"this schedule replaces velocities and reuses groups of blocks, and this pipeline runs "
                f"{' and '.join(experts)} in turns, of which it knows the groups of one; take a schedule of whole "
                "steps (layercache.search), or plan each transformer for its own steps "
                "(layercache.calibrate(transformer=...))"
            )

    def joined(self, is_same: Callable[[Any], bool]) -> Any:
        """The router that another pipeline or loop has the same plan enabled with, which this one joins, or ``None``.

        Args:
            is_same: whether a router has this plan.

        Raises:
            CacheStateError: it stores residuals in another way.
        """
        attachment = attachment_of(self.transformer)
        if attachment is None or self.scheduler is None or not is_same(attachment.root):
            return None
        pipeline = None if isinstance(self.pipe, nn.Module) else self.pipe
        if attachment.root.identity.follows(pipeline, self.scheduler):
            return None
        if attachment.root.offload != self.offload:
            raise CacheStateError(
                f"a layercache cache is already enabled on this transformer, with offload={attachment.root.offload}: "
                "give this pipeline the same, or call layercache.disable first",
                argument="offload",
            )
        if attachment.root.storage_name != self.storage:
            raise CacheStateError(
                f"a layercache cache is already enabled on this transformer, and stores residuals as "
                f"{attachment.root.storage_name!r}: give this pipeline storage={attachment.root.storage_name!r} too, "
                "or call layercache.disable first",
                argument="storage",
            )
        attachment.share(pipeline, self.scheduler)
        return attachment.root

    def refuse_storage(self, plan: Any) -> None:
        """Raises `CacheStateError` where a storage was asked for and the plan stores no residuals of groups."""
        if self.storage != "same":
            raise CacheStateError(
                f"storage={self.storage!r} is for residuals of groups; {type(plan).__name__} stores others, "
                "leave it out"
            )

    def refuse_options_of_loops(self, name: str) -> None:
        """Raises `CacheStateError` where a pipeline is given what only a plan, or a loop of one's own, makes use of."""
        own = getattr(self.pipe, "scheduler", None)
        given = {"num_steps": self.num_steps, "process_group": self.process_group}
        given["scheduler"] = None if self.scheduler is own else self.scheduler
        if unused := [option for option, value in given.items() if value is not None]:
            raise CacheStateError(
                f"{name} takes no {' and '.join(unused)}, for the pipeline says its steps and each process decides for "
                "itself: leave it out, or enable a schedule or a method with it",
                argument=unused[0],
            )


@functools.singledispatch
def make_router(plan: Any, setting: Setting) -> Any:
    """The router that executes a plan, chosen by the plan's class.

    Another kind of plan registers its own: ``make_router.register(PlanClass, handler)``.

    Raises:
        MethodError: no handler is registered for it.
    """
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


@make_router.register
def _(plan: Schedule, setting: Setting) -> ScheduleCache:
    setting.check_fingerprint(plan.fingerprint)
    check_levels(setting.pipe, plan.fingerprint)
    shared = setting.joined(lambda router: isinstance(router, ScheduleCache) and router.schedule == plan)
    if shared is not None:
        return shared
    transformer, scheduler = setting.transformer, setting.scheduler
    router = ScheduleCache(transformer, spec_for(transformer), plan, scheduler, setting.storage, setting.offload)
    if any(plan.velocities):
        setting.check_velocities("this schedule")
        setting.check_experts(plan)
    if router.replaces_velocity and not tells_steps(scheduler):
        raise CacheStateError(
            "this schedule changes velocities on their way to the sampler: enable it on the pipeline, or name the "
            "scheduler of your own loop: layercache.enable(transformer, schedule, scheduler)"
        )
    return router


@make_router.register
def _(plan: ModuleSchedule, setting: Setting) -> ModuleScheduleRouter:
    setting.refuse_storage(plan)
    setting.check_fingerprint(plan.fingerprint)
    model = setting.transformer
    return ModuleScheduleRouter(model, spec_for(model), plan, setting.scheduler, setting.offload)


@make_router.register
def _(plan: StepMethod, setting: Setting) -> StepRouter:
    setting.refuse_storage(plan)
    setting.check_velocities(type(plan).__name__)
    return StepRouter(setting.transformer, spec_for(setting.transformer), plan, setting.scheduler, setting.offload)


@make_router.register
def _(plan: PlannedMethod, setting: Setting) -> PlannedRouter:
    model = setting.transformer
    if isinstance(plan, PlannedModules):
        setting.refuse_storage(plan)
        module_units(model, spec_for(model))  # refuses a model whose modules are not known
    if plan.replaces_velocity:
        setting.check_velocities(type(plan).__name__)
    shared = setting.joined(lambda router: isinstance(router, PlannedRouter) and router.has(plan))
    return shared or PlannedRouter(model, spec_for(model), plan, setting.scheduler, setting.storage, setting.offload)


@make_router.register
def _(plan: DynamicMethod, setting: Setting) -> DynamicRouter:
    model, group = setting.transformer, setting.process_group
    return DynamicRouter(
        model, spec_for(model), plan, setting.scheduler, setting.num_steps, group, setting.storage, setting.offload
    )


@make_router.register
def _(plan: RowMethod, setting: Setting) -> RowRouter:
    model, group = setting.transformer, setting.process_group
    return RowRouter(
        model, spec_for(model), plan, setting.scheduler, setting.num_steps, group, setting.storage, setting.offload
    )


def disable(pipe: Any) -> None:
    """Restores the transformer exactly; stored residuals are freed.

    Raises:
        CacheStateError: no cache is enabled.
    """
    attachment = attachment_of(find_transformer(pipe))
    if attachment is None:
        raise CacheStateError("no layercache cache is enabled here")
    attachment.detach()


@overload
def enabled(
    pipe: Any, plan: Schedule, scheduler: Any = None, *, storage: str = "same", offload: bool | int = False
) -> AbstractContextManager[ScheduleCache]: ...


@overload
def enabled(
    pipe: Any,
    plan: DynamicMethod,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
    *,
    offload: bool | int = False,
) -> AbstractContextManager[DynamicRouter]: ...


@overload
def enabled(
    pipe: Any, plan: PlannedMethod, scheduler: Any = None, *, storage: str = "same", offload: bool | int = False
) -> AbstractContextManager[PlannedRouter]: ...


@overload
def enabled(
    pipe: Any, plan: StepMethod, scheduler: Any = None, *, offload: bool | int = False
) -> AbstractContextManager[StepRouter]: ...


@overload
def enabled(
    pipe: Any,
    plan: RowMethod,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
    *,
    offload: bool | int = False,
) -> AbstractContextManager[RowRouter]: ...


@overload
def enabled(
    pipe: Any, plan: ModuleSchedule, scheduler: Any = None, *, offload: bool | int = False
) -> AbstractContextManager[ModuleScheduleRouter]: ...


@overload
def enabled(
    pipe: Any,
    plan: Any,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
    *,
    offload: bool | int = False,
) -> AbstractContextManager[Cache]: ...


@overload
def enabled(
    pipe: Any,
    *,
    budget: float | None = None,
    speedup: float | None = None,
    min_psnr: float | None = None,
    learn: int | str | None = None,
    offload: bool | int = False,
) -> AbstractContextManager[Cache]: ...


@contextmanager
def enabled(
    pipe: Any,
    plan: Any = None,
    scheduler: Any = None,
    num_steps: int | None = None,
    process_group: Any = None,
    storage: str = "same",
    **target: Any,
) -> Iterator[Any]:
    """``enable`` for the length of a ``with`` block; takes the same arguments.

    Where a picture of a pipeline's call is NaN, the call gives all its pictures and a `NonFiniteWarning` says which are
    not finite; the end of the block raises nothing then, and ``cache.check()`` raises for those who ask.

    Raises:
        NonFiniteResidualError: at the end, on a bare transformer, when a stored residual held NaN or infinity.
    """
    cache: Any = enable(pipe, plan, scheduler, num_steps, process_group, storage, **target)
    try:
        yield cache
        _check_at_end(cache, pipe)
    finally:
        cache.attachment.detach()  # the pipeline may not have its transformer any more


def _check_at_end(cache: Cache, pipe: Any) -> None:
    """What the last generation has stored; the finished calls of a pipeline keep their pictures."""
    try:
        cache.check()
    except NonFiniteResidualError as error:
        if isinstance(pipe, nn.Module):
            raise
        if not error.was_warned_of:
            warnings.warn(str(error), NonFiniteWarning, stacklevel=4)
