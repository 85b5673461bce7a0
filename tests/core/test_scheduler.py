"""layercache._core.solve against its definition, a plain-Python twin and brute force."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercache import _core
from support import oracle_scheduler as oracle
from support import oracle_solvers
from support.marks import slow
from support.oracle_scheduler import Problem, smooth_problem

GREEDY = ["removal", "addition"]
METHODS = [*GREEDY, "exact", "lagrangian", "best"]


def solve(problem: Problem, method: str = "best") -> _core.Result:
    return _core.solve(**asdict(problem), method=method)


def table(rng: np.random.Generator, shape: tuple[int, int, int, int], forbidden: float) -> np.ndarray:
    """Sixteenths, so that sums are exact in any order; a share of the entries forbids caching."""
    errors = rng.integers(0, 64, shape) / 16
    errors[rng.random(shape) < forbidden] = math.inf
    return errors


def between(low: int, high: int) -> st.SearchStrategy[int]:
    """Spread evenly: drawn integers favour the small ends, where hardly anything can be cached."""
    return st.sampled_from(range(low, high + 1))


@st.composite
def problems(draw: st.DrawFn, max_steps: int = 9, max_groups: int = 3) -> Problem:
    steps = draw(between(1, max_steps))
    groups = draw(between(1, max_groups))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (steps, groups, draw(between(2, max_steps)), draw(between(1, 6)))
    compute_cost = [draw(st.sampled_from([0.5, 1.0, 1.5, 2.0])) for _ in range(groups)]
    share = draw(st.sampled_from([0.0, 0.125]))
    return Problem(
        errors=table(rng, shape, forbidden=draw(st.sampled_from([0.0, 0.0, 0.05, 0.4]))),
        compute_cost=compute_cost,
        cached_cost=[share * cost for cost in compute_cost],
        budget=draw(st.sampled_from([0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])) * steps * sum(compute_cost),
        protected=rng.random((steps, groups)) < draw(st.sampled_from([0.0, 0.2])),
        spans=[draw(between(1, 6)) for _ in range(draw(between(0, 4)))],
        history=draw(between(1, 4)),
        max_run=draw(between(1, 8)),
        tau=draw(st.sampled_from([0.0, 0.05, 0.5])),
    )


def computed_steps(result: _core.Result, group: int) -> list[int]:
    return [int(step) for step in np.flatnonzero(result.cells[:, group] < 0)]


def expected_arrays(problem: Problem, result: _core.Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, anchors and bases that follow from the set of computed cells alone."""
    cells, anchor, base = (np.full((problem.steps, problem.groups), -1, np.int32) for _ in range(3))
    for group in range(problem.groups):
        for run in oracle.runs_of(problem, group, computed_steps(result, group)):
            inside = slice(run.anchor + 1, run.end)
            cells[inside, group] = run.span
            anchor[inside, group] = run.anchor
            base[inside, group] = run.base
    return cells, anchor, base


def check_cached_cell(problem: Problem, result: _core.Result, step: int, group: int) -> None:
    computed = computed_steps(result, group)
    span, anchor, base = (int(array[step, group]) for array in (result.cells, result.anchor, result.base))
    assert anchor == max(a for a in computed if a < step)
    assert step - anchor <= min(problem.max_run, problem.errors.shape[2] - 1)
    assert (span > 0) == (base >= 0)
    if span:
        older = [b for b in computed if b < anchor][::-1][: problem.history - 1]
        assert span in problem.spans
        assert base in older
        assert anchor - base >= span or base == older[-1]
        assert anchor - base <= problem.errors.shape[3] - 1


def cell_error(problem: Problem, result: _core.Result, step: int, group: int) -> float:
    anchor, base = int(result.anchor[step, group]), int(result.base[step, group])
    return float(problem.errors[step, group, step - anchor, anchor - base if base >= 0 else 0])


def check_result(problem: Problem, result: _core.Result) -> None:
    cached = [(int(step), int(group)) for step, group in np.argwhere(result.cells >= 0)]
    assert not any(problem.must_compute(step, group) for step, group in cached)
    for step, group in cached:
        check_cached_cell(problem, result, step, group)
    for array, expected in zip(
        (result.cells, result.anchor, result.base), expected_arrays(problem, result), strict=True
    ):
        assert array.dtype == np.int32
        assert np.array_equal(array, expected)
    assert math.isfinite(result.total_error)
    assert result.total_error == sum(cell_error(problem, result, *cell) for cell in cached)


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from(METHODS))
def test_result_obeys_every_rule(problem: Problem, method: str) -> None:
    result = solve(problem, method)
    check_result(problem, result)
    spent = sum(
        problem.compute_cost[group] if span < 0 else problem.cached_cost[group]
        for (_, group), span in np.ndenumerate(result.cells)
    )
    assert result.spent == pytest.approx(spent)
    assert result.feasible == (result.spent <= problem.budget * oracle.SLACK)


