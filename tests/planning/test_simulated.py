"""Pictures that are simulated beside those that run."""

import numpy as np
import pytest

from layercache.planning.fit import Forecast, solve_velocity
from layercache.planning.sampler import LinearSampler
from layercache.planning.simulated import Simulated
from layercache.planning.surrogate import Answers, FullRuns, surrogate_of

STEPS, PICTURES = 9, 3


@pytest.mark.parametrize("looks_back", [False, True])
def test_they_take_the_steps_that_the_surrogate_gives_them(looks_back):
    random = np.random.default_rng(0)
    sigmas = tuple(np.linspace(1.0, 0.0, STEPS + 1) ** 1.3)
    sampler = LinearSampler.euler(sigmas)
    if looks_back:
        sampler.weights[:] += np.tril(random.normal(scale=0.02, size=sampler.weights.shape), -1)
    vectors = random.normal(size=(PICTURES, STEPS + 1, 12)).cumsum(axis=1) / 12
    runs = FullRuns(sigmas, vectors, (sampler,) * PICTURES, tuple(range(PICTURES)))
    answers = Answers(random.normal(size=(PICTURES, STEPS)), random.uniform(0, 3, size=(PICTURES, STEPS)))
    path = np.isin(np.arange(STEPS), [0, 1, 3, 6, 7])
    forecast = Forecast("steer", terms=3, weighting=0.5)
    surrogate = surrogate_of(runs, answers, forecast)

    simulated, computed = Simulated(runs, answers), []
    for step, expected in enumerate(surrogate.forecasts(path[None])):
        if path[step]:
            computed = [step, *computed]
            simulated.compute(step)
        rule = None
        if expected:
            sources = computed[:3]
            rule = solve_velocity(forecast, sources, simulated.products(step, sources))
            np.testing.assert_allclose(
                [*rule.terms.values(), rule.latents][: len(expected)], expected, rtol=1e-6, atol=1e-8
            )
        simulated.take(step, rule)
    error = np.sum((simulated.latents - simulated.full) ** 2, axis=1) / 4
    np.testing.assert_allclose(-10 * np.log10(error), surrogate.simulate(path[None])[0], rtol=1e-8)
