"""Noise levels of one's own: runs between them, the search that moves them, and what is refused."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

import layercache
from layercache.errors import ArgumentError, BudgetError, MethodError, ScheduleMismatchError
from layercache.planning import free_levels
from layercache.planning.noise_levels import GivenLevels, descend, simulated
from layercache.planning.rollout import Rollouts, psnr_of
from layercache.planning.search import search_cost
from layercache.planning.surrogate import Answers, FullRuns
from layercache.schedule.schedule import Schedule
from support import zoo_pipelines
from support.marks import slow
from support.tiny import tiny_pipeline

CALL = {"num_inference_steps": 5, "guidance_scale": 3.0}
PROMPTS, SEEDS = ["cat", "coffee"], [3, 4]
MOVED = (1.0, 0.7, 0.52, 0.4)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(2)


@pytest.fixture(scope="module")
def rollouts(pipe):
    return Rollouts(pipe, PROMPTS, SEEDS, **CALL)


@pytest.fixture(scope="module")
def given(pipe):
    return GivenLevels.of_sample(pipe, "cat", CALL)


def on_the_polygon(rollouts, level):
    """``x_ref[i] + (level - sigma_i) v_ref[i]`` of the first sample, by the segment that the level lies in."""
    trace, sigmas = rollouts.full[0], rollouts.sigmas
    at = max(k for k in range(len(sigmas) - 1) if sigmas[k] >= level)
    return trace.latents[at].double() + (level - sigmas[at]) * trace.taken[at].double()


def test_full_runs_between_other_levels_lie_on_the_polygon(rollouts, given):
    levels = given.levels(MOVED)
    moved = rollouts.moved(levels, MOVED)
    assert moved.num_steps == 4 and moved.call["sigmas"] == list(MOVED) and moved.call["num_inference_steps"] == 4
    latents = [*moved.full[0].latents, moved.samplers[0].after(moved.full[0], 3)]
    for level, found in zip(levels, latents, strict=True):
        torch.testing.assert_close(found.double(), on_the_polygon(rollouts, level), atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(moved.pictures[0], rollouts.pictures[0])


def test_simulated_runs_of_fewer_steps(rollouts, given):
    """At levels of the full run's own, without an answer to drift."""
    runs = FullRuns.of(rollouts)
    none = Answers(np.zeros((2, 5)), np.zeros((2, 5)))
    levels = [rollouts.sigmas[k] for k in (0, 1, 3, 5)]
    lengths, velocities = np.diff(levels), rollouts.full[0].taken
    end = sum(h * velocities[k].double() for h, k in zip(lengths, (0, 1, 3), strict=True))
    missed = end - sum(h * v.double() for h, v in zip(np.diff(rollouts.sigmas), velocities, strict=True))
    found = simulated(runs, none, levels)
    assert found[0] == pytest.approx(-10 * math.log10(float(missed.square().mean())), abs=1e-3)
    assert simulated(runs, none, rollouts.sigmas) == pytest.approx([100.0] * 2)


def test_levels_descend_to_where_the_score_is_highest():
    asked = []

    def score(sigmas):
        asked.append(tuple(sigmas))
        ordered = all(b < a for a, b in zip(sigmas, sigmas[1:], strict=False))
        return -sum((a - b) ** 2 for a, b in zip(sigmas, (1.0, 0.8, 0.3), strict=True)) if ordered else -math.inf

    assert descend((1.0, 0.6, 0.2), score) == pytest.approx((1.0, 0.8, 0.3), abs=0.02)
    assert all(one[0] == 1.0 for one in asked)
    asked.clear()
    descend((1.0, 0.6, 0.2), score, tries=4)
    assert len(asked) == 4


@pytest.mark.parametrize("made", ["_sd3", *slow("_qwen", "_flux2")])
def test_given_levels_are_those_of_the_run(made):
    """A scheduler of its own levels, one with a shift by size, and one with a shift by size and steps."""
    pipe, call = getattr(zoo_pipelines, made)()
    found = GivenLevels.of(pipe, {**call, "generator": torch.Generator()})
    levels = found.levels(found.own)
    pipe(**call, generator=torch.Generator().manual_seed(0))
    assert levels == pytest.approx(pipe.scheduler.sigmas.tolist(), abs=1e-5)
    moved = [*found.own[:3], *(0.9 * sigma for sigma in found.own[3:])]
    pipe(**call, sigmas=moved, generator=torch.Generator().manual_seed(0))
    assert found.levels(moved) == pytest.approx(pipe.scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "more", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), {}, "makes others of those"),
        (zoo_pipelines.DPMSolverMultistepScheduler(use_flow_sigmas=True), {}, "takes no `sigmas`"),
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), {}, "Euler steps"),
        (None, {"sizes": [(32, 32), (32, 64)]}, "sizes="),
        (None, {"sigmas": "moved"}, 'sigmas is "free"'),
        (None, {"budgets": (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), "effort": "quick"}, "full generations at least"),
    ],
)
def test_what_cannot_be_moved_is_refused_before_anything_runs(pipe, monkeypatch, scheduler, more, message):
    if scheduler is not None:
        monkeypatch.setattr(pipe, "scheduler", scheduler)
    monkeypatch.setattr("layercache.planning.search.Rollouts", None)
    settings = {"sigmas": "free", "progress": False, **CALL, **more}
    with pytest.raises((MethodError, ArgumentError, BudgetError), match=message):
        layercache.search(pipe, ["cat"] * 8, **settings)