@settings(max_examples=600, deadline=None)
@given(problems(), st.sampled_from(GREEDY))
def test_equals_the_plain_python_twin(problem: Problem, method: str) -> None:
    result = solve(problem, method)
    twin = getattr(oracle, method)(problem)
    assert [computed_steps(result, group) for group in range(problem.groups)] == twin.computed
    assert result.total_error == twin.total_error
    assert result.spent == twin.spent
    assert result.feasible == twin.feasible(problem)


@pytest.mark.parametrize("method", ["removal", "addition"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_twin_on_smooth_tables(method: str, seed: int) -> None:
    problem = smooth_problem(steps=14, groups=2, share=0.55, seed=seed)
    result = solve(problem, method)
    twin = getattr(oracle, method)(problem)
    assert [computed_steps(result, group) for group in range(2)] == twin.computed
    assert result.total_error == pytest.approx(twin.total_error)


@settings(max_examples=60, deadline=None)
@given(problems(max_steps=10, max_groups=1), st.sampled_from(METHODS))
def test_never_below_brute_force_one_group(problem: Problem, method: str) -> None:
    result = solve(problem, method)
    if result.feasible:
        assert result.total_error >= oracle.brute_force(problem)


@settings(max_examples=40, deadline=None)
@given(problems(max_steps=6, max_groups=2), st.sampled_from(METHODS))
def test_never_below_brute_force_two_groups(problem: Problem, method: str) -> None:
    result = solve(problem, method)
    if result.feasible:
        assert result.total_error >= oracle.brute_force(problem)


@settings(max_examples=150, deadline=None)
@given(problems(max_steps=10, max_groups=1))
def test_exact_is_brute_force_one_group(problem: Problem) -> None:
    check_exact(replace(problem, history=min(problem.history, 3)))


@settings(max_examples=60, deadline=None)
@given(problems(max_steps=6, max_groups=2))
def test_exact_is_brute_force_two_groups(problem: Problem) -> None:
    check_exact(replace(problem, history=min(problem.history, 3)))


@settings(max_examples=25, deadline=None)
@given(problems(max_steps=5, max_groups=3))
def test_exact_is_brute_force_three_groups(problem: Problem) -> None:
    check_exact(replace(problem, history=min(problem.history, 3)))


def check_exact(problem: Problem) -> None:
    result, least = solve(problem, "exact"), oracle.brute_force(problem)
    assert result.feasible == math.isfinite(least)
    if result.feasible:
        assert result.total_error == least
        assert result.method == "exact"
        assert solve(problem, "best").total_error == least


@settings(max_examples=200, deadline=None)
@given(problems())
def test_best_is_the_best(problem: Problem) -> None:
    problem = replace(problem, history=min(problem.history, 3))
    best = solve(problem, "best")
    others = [solve(problem, method) for method in METHODS]
    assert best.feasible == any(other.feasible for other in others)
    if best.feasible:
        assert best.total_error == min(other.total_error for other in others if other.feasible)


@pytest.mark.parametrize("method", ["exact", "lagrangian"])
def test_more_history_than_the_solver_looks_at_never_picks_a_forbidden_forecast(method: str) -> None:
    for seed in range(400):
        rng = np.random.default_rng(seed)
        errors = table(rng, (9, 1, 3, 4), forbidden=0.5)
        problem = Problem(
            errors, [1.0], [0.0], 6.0, np.zeros((9, 1), bool), spans=[1, 3], history=4, max_run=2, tau=0.0
        )
        check_result(problem, solve(problem, method))


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4, 0.3])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_lagrangian_is_close_to_exact(groups: int, share: float) -> None:
    problem = smooth_problem(steps=40, groups=groups, share=share)
    exact, lagrangian = solve(problem, "exact"), solve(problem, "lagrangian")
    assert exact.feasible and lagrangian.feasible
    assert exact.total_error <= lagrangian.total_error <= (1.02 if groups > 1 else 1.1) * exact.total_error


def test_exact_of_many_unequal_groups_says_that_it_is_lagrangian() -> None:
    rng = np.random.default_rng(0)
    groups = 24
    problem = smooth_problem(steps=60, groups=groups, compute_cost=list(rng.uniform(0.5, 2.0, groups)), budget=1000.0)
    assert solve(problem, "exact").method == "lagrangian"


