"""Searching schedules closed loop: candidates are run on calibration samples, the best refined, the front returned."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from layercache._utils.files import check_output
from layercache._utils.validate import expect
from layercache.errors import ArgumentError, BudgetError, ScheduleMismatchError
from layercache.models.registry import config_hash
from layercache.planning.fit import Forecast, fit_residuals
from layercache.planning.front import Front, Point, quality
from layercache.planning.journal import Journal, read_journal
from layercache.planning.plan import SPANS, plan
from layercache.planning.profile import StabilityProfile
from layercache.planning.refit import refit, with_terms
from layercache.planning.rollout import Rollout, Rollouts, skipping, with_terms_of
from layercache.planning.samples import call_settings
from layercache.planning.scores import cell_needs, step_needs, step_weights, velocity_errors
from layercache.planning.whole_steps import check_effort, search_whole_steps
from layercache.schedule.forecast import reforecast
from layercache.schedule.schedule import Cell, Schedule

BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.33, 0.25)
STEERED = (Forecast(terms=4), Forecast(terms=3), Forecast(terms=2))
TEACHER_FORCED = (Forecast("teacher", terms=3, everywhere=False), Forecast("teacher", terms=2, everywhere=False))
RESIDUAL_FORECASTS = ("secant", "fitted")
REFIT_TERMS = 3
WORTH_REFINING = 3.0  # dB that a schedule of groups may lie behind the best


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of `search`, which says what they mean.

    Raises:
        BudgetError: on construction, for a budget or tail out of range.
    """

    budgets: tuple[float, ...]
    forecasts: tuple[Forecast, ...] | None
    trials: int
    time_limit: float | None
    max_cache_bytes: int | None
    per_branch: bool
    tail: float
    step_probes: int
    seed: int

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise BudgetError(
                    f"budgets must be shares of the block time above 0 and at most 1, got {budget}", argument="budgets"
                )
        if not 0 <= self.tail <= 1:
            raise BudgetError(f"tail is a weight from 0 to 1, got {self.tail}", argument="tail")


