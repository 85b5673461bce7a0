"""The shortest path over whole steps against every path there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercache import _core
from support import oracle_solvers


def edges_of(steps, end):
    return list(itertools.pairwise([*steps, end]))


def every_path(errors, budget, gamma, required=()):
    """``(steps, sorted weights)`` of every path within the budget."""
    count, longest = errors.shape[0], errors.shape[1] - 1
    for chosen in range(1, budget + 1):
        for rest in itertools.combinations(range(1, count), chosen - 1):
            steps = (0, *rest)
            pairs = edges_of(steps, count)
            if not set(required) <= set(steps) or any(b - a > longest for a, b in pairs):
                continue
            weights = [0.0 if b - a == 1 else min(e**gamma for e in errors[a, b - a]) for a, b in pairs]
            if np.isfinite(sum(weights)):
                yield steps, tuple(sorted((w for w in weights if w > 0), reverse=True))


def table(rng, steps, longest, choices, forbidden=0.0):
    errors = rng.integers(1, 9, (steps, longest + 1, choices)).astype(float)
    errors[rng.random(errors.shape) < forbidden] = np.inf
    return errors


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5), st.integers(1, 3), st.integers(1, 8), st.booleans())
def test_against_every_path(seed, steps, longest, choices, budget, lexicographic):
    rng = np.random.default_rng(seed)
    errors = table(rng, steps, longest, choices, forbidden=0.2)
    required = sorted(set(rng.integers(0, steps, rng.integers(0, 3)).tolist()))
    flags = [k in required for k in range(steps)]
    mode = "lexicographic" if lexicographic else "sum"
    path = _core.shortest_path(errors, budget, gamma=2.0, mode=mode, required=flags)
    paths = list(every_path(errors, min(budget, steps), 2.0, required))
    assert path.feasible == bool(paths)
    if not paths:
        return
    weights = dict(paths)[tuple(path.steps)]
    if lexicographic:
        assert weights == min(w for _, w in paths)
    else:
        assert sum(weights) == min(sum(w) for _, w in paths)
    assert path.cost == pytest.approx(sum(weights))
    assert len(path.steps) <= budget
    for (start, end), choice in zip(edges_of(path.steps, steps), path.choice, strict=True):
        if end - start > 1:
            assert errors[start, end - start, choice] == errors[start, end - start].min()


def test_the_curve_is_the_best_of_each_count():
    errors = table(np.random.default_rng(1), 7, 4, 2)
    path = _core.shortest_path(errors, 7, gamma=1.0)
    for count in range(1, 8):
        costs = [sum(w) for steps, w in every_path(errors, 7, 1.0) if len(steps) == count]
        assert path.curve[count] == pytest.approx(min(costs, default=np.inf))


def test_peaks_are_suppressed():
    """Two edges of 3 cost less in sum than 1 and 6, but only a high power sees it the other way round."""
    errors = np.full((4, 4, 1), np.inf)
    errors[:, 1] = 0
    errors[0, 2, 0], errors[2, 2, 0] = 1.0, 5.5
    errors[0, 3, 0] = 7.0
    errors[1, 2, 0], errors[1, 3, 0] = 3.5, 6.0
    assert _core.shortest_path(errors, 2, gamma=1.0).steps == [0, 1]
    errors[1, 3, 0] = 6.4
    path = _core.shortest_path(errors, 2, gamma=5.0)
    assert path.steps == [0, 2]
    assert _core.shortest_path(errors, 2, mode="lexicographic").steps == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"errors": np.zeros((3, 3))}, "errors must have shape"),
        ({"budget": 0}, "budget must be at least 1"),
        ({"gamma": 0.0}, "gamma must be finite"),
        ({"mode": "peak"}, "mode must be"),
        ({"required": [True]}, "required must have shape"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        _core.shortest_path(**{"errors": np.ones((3, 3, 1)), "budget": 2, **arguments})


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_a_bad_entry_is_named(bad):
    errors = np.ones((4, 3, 2))
    errors[1, 2, 1] = bad
    with pytest.raises(ValueError, match="step 1, length 2, choice 1"):
        _core.shortest_path(errors, 2)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_plain_python_twin(seed):
    errors = np.random.default_rng(seed).random((20, 7, 3))
    for budget in (5, 8, 14):
        cost, steps = oracle_solvers.shortest_path(errors, budget, 3.0)
        path = _core.shortest_path(errors, budget, gamma=3.0)
        assert path.cost == pytest.approx(cost)
        assert path.steps == steps
