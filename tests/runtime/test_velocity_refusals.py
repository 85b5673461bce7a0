"""Plans that replace velocities, on models with two outputs (LTX-2) and pipelines of two transformers (Wan 2.2)."""

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
from support.zoo_pipelines import _wan_two_experts

STEPS = 8


@pytest.fixture(scope="module")
def model():
    return build("LTX2VideoTransformer3DModel")[0]


@pytest.fixture
def scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    return scheduler


METHODS = [EasyCache(), Uniform(), TaylorSeer(), MeanCache(computed=(0, 1, 4), spans=(1, 1, 1))]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
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


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_two_experts(scheduler, method):
    """One that says itself at which steps its transformer runs is not refused (`test_experts`)."""
    pipe = _wan_two_experts()[0]
    plans = [method]
    if isinstance(method, PlannedMethod):
        plans.append(method.schedule(fingerprint_of(pipe.transformer, scheduler.sigmas.tolist(), ("cond", "uncond"))))
    for plan in plans:
        with pytest.raises(MethodError, match="runs transformer and transformer_2 in turns"):
            layercache.enable(pipe, plan)
        assert attachment_of(pipe.transformer) is None