def search(
    pipe: Any,
    prompts: Sequence[Any],
    *,
    effort: str | None = None,
    profiles: StabilityProfile | Sequence[StabilityProfile] | None = None,
    seeds: Sequence[int] | None = None,
    validation: tuple[Sequence[Any], Sequence[int]] | None = None,
    budgets: Sequence[float] = BUDGETS,
    forecasts: Sequence[Forecast] | None = None,
    trials: int | None = None,
    time_limit: float | None = None,
    max_cache_bytes: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    per_branch: bool = False,
    tail: float = 0.5,
    step_probes: int = 0,
    seed: int = 0,
    progress: bool = True,
    **call: Any,
) -> Front:
    """Finds the schedules of highest PSNR for every budget, by running them.

    **Without profiles**: schedules of whole steps, for a fixed number of full generations in all, whatever the model:
    ``effort="quick"`` at most 32, ``"normal"`` 72, ``"thorough"`` 160. Paths are found in a surrogate made of the full
    runs' inner products, a few of each budget are run, and their forecasts fitted as they run, pictures weighted by
    what they miss (`layercache.planning.whole_steps`, ours). Of the pictures given 8 are used, 16 by ``"thorough"``.

    **With profiles** of groups of layers, for several times the cost: for every budget it runs a portfolio once,
    schedules of whole steps and, from every profile, of its groups, the two best with every forecast. The best schedule
    of whole steps, and of groups where that is close, is then refined: one computed cell is exchanged for a cached one,
    in the order of what their errors promise. At last the forecasts of the groups' residuals are fitted while the
    schedule runs (`layercache.planning.refit.refit`). Nothing is drawn by chance but every fourth exchange, from
    ``seed``. Sources: methods.md §17 (ours), §1.7, §1.8.

    Args:
        pipe: a diffusers pipeline.
        prompts, seeds, call: the calibration samples, see `layercache.planning.rollout.Rollouts`.
        effort: of the search without profiles; ``"normal"`` by default.
        profiles: from `layercache.calibrate`, on the same settings: costs, and the groups to try.
        validation: prompts and seeds that nothing is fitted to; each point of the front is run on them once.
        budgets: shares of the block time.
        forecasts: of velocities; by default steered ones, where the sampler takes Euler steps.
        trials: with profiles: exchanges tried per budget and kind of schedule, at most; 40 by default.
        time_limit: seconds after which no further trial begins; the result then depends on the machine's speed.
        max_cache_bytes: schedules that would store more than this, all branches together, are left out.
        per_branch: also try schedules that compute the guidance branches at different steps.
        tail: weight of the 10 % quantile of the PSNR beside its mean; 0 looks at the mean alone.
        step_probes: measure at so many steps what an error becomes at the end (`step_weights`), and also try schedules
            of whole steps that weigh errors by it. A probe costs half a full run on average.
        resume: a file that keeps what every run gave; a search that was stopped goes on from it.
        seed: of the order of exchanges.
        progress: show a progress bar.

    Raises:
        ArgumentError: profiles are something else, or an argument belongs to the other kind of search.
        BudgetError: a budget is out of range, or the pictures cost more than the effort allows.
        ScheduleMismatchError: a profile was measured on something else.
        CalibrationError: as for `Rollouts`.
        UnsupportedModelError: the model gives two outputs (LTX-2), or is of an unknown class.
        OutputError: the file of ``resume`` cannot be written.
    """
    config = SearchConfig(
        budgets=tuple(budgets),
        forecasts=None if forecasts is None else tuple(forecasts),
        trials=40 if trials is None else trials,
        time_limit=time_limit,
        max_cache_bytes=max_cache_bytes,
        per_branch=per_branch,
        tail=tail,
        step_probes=step_probes,
        seed=seed,
    )
    if profiles is None:
        check_effort(
            effort, forecasts=forecasts, trials=trials, resume=resume, per_branch=per_branch, step_probes=step_probes
        )
        found = search_whole_steps(
            pipe,
            prompts,
            seeds,
            config.budgets,
            effort or "normal",
            time_limit=time_limit,
            max_cache_bytes=max_cache_bytes,
            tail=tail,
            seed=seed,
            progress=progress,
            **call,
        )
        return _with_validation(found, pipe, validation, call)
    if effort is not None:
        raise ArgumentError("effort belongs to the search without profiles; with them give trials", argument="effort")
    measured = _profiles(profiles)
    if resume is not None:
        check_output(resume, "resume")
    remembered = read_journal(resume)
    rollouts = Rollouts(pipe, prompts, seeds, **call)
    for profile in measured:
        _check_profile(profile, rollouts)
    state = _Search(rollouts, measured, Journal(resume, rollouts, remembered), config)
    with tqdm(desc="searching", disable=not progress, unit="trial") as bar:
        for budget in sorted(config.budgets, reverse=True):
            state.explore(budget, bar)
    front = Front.of(state.points, _seconds(measured[0]), rollouts.runs, state.notes, tail)
    return _with_validation(front, pipe, validation, call)


def _with_validation(
    front: Front, pipe: Any, validation: tuple[Sequence[Any], Sequence[int]] | None, call: dict[str, Any]
) -> Front:
    if validation is None:
        return front
    return replace(front, points=tuple(validated(front.points, pipe, *validation, **call)))


def _profiles(given: Any) -> list[StabilityProfile]:
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not found:
        raise ArgumentError(
            "layercache.search needs a profile at least: layercache.calibrate(pipe, prompts)", argument="profiles"
        )
    for profile in found:
        expect("layercache.search(profiles=...)", profile, StabilityProfile)
    return found


def validated(
    points: Sequence[Point], pipe: Any, prompts: Sequence[Any], seeds: Sequence[int], **call: Any
) -> Iterator[Point]:
    """The points with their PSNR on other samples: nothing is fitted here."""
    rollouts = Rollouts(pipe, prompts, seeds, **call)
    for point in points:
        yield replace(point, held_out=rollouts.run(point.schedule).psnr)


def _check_profile(profile: StabilityProfile, rollouts: Rollouts) -> None:
    here, there = rollouts.fingerprint, profile.fingerprint
    there.check_model(here.model_class, config_hash(rollouts.transformer), here.num_blocks)
    there.warn_of(call_settings(rollouts.call))
    there.check_sigmas(here.sigmas)
    if set(here.branches) != set(there.branches):
        raise ScheduleMismatchError(
            f"the profile was measured with the branches {', '.join(there.branches)}, this run has "
            f"{', '.join(here.branches)}; calibrate with the same guidance",
            argument="guidance_scale",
        )


def _seconds(profile: StabilityProfile) -> tuple[float, float, float]:
    return sum(profile.group_seconds), profile.fixed_seconds, sum(profile.reuse_seconds)


