"""Schedules fitted anew: to other weights, another number of steps, and what cannot be."""

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import ArgumentError, ScheduleError
from layercache.planning.fit import Forecast
from layercache.planning.refit import path_of
from layercache.planning.rollout import Rollouts, skipping
from support.tiny import mixed_cells, schedule_for, tiny_pipeline

PROMPTS, SEEDS = [["cat", "coffee"], "rocket"], [3, 4, 5]
CALL = {"num_inference_steps": 8, "guidance_scale": 3.0}
COMPUTED = [0, 1, 3, 4, 7]


@pytest.fixture(scope="module")
def fitted():
    rollouts = Rollouts(tiny_pipeline(2), PROMPTS, SEEDS, **CALL)
    return rollouts.run(skipping(rollouts.fingerprint, COMPUTED), Forecast(terms=2)).schedule


def test_other_weights_get_other_coefficients(fitted):
    """As a run of the same steps fits them, and nearer to the changed model's full run than the old ones."""
    pipe = tiny_pipeline(2)
    with torch.no_grad():
        for block in pipe.transformer.transformer_blocks:
            block.attn.to_out[0].weight.mul_(3.0)
    point = layercache.refit(pipe, fitted, PROMPTS, seeds=SEEDS, progress=False, **CALL)
    rollouts = Rollouts(pipe, PROMPTS, SEEDS, **CALL)
    again = rollouts.run(skipping(rollouts.fingerprint, COMPUTED), Forecast(terms=2, weighting=1.0))
    assert (point.psnr, point.schedule.velocities) == (again.psnr, again.schedule.velocities)
    assert len(point.expected) == 3 and point.schedule.made_by["origin"] == "a schedule, refitted"
    assert np.mean(point.psnr) > np.mean(rollouts.run(fitted).psnr)
    assert rollouts.run(point.schedule).psnr == pytest.approx(point.psnr, rel=1e-9)


def test_another_number_of_steps_computes_as_large_a_share(fitted):
    point = layercache.refit(tiny_pipeline(2), fitted, ["cat"], progress=False, **CALL | {"num_inference_steps": 16})
    assert point.schedule.num_steps == 16 and point.used == pytest.approx(5 / 8)
    assert path_of(fitted, fitted.fingerprint.sigmas).nonzero()[0].tolist() == COMPUTED
    finer = path_of(fitted, np.linspace(1.0, 0.0, 17))
    assert finer[0] and finer.sum() == 10


def test_what_is_not_refitted(fitted):
    pipe = tiny_pipeline()
    with pytest.raises(ScheduleError, match="only schedules of whole steps"):
        layercache.refit(pipe, schedule_for(pipe, mixed_cells()), PROMPTS)
    with pytest.raises(ArgumentError, match="layercache.refit expects Schedule"):
        layercache.refit(pipe, [fitted], PROMPTS)
