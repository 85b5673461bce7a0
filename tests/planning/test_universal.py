"""Schedules made from other models' full runs: the interpolation of those, and what is run by them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler

import layercache
from layercache.errors import ArgumentError, BudgetError, LayerCacheWarning, MethodError
from layercache.methods import Universal
from layercache.models.registry import config_hash
from layercache.planning.sampler import LinearSampler
from layercache.planning.universal import ModelRuns, shipped
from support.tiny import fingerprint, generate, shifted_sigmas, tiny_pipeline


@pytest.fixture
def pipe():
    return tiny_pipeline(2)


def runs_between(levels):
    """One picture whose velocities are a cubic of the noise level, its factors being the vectors themselves."""
    random = np.random.default_rng(0)
    start, terms = random.normal(size=5), random.normal(size=(4, 5))
    velocities = np.vander(levels[:-1], 4) @ terms
    return ModelRuns(np.asarray(levels), np.vstack([start, velocities])[None], ("other",), (0,)), start, terms


def test_full_runs_are_interpolated():
    levels = np.array([*np.linspace(1, 0.02, 40), 0.0])
    runs, start, terms = runs_between(levels)
    sigmas = shifted_sigmas(7)
    found = runs.at(sigmas, LinearSampler.euler(sigmas))
    vectors = np.vstack([start, np.vander(sigmas[:-1], 4) @ terms])
    np.testing.assert_allclose(found.vectors[0], vectors, rtol=1e-9, atol=1e-9)
    assert found.folds == (0,) and len(found.samplers) == 1 and found.sigmas == sigmas


def test_a_run_may_begin_in_the_middle():
    """Its first latents are those that Euler steps from the noise have reached by then."""
    levels = np.array([*np.linspace(1, 0.02, 50), 0.0])
    runs, start, terms = runs_between(levels)
    sigmas = (levels[20] - 0.005, 0.3, 0.1, 0.0)
    latents = start.copy()
    for k in range(21):
        latents += (max(levels[k + 1], sigmas[0]) - levels[k]) * (np.vander(levels[k : k + 1], 4) @ terms)[0]
    found = runs.at(sigmas, LinearSampler.euler(sigmas))
    np.testing.assert_allclose(found.vectors[0, 0], latents, rtol=1e-9)


def test_what_is_shipped():
    runs = shipped()
    assert runs.sigmas[0] == 1 and runs.sigmas[-1] == 0 and (np.diff(runs.sigmas) < 0).all()
    assert len(runs.models) >= 3 and set(runs.folds) == set(range(len(runs.models)))
    assert np.isfinite(runs.factors).all() and runs.factors.shape[:2] == (len(runs.folds), len(runs.sigmas))


def test_a_model_is_not_measured_on_itself(pipe):
    runs = shipped()
    own = str(config_hash(pipe.transformer))
    marked = replace(runs, models=(own, *runs.models[1:]))
    left = marked.without(own)
    assert 0 not in left.folds and len(left.folds) == len(left.factors) == sum(fold > 0 for fold in runs.folds)
    prints = fingerprint(pipe.transformer, shifted_sigmas(8))
    sampler = LinearSampler.euler(prints.sigmas)
    found = Universal(budget=0.5).schedule_for(prints, sampler, marked)
    assert found == Universal(budget=0.5).schedule_for(prints, sampler, left)
    assert found != Universal(budget=0.5).schedule_for(prints, sampler, runs)


@pytest.mark.parametrize(("steps", "shift"), [(4, 1.0), (20, 3.0)])
def test_a_schedule_follows_steps_and_shift(pipe, steps, shift):
    schedule = Universal(budget=0.5).schedule(fingerprint(pipe.transformer, shifted_sigmas(steps, shift)))
    assert schedule.used == pytest.approx(0.5) and schedule.num_steps == steps and not schedule.is_skipped(0)
    sums = [sum(v.terms.values()) for v in schedule.velocities if v is not None]
    assert sums and all(0.7 < total < 1.3 for total in sums)  # as forecasts of nearby velocities have


def test_the_first_generation_is_cached(pipe):
    full = generate(pipe, steps=12)
    cache = layercache.enable(pipe, Universal(budget=0.5))
    found = generate(pipe, steps=12)
    assert cache.report().used == pytest.approx(0.5) and cache.report().fallback_rows == 0
    assert 0 < (found - full).norm() < 0.2 * full.norm()
    generate(pipe, steps=8)  # made anew
    assert cache.schedule.num_steps == 8
    layercache.disable(pipe)
    torch.testing.assert_close(generate(pipe, steps=12), full, rtol=0, atol=0)


def test_a_multistep_sampler_has_forecasts_of_its_own(pipe):
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    full = generate(pipe, steps=12)
    with layercache.enabled(pipe, Universal(budget=0.5)) as cache:
        found = generate(pipe, steps=12)
    assert cache.report().used == pytest.approx(0.5)
    euler = Universal(budget=0.5).schedule(cache.schedule.fingerprint)
    assert cache.schedule.velocities != euler.velocities
    with layercache.enabled(pipe, euler):
        by_euler = generate(pipe, steps=12)
    assert (found - full).norm() < min(0.2 * full.norm(), (by_euler - full).norm())


def test_a_run_from_the_middle_is_planned_from_there(pipe):
    """As img2img begins: the steps before it are not the run's."""
    sigmas = shifted_sigmas(12)
    prints = replace(fingerprint(pipe.transformer, sigmas), steps_run=tuple(range(4, 12)))
    schedule = Universal(budget=0.5).schedule(prints)
    computed = [step for step in range(12) if not schedule.is_skipped(step)]
    assert computed[0] == 4 and len(computed) == 4 and schedule.used == pytest.approx(0.5)
    terms = {source for v in schedule.velocities if v is not None for source in v.terms}
    assert min(terms) >= 4


