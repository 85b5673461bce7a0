"""Models with two outputs, each with a sampler of its own: LTX-2, video and sound."""

from __future__ import annotations

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.errors import MethodError
from layercache.methods import EasyCache, FBCache, MagCache, MeanCache, TaylorSeer, Uniform
from layercache.models.registry import fingerprint_of
from layercache.runtime.attachment import attachment_of
from layercache.runtime.policy import PlannedMethod
from support.zoo import build

STEPS = 8


@pytest.fixture(scope="module")
def model():
    return build("LTX2VideoTransformer3DModel")[0]


@pytest.fixture
def scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize(
    "method", [EasyCache(), Uniform(), TaylorSeer(), MeanCache(computed=(0, 1, 4), spans=(1, 1, 1))]
)
def test_plans_that_replace_velocities_are_refused_before_any_work(model, scheduler, method):
    plans = [method]
    if isinstance(method, PlannedMethod):
        plans.append(method.schedule(fingerprint_of(model, scheduler.sigmas.tolist(), ("all",))))
    for plan in plans:
        with pytest.raises(MethodError, match="LTX2VideoTransformer3DModel gives two outputs"):
            layercache.enable(model, plan, scheduler)
        assert attachment_of(model) is None


@pytest.mark.parametrize(
    "plan",
    [FBCache(), TaylorSeer(groups=((0, 2), (2, 4))), MagCache(ratios=[1.0] * STEPS, threshold=0.1)],
    ids=lambda plan: plan.name,
)
def test_plans_of_groups_are_not(model, scheduler, plan):
    layercache.enable(model, plan, scheduler)
    layercache.disable(model)