@pytest.mark.parametrize(("made", "message"), [("_wan", "takes no `sigmas`"), ("_cogview4", "timesteps of its own")])
def test_pipelines_that_take_no_levels_are_refused(made, message):
    pipe, call = getattr(zoo_pipelines, made)()
    with pytest.raises(MethodError, match=message):
        GivenLevels.of(pipe, {**call, "generator": torch.Generator()})


@pytest.fixture(scope="module")
def searched(pipe):
    """A front with moved levels, which are kept whatever they give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(free_levels, "GAIN", -math.inf)
        patch.setattr("layercache.planning.front.quality", lambda psnr, tail: float(-len(psnr)))
        costs = []
        real = Rollouts._note
        patch.setattr(Rollouts, "_note", lambda self, cost: (costs.append(cost), real(self, cost)))
        settings = {"seeds": SEEDS, "budgets": (0.6,), "sigmas": "free", "effort": "quick", **CALL}
        found = free_levels.FreeLevels
        kept = []

        class Kept(found):
            def run(self, counts):
                yield from super().run(counts)
                kept.extend(self.kept)

        patch.setattr("layercache.planning.search.FreeLevels", Kept)
        front = layercache.search(pipe, PROMPTS, progress=False, **settings)
    return front, kept, sum(costs)


def test_a_search_moves_levels_within_its_cost(searched):
    front, (moved,), cost = searched
    assert cost == pytest.approx(search_cost(2, 5, (0.6,), "quick", is_free=True)[0])
    assert "noise levels moved for 1 of 1 budgets" in front.notes
    prints = moved.point.schedule.fingerprint
    assert prints.sigmas_given[0] == 1.0 and len(prints.sigmas_given) == 5
    assert "noise levels moved" in moved.origin


def test_a_moved_schedule_runs_as_it_was_fitted(pipe, searched, tmp_path):
    schedule = searched[1][0].point.schedule
    schedule.save(tmp_path / "moved.json")
    loaded = Schedule.load(tmp_path / "moved.json")
    assert loaded.fingerprint == schedule.fingerprint and "call_arguments" in str(loaded)
    loaded.save_pretrained(tmp_path / "folder")
    assert ", **schedule.call_arguments())" in (tmp_path / "folder" / "README.md").read_text()
    full, found = [], []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        call = {**CALL, "output_type": "np"}
        full.append(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images)
        with layercache.enabled(pipe, loaded) as cache:
            call |= loaded.call_arguments()
            found.append(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images)
        assert cache.report().used == pytest.approx(0.6) and cache.report().fallback_rows == 0
    psnr = psnr_of(np.concatenate(full), np.concatenate(found))
    assert psnr == pytest.approx(searched[1][0].rollout.psnr, abs=1e-4)
    with layercache.enabled(pipe, loaded), pytest.raises(ScheduleMismatchError, match=r"\*\*schedule.call_arguments"):
        pipe("cat", **CALL)


def test_other_rollouts_and_a_refit_keep_the_levels(pipe, rollouts, searched):
    moved = searched[1][0]
    assert rollouts.run(moved.point.schedule).psnr == pytest.approx(moved.rollout.psnr, abs=1e-4)
    point = layercache.refit(pipe, moved.point.schedule, PROMPTS, seeds=SEEDS, progress=False, **CALL)
    assert point.schedule.fingerprint.sigmas_given == moved.point.schedule.fingerprint.sigmas_given
    own = Rollouts(pipe, ["cat"], **CALL).moved(rollouts.sigmas, GivenLevels.of_sample(pipe, "cat", CALL).own)
    assert own.run(Schedule.compute_all(own.fingerprint)).psnr == (100.0,)  # not moved at all


def test_a_pipeline_without_levels_refuses_a_moved_schedule(searched):
    class Other(type(tiny_pipeline(1))):
        def __call__(self, prompt="cat", num_inference_steps=5):
            raise AssertionError

    other = Other(**tiny_pipeline(2).components)
    with pytest.raises(ScheduleMismatchError, match="takes no `sigmas`"):
        layercache.enable(other, searched[1][0].point.schedule)
