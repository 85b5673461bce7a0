"""The other solvers in plain Python, as one would write them down.

They are oracles for the tests, and what the C++ is timed against.
"""

from __future__ import annotations

import math

import numpy as np

from support.oracle_scheduler import SLACK, Problem, cost_of_run, group_cost, spent

INFINITY = math.inf


def shortest_path(errors: np.ndarray, budget: int, gamma: float) -> tuple[float, list[int]]:
    """MeanCache's peak-suppressed shortest path (docs/methods.md, MeanCache): cost and computed steps."""
    steps, longest = errors.shape[0], errors.shape[1] - 1
    best = {(0, 0): (0.0, [])}
    for count in range(1, budget + 1):
        for end in range(1, steps + 1):
            options = []
            for start in range(max(0, end - longest), end):
                if (count - 1, start) in best:
                    weight = 0.0 if end == start + 1 else min(float(e) ** gamma for e in errors[start, end - start])
                    cost, path = best[count - 1, start]
                    options.append((cost + weight, [*path, start]))
            options = [option for option in options if option[0] < INFINITY]
            if options:
                best[count, end] = min(options, key=lambda option: option[0])
    found = [best[count, steps] for count in range(1, budget + 1) if (count, steps) in best]
    return min(found, key=lambda option: option[0], default=(INFINITY, []))


def priced_steps(problem: Problem, group: int, multiplier: float) -> list[int]:
    """Computed steps of one group of least error + multiplier * seconds; a state is the last two computed steps."""
    price = multiplier * problem.saving(group)
    best: dict[tuple[int, int], tuple[float, tuple[int, int] | None]] = {(-1, 0): (price, None)}
    finish: tuple[float, tuple[int, int] | None] = (INFINITY, None)
    for anchor in range(problem.steps):
        for older in range(-1, anchor):
            if (older, anchor) not in best:
                continue
            value = best[older, anchor][0]
            computed = [older, anchor] if older >= 0 else [anchor]
            for end in range(anchor + 1, min(problem.steps, anchor + problem.longest_run + 1) + 1):
                if any(problem.must_compute(step, group) for step in range(anchor + 1, end)):
                    break
                total = value + cost_of_run(problem, group, computed, anchor, end).cost
                if end == problem.steps:
                    finish = min(finish, (total, (older, anchor)), key=lambda option: option[0])
                elif total + price < best.get((anchor, end), (INFINITY, None))[0]:
                    best[anchor, end] = (total + price, (older, anchor))
    steps, state = [], finish[1]
    while state is not None:
        steps.append(state[1])
        state = best[state][1]
    return steps[::-1]


def lagrangian(problem: Problem, rounds: int = 40) -> float:
    """Error of the cheapest affordable multiplier's schedule, before what is left of the budget is spent."""
    low, high = 0.0, 1e-12

    def computed(multiplier: float) -> list[list[int]]:
        return [priced_steps(problem, group, multiplier) for group in range(problem.groups)]

    def fits(steps: list[list[int]]) -> bool:
        return spent(problem, steps) <= problem.budget * SLACK

    while not fits(computed(high)):
        low, high = high, high * 64
    for _ in range(rounds):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if fits(computed(middle)) else (middle, high)
    return sum(group_cost(problem, group, steps) for group, steps in enumerate(computed(high)))
