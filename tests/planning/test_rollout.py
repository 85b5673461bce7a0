"""Rollouts: full runs, and schedules run on the same samples, on a tiny untrained pipeline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import layercache
from layercache.errors import CacheStateError, CalibrationError
from layercache.planning.fit import HOLD, Forecast
from layercache.planning.rollout import Rollouts, psnr_of, skipping, with_terms_of
from layercache.runtime.attachment import attachment_of
from support.tiny import generators, mixed_cells, schedule_for, tiny_pipeline

STEPS = 8
PROMPTS = [["cat", "coffee"], "rocket"]
SEEDS = [3, 4, 5]
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def rollouts(pipe):
    return Rollouts(pipe, PROMPTS, SEEDS, **CALL)


def pictures(pipe, schedule=None):
    """What the pipeline itself draws for the samples."""
    results = []
    for prompt, seed, count in (("cat coffee".split(), 3, 2), ("rocket", 5, 1)):
        seeds = generators(count, seed)
        call = CALL | {"generator": seeds if count > 1 else seeds[0], "output_type": "np"}
        if schedule is None:
            results.append(pipe(prompt, **call).images)
        else:
            with layercache.enabled(pipe, schedule):
                results.append(pipe(prompt, **call).images)
    return results


def test_the_full_run_is_the_pipelines_own(pipe, rollouts):
    for a, b in zip(pictures(pipe), rollouts.pictures, strict=True):
        np.testing.assert_array_equal(a, b)
    assert rollouts.branches == ("cond", "uncond")
    assert rollouts.num_steps == STEPS
    assert rollouts.samplers is not None
    for sampler in rollouts.samplers:
        np.testing.assert_allclose(sampler.weights, np.diag(np.diff(rollouts.sigmas)), atol=1e-7)


@pytest.mark.parametrize("forecast", [Forecast(terms=3), Forecast("open", terms=2), Forecast("teacher", terms=2), HOLD])
def test_a_fitted_schedule_gives_the_same_when_it_is_used(pipe, rollouts, forecast):
    rollout = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 3, 4, 7]), forecast)
    for a, b, full in zip(pictures(pipe, rollout.schedule), _split(rollout.psnr), rollouts.pictures, strict=True):
        np.testing.assert_allclose(psnr_of(full, a), b, rtol=1e-9)


def _split(values):
    return [values[:2], values[2:]]


def test_group_schedules_are_steered_too(pipe, rollouts):
    plain = schedule_for(pipe, mixed_cells())
    schedule = replace(plain, fingerprint=rollouts.fingerprint)
    as_it_is, steered = rollouts.run(schedule), rollouts.run(schedule, Forecast(terms=3))
    assert as_it_is.schedule.velocities == ()
    assert steered.quality > as_it_is.quality
    for a, b, full in zip(pictures(pipe, steered.schedule), _split(steered.psnr), rollouts.pictures, strict=True):
        np.testing.assert_allclose(psnr_of(full, a), b, rtol=1e-9)


def test_steering_hits_the_full_run_where_it_can(rollouts):
    """With as many free terms as needed the latents are back on the full run's; one sample, so it can be exact."""
    rollout = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 2, 3, 4, 5, 7]), Forecast(terms=4, ridge=1e-12))
    hold = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 2, 3, 4, 5, 7]), HOLD)

    def drift(rollout, step):
        pairs = zip(rollout.traces, rollouts.full, strict=True)
        return sum(float((t.latents[step] - f.latents[step]).pow(2).sum()) for t, f in pairs)

    assert drift(rollout, 6) == 0
    assert 0 < drift(rollout, 7) < drift(hold, 7)


def test_open_fits_use_the_full_runs_velocities(rollouts):
    """The coefficients of an open fit do not depend on what was skipped before."""
    forecast = Forecast("open", terms=2)
    a = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 3, 4, 5, 7]), forecast).schedule
    b = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 2, 3, 4, 5, 7]), forecast).schedule
    assert a.velocity(6) == b.velocity(6)


def test_nothing_is_left_behind(pipe, rollouts):
    rollouts.run(skipping(rollouts.fingerprint, [0, 1, 7]), HOLD)
    assert attachment_of(pipe.transformer) is None
    assert "step" not in pipe.scheduler.__dict__
    assert "maybe_free_model_hooks" not in pipe.__dict__


def test_an_enabled_cache_is_in_the_way(pipe, rollouts):
    with layercache.enabled(pipe, schedule_for(pipe, mixed_cells())), pytest.raises(CacheStateError, match="already"):
        rollouts.run(skipping(rollouts.fingerprint, [0, 7]), HOLD)


