"""Turning a profile into a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any

import numpy as np

from layercache._utils.metrics import summarise
from layercache._utils.validate import expect
from layercache.errors import BudgetError, ScheduleError
from layercache.planning.fit import fit_residuals
from layercache.planning.front import Front, Point, check_one_target
from layercache.planning.profile import StabilityProfile, readable
from layercache.schedule.few_steps import warn_of_few_steps
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.forecast import FORECASTS, reforecast, secant_coefficients
from layercache.schedule.schedule import EXPECTED_PSNR, Cell, Schedule

SPANS = (1, 2, 3, 4, 5, 6)
SOLVERS = ("best", "exact", "lagrangian", "removal", "addition")
MAX_ORDER = 7


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Settings of `plan` that a solver is run with; `plan` says what they mean.

    Raises:
        ScheduleError: on construction, for what is no budget and out of range; the message begins with its name.
    """

    budget: float | None
    speedup: float | None
    max_run: int
    protect_first: int | None
    protect_last: int | None
    tau: float
    gamma: float
    kappa: float
    text_weight: float
    sensitivity: bool
    per_branch: bool
    solver: str
    forecast: str
    order: int
    spans: tuple[int, ...]
    history: int

    def __post_init__(self) -> None:
        for name, least in {"history": 1, "max_run": 1, "protect_first": 0, "protect_last": 0, "order": 0}.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and int(value) >= least):
                raise ScheduleError(f"{name} must be a whole number of at least {least}, got {value}", argument=name)
        if self.order > MAX_ORDER:
            raise ScheduleError(f"order must be at most {MAX_ORDER}, got {self.order}", argument="order")
        if not all(isinstance(span, Integral) and int(span) >= 1 for span in self.spans):
            raise ScheduleError(f"spans must be whole numbers of at least 1, got {self.spans}", argument="spans")
        for name in ("kappa", "text_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ScheduleError(f"{name} must be a number of at least 0, got {getattr(self, name)}", argument=name)
        if not 0 < self.gamma < math.inf:
            raise ScheduleError(f"gamma must be a number above 0, got {self.gamma}", argument="gamma")
        if not 0 <= self.tau < 1:
            raise ScheduleError(f"tau must be a number from 0 to below 1, got {self.tau}", argument="tau")
        if self.solver not in SOLVERS:
            raise ScheduleError(f"method must be one of {', '.join(SOLVERS)}, got {self.solver!r}", argument="method")
        if self.forecast not in ("fitted", *FORECASTS):
            raise ScheduleError(
                f"unknown forecast {self.forecast!r}; choose fitted, {', '.join(FORECASTS)}", argument="forecast"
            )

    @property
    def metadata(self) -> dict[str, Any]:
        """What a schedule's ``made_by`` keeps of them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {name: value for name, value in found.items() if not name.startswith("protect")}
        return kept | {"spans": list(self.spans)}


def plan(
    profile: StabilityProfile | Front,
    budget: float | None = None,
    *,
    speedup: float | None = None,
    full_steps: float | None = None,
    min_psnr: float | None = None,
    percentile: float | None = None,
    max_cache_bytes: int | None = None,
    spans: Sequence[int] = SPANS,
    history: int = 3,
    max_run: int = 8,
    protect_first: int | None = None,
    protect_last: int | None = None,
    tau: float = 0.05,
    gamma: float = 1.0,
    kappa: float = 0.0,
    text_weight: float = 0.1,
    sensitivity: bool | None = None,
    per_branch: bool = False,
    forecast: str = "secant",
    order: int = 1,
    method: str = "best",
) -> Schedule:
    """A schedule for a budget: from a profile by its error tables, or from a front of schedules that were run.

    From a front the best of what `layercache.search` found is taken, and only the targets count. From a profile: the
    error of caching group g at step i, m steps after its anchor and with span K, is ``(|sigma[i+1] - sigma[i]| *
    error(i, g, m, K)) ** gamma``; its sum is kept low. Source: docs/methods.md, Choice of cells.

    Args:
        profile: what to plan from.
        budget: largest share of the block time that is computed, in (0, 1].
        speedup: instead of a budget, the speedup of the denoising loop to reach, by the measured seconds.
        full_steps: instead of a budget, in equivalent full steps: ``budget * N``, of the steps that are run.
        min_psnr: with a front only: the least compute that is expected to reach this mean PSNR, in dB.
        percentile: what ``min_psnr`` is asked of instead of the mean, 0 to 100.
        max_cache_bytes: most bytes of stored residuals, all branches together, at the batch that was calibrated.
        spans: spans K of the secant to choose from; empty means plain reuse only.
        history: how many computed steps' residuals are kept.
        max_run: longest run of cached steps of a group.
        protect_first, protect_last: steps at the ends always computed; default max(3, N/10); 1, or 2 above 28 steps.
        tau: smallest relative gain over plain reuse for which a span is taken.
        gamma, kappa: above 1, single large errors weigh more; standard deviations over the samples added to the mean.
        text_weight: weight of the text stream's error.
        sensitivity: weigh errors by their effect on the velocity; by default if that was measured.
        per_branch: decide for every guidance branch on its own, whose difference guidance amplifies.
        forecast: of cached cells: ``"secant"``, ``"fitted"``, ``"newton"``, ``"taylor"`` or ``"hold"``.
        order: of all but the secant: so many residuals more than one are combined.
        method: ``"removal"``, ``"addition"``, ``"exact"``, ``"lagrangian"`` or the ``"best"`` of them.

    Raises:
        ArgumentError: neither a profile nor a front, or a target that is no number.
        BudgetError: not exactly one target, or one that is out of range or below what the other settings allow.
        ScheduleError: another setting is out of range.
    """
    expect("layercache.plan", profile, StabilityProfile, Front)
    _check_target(profile, percentile, budget=budget, full_steps=full_steps, speedup=speedup, min_psnr=min_psnr)
    budget = budget if full_steps is None else _share_of(profile, full_steps)
    if isinstance(profile, Front):
        return _of_point(profile.choose(budget, speedup=speedup, min_psnr=min_psnr, percentile=percentile))
    config = PlanConfig(
        budget=budget,
        speedup=speedup,
        max_run=max_run,
        protect_first=protect_first,
        protect_last=protect_last,
        tau=tau,
        gamma=gamma,
        kappa=kappa,
        text_weight=text_weight,
        sensitivity=profile.has_sensitivity if sensitivity is None else sensitivity,
        per_branch=per_branch and len(profile.fingerprint.branches) > 1,
        solver=method,
        forecast=forecast,
        order=order,
        spans=tuple(spans),
        history=history,
    )
    return _warned_of(_within(profile, config, max_cache_bytes))


def _of_point(point: Point) -> Schedule:
    """The schedule of a point, with the PSNR that pictures are expected to have in its ``made_by``."""
    found = summarise(point.likely)
    psnr = [found.mean, found.quantile10]
    if point.schedule.expected_psnr or not all(map(math.isfinite, psnr)):
        return _warned_of(point.schedule)
    return _warned_of(replace(point.schedule, made_by={**point.schedule.made_by, EXPECTED_PSNR: psnr}))


def _within(profile: StabilityProfile, config: PlanConfig, max_cache_bytes: int | None) -> Schedule:
    """The solver's schedule, with as many anchors as the memory holds."""
    if max_cache_bytes is None:
        return _solved(profile, config)
    needed = []
    # a second anchor costs memory, and the choice between older ones more of it
    fewer = replace(config, history=min(2, config.history)), replace(config, spans=(), history=1)
    for one in (config, *fewer):
        schedule = _solved(profile, one)
        needed.append(profile.cache_bytes(schedule))
        if needed[-1] <= max_cache_bytes:
            return schedule
    least = min(needed)
    raise BudgetError(
        f"{max_cache_bytes} bytes (max_cache_bytes) are too little for this budget: {least} bytes are needed "
        f"({math.ceil(least / 1e4) / 100:g} MB); cut the blocks into fewer groups, calibrate smaller batches, or plan "
        "whole steps from a front",
        argument="max_cache_bytes",
    )


def _warned_of(schedule: Schedule) -> Schedule:
    """The schedule; warns of one of few steps."""
    warn_of_few_steps(schedule.fingerprint, stacklevel=4)
    return schedule


def _check_target(profile: StabilityProfile | Front, percentile: float | None, **targets: float | None) -> None:
    if isinstance(profile, Front):
        return check_one_target(targets, targets)
    if [name for name, value in targets.items() if value is not None] == ["min_psnr"]:
        raise BudgetError(
            "min_psnr needs a front of measured schedules: run layercache.search first", argument="min_psnr"
        )
    more = "; min_psnr is for a front of measured schedules (layercache.search)"
    check_one_target(targets, [name for name in targets if name != "min_psnr"], more)
    if percentile is not None:
        raise BudgetError("percentile belongs to min_psnr, which needs a front", argument="percentile")


def _share_of(profile: StabilityProfile | Front, full_steps: float) -> float:
    if isinstance(profile, Front) and not profile.points:
        raise BudgetError("the front is empty; search for schedules first (layercache.search)")
    fingerprint = profile.points[0].schedule.fingerprint if isinstance(profile, Front) else profile.fingerprint
    most = len(fingerprint.steps)
    if not 0 < full_steps <= most:
        raise BudgetError(f"full_steps must be above 0 and at most {most}, got {full_steps:g}", argument="full_steps")
    return full_steps / most


def _solved(profile: StabilityProfile, config: PlanConfig) -> Schedule:
    """The solver's schedule; `plan` says what the settings mean."""
    steps = profile.fingerprint.steps
    num_steps = len(steps)
    protect_first, protect_last = config.protect_first, config.protect_last
    first = max(3, math.ceil(0.1 * num_steps)) if protect_first is None else protect_first
    last = (2 if num_steps > 28 else 1) if protect_last is None else protect_last
    branches: list[int | None] = [*range(len(profile.fingerprint.branches))] if config.per_branch else [None]
    count = len(branches)
    protected = np.zeros((num_steps, count * len(profile.groups)), dtype=bool)
    protected[:first] = True
    protected[max(0, num_steps - last) :] = True

    weighing = {name: getattr(config, name) for name in ("gamma", "kappa", "text_weight", "sensitivity")}
    cached_cost, seconds = _seconds(profile, config.budget, config.speedup)
    import layercache._core as core

    errors = np.concatenate([weighted_errors(profile, **weighing, branch=branch) for branch in branches], axis=1)
    result = core.solve(
        errors_among(errors, steps),
        np.tile(np.asarray(profile.group_seconds) / count, count),
        np.tile(cached_cost / count, count),
        seconds,
        protected,
        [span for span in config.spans if span <= num_steps],
        history=min(config.history, num_steps),
        max_run=min(config.max_run, profile.max_distance),
        tau=config.tau,
        method=config.solver,
    )
    if not result.feasible:
        _refuse(profile, result.spent, config.budget, cached_cost)
    metadata = {"protect": [first, last], "error": result.total_error, "samples": len(profile.samples)}
    cells = [_cells(profile, result, number * len(profile.groups)) for number in range(count)]
    schedule = Schedule(
        fingerprint=profile.fingerprint,
        groups=profile.groups,
        cells=cells[0],
        group_seconds=tuple(profile.group_seconds),
        made_by={"method": "layercache", **config.metadata, "solver": result.method, **metadata},
        branch_cells=dict(zip(profile.fingerprint.branches[1:], cells[1:], strict=False)),
    )
    kind, order = config.forecast, config.order if config.history > 1 else 0
    if kind == "secant":
        return schedule
    if kind == "fitted":
        return fit_residuals(profile, schedule, order + 1)
    return reforecast(schedule, kind, order)


def weighted_errors(
    profile: StabilityProfile,
    gamma: float,
    kappa: float,
    text_weight: float,
    sensitivity: bool = False,
    branch: int | None = None,
) -> np.ndarray:
    """The solver's table ``D [N, G, M+1, K+1]``, with sensitivity or else 1.

    Source: docs/methods.md, Effect on the velocity.

    Of one guidance branch, or the mean over all.
    """
    step_size = _step_sizes(profile.fingerprint.sigmas)
    errors = profile.relative_errors(text_weight=text_weight, kappa=kappa, branch=branch)
    weights = profile.sensitivity()[:, :, None, None] if sensitivity else 1.0
    return np.ascontiguousarray((step_size[:, None, None, None] * weights * errors) ** gamma)


def errors_among(errors: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """The solver's table as if there were no steps but these, ``[len(steps), G, M+1, K+1]``.

    Its distances and spans count these steps alone; a forecast over more steps of the run than ``errors`` knows is
    infinite.
    """
    if len(steps) == len(errors):
        return errors
    table = np.full((len(steps), *errors.shape[1:]), np.inf)
    farthest, widest = errors.shape[2] - 1, errors.shape[3] - 1
    for at, m, k in np.argwhere(readable(len(steps), farthest, widest)).tolist():
        step, anchor, base = steps[at], steps[at - m], steps[at - m - k]
        if step - anchor <= farthest and anchor - base <= widest:
            table[at, :, m, k] = errors[step, :, step - anchor, anchor - base]
    return table


def _step_sizes(sigmas: Sequence[float]) -> np.ndarray:
    """How far each step goes in sigma; a second evaluation at one sigma belongs to the step before it."""
    sizes = np.abs(np.diff(np.asarray(sigmas)))
    for step in np.flatnonzero(sizes == 0):
        sizes[step] = sizes[step - 1] if step else 1.0
    return sizes


def _seconds(profile: StabilityProfile, budget: float | None, speedup: float | None) -> tuple[np.ndarray, float]:
    """Cost of a cached cell per group, and the seconds all cells together may take."""
    num_steps, blocks = len(profile.fingerprint.steps), sum(profile.group_seconds)
    if budget is not None:
        if not 0 < budget <= 1:
            raise BudgetError(
                f"budget must be a share of the block time above 0 and at most 1, got {budget}", argument="budget"
            )
        # the share counts computed time only; a hair more keeps rounding from costing a cell
        return np.zeros(len(profile.groups)), budget * num_steps * blocks * (1 + 1e-9)
    if not (speedup is not None and math.isfinite(speedup) and speedup >= 1):
        raise BudgetError(f"speedup must be a number of at least 1, got {speedup}", argument="speedup")
    limit = (profile.fixed_seconds + blocks) / (profile.fixed_seconds + sum(profile.reuse_seconds))
    seconds = num_steps * ((profile.fixed_seconds + blocks) / speedup - profile.fixed_seconds)
    if seconds <= 0:
        raise BudgetError(
            f"a speedup of {speedup:g} cannot be reached: with every block cached it would be {limit:.2f}",
            argument="speedup",
        )
    cached = np.minimum(np.asarray(profile.reuse_seconds), 0.99 * np.asarray(profile.group_seconds))
    return cached, seconds


def _refuse(profile: StabilityProfile, spent: float, budget: float | None, cached_cost: np.ndarray) -> None:
    num_steps, blocks = len(profile.fingerprint.steps), sum(profile.group_seconds)
    hint = (
        "protect fewer steps (protect_first, protect_last), allow longer runs (max_run), or calibrate with more steps"
    )
    if budget is not None:
        least = spent / (num_steps * blocks)
        raise BudgetError(
            f"budget {budget:g} cannot be met: at least {least:.3f} of the block time is needed; {hint}",
            argument="budget",
        )
    fastest = num_steps * (profile.fixed_seconds + blocks) / (num_steps * profile.fixed_seconds + spent)
    raise BudgetError(f"that speedup cannot be reached: at most {fastest:.2f} is possible; {hint}", argument="speedup")


def _cells(profile: StabilityProfile, result: Any, offset: int = 0) -> tuple[tuple[Cell, ...], ...]:
    """Coefficients of the solver's anchors, its columns from ``offset`` on; its rows are the steps that are run."""
    sigmas = [profile.fingerprint.sigmas[step] for step in profile.fingerprint.steps]
    rows = []
    for step in range(len(sigmas)):
        row: list[Cell] = []
        for group in range(offset, offset + len(profile.groups)):
            if result.cells[step, group] < 0:
                row.append(None)
                continue
            base = int(result.base[step, group])
            anchor = int(result.anchor[step, group])
            row.append(secant_coefficients(sigmas, step, anchor, base if base >= 0 else None, profile.eta))
        rows.append(tuple(row))
    return spread(profile.fingerprint, rows)


def spread(fingerprint: Fingerprint, rows: Sequence[Sequence[Cell]]) -> tuple[tuple[Cell, ...], ...]:
    """Rows of the steps that are run, whose anchors are counted among these, as rows of the whole run."""
    steps = fingerprint.steps
    skip: tuple[Cell, ...] = ({},) * len(rows[0])
    whole = [skip] * fingerprint.num_steps
    for step, row in zip(steps, rows, strict=True):
        whole[step] = tuple(cell and {steps[anchor]: value for anchor, value in cell.items()} for cell in row)
    return tuple(whole)
