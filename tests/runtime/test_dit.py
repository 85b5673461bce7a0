"""The DiT class with samplers of its time: DDIM, which keeps no count of its steps, and single-step DPM-Solver-2."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverSinglestepScheduler

import layercache
from layercache.errors import MethodError
from layercache.methods import invardiff, l2c
from layercache.methods.easycache import EasyCache
from layercache.methods.fbcache import FBCache
from layercache.planning.rollout import psnr_of, skipping
from layercache.runtime.timesteps import StepTally
from support.zoo import build

STEPS = 6
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
LABELS = [{"class_labels": [3, 5]}, {"class_labels": [1, 7]}]


@pytest.fixture(scope="module")
def pipe():
    transformer, _ = build("DiTTransformer2DModel")
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, plan=None, sample=LABELS[0], seed=0):
    call = {**CALL, **sample, "generator": torch.Generator().manual_seed(seed), "output_type": "np"}
    if plan is None:
        return pipe(**call).images
    with layercache.enabled(pipe, plan) as cache:
        found = pipe(**call).images
        assert cache.report().generations == 1
    return found


def test_a_router_learns_plans_and_runs(pipe):
    settings = l2c.LearningToCache(rounds=2, by_cost=False)
    router = settings.train(pipe, LABELS, progress=False, output_type="np", **CALL)
    assert router.theta.shape == (STEPS // 2, 4 * 2)
    assert router.units[:2] == ("transformer_blocks.0.attn1", "transformer_blocks.0.ff")
    assert np.isfinite(router.losses).all()
    full = picture(pipe)
    np.testing.assert_array_equal(picture(pipe, router.schedule(threshold=0.0)), full)
    half = picture(pipe, router.schedule(budget=0.75))
    assert np.isfinite(half).all() and not np.array_equal(half, full)


def test_noise_levels_are_those_of_the_scheduler(pipe):
    router = l2c.LearningToCache(rounds=1).train(pipe, LABELS[:1], progress=False, output_type="np", **CALL)
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    expected = [*((1 - kept) / kept).sqrt().tolist(), 0.0]
    assert router.fingerprint.sigmas == pytest.approx(expected)
    assert router.fingerprint.branches == ("call 0",)  # both guidance branches in one batch


def test_groups_and_steps_are_calibrated_and_planned(pipe):
    profile = layercache.calibrate(pipe, LABELS, progress=False, max_distance=3, max_span=2, **CALL)
    schedule = layercache.plan(profile, 0.75)
    with layercache.enabled(pipe, schedule) as cache:
        pipe(**CALL, **LABELS[0], generator=torch.Generator().manual_seed(0))
        report = cache.report()
    assert report.used == pytest.approx(schedule.used) and report.fallback_rows == 0
    assert picture(pipe).shape == (2, 8, 8, 3)


def test_two_generations_in_a_row_are_alike(pipe):
    profile = layercache.calibrate(pipe, LABELS[:1], progress=False, max_distance=3, max_span=2, **CALL)
    call = {**CALL, **LABELS[0], "output_type": "np"}
    with layercache.enabled(pipe, layercache.plan(profile, 0.75)) as cache:
        first, second = (pipe(**call, generator=torch.Generator().manual_seed(0)).images for _ in range(2))
        assert cache.report().generations == 2
    np.testing.assert_array_equal(first, second)
    assert "step" not in vars(pipe.scheduler)


def test_dynamic_methods_and_invardiff(pipe):
    full = picture(pipe)
    with layercache.enabled(pipe, FBCache(threshold=1.0, warmup=2)) as cache:
        cached = pipe(**CALL, **LABELS[0], generator=torch.Generator().manual_seed(0), output_type="np").images
        schedule = cache.export_schedule()
    np.testing.assert_array_equal(picture(pipe, schedule), cached)
    plan = invardiff.InvarDiff(0.4, 0.6, 0.0).schedule(pipe, LABELS, output_type="np", **CALL)
    assert plan.used < 1 and not np.array_equal(picture(pipe, plan), full)


def test_whole_steps_of_a_sampler_that_counts_none(pipe):
    """DDIM's steps are counted by its calls; EasyCache, which takes Euler's steps, says that these are none."""
    with pytest.raises(MethodError, match="DDIMScheduler"):
        layercache.enable(pipe, EasyCache())
    profile = layercache.calibrate(pipe, LABELS[:1], progress=False, max_distance=3, max_span=2, **CALL)
    point = layercache.refit(pipe, skipping(profile.fingerprint, [0, 2, 4]), LABELS, progress=False, **CALL)
    assert len(point.psnr) == 4 and point.used == 0.5
    call = {**CALL, **LABELS[0], "output_type": "np"}
    found = []
    for plan in (layercache.Schedule.compute_all(profile.fingerprint), point.schedule):
        with layercache.enabled(pipe, plan) as cache:
            found.append(pipe(**call, generator=[torch.Generator().manual_seed(k) for k in range(2)]).images)
            assert cache.report().fallback_rows == 0
    assert psnr_of(*found) == pytest.approx(point.psnr[:2], rel=1e-4)
    assert "step" not in vars(pipe.scheduler)


def test_single_step_dpm_solver_takes_shifted_steps(pipe):
    """Two evaluations per outer step: the outer points behind the first take what the midpoint before them gave."""
    ddim, pipe.scheduler = pipe.scheduler, DPMSolverSinglestepScheduler(solver_order=2)
    try:
        settings = l2c.LearningToCache(rounds=1, shifted=True)
        router = settings.train(pipe, LABELS[:1], progress=False, output_type="np", **CALL)
        assert router.theta.shape == ((STEPS - 1) // 2, 4 * 2)
        schedule = router.schedule(threshold=1.0)
        assert [all(row) for row in schedule.computed] == [True, True, False, True, False, True]
        assert np.isfinite(picture(pipe, schedule)).all()
    finally:
        pipe.scheduler = ddim


class Bare:
    timesteps = None


def test_a_tally_follows_a_run_from_where_it_begins():
    scheduler = Bare()
    tally = StepTally(scheduler)
    assert tally.step(torch.tensor(999)) is None
    scheduler.timesteps = torch.tensor([800, 600, 400, 200])
    found = []
    for timestep in (600, 400, 200):  # img2img begins at the second step
        found += [tally.step(torch.tensor([timestep])), tally.step(torch.tensor([timestep]))]
        tally.count()
    assert found == [1, 1, 2, 2, 3, 3]
    assert tally.step(torch.tensor(800)) == 0  # the same list again
    tally.count()
    scheduler.timesteps = scheduler.timesteps.clone()
    assert tally.step(torch.tensor(400)) == 2  # another list in the middle of a run
    assert tally.step(None) == 2
    scheduler.timesteps = torch.tensor([500])
    assert tally.step(torch.tensor(500)) == 0  # a run of one step
    scheduler.timesteps = torch.tensor([])
    assert tally.step(torch.tensor(500)) is None
