"""`layercache.enable(pipe, speedup=1.8, learn=4)`: schedules fitted to a pipeline's own first generations (ours).

The first calls with the same settings run in full and are recorded. Before the next one a path is chosen in the
surrogate, run on the recorded calls, and its forecasts fitted (`layercache.planning.whole_steps`), for at most
`COST` full generations in all. From then on calls with these settings are cached.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from layercache._utils.compat import progress_bar_settings
from layercache.errors import (
    BudgetError,
    CacheStateError,
    CalibrationError,
    LayerCacheError,
    LayerCacheWarning,
)
from layercache.models.registry import count_blocks, spec_for
from layercache.planning.calls import arguments_of_call, intercepted, repeatable, settings_of_call, watched
from layercache.planning.front import Front, Point
from layercache.planning.full_run import FullRun, FullSample
from layercache.planning.learnt_files import Learnt, LearntFiles
from layercache.planning.refit import path_of
from layercache.planning.rollout import Rollouts
from layercache.planning.samples import pictures_in
from layercache.planning.search_files import digest_of, model_identity
from layercache.planning.surrogate import Answers
from layercache.planning.whole_steps import Tried, WholeStepSearch
from layercache.runtime.enable import Setting, make_router
from layercache.runtime.forward import Forward
from layercache.runtime.identity import Identity
from layercache.runtime.report import TO_LEARN, CacheReport
from layercache.runtime.requests import ScheduleCache
from layercache.runtime.router import Router
from layercache.runtime.target import MORE, Target

COST = 3.0
"""Full generations that a fit may cost in all."""

MOST_RUNS = 4

TAIL = 0.2
"""Weight of the 10 % quantile beside the mean: of four pictures it is nearly the worst one."""

BAR = "{desc}: {n:.1f} of {total:.1f} full generations |{bar}| {elapsed}, {remaining} left"

_log = logging.getLogger("layercache")


@dataclass(frozen=True)
class Recorded:
    """A call of the pipeline that ran in full: its arguments, with generators as they were, and what it gave."""

    arguments: Mapping[str, Any]
    full: FullSample


@dataclass
class CallState:
    """What is known of calls with the same settings.

    Attributes:
        key: of the settings, and of the model.
        recorded: calls so far.
        cache: that runs the schedule, once there is one.
        point: the schedule, and what it gave.
        is_full: whether calls are to run in full from now on, since no schedule can be found.
    """

    key: str
    recorded: list[Recorded] = field(default_factory=list)
    cache: ScheduleCache | None = None
    point: Point | None = None
    is_full: bool = False


class Recorder(FullRun):
    """Records a call of the pipeline; where that is not possible, it is computed in full all the same.

    Attributes:
        obstacle: why it cannot be learnt from; empty where it can.
    """

    obstacle = ""

    @property
    def replaces_velocity(self) -> bool:
        return True  # it sees them on their way to the sampler

    def begin(self, forward: Forward) -> None:
        try:
            super().begin(forward)
        except CacheStateError as error:
            self.obstacle = self.obstacle or str(error)

    def note_change(self) -> None:
        """Something outside of the model changes the generation as it runs."""
        self.obstacle = "its callback_on_step_end changes it"

    def replace_velocity(self, step: int, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        self.note_step(velocity, latents)
        return velocity


class LearningCache(Router):
    """Records a pipeline's first generations, fits a schedule to them, and caches those that follow.

    Calls with other settings (steps, size, guidance, strength) are recorded and fitted apart from each other. Where
    nothing is to be recorded, calls of which nothing was learnt before are run by a substitute.

    Attributes:
        known: by the digest of their settings, what is known of calls.
    """

    takes_experts = True

    def __init__(self, setting: Setting, target: Target, substitute: Router | None = None, note: str = ""):
        transformer = setting.transformer
        super().__init__(transformer, spec_for(transformer), [(0, count_blocks(transformer))])
        self.setting, self.target, self.substitute = setting, target, substitute
        self._note = note  # of the substitute; empty once it was given
        self.known: dict[str, CallState] = {}
        self._class = type(setting.pipe)
        self._forwards = self._generations = 0  # of calls that ran in full
        self._is_busy = False
        self._now: Router = self
        self.identity = Identity(self.spec, setting.scheduler)

    # --- as the executor's router ---

    def for_call(self) -> Router:
        return self if self._now is self else self._now.for_call()

    @property
    def replaces_velocity(self) -> bool:
        return True

    def begin(self, forward: Forward) -> None:
        """A forward outside of the pipeline's calls is computed in full."""

    def attached(self) -> None:
        self.setting.pipe.__class__ = intercepted(self._class, self.call)

    def free(self) -> None:
        self.setting.pipe.__class__ = self._class
        for router in self._routers:
            router.free()

    def invalidate(self) -> None:
        """The model is another one now: what was recorded of it is dropped; schedules are looked for anew."""
        for router in self._routers:
            router.invalidate()
        self.known = {}

    def end_generation(self, completed: bool = True) -> None:
        for router in self._routers:
            router.end_generation(completed)

    def finish(self) -> None:
        for router in self._routers:
            router.finish()

    def check(self) -> None:
        for router in self._routers:
            router.check()

    @property
    def _routers(self) -> list[Router]:
        """Those that run calls with what was learnt, or without."""
        caches: list[Router] = [known.cache for known in self.known.values() if known.cache is not None]
        return caches if self.substitute is None else [*caches, self.substitute]

    def report(self) -> CacheReport:
        """What all calls did since the cache was enabled; those that were recorded computed everything."""
        reports = [router.report() for router in self._routers]
        forwards = self._forwards + sum(one.forwards for one in reports)
        used = self._forwards + sum(one.forwards * one.used for one in reports)
        newest = self._now.report() if self._now in self._routers else None
        in_full = Counter({TO_LEARN: self._forwards} if self._forwards else {})
        for one in reports:
            in_full.update(one.in_full)
        return CacheReport(
            used=used / forwards if forwards else 1.0,
            computed_cells=self._forwards + sum(one.computed_cells for one in reports),
            cached_cells=sum(one.cached_cells for one in reports),
            generations=self._generations + sum(one.generations for one in reports),
            forwards=forwards,
            fallback_rows=sum(one.fallback_rows for one in reports),
            cache_bytes=newest.cache_bytes if newest else 0,
            branches=tuple(dict.fromkeys(name for one in reports for name in one.branches)),
            source=self._now.identity.source,
            unidentified=sum(one.unidentified for one in reports),
            speedup=self.measured_speedup,
            expected_psnr=newest.expected_psnr if newest else None,
            in_full=in_full,
        )

    # --- the pipeline's calls ---

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the pipeline: recorded, or by the schedule for its settings."""
        pipe = self.setting.pipe
        arguments = None if self._is_busy else arguments_of_call(self._class, pipe, args, kwargs)
        if arguments is None:  # it is called from within a call, or wrongly
            return original(*args, **kwargs)
        model = model_identity(pipe)
        key = digest_of([model, settings_of_call(arguments), repr(replace(self.target, learn=1))])
        learned = self.known.setdefault(key, CallState(key))
        self._is_busy = True
        try:
            self._prepare(learned)
            router = learned.cache or self.substitute
            if router is None:
                return self._recorded(learned, original, arguments)
            self._route_by(router)
            return original(*args, **kwargs)
        finally:
            self._is_busy = False

    def _route_by(self, router: Router) -> None:
        router.attachment = self.attachment
        router.identity.follow(self.setting.pipe)
        self._now, self.identity = router, router.identity

    def _recorded(self, learned: CallState, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        watcher = Recorder(self.transformer, self.spec, self.setting.pipe.scheduler)
        again = repeatable(arguments, self.setting.pipe)
        callback = arguments.get("callback_on_step_end")
        if callback is not None:
            arguments = arguments | {"callback_on_step_end": watched(callback, watcher.note_change)}
        self._route_by(watcher)
        result = original(**arguments)
        self._forwards += watcher.forwards
        self._generations += 1
        if not learned.is_full:
            self._keep(learned, watcher, again, result)
        return result

    def _keep(self, learned: CallState, watcher: Recorder, arguments: dict[str, Any], result: Any) -> None:
        """Adds what was recorded, if the call can be repeated and steered."""
        try:
            if watcher.obstacle or "generator" not in arguments:
                raise CalibrationError(
                    watcher.obstacle or "the pipeline takes no generator, so no call can be repeated"
                )
            full = watcher.sample(pictures_in(result))
            if full.sampler is None:
                raise CalibrationError("the sampler adds noise of its own, or its steps are not linear in the velocity")
            learned.recorded.append(Recorded(arguments, full))
        except CalibrationError as error:
            warnings.warn(
                f"nothing can be learnt from this generation, which was computed in full: {error}",
                LayerCacheWarning,
                stacklevel=6,
            )

    # --- fits ---

    def _prepare(self, learned: CallState) -> None:
        """Finds the schedule for these settings, where one is kept or enough was recorded."""
        if learned.cache is not None or learned.is_full:
            return
        files = LearntFiles(type(self.transformer).__name__, learned.key)
        kept = files.load()
        if kept is None or self.target.learn == MORE:
            if self.substitute is not None and self._note:
                warnings.warn(self._note, LayerCacheWarning, stacklevel=4)
                self._note = ""
            if self.substitute is not None or len(learned.recorded) < self.target.generations:
                return
            kept = self._fitted(learned, kept)
            if kept is None:
                return
            files.save(kept)
        cache = make_router(kept.point.schedule, replace(self.setting, scheduler=self.setting.pipe.scheduler))
        assert isinstance(cache, ScheduleCache)
        learned.cache, learned.point = cache, kept.point

    def _fitted(self, learned: CallState, kept: Learnt | None) -> Learnt | None:
        """What is found on the recorded calls; ``None``, and full generations from now on, where nothing is."""
        attachment: Any = self.attachment
        attachment.detach()
        calls, quiet = learned.recorded, bool(progress_bar_settings(self.setting.pipe).get("disable"))
        try:
            with tqdm(disable=quiet, bar_format=BAR, total=COST, desc=f"learning from {len(calls)} generations") as bar:
                found = Fit(self.setting.pipe, calls, self.target, bar, kept).run()
        except LayerCacheError as error:
            learned.is_full, learned.recorded = True, []
            warnings.warn(
                f"no schedule was found, and generations are computed in full: {error}", LayerCacheWarning, stacklevel=6
            )
            return None
        finally:
            attachment.router = self
            attachment.attach()
        learned.recorded = []
        point = found.point
        _log.info(
            "learnt from %d generations: %.0f %% of the steps are computed, %.1f dB are expected",
            len(calls),
            100 * point.used,
            sum(point.likely) / len(point.likely),
        )
        return found


class Fit:
    """Finds a schedule for a target on recorded calls, for at most `COST` full generations a picture of a call.

    Args:
        pipe: the pipeline, with nothing enabled on it.
        calls: recorded.
        target: what is wanted.
        bar: told what it costs, in full generations.
        kept: what was learnt before and is refined.
    """

    def __init__(self, pipe: Any, calls: list[Recorded], target: Target, bar: Any, kept: Learnt | None = None):
        self.pipe, self.calls, self.target, self.bar, self.kept = pipe, calls, target, bar, kept
        self.seconds = self.calls[0].full.seconds
        self.num_steps = self.calls[0].full.num_steps
        self.left = COST

    def run(self) -> Learnt:
        """The schedule.

        Raises:
            BudgetError, CalibrationError: no schedule reaches the target, or runs are not finite.
        """
        if self.target.min_psnr is not None:
            return self._learnt([self._for_quality(self.target.min_psnr)])
        return self._learnt(self._at(self._count()))

    def _count(self) -> int:
        """Computed steps for the budget or speedup."""
        budget, (blocks, rest) = self.target.budget, self.seconds
        if self.target.speedup is not None:
            budget = ((rest + blocks) / self.target.speedup - rest) / blocks
        count = min(math.floor((budget or 0.0) * self.num_steps + 1e-9), self.num_steps - 1)
        if count < 1:
            most = (rest + blocks) / (rest + blocks / self.num_steps)
            raise BudgetError(
                f"with {self.num_steps} steps a budget is at least {1 / self.num_steps:.2f}, and a speedup of the loop "
                f"at most {most:.1f}"
            )
        return count

    def _search(self, cost: float, answers: Answers | None = None) -> WholeStepSearch:
        """On as many of the calls as can be run for this cost each."""
        calls = self.calls[: max(1, math.floor(self.left / cost + 1e-9))]
        full = [call.full for call in calls]
        rollouts = Rollouts(self.pipe, [call.arguments for call in calls], on_cost=self.bar.update, full=full)
        if answers is not None:
            pictures = rollouts.num_pictures
            answers = Answers(answers.kappa[:pictures], answers.eta[:pictures])
        return WholeStepSearch(rollouts, self.seconds[0], tail=TAIL, answers=answers)

    def _spend(self, search: WholeStepSearch, count: int, runs: int = 1) -> None:
        """Notes what runs will cost."""
        calls, pictures = len(search.rollouts.prompts), search.rollouts.num_pictures
        self.left -= runs * calls * count / self.num_steps
        self.bar.total = self.bar.n + runs * pictures * count / self.num_steps
        self.bar.refresh()

    def _at(self, count: int) -> list[Tried]:
        """Schedules with so many computed steps."""
        share = count / self.num_steps
        search = self._search(share)
        if self.kept is not None and (path := path_of(self.kept.point.schedule, search.rollouts.sigmas)).sum() == count:
            self._spend(search, count)
            origin = self.kept.point.origin.split(",")[0] + ", learnt from more"
            return [search.run_path(path, search.forecast_of(count), origin, self.kept.products)]
        runs = min(MOST_RUNS, max(1, math.floor(self.left / (len(search.rollouts.prompts) * share) + 1e-9)))
        self._spend(search, count, runs)
        return list(search.run([count], [runs]))

    def _for_quality(self, least: float) -> Tried:
        """The schedule of least compute that other pictures are expected to have this mean PSNR with."""
        search = self._search(self.left / len(self.calls))  # all of them
        search.prepare(1)
        tried: list[Tried] = []
        shortfall = 0.0
        while True:
            count, path = self._least(search, least + shortfall)
            if any(count <= int(one.computed.sum()) for one in tried if _mean(one) < least):
                break
            share = count / self.num_steps
            if share > self.left:
                break
            if len(search.rollouts.prompts) * share > self.left:
                search = self._search(share, search.answers)
                search.prepare(1)
            self._spend(search, count)
            tried.append(search.run_path(path, search.forecast_of(count), "whole steps, surrogate"))
            search.tried.append(tried[-1])
            if _mean(tried[-1]) >= least:
                return tried[-1]
            shortfall += least - _mean(tried[-1])
        best = max(tried, key=_mean, default=None)
        found = "none was run" if best is None else f"{_mean(best):.1f} dB with {best.computed.mean():.2f} of the steps"
        raise CalibrationError(
            f"min_psnr={least:g} was not reached on the recorded generations ({found}); ask for less, or search "
            "(layercache.search)",
            argument="min_psnr",
        )

    def _least(self, search: WholeStepSearch, least: float) -> tuple[int, np.ndarray]:
        """The fewest computed steps that the surrogate gives this mean PSNR, and its path."""
        low, high = 1, self.num_steps - 1
        paths: dict[int, np.ndarray] = {}
        while low < high:
            middle = (low + high) // 2
            paths[middle], psnr = search.predicted(middle)
            low, high = (low, middle) if np.mean(psnr) >= least else (middle + 1, high)
        return low, paths[low] if low in paths else search.predicted(low)[0]

    def _learnt(self, tried: list[Tried]) -> Learnt:
        best = max(tried, key=lambda one: one.quality)
        blocks, rest = self.seconds
        front = Front((best.point,), (blocks, rest, 0.0), len(tried), (f"learnt from {len(self.calls)} generations",))
        return Learnt(front, best.rollout.products)


def _mean(tried: Tried) -> float:
    return float(np.mean(tried.expected or tried.rollout.psnr))