def test_ctrl_c_ends_a_solver() -> None:
    code = (
        "import signal, sys; from dataclasses import asdict;"
        "from layercache import _core; from support.oracle_scheduler import smooth_problem;"
        "problem = asdict(smooth_problem(steps=180, groups=60, max_run=8));"
        "signal.setitimer(signal.ITIMER_REAL, 0.3); signal.signal(signal.SIGALRM, signal.default_int_handler);"
        "_core.solve(**problem, method='exact')"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr


def test_the_gil_is_released() -> None:
    problem, seen = smooth_problem(steps=60, groups=15), []
    thread = threading.Thread(target=lambda: (solve(problem, "exact"), seen.append("solved")))
    thread.start()
    count = 0
    while not seen:
        count += 1
    thread.join()
    assert count > 1000


@pytest.mark.parametrize("seed", range(8))
def test_close_to_brute_force_on_smooth_tables(seed: int) -> None:
    problem = smooth_problem(steps=11, groups=1, share=0.6, seed=seed)
    assert solve(problem).total_error <= 1.35 * oracle.brute_force(problem)


@settings(max_examples=60, deadline=None)
@given(problems(max_steps=8, max_groups=1))
def test_addition_starts_from_as_few_cells_as_possible(problem: Problem) -> None:
    problem = replace(problem, spans=[], budget=0.0)
    legal = [s for s in oracle.subsets(problem, 0) if oracle.group_cost(problem, 0, s) < math.inf]
    assert len(computed_steps(solve(problem, "addition"), 0)) == min(map(len, legal))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_deterministic(problem: Problem) -> None:
    first, second = solve(problem), solve(problem)
    assert np.array_equal(first.cells, second.cells)
    assert first.total_error == second.total_error


@pytest.mark.parametrize("steps, groups", [(1, 1), (7, 2), (50, 3)])
@pytest.mark.parametrize("cost", [1.0, 0.1, 1 / 3])
def test_a_full_budget_computes_everything(steps: int, groups: int, cost: float) -> None:
    full = sum([cost] * (steps * groups))  # rounds differently from the solver's own sum
    problem = smooth_problem(steps, groups, compute_cost=[cost] * groups, cached_cost=[0.0] * groups, budget=full)
    result = solve(problem, "removal")
    assert (result.cells == -1).all() and (result.anchor == -1).all() and (result.base == -1).all()
    assert result.total_error == 0.0
    assert result.feasible


def test_a_zero_budget_is_reported_as_not_feasible() -> None:
    problem = smooth_problem(steps=20, budget=0.0)
    for method in METHODS:
        result = solve(problem, method)
        assert not result.feasible
        assert result.spent > 0.0
        check_result_of_any_table(problem, result)


def check_result_of_any_table(problem: Problem, result: _core.Result) -> None:
    for step, group in np.argwhere(result.cells >= 0):
        check_cached_cell(problem, result, int(step), int(group))


def test_best_prefers_the_feasible_method() -> None:
    # Dropping step 2 first looks free, but leaves steps 1 and 3 too dear to drop.
    problem = Problem(
        errors=np.zeros((4, 1, 3, 1)),
        compute_cost=[1.0],
        cached_cost=[0.0],
        budget=2.0,
        protected=np.zeros((4, 1), bool),
        max_run=1,
    )
    removal, addition, best = (solve(problem, method) for method in [*GREEDY, "best"])
    assert removal.feasible and addition.feasible and best.method == "removal"

    problem.errors[1, 0, 1, 0] = problem.errors[3, 0, 1, 0] = 1.0
    removal, addition, best = (solve(problem, method) for method in [*GREEDY, "best"])
    assert not removal.feasible and addition.feasible and best.method == "addition"


def test_addition_stops_when_nothing_is_gained() -> None:
    problem = smooth_problem(steps=12, groups=1, share=1.0)
    problem.errors[:] = 0.0
    result = solve(problem, "addition")
    assert result.total_error == 0.0
    assert result.spent < problem.budget
    assert len(computed_steps(result, 0)) == 2  # max_run 8 asks for one more than step 0


def test_spans_serve_where_they_help_and_only_there() -> None:
    problem = smooth_problem(steps=20, groups=1)
    assert (solve(problem).cells > 0).any()
    assert solve(replace(problem, spans=[])).cells.max() == 0
    assert solve(replace(problem, history=1)).cells.max() == 0
    assert solve(replace(problem, tau=0.9)).cells.max() == 0
    assert solve(replace(problem, errors=problem.errors[..., :1])).cells.max() == 0


def test_an_infinite_entry_is_never_cached() -> None:
    problem = smooth_problem(steps=20, groups=2, share=0.4)
    problem.errors[7, 1] = math.inf
    problem.errors[:, 0, 3:] = math.inf
    for method in METHODS:
        result = solve(problem, method)
        assert result.cells[7, 1] == -1
        assert math.isfinite(result.total_error)
        assert (np.arange(20)[:, None] - result.anchor)[result.cells >= 0].max() <= 8
        assert (np.arange(20) - result.anchor[:, 0])[result.cells[:, 0] >= 0].max() <= 2


@pytest.mark.parametrize("method", METHODS)
def test_everything_forbidden_leaves_everything_computed(method: str) -> None:
    problem = smooth_problem(steps=10, share=0.3)
    problem.errors[:] = math.inf
    result = solve(problem, method)
    assert (result.cells == -1).all()
    assert result.total_error == 0.0
    assert not result.feasible


def test_a_span_can_serve_where_plain_reuse_is_forbidden() -> None:
    problem = smooth_problem(steps=12, groups=1, share=0.75)
    problem.errors[..., 0] = math.inf
    for method in METHODS:
        result = solve(problem, method)
        assert result.feasible
        assert (result.cells != 0).all()


def test_entries_that_are_never_read_may_hold_anything() -> None:
    problem = smooth_problem(steps=15, groups=2, share=0.6)
    expected = solve(problem)
    step, distance, span = np.ogrid[:15, :9, :10]
    unread = np.broadcast_to((distance == 0) | (step - distance < 0) | (step - distance - span < 0), (15, 9, 10))
    problem.errors[np.broadcast_to(unread[:, None], problem.errors.shape)] = math.nan
    assert np.array_equal(solve(problem).cells, expected.cells)


@pytest.mark.parametrize("value", [math.nan, -0.5, -math.inf])
def test_a_bad_error_is_refused_by_name(value: float) -> None:
    problem = smooth_problem(steps=12, groups=2)
    problem.errors[7, 1, 3, 2] = value
    with pytest.raises(ValueError, match="errors.* step 7, group 1, distance 3, span 2"):
        solve(problem)


BAD_ARGUMENTS = [
    ("errors", np.zeros((12, 2, 9))),
    ("errors", np.zeros((0, 2, 9, 10))),
    ("errors", np.zeros((12, 2, 1, 10))),
    ("errors", np.zeros((12, 2, 9, 0))),
    ("compute_cost", [1.0]),
    ("compute_cost", [1.0, 0.0]),
    ("compute_cost", [1.0, math.inf]),
    ("compute_cost", [[1.0, 1.0]]),
    ("cached_cost", [0.0]),
    ("cached_cost", [0.0, 1.0]),
    ("cached_cost", [0.0, -0.1]),
    ("cached_cost", [0.0, math.nan]),
    ("budget", -1.0),
    ("budget", math.nan),
    ("protected", np.zeros((12, 3), bool)),
    ("protected", np.zeros(12, bool)),
    ("spans", [1, 0]),
    ("spans", [-2]),
    ("history", 0),
    ("max_run", 0),
    ("tau", 1.0),
    ("tau", -0.1),
    ("tau", math.nan),
]


@pytest.mark.parametrize("name, value", BAD_ARGUMENTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_argument_is_refused_by_name(name: str, value: object) -> None:
    problem = replace(smooth_problem(steps=12, groups=2), **{name: value})
    with pytest.raises(ValueError, match=f"^{name} "):
        solve(problem)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method must be .* got 'fastest'"):
        solve(smooth_problem(steps=12), "fastest")


def test_inputs_of_other_layouts_are_read_correctly() -> None:
    problem = smooth_problem(steps=12, groups=2)
    expected = solve(problem)
    turned = replace(problem, errors=np.asfortranarray(problem.errors), spans=(6, 5, 4, 3, 2, 1, 1))
    assert np.array_equal(solve(turned).cells, expected.cells)
    single = replace(problem, errors=problem.errors.astype(np.float32), protected=[[False] * 2] * 12)
    assert solve(single).total_error == pytest.approx(expected.total_error, rel=1e-5)


def test_arrays_are_read_only_and_outlive_the_result() -> None:
    cells = solve(smooth_problem()).cells
    assert cells.shape == (50, 3)
    with pytest.raises(ValueError, match="read-only"):
        cells[0, 0] = 3
    assert (cells[0] == -1).all()


def test_repr_names_method_and_totals() -> None:
    text = repr(solve(smooth_problem(), "removal"))
    assert text.startswith("Result(method='removal', total_error=") and text.endswith("feasible=True)")


def test_threads_do_not_disturb_each_other() -> None:
    problem = smooth_problem()
    expected = solve(problem).cells
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(solve(problem).cells)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(cells, expected) for cells in found)


@pytest.mark.parametrize("seed", [0, *slow(1, 2, 3)])
def test_lagrangian_is_no_worse_than_its_plain_twin(seed: int) -> None:
    """The twin stops at the multiplier; ours also spends what is left, and may read an older residual."""
    problem = smooth_problem(steps=16, groups=3, share=0.6, seed=seed, history=2)
    result = solve(problem, "lagrangian")
    assert result.feasible
    assert result.total_error <= oracle_solvers.lagrangian(problem) + 1e-9
