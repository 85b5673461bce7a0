"""Fewer steps without a cache, in a comparison: as many as the budget allows, and at other noise levels."""

import math

import numpy as np
import pytest
import torch

import layercache
from layercache._utils import metrics
from layercache.errors import BudgetError, MethodError
from layercache.planning.front import quality
from layercache.planning.noise_levels import GivenLevels
from layercache.planning.rollout import Rollouts
from layercache.planning.whole_steps import TAIL
from layercache.schedule.schedule import Schedule
from layercache.tools.batch.run import _Maker
from layercache.tools.cli.generate import _draw
from layercache.tools.compare.entries import CallArguments
from layercache.tools.compare.fewer import LevelSearch, full_steps
from support.tiny import tiny_pipeline

CALL = {"num_inference_steps": 6, "guidance_scale": 3.0}
CALIBRATION = [["cat", "coffee"]], [8, 9]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(2)


@pytest.fixture(scope="module")
def rollouts(pipe):
    return Rollouts(pipe, *CALIBRATION, **CALL)


def picture(pipe, **more):
    return pipe("cat", generator=torch.Generator().manual_seed(0), output_type="np", **{**CALL, **more}).images


@pytest.fixture(scope="module")
def schedule(pipe, rollouts):
    """Of all steps, at noise levels of its own."""
    given = GivenLevels.of_sample(pipe, "cat", CALL)
    moved = [given.own[0], *(0.9 * sigma for sigma in given.own[1:])]
    return Schedule.compute_all(rollouts.moved(given.levels(moved), moved).fingerprint)


def test_fewer_steps_are_compared_with_the_full_runs(pipe, schedule):
    """Beside a schedule with noise levels of its own, and arguments of a call of one's own."""
    methods = {"fewer-steps": "fewer-steps", "moved": schedule, "two": CallArguments({"num_inference_steps": 2})}
    settings = {"calibration": 1, "repeats": 1, "progress": False, **CALL}
    table = layercache.compare(pipe, methods, ["cat"], (0.7,), **settings)
    rows, reference = {row.method: row for row in table.rows}, picture(pipe)
    for name, arguments, used in (
        ("fewer-steps", {"num_inference_steps": 4}, 4 / 6),
        ("moved", schedule.call_arguments(), 1.0),
        ("two", {"num_inference_steps": 2}, 2 / 6),
    ):
        row = rows[name]
        expected = metrics.psnr(reference, picture(pipe, **arguments))
        assert row.error == "" and row.psnr == pytest.approx(expected, abs=1e-3)
        assert row.used == pytest.approx(used)
    assert rows["fewer-steps"].setting == "4 full steps" and rows["two"].setting == "num_inference_steps=2"


def test_tools_call_a_pipeline_with_the_levels_of_a_schedule(pipe, schedule):
    expected = picture(pipe, **schedule.call_arguments())
    drawn = _draw(pipe, {"prompt": "cat", **CALL}, 0, schedule, "")
    many = _Maker(pipe, [], dict(CALL), schedule, False, None)._draw({"prompt": "cat", **CALL}, 0, schedule)
    np.testing.assert_array_equal(drawn.pixels, expected[0])
    np.testing.assert_array_equal(many.pixels, expected[0])
    found = layercache.measure(pipe, schedule, ["cat"], seeds=[0], repeats=1, **CALL)
    assert found.psnr == pytest.approx(metrics.psnr(picture(pipe), expected), abs=1e-3)


def test_levels_of_fewer_steps_are_the_best_that_were_run(pipe, rollouts):
    given = GivenLevels.of_sample(pipe, "cat", {**CALL, "num_inference_steps": 3})
    search = LevelSearch(rollouts, given, generations=6)
    found = search.found(given.own)
    runs = dict(search._ran)
    assert len(runs) <= 6 and found == max(runs, key=runs.get) and tuple(given.own) in runs
    assert runs[found] > runs[tuple(given.own)]
    calls = {"generator": [torch.Generator().manual_seed(seed) for seed in (8, 9)], "output_type": "np"}
    images = pipe(["cat", "coffee"], **{**CALL, "num_inference_steps": 3}, sigmas=list(found), **calls).images
    assert quality(metrics.psnr(rollouts.pictures[0], images), TAIL) == pytest.approx(runs[found], abs=1e-3)


@pytest.mark.parametrize(
    ("call", "budget", "error", "message"),
    [
        ({}, 0.5, None, 15),
        ({"num_inference_steps": 10}, 0.39, None, 3),
        ({"num_inference_steps": 10}, 0.05, BudgetError, "less than one of 10 steps"),
        ({"sigmas": [1.0, 0.5]}, 0.5, MethodError, "its own sigmas"),
        ({"num_inference_steps": None}, 0.5, MethodError, "takes no num_inference_steps"),
    ],
)
def test_how_many_full_steps_a_budget_allows(pipe, call, budget, error, message):
    if error is None:
        assert full_steps(pipe, call, budget) == message
        return
    with pytest.raises(error, match=message):
        full_steps(pipe, call, budget)


def test_levels_that_are_none_of_flow_matching_are_refused(rollouts):
    class Other:
        sigmas, num_pictures = (14.6, 1.0, 0.0), 2

    with pytest.raises(MethodError, match="those of flow matching"):
        LevelSearch(Other(), None, math.inf)
