"""Solvers at their limits: Ctrl-C, sizes whose products an int does not hold, budgets and counts of any size."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from layercache import _core


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where it is ignored, as in jobs of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def table(steps: int, groups: int, distances: int, spans: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((steps, groups, distances + 1, spans)).cumsum(axis=2)


def solver(method: str, errors: np.ndarray, spans: range | list[int], history: int = 3) -> Callable[[], object]:
    steps, groups, distances, _ = errors.shape
    limits = {"history": history, "max_run": distances - 1, "method": method}
    costs, protected = (np.ones(groups), np.zeros(groups)), np.zeros((steps, groups), bool)
    return lambda: _core.solve(errors, *costs, 0.5 * steps * groups, protected, spans, **limits)


def paths(mode: str) -> Callable[[], object]:
    errors = np.random.default_rng(0).random((1500, 1501, 1))
    return lambda: _core.shortest_path(errors, 1500, mode=mode)


LONG = {
    "path-sum": lambda: paths("sum"),
    "path-lexicographic": lambda: paths("lexicographic"),
    "removal": lambda: solver("removal", table(1500, 1, 150, 20), range(1, 20), history=5000),
    "addition": lambda: solver("addition", table(1500, 1, 150, 20), range(1, 20), history=5000),
    "exact": lambda: solver("exact", table(400, 2, 24), [1, 2]),
    "exact-without-spans": lambda: solver("exact", table(2000, 2, 300, 1), []),
    "lagrangian": lambda: solver("lagrangian", table(700, 2, 60), [1, 2]),
    "lagrangian-of-long-runs": lambda: solver("lagrangian", table(1500, 1, 300, 2), [1]),
    "best": lambda: solver("best", table(700, 4, 60), [1, 2]),
}


@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_is_heard(name: str, ctrl_c: None) -> None:
    work = LONG[name]()
    signalled = threading.Timer(0.15, _thread.interrupt_main)
    signalled.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - began < 2


def test_a_budget_beyond_the_steps_is_no_limit() -> None:
    errors = np.random.default_rng(0).random((12, 5, 2))
    expected = _core.shortest_path(errors, 12)
    for budget in (13, 10**8, 2**31 - 1, 2**31, 2**63, 10**30):
        found = _core.shortest_path(errors, budget)
        assert (found.steps, found.cost, found.curve) == (expected.steps, expected.cost, expected.curve)


def test_the_largest_counts_are_no_limit() -> None:
    errors = table(12, 2, 12)
    common = errors, [1.0, 2.0], [0.0, 0.0], 18.0, np.zeros((12, 2), bool)
    for method in ("removal", "addition", "exact", "lagrangian", "best"):
        expected = _core.solve(*common, [1, 2], history=12, max_run=12, method=method)
        for most in (2**31 - 1, 2**40, 10**30):
            found = _core.solve(*common, [1, 2, most], history=most, max_run=most, method=method)
            assert found.total_error == expected.total_error and np.array_equal(found.anchor, expected.anchor)


@pytest.mark.parametrize("name", ["history", "max_run", "spans"])
def test_the_least_counts_are_refused_by_name(name: str) -> None:
    for least in (0, -(2**31), -(2**40), -(10**30)):
        counts = {"spans": [1], name: [least] if name == "spans" else least}
        with pytest.raises(ValueError, match=f"^{name} must be at least 1"):
            _core.solve(table(6, 1, 3), [1.0], [0.0], 3.0, np.zeros((6, 1), bool), **counts)
    with pytest.raises(ValueError, match="^budget must be at least 1"):
        _core.shortest_path(np.zeros((4, 3, 1)), -(10**30))


# A state of the chains is a step and the gaps before it: steps * (run + 2)^2 of them, 2^32 in the first row.
@pytest.mark.parametrize(
    ("steps", "run", "method"),
    [
        (4096, 1022, "exact"),
        (2048, 1022, "exact"),
        (1024, 1023, "exact"),
        (2000, 1998, "exact"),
        (4096, 1022, "lagrangian"),
        (1024, 1023, "best"),
    ],
)
def test_more_states_than_an_int_counts(steps: int, run: int, method: str) -> None:
    errors, free = np.ones((steps, 1, run + 1, 2)), np.zeros((steps, 1), bool)
    try:
        found = _core.solve(errors, [1.0], [0.0], steps / 2, free, [1], max_run=run, method=method)
    except ValueError as refused:
        assert method == "exact" and str(refused).startswith("max_run ")
    else:
        assert found.total_error == steps / 2


def test_without_spans_long_runs_are_solved_exactly() -> None:
    errors = np.ones((1024, 1, 1023, 1))
    found = _core.solve(errors, [1.0], [0.0], 512.0, np.zeros((1024, 1), bool), [], max_run=1022, method="exact")
    assert (found.total_error, found.method) == (512.0, "exact")


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
def test_a_long_path_takes_little_memory() -> None:
    code = (
        "import resource, numpy as np; from layercache import _core; errors = np.random.rand(400, 401, 1);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "_core.shortest_path(errors, 400, mode='lexicographic');"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 50
