"""Fits of velocity forecasts: against NumPy's least squares, and where there is nothing to fit to."""

import numpy as np
import pytest
import torch

from layercache.errors import CalibrationError, ScheduleError
from layercache.planning.fit import HOLD, Forecast, products_of, solve_ridge, solve_velocity
from support.weighted_fit import weighted

SHAPE = (2, 16, 8)


def fit_velocity(forecast, step, sources, *tensors):
    return solve_velocity(forecast, sources, np.concatenate(products_of(step, *tensors)))


def tensors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def predicted(velocity, sources, features, x):
    return sum(velocity.terms[s] * f for s, f in zip(sources, features, strict=True)) + velocity.latents * x


@pytest.mark.parametrize(("latents", "free_sum"), [(True, True), (False, True), (True, False), (False, False)])
def test_against_least_squares(latents, free_sum):
    """With next to no ridge the fit is NumPy's, over all samples together."""
    sources = [9, 7, 4]
    samples = [tensors(5, seed) for seed in range(3)]
    features = [s[:3] for s in samples]
    xs, targets = [s[3] for s in samples], [s[4] for s in samples]
    forecast = Forecast(terms=3, latents=latents, free_sum=free_sum, ridge=1e-13)
    found = fit_velocity(forecast, 10, sources, features, xs, targets)

    columns, right = [], []
    for own, x, target in zip(features, xs, targets, strict=True):
        a, b, c = (f.flatten().numpy() for f in own)
        free = [a] * free_sum + [x.flatten().numpy()] * latents
        columns.append(np.stack([b - a, c - a, *free], axis=1))
        right.append(target.flatten().numpy() - a)
    weights = np.linalg.lstsq(np.concatenate(columns), np.concatenate(right), rcond=None)[0]
    free = weights[2] if free_sum else 0.0
    assert found.terms[7] == pytest.approx(weights[0], abs=1e-9)
    assert found.terms[4] == pytest.approx(weights[1], abs=1e-9)
    assert found.terms[9] == pytest.approx(1 - weights[0] - weights[1] + free, abs=1e-9)
    assert found.latents == pytest.approx(weights[-1] if latents else 0.0, abs=1e-9)
    if not free_sum:
        assert sum(found.terms.values()) == pytest.approx(1.0)


def test_an_exact_combination_is_found():
    first, second, x = tensors(3)
    target = 1.3 * first - 0.4 * second + 0.02 * x
    found = fit_velocity(Forecast(terms=2, ridge=1e-12), 3, [2, 0], [[first, second]], [x], [target])
    torch.testing.assert_close(predicted(found, [2, 0], [first, second], x), target, rtol=1e-6, atol=1e-6)


def test_one_source_and_nothing_free_holds_it():
    (v,) = tensors(1)
    assert fit_velocity(HOLD, 4, [3], [[v]], [v], [2 * v]).terms == {3: 1.0}


@pytest.mark.parametrize("case", ["equal", "zero", "one sample of one number"])
def test_without_full_rank_the_correction_is_short(case):
    first, second, x = tensors(3)
    if case == "equal":
        second = first.clone()
    elif case == "zero":
        first = second = x = torch.zeros(SHAPE, dtype=torch.float64)
    else:
        first, second, x = (t[:1, :1, :1] for t in (first, second, x))
    target = 0.5 * first
    found = fit_velocity(Forecast(terms=2), 5, [4, 1], [[first, second]], [x], [target])
    values = [*found.terms.values(), found.latents]
    assert np.isfinite(values).all()
    assert np.abs(values).max() < 10
    torch.testing.assert_close(predicted(found, [4, 1], [first, second], x), target, rtol=1e-3, atol=1e-3)


def test_the_ridge_pulls_to_the_newest_velocity():
    first, second, x, target = tensors(4)
    strong = fit_velocity(Forecast(terms=2, ridge=1e9), 3, [2, 0], [[first, second]], [x], [target])
    assert strong.terms[2] == pytest.approx(1.0, abs=1e-6)
    assert strong.terms[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(bad):
    first, second, x, target = tensors(4)
    second[0, 0, 0] = bad
    with pytest.raises(CalibrationError, match="step 7"):
        fit_velocity(Forecast(terms=2), 7, [6, 5], [[first, second]], [x], [target])


def test_ridge_solution_of_its_definition():
    rng = np.random.default_rng(0)
    a, t = rng.normal(size=(40, 3)), rng.normal(size=40)
    a[:, 1] *= 1e6
    gram, right = a.T @ a, a.T @ t
    stacked = np.concatenate([a, np.sqrt(0.1) * np.diag(np.sqrt(np.diag(gram)))])
    expected = np.linalg.lstsq(stacked, np.concatenate([t, np.zeros(3)]), rcond=None)[0]
    np.testing.assert_allclose(solve_ridge(gram, right, 0.1), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "guess"}, "unknown target"),
        ({"terms": 0}, "1 to 8"),
        ({"terms": 9}, "1 to 8"),
        ({"ridge": 0.0}, "ridge"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        Forecast(**arguments)


@pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])
def test_weights_against_numpy(weighting):
    """Every picture of every sample counts by what it misses."""
    samples = [tensors(4, seed) for seed in range(3)]
    samples[2][3] *= 10  # pictures that have gone astray
    forecast = Forecast(terms=2, ridge=1e-5, weighting=weighting)
    found = fit_velocity(
        forecast, 5, [4, 1], [s[:2] for s in samples], [s[2] for s in samples], [s[3] for s in samples]
    )
    matrices, targets = [], []
    for sample in samples:
        for newest, older, x, target in zip(*(t.flatten(1).numpy() for t in sample), strict=True):
            matrices.append(np.stack([older - newest, newest, x]))
            targets.append(target - newest)
    d, b, a = weighted(matrices, targets, 1e-5, weighting)
    assert [found.terms[1], found.terms[4], found.latents] == pytest.approx([d, 1 - d + b, a], abs=1e-9)


def test_names():
    names = {HOLD: "hold", Forecast(): "steer-all n=4+x+b", Forecast("open", latents=False, free_sum=False): "open n=4"}
    assert {forecast: forecast.name for forecast in names} == names
