"""Times of the schedulers in C++ against the plain Python of the tests, and how far the greedy ones are from exact.

python bench/solvers.py --json bench/results/solvers.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pareto import load
from tqdm import tqdm

import layercache
from layercache import _core
from layercache.errors import BudgetError
from layercache.planning.profile import StabilityProfile
from layercache.tools.report.machine import machine_info, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import oracle_scheduler, oracle_solvers
from support.oracle_scheduler import Problem

STEPS, GROUPS, SPANS, LONGEST = 100, 60, 8, 12
PARTITIONS = ("whole", "sixth", "thirds", "measured")
BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.33, 0.25)


def table(rng: np.random.Generator, steps: int, groups: int, rough: float = 0.1) -> np.ndarray:
    """Errors that grow with the distance and shrink with the span up to a point, as measured ones do."""
    scale = rng.uniform(0.5, 2.0, (steps, groups, 1, 1))
    distance = np.arange(LONGEST + 1.0)[:, None] ** rng.uniform(1.0, 1.6)
    damping = 1 - 0.5 * np.sin(np.linspace(0, 3, SPANS + 1))
    noise = rng.uniform(1 - rough, 1 + rough, (steps, groups, LONGEST + 1, SPANS + 1))
    return scale * distance * damping * noise


def problem_of(rng: np.random.Generator, steps: int, groups: int, share: float, rough: float = 0.1) -> Problem:
    return Problem(
        errors=table(rng, steps, groups, rough),
        compute_cost=[1.0] * groups,
        cached_cost=[0.01] * groups,
        budget=share * steps * groups,
        protected=np.zeros((steps, groups), bool),
        spans=list(range(1, SPANS + 1)),
        max_run=LONGEST,
    )


def solve(problem: Problem, method: str) -> _core.Result:
    # not asdict, which would copy the table
    arguments = {field.name: getattr(problem, field.name) for field in fields(problem)}
    return _core.solve(**arguments, method=method)


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds)


def times(repeats: int, python: bool) -> list[dict[str, Any]]:
    """Every solver at 100 steps, 60 groups, 8 spans and runs of up to 12; plain Python once, on one core."""
    rng = np.random.default_rng(0)
    problem = problem_of(rng, STEPS, GROUPS, 0.55)
    edges = np.ascontiguousarray(problem.errors[:, 0])
    # the greedy Python costs every group again for every candidate: a small share of the moves has to do
    short = problem_of(rng, 40, 6, 0.8)
    calls: list[tuple[str, Callable[[], Any], Callable[[], Any] | None, Callable[[], Any] | None]] = [
        (
            "removal",
            lambda: solve(problem, "removal"),
            lambda: solve(short, "removal"),
            lambda: oracle_scheduler.removal(short),
        ),
        ("addition", lambda: solve(problem, "addition"), None, None),
        (
            "lagrangian",
            lambda: solve(problem, "lagrangian"),
            lambda: solve(short, "lagrangian"),
            lambda: oracle_solvers.lagrangian(short),
        ),
        ("exact, 50 steps, 3 groups", lambda: solve(problem_of(rng, 50, 3, 0.6), "exact"), None, None),
        (
            "peak-suppressed path",
            lambda: _core.shortest_path(edges, 50),
            lambda: _core.shortest_path(edges, 50),
            lambda: oracle_solvers.shortest_path(edges, 50, 5.0),
        ),
        ("lexicographic path", lambda: _core.shortest_path(edges, 50, mode="lexicographic"), None, None),
    ]
    rows = []
    for name, full, same, plain in tqdm(calls, desc="timing"):
        row: dict[str, Any] = {"solver": name, "milliseconds": milliseconds(full, repeats)}
        if python and same is not None and plain is not None:
            row["python_ratio"] = milliseconds(plain, 1) / milliseconds(same, repeats)
        rows.append(row)
    return rows


def gaps(count: int) -> dict[str, Any]:
    """Error above the exact optimum's, relative, over random tables."""
    found: dict[str, list[float]] = {"removal": [], "addition": [], "lagrangian": [], "best": []}
    for seed in tqdm(range(count), desc="gaps"):
        rng = np.random.default_rng([1, seed])
        steps, groups = int(rng.integers(12, 41)), int(rng.integers(1, 5))
        problem = problem_of(rng, steps, groups, float(rng.uniform(0.3, 0.9)), rough=float(rng.uniform(0.0, 0.5)))
        exact = solve(problem, "exact")
        for method, values in found.items():
            result = solve(problem, method)
            if exact.feasible and result.feasible and exact.total_error > 0:
                values.append(result.total_error / exact.total_error - 1)
    return {method: summary(values) for method, values in found.items()}


