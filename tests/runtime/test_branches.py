"""Branches that follow cells of their own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import ScheduleError
from layercache.planning.fit import Forecast
from layercache.planning.rollout import Rollouts, psnr_of, skipping
from layercache.schedule.schedule import Schedule, Velocity
from support.tiny import generate, generators, mixed_cells, schedule_for, tiny_pipeline

STEPS = 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
FULL = tuple((None,) * 3 for _ in range(STEPS))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def apart(pipe):
    plain = schedule_for(pipe, mixed_cells())
    return replace(plain, branch_cells={"uncond": FULL})


def test_each_branch_follows_its_own_cells(pipe, apart):
    calls = []
    hooks = [
        block.register_forward_hook(lambda *_, k=k: calls.append(k))
        for k, block in enumerate(pipe.transformer.transformer_blocks)
    ]
    with layercache.enabled(pipe, apart) as cache:
        generate(pipe)
        report = cache.report()
    for hook in hooks:
        hook.remove()
    own = sum(cell is None for row in apart.cells for cell in row)
    assert len(calls) == 2 * (own + 3 * STEPS)
    assert report.used == pytest.approx(apart.used) == pytest.approx((own + 3 * STEPS) / (6 * STEPS))
    assert report.fallback_rows == 0


def test_branches_with_equal_cells_change_nothing(pipe):
    plain = schedule_for(pipe, mixed_cells())
    with layercache.enabled(pipe, plain):
        expected = generate(pipe)
    with layercache.enabled(pipe, replace(plain, branch_cells={"uncond": plain.cells})):
        assert torch.equal(generate(pipe), expected)


def test_first_forwards_of_each_branch_are_those_of_its_own_schedule(pipe, apart):
    """At the first cached step both branches still have the full run's latents: their outputs can be compared alone."""
    step = next(k for k, row in enumerate(apart.cells) if any(cell is not None for cell in row))

    def outputs(schedule):
        found = []
        hook = pipe.transformer.register_forward_hook(lambda m, a, output: found.append(output[0]))
        with layercache.enabled(pipe, schedule):
            generate(pipe)
        hook.remove()
        return found[2 * step], found[2 * step + 1]

    plain = replace(apart, branch_cells={})
    full = replace(plain, cells=FULL)
    assert torch.equal(outputs(apart)[0], outputs(plain)[0])
    assert torch.equal(outputs(apart)[1], outputs(full)[1])
    assert not torch.equal(outputs(plain)[1], outputs(full)[1])


def test_file_keeps_them(apart, tmp_path):
    assert Schedule.load(apart.save(tmp_path / "s.json")) == apart


def test_refusals(pipe, apart):
    with pytest.raises(ScheduleError, match="none of"):
        replace(apart, branch_cells={"other": FULL})
    with pytest.raises(ScheduleError, match="of branch uncond"):
        replace(apart, branch_cells={"uncond": FULL[:-1]})
    with pytest.raises(ScheduleError, match="of branch uncond"):
        replace(apart, branch_cells={"uncond": (({5: 1.0}, None, None), *FULL[1:])})
    whole = skipping(apart.fingerprint, [0, 2, 3, 4, 5, 6, 7])
    with pytest.raises(ScheduleError, match="skip it in all"):
        replace(whole, branch_cells={"uncond": ((None,),) * STEPS})
    assert replace(whole, velocities=(None, Velocity({0: 1.0}), *[None] * 6)).used < 1


@pytest.mark.slow
def test_planned_per_branch(pipe):
    measured = layercache.calibrate(pipe, ["cat"], progress=False, max_distance=5, max_span=5, **CALL)
    # times that were measured beside other work may leave no choice
    profile = replace(measured, group_seconds=(1.0,) * 3, reuse_seconds=(0.0,) * 3)
    settings = {"protect_first": 1, "protect_last": 1}
    schedule = layercache.plan(profile, 0.6, per_branch=True, **settings)
    assert schedule.used <= 0.6 + 1e-9
    assert set(schedule.branch_cells) == {"uncond"}
    assert schedule.cells != schedule.branch_cells["uncond"]
    together = layercache.plan(profile, 0.6, **settings)
    assert schedule.made_by["error"] <= 2 * together.made_by["error"] + 1e-9
    with layercache.enabled(pipe, schedule) as cache:
        pipe("cat", **CALL)
        assert cache.report().cache_bytes == profile.cache_bytes(schedule)


def test_of_rollouts(pipe, apart):
    rollouts = Rollouts(pipe, ["cat"], [0], **CALL)
    take = rollouts.run(replace(apart, fingerprint=rollouts.fingerprint), Forecast(terms=2))
    with layercache.enabled(pipe, take.schedule):
        picture = pipe("cat", generator=generators(1)[0], output_type="np", **CALL).images
    np.testing.assert_allclose(psnr_of(rollouts.pictures[0], picture), take.psnr, rtol=1e-9)
