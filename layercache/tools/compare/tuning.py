"""Tuning a method to a budget on calibration samples: its knob by bisection, the steps at both ends by quality."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from layercache.errors import BudgetError, MethodError
from layercache.methods import InvarDiff
from layercache.runtime.policy import PlannedMethod, PlannedModules
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule

if TYPE_CHECKING:
    from layercache.tools.compare.model import CalibratedModel

Maker = Callable[["CalibratedModel", float], tuple[Any, str]]
Build = Callable[["CalibratedModel", float], Any]
Change = Mapping[str, Any]

FIRST_SHARES = (0.0, 0.1, 0.25)
"""Shares of the steps that are computed at the beginning, of which the best is taken, beside the method's own."""
LAST_SHARES = (0.0, 0.1)
"""The same of the steps at the end."""
ENOUGH = 0.25
"""Of a step: how near the share of what is computed has to come to the budget."""
SHARES = ("retention", "nonskip")
"""Of the settings in `ENDS`, those that are shares of the steps."""
ENDS = ((("warmup", *SHARES), FIRST_SHARES), (("cooldown", "stop"), LAST_SHARES))
"""Settings of methods that say how many steps, or what share of them, are computed at the two ends."""


def tuned_by_knob(method: type, has_ends: bool = True) -> Maker:
    """A config class of a method, tuned by its own knob (`layercache.methods.policy.DynamicMethod.knob`)."""
    setting, low, high = method.knob  # type: ignore[attr-defined]
    return by_threshold(lambda model, value: method(**{setting: value}), low, high, 8, setting, has_ends)


def by_threshold(
    build: Build, low: float, high: float, rounds: int = 8, setting: str = "threshold", has_ends: bool = True
) -> Maker:
    """The best of a method within the budget, by bisection of a setting on one calibration sample.

    Steps at the beginning, then those at the end, are tried as the method has them and by shares of the run, each with
    its own bisection; what gives the best pictures of the calibration samples is taken.

    Args:
        build: the plan for a value of the setting; larger values compute less.
        low, high: its range.
        rounds: plans that are tried behind the one of ``high``, each for a generation where it decides as it runs.
        setting: its name, for people.
        has_ends: whether steps at both ends are tried; else they are as the method has them.
    """

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        built = functools.cache(functools.partial(build, model))

        def within(change: Change) -> tuple[Any, str]:
            def plan_at(value: float) -> Any:
                return _schedule_of(model, replace(built(value), **change) if change else built(value))

            def share_at(value: float) -> float:
                return _share(model, plan_at(value))

            near = budget - ENOUGH / model.fingerprint.num_steps
            value = largest_share(share_at, (near, budget), low, high, rounds, setting)
            return plan_at(value), f"{setting} {value:.4g}"

        return _best_ends(model, built(high), within) if has_ends else within({})

    return make


def by_interval(build: Callable[[CalibratedModel, int], PlannedMethod]) -> Maker:
    """The shortest interval between full steps that keeps to the budget; the ends as with `by_threshold`."""

    def make(model: CalibratedModel, budget: float) -> tuple[Any, str]:
        def within(change: Change) -> tuple[Any, str]:
            for interval in range(1, model.fingerprint.num_steps + 1):
                method: Any = build(model, interval)
                plan = replace(method, **change).schedule(model.fingerprint)
                if plan.used <= budget + 1e-9:
                    return plan, f"interval {interval}"
            raise BudgetError(f"no interval keeps to a budget of {budget:g}")

        return _best_ends(model, build(model, 1), within)

    return make


def _best_ends(model: CalibratedModel, config: Any, within: Callable[[Change], tuple[Any, str]]) -> tuple[Any, str]:
    """The best of plans with other first steps, then of those with other last steps besides."""
    ends = [list(_changes(config, names, shares, model.fingerprint.num_steps)) for names, shares in ENDS]
    if not any(ends):
        return within({})
    tried: list[tuple[float, Change, Any, str]] = []
    refused: list[BudgetError] = []

    def attempt(change: Change) -> None:
        try:
            plan, text = within(change)
        except BudgetError as error:
            refused.append(error)
        else:
            words = [text, *(f"{name} {value:g}" for name, value in change.items() if value is not None)]
            tried.append((model.quality_of(plan), change, plan, ", ".join(words)))

    attempt({})
    for changes in ends:
        begin: Change = max(tried, key=lambda one: one[0])[1] if tried else {}
        for change in changes:
            attempt({**begin, **change})
    if not tried:
        raise refused[0]
    _, _, plan, text = max(tried, key=lambda one: one[0])
    return plan, text


def _changes(config: Any, names: Sequence[str], shares: Sequence[float], steps: int) -> Iterator[Change]:
    """Other values of the settings of one end, of those that a method has and takes; none that is its own already."""
    settings = {one.name for one in fields(config)} if is_dataclass(config) else set()
    for name in names:
        if name not in settings:
            continue
        seen = [getattr(config, name)]
        for share in shares:
            value = _setting_of(name, share, steps)
            if value not in seen and _takes(config, {name: value}):
                seen.append(value)
                yield {name: value}


def _takes(config: Any, change: Change) -> bool:
    """Whether a value is in a setting's range."""
    try:
        replace(config, **change)
    except MethodError:
        return False
    return True


def _setting_of(name: str, share: float, steps: int) -> float | int | None:
    """What a setting is where such a share of the steps is computed at its end."""
    count = round(share * steps)
    if name == "stop":
        return steps - count if count else None
    return share if name in SHARES else max(int(name == "warmup"), count)


def largest_share(
    share_at: Callable[[float], float],
    wanted: tuple[float, float],
    low: float,
    high: float,
    rounds: int,
    setting: str,
) -> float:
    """The value of a setting with the largest share within ``wanted[1]``, or the first of ``wanted[0]`` and more.

    Raises:
        BudgetError: the share is larger at the highest value.
    """
    near, budget = wanted
    least, most, best = low, high, (share_at(high), high)
    if best[0] > budget + 1e-9:
        raise BudgetError(
            f"no {setting} up to {high:g} brings it down to {budget:g}: there it computes {best[0]:.3f} still"
        )
    for _ in range(rounds):
        if best[0] >= near:
            break
        value = (least * most) ** 0.5
        used = share_at(value)
        if used <= budget + 1e-9:
            most = value
            best = max(best, (used, value), key=lambda one: one[0])
        else:
            least = value
    return best[1]


def _share(model: CalibratedModel, plan: Any) -> float:
    return plan.used if isinstance(plan, (Schedule, ModuleSchedule)) else model.used_by(plan)


def _schedule_of(model: CalibratedModel, plan: Any) -> Any:
    """The schedule of a method that plans ahead, or from full runs; other plans as they are."""
    if isinstance(plan, InvarDiff):
        return model.invardiff(plan)
    is_planned = isinstance(plan, PlannedMethod) and not isinstance(plan, PlannedModules)
    return plan.schedule(model.fingerprint) if is_planned else plan
