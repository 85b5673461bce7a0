"""Fitting the forecasts of residuals while the schedule runs beside the full model (methods.md §17.1, ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from layercache._utils.validate import expect
from layercache.errors import CalibrationError, ScheduleError
from layercache.models.spec import ModelSpec, Streams
from layercache.planning.fit import Forecast, solve_ridge
from layercache.planning.rollout import Rollout, RolloutRouter, Rollouts
from layercache.runtime.forward import Forward
from layercache.runtime.recording import RecordingRouter
from layercache.runtime.router import Router
from layercache.runtime.state import CacheState
from layercache.schedule.memory_plan import GroupAction
from layercache.schedule.schedule import Cell, Schedule

TARGETS = ("teacher", "steer")

Term = tuple[int, int]
"""A stored residual: the step that stored it, and its group."""


@dataclass
class _Products:
    """Inner products of the target and the terms of one run of reused groups, summed over samples and branches."""

    terms: list[Term]
    gram: np.ndarray

    def add(self, target: torch.Tensor, residuals: Sequence[torch.Tensor]) -> None:
        rows = torch.stack([t.flatten().double() for t in (target, *residuals)])
        self.gram += (rows @ rows.T).cpu().numpy()


@dataclass
class _Lesson:
    """What one run of a schedule beside the full model showed, by ``(step, last group, branch)``."""

    schedule: Schedule
    target: str
    products: dict[tuple[int, int, str], _Products] = field(default_factory=dict)

    def at(self, step: int, group: int, branch: str) -> _Products:
        # branches with cells of their own are fitted on their own
        key = (step, group, branch if branch in self.schedule.branch_cells else "")
        if key not in self.products:
            terms = run_terms(self.schedule.cells_of(branch)[step], group)
            self.products[key] = _Products(terms, np.zeros((len(terms) + 1, len(terms) + 1)))
        return self.products[key]


def run_terms(row: Sequence[Cell], last: int) -> list[Term]:
    """The terms of the run of reused groups that ends with group ``last``, in the order they are stored in."""
    first = last
    while first > 0 and row[first - 1]:
        first -= 1
    return [(anchor, g) for g in range(first, last + 1) for anchor in sorted(row[g] or {}, reverse=True)]


class _FullRouter(RecordingRouter):
    """Remembers the image stream in front of and behind every group of a full run, by branch."""

    def __init__(self, transformer: Any, spec: ModelSpec, groups: Sequence[tuple[int, int]], scheduler: Any):
        super().__init__(transformer, spec, scheduler, groups)
        self.streams: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def begin(self, forward: Forward) -> None:
        super().begin(forward)
        self.streams[self.branch] = []

    def look(self, group: int, before: Any, after: Any) -> None:
        self.streams[self.branch].append((before[0], after[0]))


class CachedRouter(RolloutRouter):
    """Runs the schedule, and notes at every run of reused groups what it should have given."""

    def __init__(self, model: _FullRouter, lesson: _Lesson, scheduler: Any):
        super().__init__(model.transformer, model.spec, lesson.schedule, scheduler, 0)
        self._model, self._lesson = model, lesson
        self._place = (0, "")

    def _choose_row(self, state: CacheState, step: int) -> tuple[GroupAction, ...]:
        actions = super()._choose_row(state, step)
        self._place = step, next(name for name, own in self.states.items() if own is state)
        return actions

    def reuse(self, group: int, image: Any, text: Any, results: Streams | None = None) -> Streams:
        step, branch = self._place
        products = self._lesson.at(step, group, branch)
        streams = self._model.streams[branch]
        start = image if self._lesson.target == "steer" else streams[products.terms[0][1]][0]
        residuals: list[Any] = [buffer.tensor for terms in self.row.runs[group] for buffer in terms.buffers[0]]
        products.add(streams[group][1].double() - start.double(), residuals)
        return super().reuse(group, image, text, results)


def refit(
    rollouts: Rollouts,
    schedule: Schedule,
    target: str = "steer",
    terms: int = 2,
    forecast: Forecast | None = None,
    rounds: int = 2,
    ridge: float = 1e-3,
) -> Rollout:
    """The same computed cells, with forecasts fitted to what the running schedule misses; the best of the rounds.

    All samples run by the schedule, each beside its own full run. Behind every run of reused groups the forecast
    ``sum_g F_0 + sum_k d_k (F_k - F_0) + b F_0``, F being the stored residuals of the cached run, is compared with

    * ``"teacher"``: the residual that the groups have in the full run;
    * ``"steer"``: what takes the cached run's image stream to where the full run's is behind these groups.

    Least squares over samples, elements and (where they share cells) branches; the coefficients found serve from the
    next round on, because what is stored and missed depends on them. The text stream takes the same coefficients.
    Source: methods.md §17.1, for residuals (ours).

    Args:
        rollouts: the samples.
        schedule: what is computed; cells that skip whole steps stay as they are.
        target: ``"teacher"`` or ``"steer"``.
        terms: how many residuals of a group are combined at most; each more costs memory.
        forecast: of the velocities, fitted along the way.
        rounds: each costs a full run and a run of the schedule.
        ridge: relative to the mean square of each term.

    Raises:
        ArgumentError: no rollouts, or no schedule.
        ScheduleError: unknown target, or terms out of range.
        CalibrationError: a residual is not finite.
    """
    expect("refit", rollouts, Rollouts)
    expect("refit", schedule, Schedule)
    if target not in TARGETS:
        raise ScheduleError(f"unknown target {target!r}; choose {' or '.join(TARGETS)}", argument="target")
    if not 1 <= terms <= 8:
        raise ScheduleError(f"a forecast takes 1 to 8 residuals, got {terms}", argument="terms")
    current = with_terms(schedule, terms)
    rollouts_made = []
    for _ in range(rounds):
        lesson = _Lesson(current, target)
        rollouts_made.append(_attend(rollouts, lesson, forecast))
        current = _corrected(lesson, ridge, {"residuals": target, "residual_terms": terms})
    rollouts_made.append(rollouts.run(current, forecast))
    return max(rollouts_made, key=lambda rollout: rollout.quality)


def _attend(rollouts: Rollouts, lesson: _Lesson, forecast: Forecast | None) -> Rollout:
    def routers(model_scheduler: Any, scheduler: Any) -> tuple[Router, RolloutRouter]:
        model = _FullRouter(rollouts.transformer, rollouts.spec, lesson.schedule.groups, model_scheduler)
        return model, CachedRouter(model, lesson, scheduler)

    return rollouts.run_beside_full(lesson.schedule, forecast, routers)


def with_terms(schedule: Schedule, terms: int) -> Schedule:
    """Every cached cell reads its group's newest residuals, so many at most; those it read keep their coefficients."""

    def cell(cells: Sequence[Sequence[Cell]], step: int, group: int) -> Cell:
        given = cells[step][group]
        if not given:
            return given
        newest = [k for k in range(step - 1, -1, -1) if cells[k][group] is None][:terms]
        kept = {k: given.get(k, 0.0) for k in newest}
        kept[newest[0]] += sum(given.values()) - sum(kept.values())
        return kept

    def changed(cells: Sequence[Sequence[Cell]]) -> tuple[tuple[Cell, ...], ...]:
        return tuple(tuple(cell(cells, i, g) for g in range(len(row))) for i, row in enumerate(cells))

    own = {name: changed(cells) for name, cells in schedule.branch_cells.items()}
    return replace(schedule, cells=changed(schedule.cells), branch_cells=own)


