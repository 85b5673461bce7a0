"""Spectrum against a literal transcription of the released forecaster and its counters, in double precision."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import MethodError
from layercache.methods import Spectrum
from layercache.methods.spectrum import spectrum_steps
from layercache.models.registry import fingerprint_of
from layercache.schedule.memory_plan import stored_bytes
from support.tiny import generate, shifted_sigmas, tiny_pipeline
from support.zoo_pipelines import _wan_two_experts
from support.zoo_pipelines import generate as generate_any

STEPS = 14
SHORT = Spectrum(warmup=3, growth=0.5)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def prints(pipe, steps):
    return fingerprint_of(pipe.transformer, shifted_sigmas(steps), ("cond", "uncond"))


class Literal:
    """The released loop: says per step whether the model runs, takes its feature or gives one."""

    def __init__(self, method, steps):
        self.method, self.steps = method, steps
        self.window, self.consecutive, self.t, self.h = method.window, 0, [], []

    def runs(self, step):
        actual = True
        if step >= self.method.warmup:
            actual = (self.consecutive + 1) % math.floor(self.window) == 0
            if actual:
                self.window = round(self.window + self.method.growth, 3)
        self.consecutive = 0 if actual else self.consecutive + 1
        return actual

    def take(self, step, feature):
        self.t.append(step)
        self.h.append(feature)

    def design(self, t):
        tau = (np.asarray(t, float) - 0.5 * self.steps) * 2 / self.steps
        columns = [np.ones_like(tau), tau]
        while len(columns) < self.method.degree + 1:
            columns.append(2 * tau * columns[-1] - columns[-2])
        return np.stack(columns[: self.method.degree + 1], axis=1)

    def give(self, step):
        t, h = self.t[-self.method.history :], self.h[-self.method.history :]
        x = self.design(t)
        flat = np.stack(h).reshape(len(h), -1)
        c = np.linalg.inv(x.T @ x + self.method.ridge * np.eye(x.shape[1])) @ x.T @ flat
        taylor = h[-1]
        if len(h) > 1:
            taylor = h[-1] + (step - t[-1]) / (t[-1] - t[-2]) * (h[-1] - h[-2])
        w = self.method.blend
        return w * (self.design([step]) @ c).reshape(h[0].shape) + (1 - w) * taylor


@pytest.mark.parametrize(
    "method",
    [Spectrum(), Spectrum(growth=3.0, blend=1.0), Spectrum(degree=1, ridge=1.0, history=6), replace(SHORT, warmup=1)],
)
def test_forecasts_are_those_of_the_released_loop(pipe, method):
    """On numbers at random; the lists of computed steps are as long as published, 14 and 10 of 50."""
    schedule, literal = method.schedule(prints(pipe, 50)), Literal(method, 50)
    features = np.random.default_rng(0).normal(size=(50, 7))
    for step in range(50):
        assert literal.runs(step) != schedule.is_skipped(step)
        if schedule.is_skipped(step):
            found = sum(c * features[k] for k, c in schedule.velocity(step).terms.items())
            np.testing.assert_allclose(found, literal.give(step), rtol=1e-9, atol=1e-9)
        else:
            literal.take(step, features[step])
    assert len(spectrum_steps(50)) == 14 and len(spectrum_steps(50, growth=3.0)) == 10
    stopped = replace(method, stop=45).schedule(prints(pipe, 50))
    assert [stopped.is_skipped(k) for k in range(45, 50)] == [False] * 5
    assert stopped.velocities[:45] == schedule.velocities[:45]


def test_a_run_takes_these_velocities_and_the_memory_that_is_planned(pipe):
    literal, given, inner = Literal(SHORT, STEPS), [], pipe.scheduler.step

    def step(velocity, *args, **kwargs):
        place = len(given)
        if literal.runs(place):
            literal.take(place, velocity.double().numpy())
        else:
            velocity = torch.as_tensor(literal.give(place)).float()
        given.append(velocity)
        return inner(velocity, *args, **kwargs)

    pipe.scheduler.step = step
    expected = generate(pipe, steps=STEPS)
    del pipe.scheduler.step
    with layercache.enabled(pipe, SHORT) as cache:
        found = generate(pipe, steps=STEPS)
        report = cache.report()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert report.used == len(literal.t) / STEPS
        planned = stored_bytes(cache.schedule, {}, given[0].nbytes)
        assert report.cache_bytes == planned == len(literal.t) * given[0].nbytes


@pytest.mark.parametrize("groups", [((0, 6),), ((0, 2), (2, 6))])
def test_residuals_of_groups(pipe, groups):
    """One combination for every group; the newest computed steps alone are stored."""
    method = replace(SHORT, history=3, groups=groups)
    sizes = {}
    block = pipe.transformer.transformer_blocks[0]
    hook = block.register_forward_hook(lambda _, args, out: sizes.update(image=out[1].nbytes, text=out[0].nbytes))
    with layercache.enabled(pipe, method) as cache:
        assert torch.isfinite(generate(pipe, steps=STEPS)).all()
        schedule, report = cache.schedule, cache.report()
    hook.remove()
    velocities = replace(method, groups=None).schedule(schedule.fingerprint)
    for row, rule in zip(schedule.cells, velocities.velocities, strict=True):
        assert row == (rule and dict(rule.terms),) * len(groups)
    streams = dict.fromkeys(("cond", "uncond"), (sizes["image"], sizes["text"]))
    assert report.cache_bytes == stored_bytes(schedule, streams) == 2 * 3 * len(groups) * sizes["image"]


def test_it_begins_anew_where_a_pipeline_turns_to_another_transformer():
    pipe, call = _wan_two_experts()
    with layercache.enabled(pipe, Spectrum(warmup=1, growth=0.0)) as cache:
        generate_any(pipe, call)
        schedule, report = cache.schedule, cache.report()
    first, second = schedule.fingerprint.turns
    assert (first, second) == ((0, 1, 2), (3, 4, 5, 6, 7))
    assert [k for k in range(8) if not schedule.is_skipped(k)] == [0, 2, 3, 5, 7]
    assert set(schedule.velocity(4).terms) == {3} and set(schedule.velocity(6).terms) == {3, 5}
    assert report.fallback_rows == 0 and report.used == 5 / 8


def test_neutral_settings_and_refusals(pipe):
    with layercache.enabled(pipe, Spectrum(window=1, growth=0.0)):
        found = generate(pipe, steps=4)
    assert torch.equal(found, generate(pipe, steps=4))
    bad = {"window": 0.5, "growth": -1, "warmup": 0, "degree": 1.5, "ridge": 0.0, "blend": 2, "history": 0}
    for name, value in bad.items():
        with pytest.raises(MethodError, match=name):
            Spectrum(**{name: value})
