"""Plans that replace velocities: those that some models and pipelines cannot take are refused before any work."""

from __future__ import annotations

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.errors import MethodError
from layercache.methods import EasyCache, FBCache, MagCache, MeanCache, TaylorSeer, Uniform
from layercache.models.registry import fingerprint_of
from layercache.runtime.attachment import attachment_of
from layercache.runtime.policy import PlannedMethod
from layercache.schedule.schedule import Schedule, Velocity
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


def test_groups_of_one_of_two_experts(scheduler):
    """Whole steps may be of both (`test_experts_together`), groups beside velocities are of one."""
    pipe = _wan_two_experts()[0]
    prints = fingerprint_of(pipe.transformer, scheduler.sigmas.tolist(), ("cond", "uncond"))
    cells = tuple(({0: 1.0},) if step == 2 else (None,) for step in range(STEPS))
    velocities = (*[None] * 3, Velocity({3: 0.9}), *[None] * 4)
    plan = Schedule(prints, ((0, prints.num_blocks),), cells, (1.0,), {}, velocities)
    with pytest.raises(MethodError, match="runs transformer and transformer_2 in turns"):
        layercache.enable(pipe, plan)
    assert attachment_of(pipe.transformer) is None