def _corrected(lesson: _Lesson, ridge: float, metadata: Mapping[str, Any]) -> Schedule:
    """The schedule with every coefficient fitted to what the lesson showed."""
    schedule = lesson.schedule
    cells = {"": [list(row) for row in schedule.cells]}
    cells |= {name: [list(row) for row in own] for name, own in schedule.branch_cells.items()}
    for (step, _, branch), products in lesson.products.items():
        if not np.isfinite(products.gram).all():
            raise CalibrationError(
                f"a residual at step {step} is NaN or infinite; no forecast can be fitted to this run"
            )
        fitted: dict[int, dict[int, float]] = {}
        for (anchor, group), value in zip(products.terms, _solve(products, ridge), strict=True):
            fitted.setdefault(group, {})[anchor] = value
        for group, cell in fitted.items():
            cells[branch][step][group] = cell
    frozen = {name: tuple(tuple(row) for row in rows) for name, rows in cells.items()}
    shared = frozen.pop("")
    return replace(schedule, cells=shared, branch_cells=frozen, made_by={**schedule.made_by, **metadata})


def _solve(products: _Products, ridge: float) -> list[float]:
    """Coefficients of the terms; the ridge pulls to reusing the newest residual of every group."""
    count = len(products.terms)
    newest = {group: at for at, (_, group) in reversed(list(enumerate(products.terms)))}
    # columns are terms; a row for every d_k (F_k - F_0) and every b F_0
    rows = np.eye(count)
    for at, (_, group) in enumerate(products.terms):
        if at != newest[group]:
            rows[at, newest[group]] = -1.0
    start = np.zeros(count)
    start[list(newest.values())] = 1.0
    gram, right = products.gram[1:, 1:], products.gram[1:, 0]
    solution = solve_ridge(rows @ gram @ rows.T, rows @ (right - gram @ start), ridge)
    return [float(value) for value in start + rows.T @ np.asarray(solution)]
