"""CacheQuant on models with weights of 8 bits: its steps, its factors, and the fits to an unquantised model's runs."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import BudgetError, CalibrationError
from layercache.methods import CacheQuant
from layercache.methods.cachequant import group_lengths, plan_steps, reuse_errors
from layercache.models.registry import settings_of
from layercache.planning.fit import Forecast
from layercache.planning.rollout import Rollouts
from support.tiny import generate, tiny_pipeline

STEPS = 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    """With an outlier in every matrix, so that 8 bits for all of it are coarse."""
    found = tiny_pipeline(layers=2)
    with torch.no_grad():
        for module in found.transformer.transformer_blocks.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[-1, -1] = 6.0
    return found


def quantised_by_torch(pipe):
    """With torch's own dynamic quantisation of the blocks, one scale per matrix: coarse."""
    found = copy.deepcopy(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = found.transformer.transformer_blocks
        torch.ao.quantization.quantize_dynamic(blocks, {torch.nn.Linear}, torch.qint8, inplace=True)
    return found


def quantised_by_torchao(pipe):
    quantization = pytest.importorskip("torchao.quantization")
    found = copy.deepcopy(pipe)
    quantization.quantize_(found.transformer.transformer_blocks, quantization.Int8WeightOnlyConfig())
    return found


@pytest.fixture(scope="module")
def coarse(pipe):
    return quantised_by_torch(pipe)


def partition(errors, count):
    """The cut into groups of allowed lengths that costs least, among all of them."""
    steps, (least, most) = len(errors), group_lengths(len(errors), count)
    found = []
    for inner in itertools.combinations(range(1, steps), count - 1):
        cuts = (0, *inner, steps)
        lengths = [b - a for a, b in itertools.pairwise(cuts)]
        if all(least <= length <= most for length in lengths):
            found.append((sum(errors[a][n] for a, n in zip(cuts, lengths, strict=False)), cuts[:-1]))
    return list(min(found)[1])


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_steps_are_the_cut_of_least_error(count):
    generator = torch.Generator().manual_seed(count)
    velocities = list(torch.randn(10, 2, 5, generator=generator).cumsum(0))
    errors = reuse_errors(velocities, 10)
    for start, length in ((0, 1), (2, 3), (7, 3)):
        expected = sum((velocities[start + k] - velocities[start]).abs().sum().item() for k in range(length))
        assert errors[start, length] == pytest.approx(expected, rel=1e-5)
    assert plan_steps(errors, count) == partition(errors, count)
    with pytest.raises(BudgetError, match="not cut into 2 groups"):
        plan_steps(errors[:, :3], 2)


def test_factors_are_least_squares_towards_the_unquantised_run(pipe, coarse):
    """Written out: the quantised model runs, and each velocity is scaled to where the other's latents are next."""
    rollouts = Rollouts(coarse, ["cat"], [0], reference=pipe, **CALL)
    full, schedule = rollouts.full[0], CacheQuant().plan(rollouts, 0.5)
    computed = [step for step in range(STEPS) if not schedule.is_skipped(step)]
    assert computed == plan_steps(reuse_errors(full.taken, 4), 4)
    assert torch.equal(full.latents[0], Rollouts(pipe, ["cat"], [0], **CALL).full[0].latents[0])
    factors, newest, latents = [], None, []

    def step_by_hand(scheduler, step=0):
        original = type(scheduler).step

        def taken(velocity, timestep, sample, **options):
            nonlocal newest
            at = len(factors)
            newest = velocity if at in computed else newest
            latents.append(sample)
            gap = rollouts.sigmas[at + 1] - rollouts.sigmas[at]
            wanted = full.taken[at] + (full.latents[at] - sample) / gap  # leads to where the full run is next
            factor = 1.0 if at == 0 else float((newest * wanted).sum() / (newest * newest).sum())
            factors.append(factor)
            return original(scheduler, factor * newest, timestep, sample, **options)

        return taken

    by_hand = copy.deepcopy(coarse)
    by_hand.scheduler.step = step_by_hand(by_hand.scheduler)
    expected = generate(by_hand, ["cat"], steps=STEPS, guidance_scale=1.0)
    rules = [schedule.velocity(step) for step in range(STEPS)]
    found = [1.0 if rule is None else sum(rule.terms.values()) for rule in rules]
    np.testing.assert_allclose(found, factors, rtol=2e-4)
    with layercache.enabled(coarse, schedule):
        result = generate(coarse, ["cat"], steps=STEPS, guidance_scale=1.0)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def distance(pipe, schedule, target):
    with layercache.enabled(pipe, schedule):
        return float((generate(pipe, ["cat"], steps=STEPS, guidance_scale=1.0) - target).square().mean())


def test_the_error_of_quantisation_is_corrected(pipe, coarse):
    """By CacheQuant's factors, and further by a fit of several terms to the same runs."""
    target = generate(pipe, ["cat"], steps=STEPS, guidance_scale=1.0)
    own = CacheQuant().schedule(coarse, ["cat"], 0.5, seeds=[0], **CALL)
    rollouts = Rollouts(coarse, ["cat"], [0], reference=pipe, **CALL)
    corrected = CacheQuant().plan(rollouts, 0.5)
    several = rollouts.run(corrected, Forecast()).schedule
    fitted = layercache.refit(coarse, several, ["cat"], seeds=[0], reference=pipe, progress=False, **CALL).schedule
    plain, ours, more = (distance(coarse, one, target) for one in (own, corrected, fitted))
    assert more < ours < plain
    assert own.fingerprint.settings["quantisation"] == corrected.fingerprint.settings["quantisation"] == "torch.ao"
    with pytest.raises(CalibrationError, match="same class and architecture"):
        Rollouts(coarse, ["cat"], [0], reference=tiny_pipeline(layers=3), **CALL)


def test_neutral(coarse):
    full = generate(coarse, ["cat"], steps=STEPS, guidance_scale=1.0)
    schedule = CacheQuant(corrects=False).schedule(coarse, ["cat"], 1.0, seeds=[0], **CALL)
    with layercache.enabled(coarse, schedule):
        assert torch.equal(generate(coarse, ["cat"], steps=STEPS, guidance_scale=1.0), full)
    with pytest.raises(BudgetError, match="from one to all"):
        CacheQuant().schedule(coarse, ["cat"], 0.01, seeds=[0], **CALL)


def test_weights_of_torchao(pipe):
    """Int8 weights on the CPU: known for what they are, searched, fitted and run."""
    quantised = quantised_by_torchao(pipe)
    assert settings_of(quantised.transformer)["quantisation"] == "torchao"
    schedule = CacheQuant().schedule(quantised, ["cat"], 0.5, seeds=[0], reference=pipe, **CALL)
    assert schedule.fingerprint.settings["quantisation"] == "torchao"
    target = generate(pipe, ["cat"], steps=STEPS, guidance_scale=1.0)
    own = CacheQuant().schedule(quantised, ["cat"], 0.5, seeds=[0], **CALL)
    assert distance(quantised, schedule, target) <= distance(quantised, own, target) * 1.05


@pytest.mark.slow
def test_a_search_is_fitted_to_the_unquantised_run(pipe, coarse):
    target = generate(pipe, ["cat"], steps=STEPS, guidance_scale=1.0)
    options = {"budgets": (0.6,), "effort": "quick", "seeds": [0], "progress": False, **CALL}
    plain, fitted = (
        layercache.search(coarse, ["cat"], **options, **more).choose(0.6).schedule for more in ({}, {"reference": pipe})
    )
    assert distance(coarse, fitted, target) < distance(coarse, plain, target)
