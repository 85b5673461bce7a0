"""Forecast coefficients: exact for what they promise, and the published recursion transcribed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import layercache
from layercache.errors import ScheduleError
from layercache.schedule.forecast import newton_forecast, reforecast, secant_coefficients, taylor_forecast
from support.tiny import generate, mixed_cells, schedule_for, shifted_sigmas, tiny_pipeline

STEPS = 12
SIGMAS = shifted_sigmas(STEPS)


@given(st.integers(1, 4), st.integers(0, 10**6))
def test_newton_is_exact_for_polynomials(count, seed):
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(STEPS, count + 1, replace=False).tolist(), reverse=True)
    step, anchors = chosen[0], chosen[1:]
    found = newton_forecast(SIGMAS, step, anchors)
    polynomial = np.polynomial.Polynomial(rng.normal(size=len(found)))
    value = sum(c * polynomial(SIGMAS[k]) for k, c in found.items())
    assert value == pytest.approx(polynomial(SIGMAS[step]), rel=1e-6, abs=1e-6)
    assert sum(abs(c) for c in found.values()) <= 9
    assert list(found) == anchors[: len(found)]


def test_newton_of_two_anchors_is_the_secant():
    assert newton_forecast(SIGMAS, 6, [5, 3]) == pytest.approx(secant_coefficients(SIGMAS, 6, 5, 3))


def taylorseer(features, steps, at, order):
    """The published update at full steps and its forecast, with numbers."""
    factors, before = [], None
    for step in steps:
        new = [features[step]]
        for q in range(order):
            if before is None or q >= len(factors):
                break
            new.append((new[q] - factors[q]) / (step - before))
        factors, before = new, step
    x = at - before
    return sum(f * x**q / math.factorial(q) for q, f in enumerate(factors))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=7, unique=True), st.integers(1, 5), st.integers(0, 4))
def test_taylor_against_the_published_recursion(steps, ahead, order):
    """With no more anchors than the order asks for, the recursion sees nothing else."""
    steps = sorted(steps)[-(order + 1) :]
    features = dict(zip(steps, np.random.default_rng(len(steps)).normal(size=len(steps)), strict=True))
    found = taylor_forecast(steps[-1] + ahead, steps[::-1], order)
    value = sum(c * features[k] for k, c in found.items())
    assert value == pytest.approx(taylorseer(features, steps, steps[-1] + ahead, order))


def test_older_anchors_do_not_matter_to_taylor():
    """F_q of the newest full step depends on the last q + 1 full steps alone."""
    steps = [0, 1, 3, 4, 7, 9]
    features = dict(zip(steps, np.random.default_rng(1).normal(size=6), strict=True))
    for order in range(4):
        found = taylor_forecast(11, steps[::-1], order)
        value = sum(c * features[k] for k, c in found.items())
        assert value == pytest.approx(taylorseer(features, steps, 11, order))


def test_reforecast_keeps_the_computed_cells_and_runs():
    pipe = tiny_pipeline()
    schedule = schedule_for(pipe, mixed_cells())
    for kind, order in (("hold", 1), ("secant", 1), ("newton", 2), ("taylor", 1), ("taylor", 3)):
        other = reforecast(schedule, kind, order)
        computed = [[cell is None for cell in row] for row in other.cells]
        assert computed == [[cell is None for cell in row] for row in schedule.cells]
        terms = max(len(cell) for row in other.cells for cell in row if cell)
        assert terms == {"hold": 1, "secant": 2, "newton": 3, "taylor": order + 1}[kind] or kind == "taylor"
        for step, row in enumerate(other.cells):
            assert all(sum(cell.values()) == pytest.approx(1.0) for cell in row if cell), step
        with layercache.enabled(pipe, other):
            assert np.isfinite(generate(pipe).numpy()).all()


def test_refusals():
    schedule = schedule_for(tiny_pipeline(), mixed_cells())
    with pytest.raises(ScheduleError, match="unknown forecast"):
        reforecast(schedule, "spline")
    for anchors in ([], [5], [4, 4], [3, 4]):
        with pytest.raises(ScheduleError, match="newest first"):
            newton_forecast(SIGMAS, 5, anchors)
        with pytest.raises(ScheduleError, match="newest first"):
            taylor_forecast(5, anchors, 1)
    with pytest.raises(ScheduleError, match="same sigma"):
        newton_forecast((1.0, 0.5, 0.5, 0.0), 3, [2, 1])
    with pytest.raises(ScheduleError, match="at least 0"):
        taylor_forecast(5, [4], -1)


@pytest.mark.parametrize("sigma", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_noise_levels_that_are_no_number_are_refused(sigma, at):
    sigmas = [1.0, 0.8, 0.5, 0.2, 0.0]
    sigmas[at] = sigma
    text = f"noise levels must be finite numbers, that of step {at} is {sigma}"
    with pytest.raises(ScheduleError, match=text):
        newton_forecast(sigmas, 3, [2, 1])
    with pytest.raises(ScheduleError, match=text):
        secant_coefficients(sigmas, 3, 2, 1)