def test_a_model_that_breaks_is_refused(rollouts):
    schedule = skipping(rollouts.fingerprint, [0, 1, 7])
    block = rollouts.transformer.transformer_blocks[0]

    def spoil(module, args, output):
        return output[0], output[1] * float("nan")

    handle = block.register_forward_hook(spoil)
    try:
        with pytest.raises(CalibrationError, match="NaN"):
            rollouts.run(schedule, Forecast(terms=2))
    finally:
        handle.remove()
    assert attachment_of(rollouts.transformer) is None


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS = {
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "DPM++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "DPM++ single": lambda: DPMSolverSinglestepScheduler(final_sigmas_type="sigma_min", **FLOW),
    "Heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_steering_takes_the_samplers_own_steps(name):
    """What is left of the drift one step later is across all that the velocity could be made of: it is least."""
    pipe = tiny_pipeline()
    pipe.scheduler = SAMPLERS[name]()
    rollouts = Rollouts(pipe, ["cat"], [3], **CALL)
    computed = [step for step in range(rollouts.num_steps) if step not in (4, 5)]
    rollout = rollouts.run(skipping(rollouts.fingerprint, computed), Forecast(terms=2, ridge=1e-12))
    (trace,), (full,) = rollout.traces, rollouts.full
    for step in (4, 5, 6):
        left = trace.latents[step + 1] - full.latents[step + 1]
        terms = [raw for raw in trace.raw[: step + 1] if raw is not None][-2:]
        for term in (*terms, trace.latents[step]):
            assert float(left.norm()) > 0 and abs(float((left * term).sum() / left.norm() / term.norm())) < 2e-4
    with layercache.enabled(pipe, rollout.schedule):
        picture = pipe("cat", **CALL, generator=generators(1, 3)[0], output_type="np").images
    assert psnr_of(rollouts.pictures[0], picture) == pytest.approx(list(rollout.psnr), rel=1e-6)


def test_steering_needs_linear_steps():
    """Of a sampler that adds noise the steps are not known; measuring it draws none of the caller's."""
    other = tiny_pipeline()
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    torch.manual_seed(0)
    other("cat", **CALL, generator=generators(1, 1)[0])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    rollouts = Rollouts(other, ["cat"], [1], **CALL)
    assert rollouts.samplers is None and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(CalibrationError, match="teacher"):
        rollouts.run(skipping(rollouts.fingerprint, [0, 1, 7]), Forecast())
    assert rollouts.run(skipping(rollouts.fingerprint, [0, 1, 7]), Forecast("teacher")).quality > 0


@pytest.mark.parametrize(("prompts", "seeds", "message"), [([], None, "at least one"), (["cat"], [1, 2], "one seed")])
def test_bad_samples(pipe, prompts, seeds, message):
    with pytest.raises(CalibrationError, match=message):
        Rollouts(pipe, prompts, seeds, **CALL)


def test_cache_bytes_are_what_is_allocated(pipe, rollouts):
    for schedule in (
        replace(schedule_for(pipe, mixed_cells()), fingerprint=rollouts.fingerprint),
        rollouts.run(skipping(rollouts.fingerprint, [0, 1, 4]), Forecast(terms=3)).schedule,
    ):
        with layercache.enabled(pipe, schedule) as cache:
            pipe(["cat", "coffee"], **CALL)
            assert cache.report().cache_bytes == rollouts.cache_bytes(schedule)


def test_terms_of_a_forecast_are_known_before_it_is_fitted(rollouts):
    for forecast in (
        Forecast(terms=3),
        Forecast(terms=2, everywhere=False),
        Forecast("teacher", terms=4, everywhere=False),
    ):
        schedule = skipping(rollouts.fingerprint, [0, 1, 2, 4, 5, 7])
        fitted = rollouts.run(schedule, forecast).schedule
        expected = with_terms_of(schedule, forecast)
        for step in range(3, STEPS):
            a, b = fitted.velocity(step), expected.velocity(step)
            assert (a and set(a.terms)) == (b and set(b.terms))


def test_psnr_by_hand():
    a, b = np.zeros((2, 2, 2, 3)), np.zeros((2, 2, 2, 3))
    b[1] += 0.1
    assert psnr_of(a, b) == pytest.approx([100.0, 20.0])
    with pytest.raises(CalibrationError, match="NaN"):
        psnr_of(a, b * np.nan)


def test_pictures_may_be_tensors(pipe):
    rollouts = Rollouts(pipe, ["cat"], [1], output_type="pt", **CALL)
    assert isinstance(rollouts.pictures[0], np.ndarray)
    assert torch.is_tensor(rollouts.full[0].raw[0])


def test_products_of_other_pictures_count_as_these_do(pipe):
    """At the first skipped step, before which nothing has drifted, it is the fit to all of them together."""
    forecast, first = Forecast(terms=2), 2
    runs = []
    for prompts, seeds in ((["cat"], [3]), (["coffee"], [4]), (["cat", "coffee"], [3, 4])):
        rollouts = Rollouts(pipe, prompts, seeds, **CALL)
        schedule = skipping(rollouts.fingerprint, [0, 1, 4, 7])
        runs.append(rollouts.run(schedule, forecast, runs[0].products if prompts == ["coffee"] else None))
    _, more, together = runs
    assert len(more.products[first]) == 2
    found, expected = more.schedule.velocity(first), together.schedule.velocity(first)
    assert found.terms == pytest.approx(expected.terms, rel=1e-6) and found.latents == pytest.approx(expected.latents)
