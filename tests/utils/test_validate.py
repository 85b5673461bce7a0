"""Public functions that are given something of another kind say what they expect and where to get it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import ArgumentError, LayerCacheError, UnsupportedModelError
from layercache.methods import fixed, full_runs, invardiff, l2c, magcache, meancache, teacache
from layercache.planning.fit import fit_residuals
from layercache.planning.front import Front
from layercache.schedule.forecast import reforecast
from layercache.schedule.schedule import Schedule
from support.profiles import made_profile
from support.tiny import tiny_pipeline

PROFILE = made_profile()
PRINTS = PROFILE.fingerprint
SCHEDULE = Schedule.compute_all(PRINTS)
FRONT = Front((), (1.0, 0.1, 0.0))
VELOCITIES = [[torch.zeros(2)] * 20]
CALL = {"num_inference_steps": 4}

OF_FINGERPRINTS = {
    "Uniform.schedule": fixed.Uniform().schedule,
    "TaylorSeer.schedule": fixed.TaylorSeer().schedule,
    "MagCache.schedule": magcache.MagCache().schedule,
    "MeanCache.schedule": meancache.MeanCache([0, 1], [1, 1]).schedule,
}
OF_PROFILES = {
    "SmoothCache.schedule": fixed.SmoothCache().schedule,
    "fit_residuals": lambda value: fit_residuals(value, SCHEDULE),
}
OTHERS = {
    "layercache.plan expects StabilityProfile or Front": lambda value: layercache.plan(value, 0.6),
    "reforecast expects Schedule": lambda value: reforecast(value, "hold"),
    "fit_residuals expects Schedule": lambda value: fit_residuals(PROFILE, value),
    "fixed.taylorseer_steps expects a number of steps": fixed.taylorseer_steps,
    "invardiff.first_phase expects Rates": lambda value: invardiff.first_phase(value, invardiff.InvarDiff()),
    "invardiff.plan expects Rates": lambda value: invardiff.plan(value, value, invardiff.InvarDiff()),
    "l2c.random_router expects LearnedRouter": l2c.random_router,
    "meancache.plan_steps expects an array [N, max_length + 1, spans]": lambda value: meancache.plan_steps(value, 3),
    "meancache.lexicographic_steps expects an array [N, max_length + 1]": (
        lambda value: meancache.lexicographic_steps(value, 3)
    ),
    "meancache.stability_deviation expects 20 velocities per sample": (
        lambda value: meancache.stability_deviation(value, PRINTS.sigmas)
    ),
}
OF_PIPELINES = {
    "teacache.fit": lambda value: teacache.fit(value, ["cat"], **CALL),
    "full_runs.magnitude_ratios": lambda value: full_runs.magnitude_ratios(value, "cat", **CALL),
    "InvarDiff.schedule": lambda value: invardiff.InvarDiff().schedule(value, ["cat"], **CALL),
    "invardiff.measure": lambda value: invardiff.measure(value, ["cat"], **CALL),
    "LearningToCache.train": lambda value: l2c.LearningToCache().train(value, ["cat"], progress=False, **CALL),
}


def refused(call, value) -> str:
    with pytest.raises(ArgumentError) as caught:
        call(value)
    assert isinstance(caught.value, LayerCacheError) and isinstance(caught.value, TypeError)
    return str(caught.value)


@pytest.mark.parametrize("name", OF_FINGERPRINTS)
@pytest.mark.parametrize("value", [PROFILE, SCHEDULE], ids=["profile", "schedule"])
def test_what_has_a_fingerprint_is_not_one(name, value):
    message = f"{name} expects Fingerprint, got {type(value).__name__}; give its .fingerprint"
    assert refused(OF_FINGERPRINTS[name], value) == message


@pytest.mark.parametrize("name", OF_FINGERPRINTS)
@pytest.mark.parametrize(
    ("value", "described"),
    [(FRONT, "Front"), ("a.json", "the text 'a.json'"), (Path("a.json"), "the path 'a.json'"), (None, "None")],
    ids=str,
)
def test_what_has_no_fingerprint_either(name, value, described):
    message = (
        f"{name} expects Fingerprint, got {described}; profiles and schedules have one, such as profile.fingerprint"
    )
    assert refused(OF_FINGERPRINTS[name], value) == message


NO_PROFILES = [
    (name, value)
    for name in OF_PROFILES
    for value in (PRINTS, SCHEDULE, "a.safetensors", Front, None)
    if value is not None or "search" not in name  # a search needs none
]


@pytest.mark.parametrize(("name", "value"), NO_PROFILES, ids=str)
def test_a_profile_is_expected(name, value):
    text = refused(OF_PROFILES[name], value)
    assert text.startswith(f"{name} expects StabilityProfile, got ")
    assert "layercache.calibrate(pipe, prompts)" in text and "StabilityProfile.load(path)" in text


@pytest.mark.parametrize("message", OTHERS)
@pytest.mark.parametrize("value", [PRINTS, FRONT.seconds, Path("a"), None], ids=["prints", "tuple", "path", "none"])
def test_other_kinds(message, value):
    text = refused(OTHERS[message], value)
    assert text.startswith(message)
    assert "; " in text and "has no attribute" not in text


def test_a_class_in_the_place_of_its_instance():
    assert "got the class Fingerprint" in refused(fixed.Uniform().schedule, type(PRINTS))


def test_tables_of_another_shape_and_numbers_of_any_kind():
    assert "got one of shape [20, 10, 6]" in refused(other("lexicographic"), np.ones((20, 10, 6)))
    assert "got one of shape [4]" in refused(other("plan_steps"), np.ones(4))
    table = meancache.stability_deviation(VELOCITIES, PRINTS.sigmas)
    assert meancache.plan_steps(table.tolist(), 5) == meancache.plan_steps(table, 5)
    assert fixed.taylorseer_steps(np.int64(7)) == fixed.taylorseer_steps(7)


def other(name):
    return next(call for message, call in OTHERS.items() if name in message)


@pytest.mark.parametrize("velocities", [[], [[torch.zeros(2)] * 19], [[1.0] * 20], [torch.zeros(20, 2)]], ids=str)
def test_velocities_of_too_few_steps(velocities):
    assert "rollouts.full" in refused(other("stability_deviation"), velocities)


@pytest.mark.parametrize("name", OF_PIPELINES)
@pytest.mark.parametrize("value", [PROFILE, "Qwen/Qwen-Image", None], ids=["profile", "text", "none"])
def test_a_pipeline_is_expected(name, value):
    with pytest.raises(UnsupportedModelError, match=f"expected a diffusers pipeline.*got {type(value).__name__}"):
        OF_PIPELINES[name](value)


@pytest.mark.parametrize("name", OF_PIPELINES)
def test_a_bare_transformer_cannot_be_asked_for_generations(name):
    with pytest.raises(UnsupportedModelError, match="give the pipeline, not its bare QwenImageTransformer2DModel"):
        OF_PIPELINES[name](tiny_pipeline().transformer)
