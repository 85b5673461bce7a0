"""What `layercache.enable(pipe)` runs where no plan is given: what was learnt before, else this method."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from layercache._utils.compat import tells_steps
from layercache._utils.validate import expect
from layercache.errors import LayerCacheWarning, MethodError
from layercache.methods.fbcache import FBCache
from layercache.methods.fixed import TaylorSeer, taylorseer_steps
from layercache.methods.universal import Universal
from layercache.models.registry import count_blocks
from layercache.planning.learn import LearningCache
from layercache.runtime.enable import Setting, make_router
from layercache.runtime.policy import PlannedMethod, check_range
from layercache.runtime.router import Router
from layercache.runtime.target import Target
from layercache.schedule.few_steps import FEWEST_STEPS
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Schedule

_log = logging.getLogger("layercache")

LAST_STEPS = 0.1
"""Share of the steps that is computed at the end of a run, whose changes show most."""

THRESHOLDS = {0.2: 0.55, 0.33: 0.22, 0.5: 0.11, 0.6: 0.085, 0.7: 0.065}
"""FBCache's, by the share of the blocks that each left to compute, about, on three models (bench/results/pareto-*)."""


@dataclass(frozen=True, kw_only=True)
class Automatic(PlannedMethod):
    """The best schedule that needs no calibration: `Universal`, or where it cannot be planned, `TaylorSeer`.

    TaylorSeer of order 2, with the shortest interval, and the longest warm-up, that the budget allows; the last tenth
    of the steps is computed where it can be. Source: ours; docs/methods.md, Without a choice.

    Attributes:
        budget: largest share of the steps that is computed, two at least; all in runs of fewer than `FEWEST_STEPS`.
        groups: block ranges whose residuals TaylorSeer forecasts, where velocities cannot be replaced (two outputs, a
            sampler that does not count its steps); then it is taken in any case.

    Raises:
        MethodError: on construction, for a budget out of range.
    """

    budget: float = 2 / 3
    groups: tuple[tuple[int, int], ...] | None = None

    name: ClassVar[str] = "automatic"

    def __post_init__(self) -> None:
        check_range("budget", self.budget, 0, 1)

    @property
    def replaces_velocity(self) -> bool:
        return self.groups is None

    def schedule(self, fingerprint: Fingerprint) -> Schedule:
        """For Euler steps between the run's noise levels.

        Raises:
            ArgumentError: no fingerprint.
        """
        return self._made(fingerprint, lambda: Universal(budget=self.budget).schedule(fingerprint))

    def schedule_of_run(self, fingerprint: Fingerprint, scheduler: Any, first: int) -> Schedule:
        universal = Universal(budget=self.budget)
        return self._made(
            fingerprint.starting_at(first), lambda: universal.schedule_of_run(fingerprint, scheduler, first)
        )

    def _made(self, fingerprint: Fingerprint, universal: Callable[[], Schedule]) -> Schedule:
        """The universal schedule, TaylorSeer's where there is none, or all steps of a run that has few."""
        expect("Automatic.schedule", fingerprint, Fingerprint)
        if len(fingerprint.steps) < FEWEST_STEPS:
            warnings.warn(
                f"a run of {len(fingerprint.steps)} steps is computed in full, since each changes much: search "
                "with these steps (layercache.search), or take layercache.methods.Universal",
                LayerCacheWarning,
                stacklevel=2,
            )
            return Schedule.compute_all(fingerprint)
        try:
            if self.groups is None:
                return universal()
        except MethodError as error:
            _log.info("no universal schedule for this run: %s", error)
        return self._taylorseer(fingerprint)

    def _taylorseer(self, fingerprint: Fingerprint) -> Schedule:
        return taylorseer_for(len(fingerprint.steps), self.budget, self.groups).schedule(fingerprint)


def taylorseer_for(
    num_steps: int, budget: float, groups: tuple[tuple[int, int], ...] | None = None, order: int = 2
) -> TaylorSeer:
    """TaylorSeer within a budget: the shortest interval for which warm-up and last steps are left.

    Args:
        num_steps: of the run.
        budget: largest share of the steps that is computed.
        groups, order: as for `TaylorSeer`.
    """
    allowed = int(budget * num_steps + 1e-9)
    last = round(LAST_STEPS * num_steps)
    for least, interval in itertools.product((order + 1, 1), range(2, num_steps + 1)):
        for stop in range(num_steps - last, num_steps + 1):
            for warmup in range(stop - 1, least - 1, -1):
                if len(taylorseer_steps(num_steps, interval, warmup, stop)) <= allowed:
                    return TaylorSeer(interval=interval, order=order, warmup=warmup, stop=stop, groups=groups)
    return TaylorSeer(interval=max(1, num_steps), order=order, warmup=1, groups=groups)


@make_router.register
def _(plan: Target, setting: Setting) -> Router:
    setting.refuse_storage(plan)
    is_bare = isinstance(setting.pipe, nn.Module)  # compiled or not
    if not is_bare:
        setting.refuse_options_of_loops("layercache.enable(pipe) without a plan")
    shared = setting.joined(lambda router: isinstance(router, LearningCache) and router.accepts(plan, setting.pipe))
    if shared is not None:
        shared.join(setting.pipe)
        return shared
    if plan.generations == 0:
        substitute, note = _substitute(plan.share, setting)
        if not is_bare:
            return LearningCache(setting, plan, substitute, note)
        warnings.warn(note, LayerCacheWarning, stacklevel=4)
        return substitute
    setting.check_velocities("what is learnt")
    if is_bare:
        raise MethodError("only a pipeline can be learnt from, since its calls are repeated; a bare transformer cannot")
    if not tells_steps(setting.scheduler):
        raise MethodError(
            f"the steps of {type(setting.scheduler).__name__} cannot be counted, so that no velocities can be "
            "replaced; take one of diffusers' schedulers"
        )
    return LearningCache(setting, plan)


def _substitute(share: float, setting: Setting) -> tuple[Router, str]:
    """The router of the best method that needs no calibration, and that nothing was measured."""
    model = setting.transformer
    method: Any
    if setting.scheduler is None:
        method = FBCache(threshold=float(np.interp(share, list(THRESHOLDS), list(THRESHOLDS.values()))))
    else:
        method = Automatic(budget=share, groups=None if _can_replace(setting) else ((0, count_blocks(model)),))
    note = (
        f"no schedule is known yet for this {type(model).__name__}, and {type(method).__name__} is taken, which needs "
        "no calibration: nothing was measured, look at its pictures, or learn from the first generations (learn=4)"
    )
    return make_router(method, setting), note


def _can_replace(setting: Setting) -> bool:
    """Whether the velocities that the sampler gets can be replaced."""
    try:
        setting.check_velocities("a schedule of whole steps")
    except MethodError:
        return False
    return bool(tells_steps(setting.scheduler))
