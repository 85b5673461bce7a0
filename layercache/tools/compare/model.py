"""The model that is compared on, and what methods are tuned with: calibration samples and what is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import layercache
from layercache.errors import CrewError, LayerCacheError
from layercache.methods import InvarDiff, LearningToCache, TeaCache, invardiff, l2c, sencache, teacache
from layercache.methods.full_runs import generate_once, magnitude_ratios
from layercache.parallel.crew import Crew, sendable
from layercache.parallel.part import by_first
from layercache.planning.front import Front, quality
from layercache.planning.profile import StabilityProfile
from layercache.planning.rollout import Rollouts, psnr_of
from layercache.planning.search import ENDED_EARLY
from layercache.planning.whole_steps import TAIL
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.tools.compare.calls import PictureCalls, Pictures
from layercache.tools.compare.tuned import METHODS, TOGETHER

T = TypeVar("T")


@dataclass
class CalibratedModel:
    """A model, and what is measured on calibration samples for the methods that need it; all of it made on demand.

    Attributes:
        pipeline: a diffusers pipeline.
        prompts, seeds: calibration samples, see `layercache.planning.rollout.Rollouts`.
        call: arguments of every call.
        budgets: shares of the block time.
        effort: of the search.
        search_files: folder of the search, so that it can go on.
        rounds: generations that Learning-to-Cache learns from.
        crew: processes that compare together. What is measured is the same on all of them, and made when all ask for
            it; `tune` alone shares out.
    """

    pipeline: Any
    prompts: Sequence[Any]
    seeds: Sequence[int]
    call: Mapping[str, Any]
    budgets: Sequence[float]
    effort: str = "normal"
    search_files: Any = None
    rounds: int = 12
    crew: Crew = field(default_factory=Crew, repr=False)
    _made: dict[tuple[str, float], tuple[Any, str] | LayerCacheError] = field(default_factory=dict, repr=False)
    _routers: dict[int, l2c.LearnedRouter] = field(default_factory=dict, repr=False)
    _invardiff: dict[InvarDiff, ModuleSchedule] = field(default_factory=dict, repr=False)

    @property
    def profile(self) -> StabilityProfile:
        """Raises every time what it raised once."""
        return found_or_raised(self._profile)

    @cached_property
    def _profile(self) -> StabilityProfile | Exception:
        try:
            with self.crew.together():
                # plans depend on the seconds, which are one process's, measured while the others wait
                found = self._calibrated() if self.crew.leads else None
            return self.crew.agree(found)  # type: ignore[return-value]
        except CrewError:
            raise
        except Exception as error:
            return error

    def _calibrated(self) -> StabilityProfile:
        """One call measures; its first seed is that of its batch."""
        return layercache.calibrate(
            self.pipeline, self.prompts[:1], seeds=self.seeds[:1], progress=False, **self._latent_call
        )

    @property
    def fingerprint(self) -> Fingerprint:
        return self.profile.fingerprint

    @cached_property
    def rollouts(self) -> Rollouts:
        crew = self.crew if len(self.prompts) >= self.crew.world else None  # else every process runs all samples
        return Rollouts(self.pipeline, self.prompts, self.seeds, crew=crew, **self.call)

    @cached_property
    def front(self) -> Front:
        def search(crew: Crew) -> Front:
            front = layercache.search(
                self.pipeline,
                self.prompts,
                seeds=self.seeds,
                budgets=self.budgets,
                effort=self.effort,
                resume=self.search_files,
                progress=False,
                crew=crew,
                **self.call,
            )
            if any(note.startswith(ENDED_EARLY[1]) for note in front.notes):
                raise KeyboardInterrupt  # which a search takes for its own end alone
            return front

        return by_first(self.crew, len(self.prompts), search)

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Mean over the branches, as the published ones: guidance amplifies what is computed for one branch alone."""
        ratios = magnitude_ratios(self.pipeline, self.prompts[0], self.seeds[0], **self._latent_call)
        return tuple(sum(values) / len(ratios) for values in zip(*ratios.values(), strict=True))

    @cached_property
    def teacache(self) -> TeaCache:
        """With the published coefficients of the model's class, else with fitted ones."""
        name = self.fingerprint.model_class
        if name in teacache.MODELS:
            return TeaCache().for_model(name)
        coefficients, _ = teacache.fit(self.pipeline, self.prompts, self._call_seeds, **self._latent_call)
        return TeaCache(coefficients=coefficients)

    @cached_property
    def sensitivities(self) -> sencache.Sensitivities:
        return sencache.fit(self.pipeline, self.prompts, self._call_seeds, **self._latent_call)

    @cached_property
    def rates(self) -> invardiff.Rates:
        return invardiff.measure(self.pipeline, self.prompts, self._call_seeds, **self._latent_call)

    def invardiff(self, settings: InvarDiff) -> ModuleSchedule:
        """Both phases of a setting on the calibration pictures; made once."""
        if settings not in self._invardiff:
            cached = invardiff.first_phase(self.rates, settings)
            again = invardiff.measure(self.pipeline, self.prompts, self._call_seeds, cached=cached, **self._latent_call)
            self._invardiff[settings] = invardiff.plan(self.rates, again, settings)
        return self._invardiff[settings]

    def router(self, budget: float) -> l2c.LearnedRouter:
        """Of the shortest period whose computed steps leave something of the budget; at least 2.

        Its generations have the seeds from that of the first calibration sample on: those before are compared.
        """
        steps, period = self.fingerprint.num_steps, 2
        while period < steps and -(-steps // period) > budget * steps + 1e-9:
            period += 1
        if period not in self._routers:
            settings = LearningToCache(rounds=self.rounds, period=period, seed=self.seeds[0])
            found = settings.train(self.pipeline, self.prompts, progress=False, **self._latent_call)
            self._routers[period] = found
        return self._routers[period]

    @property
    def _call_seeds(self) -> list[int]:
        return list(self.seeds[: len(self.prompts)])

    @property
    def _latent_call(self) -> dict[str, Any]:
        return {k: v for k, v in self.call.items() if k != "output_type"}

    def made(self, name: str, budget: float) -> tuple[Any, str]:
        """The plan of one of `METHODS` for a budget and what was set; made once, others of the same settings share it.

        Raises:
            LayerCacheError: there is no such plan; it is not looked for again.
        """
        if (name, budget) not in self._made:
            self._made[name, budget] = self._plan_of(name, budget)
        return found_or_raised(self._made[name, budget])

    def tune(self, wanted: Sequence[tuple[str, float]]) -> None:
        """Makes plans for `made`, of names in `METHODS` and budgets, a plan per process; others are left to it."""
        todo = [one for one in dict.fromkeys(wanted) if one[0] in METHODS and one[0] not in TOGETHER]
        todo = [one for one in todo if one not in self._made]
        if self.crew.world == 1 or not todo:
            return
        _ = self._profile  # what is measured together is there before processes part
        found = self.crew.map(lambda number: self._plan_if_any(*todo[number]), range(len(todo)))
        self._made |= {one: plan for one, plan in zip(todo, found, strict=True) if plan is not None}

    def _plan_of(self, name: str, budget: float) -> tuple[Any, str] | LayerCacheError:
        try:
            return METHODS[name](self, budget)
        except CrewError:
            raise
        except LayerCacheError as error:
            return error

    def _plan_if_any(self, name: str, budget: float) -> tuple[Any, str] | LayerCacheError | None:
        """``None`` of an error that is another package's, and may be any."""
        try:
            found = self._plan_of(name, budget)
        except Exception:
            return None
        return sendable(found) if isinstance(found, LayerCacheError) else found  # type: ignore[return-value]

    @cached_property
    def _calls(self) -> PictureCalls:
        return PictureCalls(self.pipeline, self.prompts, self.seeds, self.call)

    @cached_property
    def _full(self) -> Pictures:
        return self._calls.run_all()[0]

    def quality_of(self, plan: Any) -> float:
        """PSNR of the calibration samples with a plan, in dB, as searches score it (`layercache.planning.front`)."""
        full = self._full  # before a plan is enabled
        with layercache.enabled(self.pipeline, plan):
            return quality(psnr_of(full, self._calls.run_all()[0]), TAIL)

    def used_by(self, plan: Any) -> float:
        """Share of the blocks that a plan computes on the first calibration sample."""
        with layercache.enabled(self.pipeline, plan) as cache:
            generate_once(self.pipeline, self.prompts[0], self.seeds[0], self._latent_call)
            return float(cache.report().used)


def found_or_raised(found: T | Exception) -> T:
    if isinstance(found, Exception):
        raise found
    return found


@dataclass(frozen=True)
class Entry:
    """A method with its settings for one budget.

    Attributes:
        method: its name.
        setting: what was set, for people to read.
        budget: what it was set for; NaN where it runs as it is.
        attach: a context manager around the generations, which gives the cache or, of another package's, ``None``.
        call: arguments of the pipeline's call that take the place of the full run's.
    """

    method: str
    setting: str
    budget: float
    attach: Callable[[], AbstractContextManager[Any]] = field(repr=False)
    call: Mapping[str, Any] = field(default_factory=dict)