def measured_tables() -> Iterator[tuple[str, StabilityProfile]]:
    """Profiles of the bundled model and of the deeper one: every partition, 30 and 50 steps, guidance or none."""
    settings = [("demo", steps, guidance) for steps in (30, 50) for guidance in (4.0, 1.0)]
    settings.append(("examples/deep_model", 30, 4.0))
    for model, steps, guidance in tqdm(settings, desc="measuring"):
        pipe = load(model, None)
        pipe.set_progress_bar_config(disable=True)
        for partition in PARTITIONS:
            call = {"num_inference_steps": steps, "guidance_scale": guidance, "partition": partition}
            profile = layercache.calibrate(pipe, [["cat", "rocket"]], seeds=[1000], progress=False, **call)
            yield f"{model}, {steps} steps, guidance {guidance:g}, {partition}", profile


def measured_gaps() -> dict[str, Any]:
    """Error above the exact optimum's, relative, over the tables of `measured_tables` at every budget."""
    found: dict[str, list[float]] = {"removal": [], "addition": [], "lagrangian": [], "best": []}
    names, missed = [], dict.fromkeys(found, 0)
    for name, profile in measured_tables():
        names.append(name)
        for budget in BUDGETS:
            try:
                exact = layercache.plan(profile, budget, method="exact").made_by
            except BudgetError:
                continue  # the protected steps and the longest run need more
            assert exact["solver"] == "exact"
            for method, values in found.items():
                try:
                    error = layercache.plan(profile, budget, method=method).made_by["error"]
                except BudgetError:
                    missed[method] += 1
                    continue
                values.append(error / exact["error"] - 1 if exact["error"] else 0.0)
    return {
        "tables": names,
        "budgets": BUDGETS,
        "found_nothing": missed,
        **{method: summary(values) for method, values in found.items()},
    }


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "tables": len(values),
        "mean": float(np.mean(values)),
        "quantile90": float(np.quantile(values, 0.9)),
        "largest": float(np.max(values)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=1000, help="random tables for the gaps")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-python", action="store_true", help="leave out the plain Python (a minute)")
    parser.add_argument("--no-measured", action="store_true", help="leave out the tables measured on models")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    measured = times(args.repeats, not args.no_python)
    for row in measured:
        ratio = f"{row['python_ratio']:8.0f}x Python" if "python_ratio" in row else ""
        print(f"{row['solver']:28} {row['milliseconds']:8.2f} ms {ratio}")
    statistics = {"gaps": gaps(args.tables)}
    if not args.no_measured:
        statistics["measured_gaps"] = measured_gaps()
    for title, found in statistics.items():
        for method in ("removal", "addition", "lagrangian", "best"):
            gap = found[method]
            print(
                f"{title}, {method}: mean {gap['mean']:.2%}, 90 % {gap['quantile90']:.2%}, most {gap['largest']:.2%} "
                f"above exact ({gap['tables']})"
            )
    if args.json:
        size = {"steps": STEPS, "groups": GROUPS, "spans": SPANS, "longest_run": LONGEST}
        write_json(args.json, {"machine": machine_info(), "size": size, "times": measured, **statistics})


if __name__ == "__main__":
    main()