@dataclass
class _Tried:
    """A candidate after its run; a run that the journal remembers has no traces until they are asked for.

    Where it was refitted, the skeleton is the schedule from before.
    """

    skeleton: Schedule
    forecast: Forecast
    origin: str
    psnr: tuple[float, ...]
    quality: float
    rollout: Rollout | None = None
    is_refitted: bool = False


class _Search:
    """A search on one set of rollouts: what was run so far, and the points that came of it."""

    def __init__(
        self, rollouts: Rollouts, profiles: Sequence[StabilityProfile], journal: Journal, config: SearchConfig
    ):
        self.rollouts, self.profiles, self.journal, self.config = rollouts, profiles, journal, config
        self.forecasts = config.forecasts or (STEERED if rollouts.is_euler else TEACHER_FORCED)
        self.random = np.random.default_rng(config.seed)
        self.errors = velocity_errors(rollouts)
        probes = config.step_probes if rollouts.is_euler else 0
        self.weights = step_weights(rollouts, probes) if probes else None
        self.deadline = math.inf if config.time_limit is None else time.monotonic() + config.time_limit
        self.seconds = sum(profiles[0].group_seconds)
        self.points: list[Point] = []
        self.notes: list[str] = []
        self.best: _Tried | None = None

    def explore(self, budget: float, bar: Any) -> None:
        """Runs the portfolio of a budget, then refines the best of whole steps and, if they are close, of groups."""
        count = math.floor(budget * self.rollouts.num_steps + 1e-9)
        portfolio = list(self._portfolio(budget, count))
        tried = self._run_all([(skeleton, self.forecasts[0], origin) for origin, skeleton in portfolio])
        ahead = sorted(tried, key=lambda t: t.quality)[-2:] or [
            _Tried(skeleton, self.forecasts[0], origin, (), -math.inf) for origin, skeleton in portfolio
        ]
        tried += self._run_all([(one.skeleton, f, one.origin) for one in ahead for f in self.forecasts[1:]])
        whole = [t for t in tried if len(t.skeleton.groups) == 1]
        grouped = [t for t in tried if len(t.skeleton.groups) > 1]
        self._note(budget, whole, grouped)
        if whole:
            self.best = self._refine(max(whole, key=lambda t: t.quality), self.config.trials, bar)
            tried.append(self.best)
        if grouped and max(t.quality for t in grouped) > max(t.quality for t in tried) - WORTH_REFINING:
            refined = self._refine(max(grouped, key=lambda t: t.quality), self.config.trials, bar)
            tried += [refined, *self._refit(refined)]
        for one in sorted(tried, key=lambda t: t.quality)[-3:]:
            rollout = self._rollout_of(one)
            self.points.append(Point(rollout.schedule, f"{one.origin}, {one.forecast.name}", rollout.psnr))

    def _note(self, budget: float, whole: Sequence[_Tried], grouped: Sequence[_Tried]) -> None:
        """Says whether deciding per group of layers pays, before anything is refined."""
        if not whole or not grouped:
            return
        steps, groups = (max(t.quality for t in kind) for kind in (whole, grouped))
        verdict = (
            "the groups change in the same way, whole steps are the better unit"
            if steps >= groups
            else "deciding per group pays"
        )
        self.notes.append(f"budget {budget:g}: whole steps {steps:.1f} dB, groups {groups:.1f} dB: {verdict}")
        if not self.config.per_branch:
            return
        together, apart = (
            max((t.quality for t in grouped if bool(t.skeleton.branch_cells) == own), default=math.nan)
            for own in (False, True)
        )
        paid = "paid" if apart > together else "did not pay"
        self.notes.append(
            f"budget {budget:g}: branches at the same steps {together:.1f} dB, at different ones {apart:.1f} dB: "
            f"deciding per branch {paid}"
        )

    def _refit(self, tried: _Tried) -> Iterator[_Tried]:
        """The same cells with residuals fitted as they run; not where time or memory forbid it."""
        if time.monotonic() > self.deadline or not self._fits(with_terms(tried.skeleton, REFIT_TERMS), tried.forecast):
            return
        refitted = replace(tried, origin=f"{tried.origin}, refitted", is_refitted=True, rollout=None)
        key = f"{_key(tried.skeleton, tried.forecast)} refitted"
        if key not in self.journal.results:
            self.journal.add(key, self._rollout_of(refitted).psnr)
        refitted.psnr = tuple(self.journal.results[key])
        refitted.quality = quality(refitted.psnr, self.config.tail)
        yield refitted

    def _run_all(self, candidates: Sequence[tuple[Schedule, Forecast, str]]) -> list[_Tried]:
        return [self._run(*candidate) for candidate in candidates if self._fits(*candidate[:2])]

    def _portfolio(self, budget: float, count: int) -> Iterator[tuple[str, Schedule]]:
        steps = self.rollouts.num_steps
        seen: set[tuple[int, ...]] = set()
        lists = []
        for gamma in (1.0, 2.0):
            lists.append((f"whole steps, velocity errors^{gamma:g}", self._solved(count, self.errors**gamma)))
        if self.weights is not None:
            weighted = self.weights[:, None, None, None] * self.errors
            lists.append(("whole steps, weighted velocity errors", self._solved(count, weighted)))
        lists.append(
            ("whole steps, evenly", sorted({round(k * (steps - 1) / max(1, count - 1)) for k in range(count)}))
        )
        if self.best is not None:
            lists.append(("whole steps, thinned out", self._thinned(self.best, count)))
        for origin, computed in lists:
            if computed and tuple(computed) not in seen:
                seen.add(tuple(computed))
                yield origin, self._skipping(computed)
        for profile in self.profiles:
            if len(profile.groups) < 2:
                continue
            for apart in (False, True)[: 1 + self.config.per_branch]:
                for forecast in RESIDUAL_FORECASTS[: 1 + profile.has_gram]:
                    try:
                        schedule = plan(profile, budget, per_branch=apart, forecast=forecast)
                    except BudgetError:
                        continue
                    yield f"{len(profile.groups)} groups, {forecast}" + (", branches apart" if apart else ""), schedule

    def _skipping(self, computed: Sequence[int]) -> Schedule:
        return skipping(self.rollouts.fingerprint, computed, self.seconds)

    def _solved(self, count: int, errors: np.ndarray) -> list[int]:
        """The solver's choice of whole steps, by how well old velocities forecast new ones."""
        import layercache._core as core

        steps = self.rollouts.num_steps
        protected = np.zeros((steps, 1), dtype=bool)
        protected[:2] = True
        protected[-1:] = count > 3
        result = core.solve(
            np.ascontiguousarray(errors),
            np.ones(1),
            np.zeros(1),
            float(count),
            protected,
            list(SPANS),
            max_run=errors.shape[2] - 1,
        )
        return [step for step in range(steps) if result.cells[step, 0] < 0] if result.feasible else []

    def _thinned(self, tried: _Tried, count: int) -> list[int]:
        """The computed steps of a richer schedule without those that are forecast best."""
        computed = _computed(tried.skeleton)
        need = step_needs(self._rollout_of(tried), self.rollouts, tried.forecast)
        droppable = sorted((s for s in computed if s > 0), key=lambda s: need[s])
        dropped = set(droppable[: max(0, len(computed) - count)])
        return [step for step in computed if step not in dropped]

    def _refine(self, best: _Tried, trials: int, bar: Any) -> _Tried:
        """Exchanges one computed cell for a cached one at a time, as long as that helps."""
        known = {_key(best.skeleton, best.forecast)}
        bar.set_postfix_str(f"used {best.skeleton.used:.2f}: {best.quality:.2f} dB")
        neighbours = self._neighbours(best)
        for _ in range(trials):
            found = next((s for s in neighbours if _key(s, best.forecast) not in known), None)
            if found is None or time.monotonic() > self.deadline:
                break
            known.add(_key(found, best.forecast))
            if not self._fits(found, best.forecast):
                continue
            trial = self._run(found, best.forecast, best.origin.removesuffix(", refined") + ", refined", best)
            if trial.quality > best.quality:
                best, neighbours = trial, self._neighbours(trial)
                bar.set_postfix_str(f"used {best.skeleton.used:.2f}: {best.quality:.2f} dB")
            bar.update()
        return best

    def _neighbours(self, tried: _Tried) -> Iterator[Schedule]:
        """Schedules with one computed cell exchanged for a cached one."""
        if len(tried.skeleton.groups) > 1:
            return self._cell_exchanges(tried.skeleton)
        return self._step_exchanges(tried)

    def _step_exchanges(self, tried: _Tried) -> Iterator[Schedule]:
        computed = _computed(tried.skeleton)
        skipped = [step for step in range(self.rollouts.num_steps) if step not in computed]
        need = step_needs(self._rollout_of(tried), self.rollouts, tried.forecast)
        pairs = [(out, into) for out in computed[1:] for into in skipped]
        for out, into in self._mixed(pairs, lambda pair: _gain(need, *pair)):
            yield self._skipping(sorted({*computed, into} - {out}))

    def _cell_exchanges(self, skeleton: Schedule) -> Iterator[Schedule]:
        profile = next((p for p in self.profiles if p.groups == skeleton.groups), None)
        if profile is None or skeleton.branch_cells:
            return
        need = cell_needs(profile, skeleton)
        cells = skeleton.cells
        steps = range(1, skeleton.num_steps)
        moves = [
            (group, out, into)
            for group in range(len(skeleton.groups))
            for out in steps
            for into in steps
            if cells[out][group] is None and cells[into][group] is not None
        ]
        for group, out, into in self._mixed(moves, lambda move: _gain(need[:, move[0]], *move[1:])):
            exchanged = _with_exchanged(skeleton, group, out, into)
            if skeleton.made_by.get("forecast") == "fitted":
                yield fit_residuals(profile, exchanged)
            else:
                yield reforecast(exchanged, "secant")

    def _mixed(self, moves: list[Any], gain: Callable[[Any], float]) -> Iterator[Any]:
        """By falling gain, every fourth drawn by chance."""
        moves.sort(key=gain, reverse=True)
        while moves:
            for _ in range(3):
                if moves:
                    yield moves.pop(0)
            if moves:
                yield moves.pop(int(self.random.integers(len(moves))))

    def _run(self, skeleton: Schedule, forecast: Forecast, origin: str, near: _Tried | None = None) -> _Tried:
        key = _key(skeleton, forecast)
        if key in self.journal.results:
            psnr = tuple(self.journal.results[key])
            return _Tried(skeleton, forecast, origin, psnr, quality(psnr, self.config.tail))
        start, first = None, 0
        if near is not None and forecast == near.forecast:
            start = self._rollout_of(near)
            first = _first_difference(skeleton, near.skeleton)
        rollout = self.rollouts.run(skeleton, forecast, start=start, first=first)
        self.journal.add(key, rollout.psnr)
        return _Tried(skeleton, forecast, origin, rollout.psnr, quality(rollout.psnr, self.config.tail), rollout)

    def _rollout_of(self, tried: _Tried) -> Rollout:
        if tried.rollout is None and tried.is_refitted:
            tried.rollout = refit(self.rollouts, tried.skeleton, "teacher", REFIT_TERMS, tried.forecast)
        elif tried.rollout is None:
            tried.rollout = self.rollouts.run(tried.skeleton, tried.forecast)
        made_by = {"method": "layercache", "origin": tried.origin, "forecast": tried.forecast.name}
        schedule = replace(tried.rollout.schedule, made_by={**tried.rollout.schedule.made_by, **made_by})
        return replace(tried.rollout, schedule=schedule)

    def _fits(self, skeleton: Schedule, forecast: Forecast) -> bool:
        if self.config.max_cache_bytes is None:
            return True
        return self.rollouts.cache_bytes(with_terms_of(skeleton, forecast)) <= self.config.max_cache_bytes


