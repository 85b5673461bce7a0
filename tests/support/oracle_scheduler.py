"""The schedulers once more in plain Python, and brute force: slow, but easy to check against the definition.

Nothing is updated here. Every candidate of every move is scored by costing its whole group again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import numpy as np

INFINITY = math.inf
SLACK = 1 + 1e-12


@dataclass(frozen=True)
class Problem:
    errors: np.ndarray
    compute_cost: list[float]
    cached_cost: list[float]
    budget: float
    protected: np.ndarray
    spans: list[int] = field(default_factory=list)
    history: int = 3
    max_run: int = 8
    tau: float = 0.05

    @property
    def steps(self) -> int:
        return self.errors.shape[0]

    @property
    def groups(self) -> int:
        return self.errors.shape[1]

    @property
    def longest_run(self) -> int:
        return min(self.max_run, self.errors.shape[2] - 1)

    def must_compute(self, step: int, group: int) -> bool:
        return step == 0 or bool(self.protected[step, group])

    def saving(self, group: int) -> float:
        return self.compute_cost[group] - self.cached_cost[group]


@dataclass(frozen=True)
class Run:
    anchor: int
    end: int
    cost: float
    span: int
    base: int


@dataclass(frozen=True)
class Solution:
    computed: list[list[int]]
    total_error: float
    spent: float

    def feasible(self, problem: Problem) -> bool:
        return self.spent <= problem.budget * SLACK


def resolve(computed: list[int], anchor: int, span: int, problem: Problem) -> int | None:
    """Step b for span K at this anchor, or None where there is none within the table."""
    older = [step for step in computed if step < anchor]
    kept = older[max(0, len(older) - (problem.history - 1)) :]
    if not kept:
        return None
    far_enough = [step for step in kept if step <= anchor - span]
    base = max(far_enough) if far_enough else min(kept)
    return base if anchor - base < problem.errors.shape[3] else None


def cost_of_run(problem: Problem, group: int, computed: list[int], anchor: int, end: int) -> Run:
    """RUN of the algorithm: cached steps anchor + 1 .. end - 1."""
    cached = range(anchor + 1, end)
    if len(cached) > problem.longest_run:
        return Run(anchor, end, INFINITY, 0, -1)

    def total(effective_span: int) -> float:
        return sum((float(problem.errors[i, group, i - anchor, effective_span]) for i in cached), 0.0)

    reuse = best = Run(anchor, end, total(0), 0, -1)
    for span in sorted(set(problem.spans)):
        base = resolve(computed, anchor, span, problem)
        if base is None:
            continue
        cost = total(anchor - base)
        if cost < best.cost:
            best = Run(anchor, end, cost, span, base)
    return reuse if best.cost > (1 - problem.tau) * reuse.cost else best


def runs_of(problem: Problem, group: int, computed: list[int]) -> list[Run]:
    ends = [*computed[1:], problem.steps]
    return [cost_of_run(problem, group, computed, anchor, end) for anchor, end in zip(computed, ends, strict=True)]


def group_cost(problem: Problem, group: int, computed: list[int]) -> float:
    return sum((run.cost for run in runs_of(problem, group, computed)), 0.0)


def spent(problem: Problem, computed: list[list[int]]) -> float:
    seconds = 0.0
    for group, steps in enumerate(computed):
        seconds += len(steps) * problem.compute_cost[group]
        seconds += (problem.steps - len(steps)) * problem.cached_cost[group]
    return seconds


def solution(problem: Problem, computed: list[list[int]]) -> Solution:
    total = sum((group_cost(problem, group, steps) for group, steps in enumerate(computed)), 0.0)
    return Solution([list(steps) for steps in computed], total, spent(problem, computed))


def flipped(computed: list[list[int]], step: int, group: int) -> list[list[int]]:
    changed = [list(steps) for steps in computed]
    changed[group] = sorted(set(changed[group]) ^ {step})
    return changed


def moves(problem: Problem, computed: list[list[int]], adding: bool) -> Iterator[tuple[float, float, int, int]]:
    """(score, compute cost, step, group) of every cell that may be dropped, or added."""
    for step, group in product(range(problem.steps), range(problem.groups)):
        if (step in computed[group]) == adding or (not adding and problem.must_compute(step, group)):
            continue
        before = group_cost(problem, group, computed[group])
        after = group_cost(problem, group, flipped(computed, step, group)[group])
        rise = before - after if adding else after - before
        yield rise / problem.saving(group), problem.compute_cost[group], step, group


def give_up_order(move: tuple[float, float, int, int]) -> tuple[float, float, int, int]:
    score, cost, step, group = move
    return score, -cost, -step, group


def removal(problem: Problem) -> Solution:
    computed = [list(range(problem.steps)) for _ in range(problem.groups)]
    while spent(problem, computed) > problem.budget * SLACK:
        candidates = [move for move in moves(problem, computed, adding=False) if move[0] < INFINITY]
        if not candidates:
            break
        _, _, step, group = min(candidates, key=give_up_order)
        computed = flipped(computed, step, group)
    return solution(problem, computed)


def sparsest(problem: Problem, group: int) -> list[int]:
    best: dict[int, tuple[int, float, list[int]]] = {0: (1, 0.0, [0])}
    for anchor in range(problem.steps):
        count, cost, path = best[anchor]
        for end in range(anchor + 1, problem.steps + 1):
            if any(problem.must_compute(step, group) for step in range(anchor + 1, end)):
                break
            run = cost_of_run(problem, group, path, anchor, end)
            if run.cost == INFINITY:
                break
            offer = (count + 1, cost + run.cost, [*path, end])
            if end not in best or offer[:2] < best[end][:2]:
                best[end] = offer
    return best[problem.steps][2][:-1]


def addition(problem: Problem) -> Solution:
    computed = [sparsest(problem, group) for group in range(problem.groups)]
    while True:
        candidates = [
            move
            for move in moves(problem, computed, adding=True)
            if move[0] > 0 and spent(problem, computed) + problem.saving(move[3]) <= problem.budget * SLACK
        ]
        if not candidates:
            return solution(problem, computed)
        _, _, step, group = max(candidates, key=give_up_order)
        computed = flipped(computed, step, group)


def subsets(problem: Problem, group: int) -> Iterator[list[int]]:
    free = [step for step in range(problem.steps) if not problem.must_compute(step, group)]
    forced = [step for step in range(problem.steps) if problem.must_compute(step, group)]
    for size in range(len(free) + 1):
        for chosen in combinations(free, size):
            yield sorted([*forced, *chosen])


def brute_force(problem: Problem) -> float:
    """The smallest total error within the budget; infinite where no schedule fits."""
    per_group = [
        [(group_cost(problem, group, steps), steps) for steps in subsets(problem, group)]
        for group in range(problem.groups)
    ]
    lowest = INFINITY
    for choice in product(*per_group):
        total = sum(cost for cost, _ in choice)
        computed = [steps for _, steps in choice]
        if total < lowest and spent(problem, computed) <= problem.budget * SLACK:
            lowest = total
    return lowest


def smooth_problem(steps: int = 50, groups: int = 3, share: float = 0.6, seed: int = 0, **changes: object) -> Problem:
    """Errors that grow with distance and shrink with a span, as measured ones do."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 2.0, (steps, groups, 1, 1))
    distance = np.arange(9.0)[:, None]
    damping = np.array([1.0, 0.8, 0.6, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    errors = scale * distance**1.3 * damping * rng.uniform(0.9, 1.1, (steps, groups, 9, 10))
    compute_cost = [1.0] * groups
    problem = Problem(
        errors=errors,
        compute_cost=compute_cost,
        cached_cost=[0.01] * groups,
        budget=share * steps * sum(compute_cost),
        protected=np.zeros((steps, groups), bool),
        spans=[1, 2, 3, 4, 5, 6],
    )
    return replace(problem, **changes)
