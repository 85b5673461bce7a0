"""`layercache.enable(pipe, speedup=1.8, learn=4)`: schedules fitted to a pipeline's own first generations (ours).

The first calls with the same settings run in full and are recorded. Before the next one a path is chosen in the
surrogate, run on the recorded calls, and its forecasts fitted (`layercache.planning.whole_steps`), for at most
`COST` full generations in all. From then on calls with these settings are cached.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from layercache._utils.compat import guider_settings, progress_bar_settings, scheduler_sigmas
from layercache._utils.summaries import Rows, joined
from layercache.errors import (
    CacheStateError,
    CalibrationError,
    LayerCacheError,
    LayerCacheWarning,
    ScheduleMismatchError,
)
from layercache.models.registry import count_blocks, spec_for
from layercache.planning.calls import arguments_of_call, intercepted, repeatable, settings_of_call, watched
from layercache.planning.front import Point
from layercache.planning.full_run import FullRun
from layercache.planning.learn_fit import COST, Fit, Recorded
from layercache.planning.learnt_files import Learnt, LearntFiles
from layercache.planning.samples import pictures_in
from layercache.planning.search_files import digest_of, model_identity
from layercache.runtime.enable import Setting, make_router
from layercache.runtime.forward import Forward
from layercache.runtime.identity import RUN_IS_OVER, Identity
from layercache.runtime.planned import PlannedRouter
from layercache.runtime.report import TO_LEARN, CacheReport, Counts, summed
from layercache.runtime.requests import ScheduleCache
from layercache.runtime.router import Router
from layercache.runtime.target import MORE, Target
from layercache.schedule.fingerprint import SIGMA_TOLERANCE
from layercache.schedule.schedule import Schedule

BAR = "{desc}: {n:.1f} of {total:.1f} full generations |{bar}| {elapsed}, {remaining} left"

MOST_SETTINGS = 8
"""Settings whose recorded calls are kept, until there are enough; those of the one used longest ago are dropped."""

_log = logging.getLogger("layercache")


@dataclass
class CallState:
    """What is known of calls with the same settings.

    Attributes:
        key: of the settings, of the model, and of noise levels other than the settings usually have.
        base: of the settings and the model.
        sigmas: noise levels of all these calls; empty before the first.
        recorded: calls so far.
        newest: which of all calls in full the newest recorded one was.
        cache: that runs the schedule, once there is one.
        point: the schedule, and what it gave.
        is_full: whether calls are to run in full from now on, since no schedule can be found.
    """

    key: str
    base: str
    sigmas: tuple[float, ...] = ()
    recorded: list[Recorded] = field(default_factory=list)
    newest: int = 0
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

    def replace_velocity(
        self, step: int, velocity: torch.Tensor, latents: torch.Tensor, output: int = 0
    ) -> torch.Tensor:
        self.note_step(velocity, latents, output)
        return velocity


def same_levels(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a schedule for one is for the other."""
    return len(one) == len(other) and all(abs(a - b) < SIGMA_TOLERANCE for a, b in zip(one, other, strict=True))