def _computed(schedule: Schedule) -> list[int]:
    return [step for step in range(schedule.num_steps) if not schedule.is_skipped(step)]


def _gain(need: np.ndarray, out: int, into: int) -> float:
    """A neighbour takes over most of what a step gives, so shifts are the gentler moves."""
    return float(need[into] - need[out] * (0.5 if abs(out - into) == 1 else 1.0))


def _with_exchanged(schedule: Schedule, group: int, out: int, into: int) -> Schedule:
    """One cell of a group cached, another computed; every cached cell reuses step 0 until it is given a forecast."""

    def cell(step: int, k: int) -> Cell:
        computed = schedule.cells[step][k] is None
        if k == group and step in (out, into):
            computed = step == into
        return None if computed else {0: 1.0}

    cells = tuple(tuple(cell(step, k) for k in range(len(schedule.groups))) for step in range(schedule.num_steps))
    return replace(schedule, cells=cells, velocities=())


def _first_difference(a: Schedule, b: Schedule) -> int:
    """The first step whose cells differ; 0 where residuals are stored, which a later start would lack."""
    if any(cell for schedule in (a, b) for row in schedule.cells for cell in row):
        return 0
    return next((step for step, rows in enumerate(zip(a.cells, b.cells, strict=True)) if rows[0] != rows[1]), 0)


def _key(skeleton: Schedule, forecast: Forecast) -> str:
    identity = [skeleton.groups, skeleton.cells, forecast.__dict__, dict(skeleton.branch_cells)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
