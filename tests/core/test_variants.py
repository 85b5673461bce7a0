"""SmoothCache's threshold and DPCache's path against literal transcriptions (methods.md §11, §13)."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercache import _core


def smoothcache(lists, alpha, count):
    """The published loop over lists of error by look-back; ``lists[j][i]`` compares steps i and i + j."""
    computed, i = set(), 0
    while i < count:
        computed.add(i)
        for j in sorted(lists, reverse=True):
            if i < len(lists[j]) and lists[j][i] <= alpha:
                i += j
                break
        i += 1
    return sorted(computed | {0, count - 1})


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.3, 0.5, 2.0]))
def test_threshold_against_the_published_loop(seed, count, longest, alpha):
    table = np.random.default_rng(seed).random((longest + 1, count))
    lists = {j: table[j, : max(0, count - j)].tolist() for j in range(1, longest + 1)}
    assert _core.threshold_steps(table, alpha) == smoothcache(lists, alpha, count)


def cost_from(costs, steps, first):
    """Runs behind the fixed first steps."""
    end = costs.shape[0] - 1
    total = 0.0
    for at in range(first - 1, len(steps)):
        before = steps[at - 1] if at else end
        total += costs[before, steps[at], steps[at + 1] if at + 1 < len(steps) else end]
    return total


def every(costs, budget, first):
    count = costs.shape[0] - 1
    head = tuple(range(first))
    for more in range(budget - first + 1):
        for rest in itertools.combinations(range(first, count), more):
            yield head + rest


def dpcache(costs, budget, first):
    """The published recursion: D[m, k] = min_j D[m-1, j] + C[P[m-1, j], j, k]."""
    end = costs.shape[0] - 1
    label = {(first, first - 1): (0.0, first - 2 if first > 1 else end, tuple(range(first)))}
    for m in range(first + 1, budget + 1):
        for k in range(end):
            options = [
                (label[m - 1, j][0] + costs[label[m - 1, j][1], j, k], j, (*label[m - 1, j][2], k))
                for j in range(k)
                if (m - 1, j) in label
            ]
            if options and min(options)[0] < np.inf:
                label[m, k] = min(options)
    return min((value + costs[before, j, end] for (_, j), (value, before, _) in label.items()), default=np.inf)


def cube(seed, steps, forbidden=0.0):
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 50, (steps + 1,) * 3).astype(float)
    costs[rng.random(costs.shape) < forbidden] = np.inf
    return costs


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 3), st.integers(0, 6), st.sampled_from([0.0, 0.2]))
def test_pair_path(seed, steps, first, more, forbidden):
    first = min(first, steps)
    budget = min(first + more, steps)
    costs = cube(seed, steps, forbidden)
    best = min(cost_from(costs, path, first) for path in every(costs, budget, first))
    exact = _core.pair_path(costs, budget, first=first, exact=True)
    published = _core.pair_path(costs, budget, first=first)
    assert exact.feasible == np.isfinite(best)
    assert exact.cost == best
    assert published.cost == dpcache(costs, budget, first)
    for path in (exact, published):
        if path.feasible:
            assert cost_from(costs, tuple(path.steps), first) == path.cost
            assert path.steps[:first] == list(range(first))
            assert len(path.steps) <= budget
    assert published.cost >= exact.cost


def test_the_published_recursion_can_miss_the_best():
    cubes = [cube(seed, 12) for seed in range(20)]
    gaps = [_core.pair_path(c, 6, 1).cost - _core.pair_path(c, 6, 1, exact=True).cost for c in cubes]
    assert max(gaps) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _core.threshold_steps(np.zeros(3), 0.1), "errors must have shape"),
        (lambda: _core.threshold_steps(np.zeros((2, 3)), -0.1), "threshold must be"),
        (lambda: _core.threshold_steps(np.full((2, 3), np.nan), 0.1), "distance 1, step 0"),
        (lambda: _core.pair_path(np.zeros((3, 3, 4)), 2), "costs must have shape"),
        (lambda: _core.pair_path(np.zeros((5, 5, 5)), 2), "budget must be at least first"),
        (lambda: _core.pair_path(np.zeros((3, 3, 3)), 5), "first must be"),
        (lambda: _core.pair_path(np.full((5, 5, 5), -1.0), 3), "costs must be at least 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