class LearningCache(Router):
    """Records a pipeline's first generations, fits a schedule to them, and caches those that follow.

    Calls with other settings (steps, size, guidance, strength) are recorded and fitted apart from each other. Where
    nothing is to be recorded, calls of which nothing was learnt before are run by a substitute.

    Attributes:
        known: by the digest of their settings, what is known of calls.
    """

    takes_experts = True
    schedule_source = "cache.schedule gives what the newest call ran by; enable that"

    def __init__(self, setting: Setting, target: Target, substitute: Router | None = None, note: str = ""):
        transformer = setting.transformer
        super().__init__(transformer, spec_for(transformer), [(0, count_blocks(transformer))])
        self.setting, self.target, self.substitute = setting, target, substitute
        self.offload = setting.offload
        self._note = note  # of the substitute; empty once it was given
        self.known: dict[str, CallState] = {}
        self.pipes = [(setting.pipe, type(setting.pipe))]  # with their classes as they are without this cache
        self._pipe = setting.pipe  # that was called last
        self._forwards = self._generations = 0  # of calls that ran in full
        self._is_busy = False
        self._newest: dict[str, CallState] = {}  # by the digest of their settings
        self._state: CallState | None = None  # of the present call
        self._checked: object = None  # the run whose noise levels are known to be those of the schedule
        self._now: Router = self
        self.identity = Identity(self.spec, setting.scheduler)

    # --- as the executor's router ---

    def for_call(self) -> Router:
        if not self._is_busy and self._now is not self.substitute:
            return self  # of another pipeline or loop, of whose run only a substitute asks
        if self._state is not None and self._state.cache is self._now:
            run = self.identity.run
            if run is not self._checked:
                self._checked = run
                self._check_levels(self._state, scheduler_sigmas(self.identity.scheduler) or ())
        return self if self._now is self else self._now.for_call()

    @property
    def replaces_velocity(self) -> bool:
        return True

    def begin(self, forward: Forward) -> None:
        """A forward that no other router is for is computed in full."""
        if self._is_busy:
            self._forwards += 1
        else:
            self.identity.leave_unidentified(RUN_IS_OVER)

    def attached(self) -> None:
        for number, (pipe, cls) in enumerate(self.pipes):
            pipe.__class__ = intercepted(cls, self.call)
            if number:
                self.attachment.share(pipe, pipe.scheduler)

    def accepts(self, target: Target, pipe: Any) -> bool:
        """Whether a pipeline for which this is wanted may `join`."""
        known = any(one is pipe for one, _ in self.pipes)
        return target == self.target and not known and not isinstance(pipe, nn.Module)

    def join(self, pipe: Any) -> None:
        """Another pipeline with the same transformer is recorded and cached too, already shared by the attachment."""
        self.pipes.append((pipe, type(pipe)))
        pipe.__class__ = intercepted(type(pipe), self.call)

    def free(self) -> None:
        for pipe, cls in self.pipes:
            pipe.__class__ = cls
        for router in self._routers:
            router.free()

    def invalidate(self) -> None:
        """The model is another one now: what was recorded of it is dropped; schedules are looked for anew."""
        for router in self._routers:
            router.invalidate()
        self.known, self._newest = {}, {}

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

    @property
    def schedule(self) -> Schedule:
        """What the newest call ran by, learnt or of the substitute.

        Raises:
            CacheStateError: it was computed in full, to learn from it, or nothing has run yet.
        """
        if isinstance(self._now, (ScheduleCache, PlannedRouter)):
            return self._now.schedule
        raise CacheStateError("the newest call ran by no schedule: what is not learnt yet is computed in full")

    def _summary(self) -> tuple[str, Rows]:
        wanted = {name: getattr(self.target, name) for name in ("budget", "speedup", "min_psnr")}
        goal = next(f"{name}={value:g}" for name, value in wanted.items() if value is not None)
        counts, rows = self.report()._summary()
        title = f"LearningCache on a {type(self.transformer).__name__}, {goal}, learn={self.target.learn}"
        return f"{title}: {counts.partition(': ')[2]}", [("settings", self._known_settings()), *rows]

    def _known_settings(self) -> str:
        """How many settings the calls had, and how far each has come."""
        learnt = sum(one.cache is not None for one in self.known.values())
        waiting = [len(one.recorded) for one in self.known.values() if one.recorded]
        recorded = f"; {joined(waiting)} of {self.target.generations} calls recorded of others" if waiting else ""
        other = (
            ""
            if self.substitute is None
            else f", else by {type(getattr(self.substitute, 'method', self.substitute)).__name__}"
        )
        return f"{len(self.known)} known, {learnt} by a learnt schedule{other}{recorded}"

    def report(self) -> CacheReport:
        """What all calls did since the cache was enabled; those that were recorded computed everything."""
        recorded = Counts(self._forwards).report(0.0, 0, (), self._now.identity, self.measured_speedup)
        in_full = {TO_LEARN: self._forwards} if self._forwards else {}
        recorded = replace(recorded, generations=self._generations, unidentified=0, in_full=in_full)
        newest = self._now.report() if self._now in self._routers else recorded
        return summed([recorded, *(router.report() for router in self._routers)], newest)

    # --- the pipeline's calls ---

    def call(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the pipeline: recorded, or by the schedule for its settings."""
        pipe, cls = next(known for known in self.pipes if known[0] is original.args[0])  # type: ignore[attr-defined]
        arguments = None if self._is_busy else arguments_of_call(cls, pipe, args, kwargs)
        if arguments is None:  # it is called from within a call, or wrongly
            return original(*args, **kwargs)
        self._pipe, model = pipe, model_identity(pipe)
        settings = settings_of_call(arguments) | guider_settings(pipe)
        key = digest_of([model, settings, repr(replace(self.target, learn=1))])
        learned = self._newest.setdefault(key, CallState(key, key))
        self.known[learned.key] = learned
        self._is_busy, self._checked = True, None
        try:
            self._prepare(learned)
            router = learned.cache or self.substitute
            if router is None:
                return self._recorded(learned, original, arguments)
            self._route_by(router)
            self._state = None if learned.cache is None else learned
            return original(*args, **kwargs)
        finally:
            self._is_busy, self._state = False, None

    def _check_levels(self, learned: CallState, sigmas: tuple[float, ...]) -> None:
        """The run that has begun goes on by the schedule for its noise levels, or in full where there is none yet."""
        assert learned.cache is not None
        try:
            learned.cache.schedule.fingerprint.check_sigmas(sigmas)
        except ScheduleMismatchError as error:
            other = self._of_levels(learned, sigmas)
            self._take_kept(other)
            if other.cache is not None:
                self._state = other
                return self._route_by(other.cache)
            if self.substitute is not None:
                self._newest[learned.base] = learned  # of the other levels nothing will be learnt
                return self._route_by(self.substitute)
            warnings.warn(
                f"this generation is computed in full, and those that follow it are learnt apart: {error}",
                LayerCacheWarning,
                stacklevel=6,
            )
            self._generations += 1
            self._now = self

    def _of_levels(self, learned: CallState, sigmas: tuple[float, ...]) -> CallState:
        """What is known of calls with these settings and noise levels, which the next such call is taken to have."""
        same = [one for one in self.known.values() if one.base == learned.base and same_levels(one.sigmas, sigmas)]
        if not same and not learned.sigmas:
            same = [learned]
        key = digest_of([learned.base, [round(sigma, 3) for sigma in sigmas]])
        found = same[0] if same else CallState(key, learned.base)
        found.sigmas = sigmas
        self.known[found.key] = self._newest[found.base] = found
        return found

    def _route_by(self, router: Router) -> None:
        router.attachment = self.attachment
        router.identity.follow(self._pipe)
        self._now, self.identity = router, router.identity

    def _recorded(self, learned: CallState, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        watcher = Recorder(self.transformer, self.spec, self._pipe.scheduler)
        again = repeatable(arguments, self._pipe)
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
        """Adds what was recorded, if the call can be repeated and its velocities replaced."""
        try:
            if watcher.obstacle or "generator" not in arguments:
                raise CalibrationError(
                    watcher.obstacle or "the pipeline takes no generator, so no call can be repeated"
                )
            full = watcher.sample(pictures_in(result))
            if full.sampler is None:
                raise CalibrationError("the sampler adds noise of its own, or its steps are not linear in the velocity")
            found = self._of_levels(learned, full.sigmas)
            found.recorded.append(Recorded(arguments, full))
            found.newest = self._generations
            self._drop_oldest()
        except CalibrationError as error:
            warnings.warn(
                f"nothing can be learnt from this generation, which was computed in full: {error}",
                LayerCacheWarning,
                stacklevel=6,
            )

    def _drop_oldest(self) -> None:
        """Recorded calls are as large as their latents; of settings that never come to enough of them they go."""
        waiting = sorted((one for one in self.known.values() if one.recorded), key=lambda one: one.newest)
        for oldest in waiting[:-MOST_SETTINGS]:
            _log.warning(
                "%d recorded calls are dropped, of the settings used longest ago: until %d are there to learn from, "
                "calls of %d settings are kept",
                len(oldest.recorded),
                self.target.generations,
                MOST_SETTINGS,
            )
            oldest.recorded = []

    # --- fits ---

    def _prepare(self, learned: CallState) -> None:
        """Finds the schedule for these settings, where one is kept or enough was recorded."""
        if learned.cache is not None or learned.is_full:
            return
        kept = self._take_kept(learned)
        if learned.cache is None and self.substitute is not None:
            if self._note:
                warnings.warn(self._note, LayerCacheWarning, stacklevel=4)
                self._note = ""
            return
        if (kept is None or self.target.learn == MORE) and len(learned.recorded) >= self.target.generations:
            found = self._fitted(learned, kept)
            if found is not None:
                self._files_of(learned).save(found)
                self._take(learned, found)

    def _files_of(self, learned: CallState) -> LearntFiles:
        return LearntFiles(type(self.transformer).__name__, learned.key)

    def _take_kept(self, learned: CallState) -> Learnt | None:
        """What earlier processes have learnt, which is taken unless it is to be refined."""
        kept = self._files_of(learned).load()
        if kept is not None and self.target.learn != MORE:
            self._take(learned, kept)
        return kept

    def _take(self, learned: CallState, found: Learnt) -> None:
        schedule = found.point.schedule
        cache = make_router(schedule, replace(self.setting, pipe=self._pipe, scheduler=self._pipe.scheduler))
        assert isinstance(cache, ScheduleCache)
        cache.identity.check = None  # noise levels are looked at before (`_check_levels`)
        learned.cache, learned.point, learned.sigmas = cache, found.point, schedule.fingerprint.sigmas

    def _fitted(self, learned: CallState, kept: Learnt | None) -> Learnt | None:
        """What is found on the recorded calls; ``None``, and full generations from now on, where nothing is."""
        attachment: Any = self.attachment
        attachment.detach()
        calls, quiet = learned.recorded, bool(progress_bar_settings(self._pipe).get("disable"))
        try:
            with tqdm(disable=quiet, bar_format=BAR, total=COST, desc=f"learning from {len(calls)} generations") as bar:
                found = Fit(self._pipe, calls, self.target, bar, kept).run()
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