def test_rising_levels_are_mirrored(pipe):
    """Mochi's are shares of data, and its velocities point the other way: coefficients of the latents change sign."""
    falling = fingerprint(pipe.transformer, shifted_sigmas(8))
    rising = replace(falling, sigmas=tuple(1 - level for level in falling.sigmas))
    one, other = (Universal(budget=0.5).schedule(prints) for prints in (falling, rising))
    assert one.cells == other.cells and any(velocity and velocity.latents for velocity in one.velocities)
    for a, b in zip(one.velocities, other.velocities, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            assert a.terms == pytest.approx(b.terms, rel=1e-6) and a.latents == pytest.approx(-b.latents, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_compute_one_step_at_least(pipe, steps):
    full = generate(pipe, steps=steps)
    with layercache.enabled(pipe, Universal(budget=0.2)) as cache:
        found = generate(pipe, steps=steps)
        assert cache.report().used == pytest.approx(1 / steps)
    assert torch.isfinite(found).all() and torch.equal(found, full) == (steps == 1)


def test_a_sampler_of_another_kind_is_planned_for_anew(pipe):
    """Of the same class, steps and noise levels."""

    def unipc(order):
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=order
        )

    found = []
    with layercache.enabled(pipe, Universal(budget=0.5)) as cache:
        for order in (2, 3, 2):
            pipe.scheduler = unipc(order)
            generate(pipe, steps=8)
            found.append(cache.schedule)
    assert found[0].velocities != found[1].velocities and found[2] is found[0]


def test_no_run_is_under_way(pipe):
    """A call of the bare transformer, and the end of a pipeline that has not begun, plan nothing."""
    inputs = {"hidden_states": torch.zeros(1, 4, 48), "img_shapes": [(1, 2, 2)], "timestep": torch.ones(1)}
    inputs["encoder_hidden_states"] = pipe.class_encoder(torch.tensor([0])).detach()
    with layercache.enabled(pipe, Universal(budget=0.5)) as cache:
        with pytest.warns(LayerCacheWarning, match="computed in full"), torch.no_grad():
            pipe.transformer(**inputs)
        pipe.maybe_free_model_hooks()
        with pytest.raises(layercache.errors.CacheStateError, match="nothing has run yet"):
            _ = cache.schedule
        generate(pipe, steps=4)
        assert cache.schedule.num_steps == 4


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (FlowMatchLCMScheduler(shift=3.0), "a sampler whose steps are linear"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True), "a sampler whose steps are linear"),
    ],
)
def test_other_samplers_are_refused_before_the_first_step(pipe, scheduler, why):
    pipe.scheduler = scheduler
    with layercache.enabled(pipe, Universal()), pytest.raises(MethodError, match=why):
        generate(pipe, steps=4)


def test_wrong_use(pipe):
    for budget in (0.0, 1.0):
        with pytest.raises(BudgetError, match="a budget is a share"):
            Universal(budget=budget)
    high = fingerprint(pipe.transformer, (14.6, 3.0, 0.5, 0.0))
    for prints in (high, replace(high, steps_run=(2,))):
        with pytest.raises(MethodError, match="is for flow matching"):
            Universal().schedule(prints)
    with pytest.raises(MethodError, match="noise levels are repeated"):
        Universal().schedule(fingerprint(pipe.transformer, (1.0, 0.5, 0.5, 0.0)))
    with pytest.raises(ArgumentError):
        Universal().schedule("a fingerprint")
    with pytest.raises(BudgetError, match="min_psnr needs learn=1 or more"):
        layercache.enable(pipe, min_psnr=40, learn=0)
