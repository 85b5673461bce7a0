"""Schedules that are learnt from a pipeline's own first generations, on a tiny untrained pipeline."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch._dynamo.testing import CompileCounter

import layercache
from layercache.errors import ArgumentError, BudgetError, CacheStateError, LayerCacheWarning, MethodError
from layercache.planning import learn, samples, search_files
from layercache.planning.full_run import FullRun
from layercache.planning.learn_fit import COST, Fit
from support.tiny import tiny_pipeline
from support.zoo_pipelines import _wan_two_experts, generate

STEPS = 6
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
PROMPTS = ["cat", "coffee", "rocket", "astronaut", "galaxies", "cat", "coffee", "rocket"]


@pytest.fixture
def pipe():
    return tiny_pipeline(2)


def picture(pipe, seed, **call):
    torch.manual_seed(seed)  # for samplers that add noise
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipe(PROMPTS[seed], generator=generator, **{**CALL, **call}).images)


def psnr(one, other):
    return float(-10 * np.log10(((one.astype(float) - other) ** 2).mean() + 1e-12))


def count_computed(pipe):
    """Steps that were computed so far, of both guidance branches together half a step each; of all generations."""
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(0))
    return lambda: len(calls) / 2 / STEPS


@pytest.mark.parametrize("target", [{"budget": 0.5}, {"speedup": 1.6}, {"min_psnr": 45.0}])
def test_the_fifth_generation_is_cached(pipe, target, monkeypatch):
    monkeypatch.setattr(FullRun, "_seconds", lambda self, steps: (0.3, 0.1))  # with which the speedup asks for half
    full = [picture(pipe, seed) for seed in range(8)]
    generations = count_computed(pipe)
    with layercache.enabled(pipe, **target, learn=4) as cache:
        for seed in range(4):
            np.testing.assert_array_equal(picture(pipe, seed), full[seed])
        assert generations() == 4
        found = [picture(pipe, seed) for seed in range(4, 8)]
        (learned,) = cache.known.values()
        share = learned.point.used
        assert share == 0.5 or "min_psnr" in target
        if "min_psnr" not in target:  # two paths were run on three of the pictures, the fourth simulated beside them
            assert (len(learned.point.psnr), len(learned.point.expected)) == (3, 4)
        assert generations() <= 4 + COST + 4 * share and share < 0.8
        for seed in range(4, 8):
            assert 40 < psnr(found[seed - 4], full[seed]) < 100
        report = cache.report()
    assert report.generations == 8 and report.used == pytest.approx((4 + 4 * share) / 8)
    assert np.mean([psnr(*pair) for pair in zip(found, full[4:], strict=True)]) == pytest.approx(
        np.mean(learned.point.expected), abs=3.0
    )
    np.testing.assert_array_equal(picture(pipe, 4), full[4])


def test_what_was_learnt_is_known_to_the_next_process_and_refined(pipe, tmp_path):
    with layercache.enabled(pipe, budget=0.5, learn=2):
        for seed in range(2):
            picture(pipe, seed)
        first = picture(pipe, 5)
    other, generations = tiny_pipeline(2), None
    with layercache.enabled(other, budget=0.5, learn=4) as cache:
        generations = count_computed(other)
        np.testing.assert_array_equal(picture(other, 5), first)
        assert generations() == 0.5
        (before,) = (learned.point for learned in cache.known.values())
    with layercache.enabled(other, budget=0.5, learn="more") as cache:
        for seed in range(5):
            picture(other, seed)
        (after,) = (learned.point for learned in cache.known.values())
    steps = range(STEPS)
    assert [after.schedule.is_skipped(k) for k in steps] == [before.schedule.is_skipped(k) for k in steps]
    assert after.schedule.velocities != before.schedule.velocities
    text = "".join(path.read_text(errors="ignore") for path in tmp_path.rglob("*.*"))
    assert text and not any(prompt in text for prompt in PROMPTS)
    changed = tiny_pipeline(2, seed=3)
    with layercache.enabled(changed, budget=0.5, learn=4):
        generations = count_computed(changed)
        picture(changed, 5)
        assert generations() == 1


def test_calls_with_other_settings_are_learnt_apart(pipe):
    with layercache.enabled(pipe, budget=0.5, learn=1) as cache:
        for steps in (6, 5, 6, 5):
            picture(pipe, 0, num_inference_steps=steps)
        assert sorted(learned.point.schedule.num_steps for learned in cache.known.values()) == [5, 6]
        assert cache.report().generations == 4


def test_recorded_calls_of_settings_that_are_never_learnt_are_bounded(pipe, monkeypatch, caplog):
    monkeypatch.setattr(learn, "MOST_SETTINGS", 2)
    with layercache.enabled(pipe, budget=0.5, learn=2) as cache:
        recorded = []
        for steps in (4, 5, 4, 6, 7, 5):  # twice with 4, whose third would be learnt from
            picture(pipe, 0, num_inference_steps=steps)
            recorded.append(sorted(len(one.sigmas) - 1 for one in cache.known.values() if one.recorded))
        assert recorded == [[4], [4, 5], [4, 5], [4, 6], [6, 7], [5, 7]]
        text = repr(cache)
    dropped = [record.getMessage().partition(" recorded calls are dropped") for record in caplog.records]
    assert [count for count, *_ in dropped] == ["1", "2", "1"]
    assert len(text.splitlines()) <= 5 and "budget=0.5, learn=2: 62 forwards" in text
    assert "4 known, 0 by a learnt schedule; 1, 1 of 2 calls recorded of others" in text


def test_other_noise_levels_under_the_same_settings_are_learnt_apart(pipe):
    """The scheduler's shift is changed in a way that none of the call's arguments tell."""
    with layercache.enabled(pipe, budget=0.5, learn=2) as cache:
        generations = count_computed(pipe)

        def computed(seed):
            before = generations()
            return picture(pipe, seed), generations() - before

        for seed in range(2):
            picture(pipe, seed)
        first, share = computed(2)
        pipe.scheduler.set_shift(1.5)
        with pytest.warns(LayerCacheWarning, match="computed in full.*learnt apart.*noise schedule differs"):
            assert computed(2)[1] == 1
        assert [computed(seed)[1] for seed in range(2)] == [1, 1]
        assert computed(2)[1] > 0.5, "a fit, and a cached generation"
        assert computed(2)[1] == 0.5 and len(cache.known) == 2
        pipe.scheduler.set_shift(3.0)
        again, share = computed(2)
        assert share == 0.5 and np.array_equal(again, first)
        assert cache.report().generations == 8 and cache.report().fallback_rows == 0


def test_what_was_learnt_is_taken_again_after_a_call_with_other_noise_levels(pipe):
    with layercache.enabled(pipe, budget=0.5, learn=1):
        picture(pipe, 0)
        first = picture(pipe, 2)
    with layercache.enabled(pipe, budget=0.5):
        for shift in (3.0, 1.5, 3.0):
            pipe.scheduler.set_shift(shift)
            found = picture(pipe, 2)
            assert np.array_equal(found, first) is (shift == 3.0)


def test_two_pipelines_with_one_transformer_learn_together(pipe):
    other = type(pipe)(pipe.transformer, pipe.class_encoder, FlowMatchEulerDiscreteScheduler(shift=3.0))
    other.set_progress_bar_config(disable=True)
    full = picture(pipe, 2)
    cache = layercache.enable(pipe, budget=0.5, learn=2)
    assert layercache.enable(other, budget=0.5, learn=2) is cache
    with pytest.raises(CacheStateError, match="already enabled"):
        layercache.enable(other, budget=0.5, learn=2)
    picture(pipe, 0)
    picture(other, 1)
    found = [picture(one, 2) for one in (other, pipe, other)]
    (known,) = cache.known.values()
    assert known.cache.report().generations == 3 and known.cache.report().used == 0.5
    assert not np.array_equal(found[0], full) and all(np.array_equal(found[0], one) for one in found)
    layercache.disable(other)
    for one in (pipe, other):
        assert np.array_equal(picture(one, 2), full) and "step" not in vars(one.scheduler)
        assert type(one).__call__.__qualname__ == "DemoPipeline.__call__" and "progress_bar" not in vars(one)


def test_a_second_pipeline_that_nothing_is_enabled_on_runs_in_full(pipe):
    """As `from_pipe` makes it: transformer and scheduler are those of the first."""
    other = type(pipe)(pipe.transformer, pipe.class_encoder, pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    full = picture(other, 2, num_inference_steps=6)
    with layercache.enabled(pipe, budget=0.5, learn=1):
        picture(pipe, 0)
        cached = picture(pipe, 1)
        with pytest.warns(LayerCacheWarning, match="computed in full, because.*another pipeline"):
            found = picture(other, 2, num_inference_steps=6)
        assert np.array_equal(found, full) and np.array_equal(picture(pipe, 1), cached)


def test_a_compiled_transformer_is_learnt_from(pipe):
    full, counter = picture(pipe, 1, num_inference_steps=4), CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    with layercache.enabled(pipe, budget=0.5, learn=1) as cache:
        np.testing.assert_array_equal(picture(pipe, 1, num_inference_steps=4), full)
        assert counter.frame_count == 1, "one graph of all steps and branches"
        (learned,) = cache.known.values()
        assert learned.recorded[0].full.seconds[0] > 0 and set(learned.recorded[0].full.branches) == {"cond", "uncond"}


def test_a_call_that_the_first_transformer_has_no_step_of_is_given_all_the_same():
    pipe, call = _wan_two_experts()
    pipe.register_to_config(boundary_ratio=1.5)
    full = generate(pipe, call)
    with layercache.enabled(pipe, budget=0.5, learn=1):
        with pytest.warns(LayerCacheWarning, match="nothing can be learnt.*no step was run by.*transformer"):
            found = generate(pipe, call)
        np.testing.assert_array_equal(found, full)


def test_calls_are_repeated_as_they_were(pipe):
    """Without a generator, with a list of prompts, with a callback, as 8-bit pictures."""
    steps = []

    def note(pipe, step, time, values):
        steps.append(step)
        return values

    torch.manual_seed(5)
    full = pipe("cat", **CALL).images
    with layercache.enabled(pipe, budget=0.5, learn=3) as cache:
        torch.manual_seed(5)
        np.testing.assert_array_equal(pipe("cat", **CALL).images, full)
        calls = [{}, {"output_type": "pil", "callback_on_step_end": note}]
        for call in calls:
            generators = [torch.Generator().manual_seed(k) for k in range(2)]
            pipe(["cat", "coffee"], **{**CALL, **call}, generator=generators)
        assert steps == [*range(STEPS)]
        pipe("rocket", **CALL, generator=torch.Generator().manual_seed(4))
        assert steps == [*range(STEPS)], "it is not for what a fit runs"
        (learned,) = cache.known.values()
        assert len(learned.point.psnr) == 5 and min(learned.point.psnr) > 40


def test_a_call_that_cannot_be_repeated_is_noticed(pipe, monkeypatch):
    """As where a pipeline takes its noise from elsewhere: what would be fitted is of another picture."""
    full = picture(pipe, 1)
    monkeypatch.setattr(samples, "copied", lambda generator: torch.Generator().manual_seed(99))
    with layercache.enabled(pipe, budget=0.5, learn=1):
        picture(pipe, 0)
        with pytest.warns(LayerCacheWarning, match="did not begin with the latents"):
            np.testing.assert_array_equal(picture(pipe, 1), full)


def changes_guidance(pipe, step, time, values):
    pipe._guidance_scale = 1.0 + step
    return values


def noisy(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    return {}


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (noisy, "adds noise of its own"),
        (lambda pipe: {"callback_on_step_end": changes_guidance}, "callback_on_step_end changes it"),
    ],
)
def test_what_cannot_be_learnt_from_is_said_and_computed(pipe, prepare, why):
    call = prepare(pipe)
    full = [picture(pipe, seed, **call) for seed in range(3)]
    with layercache.enabled(pipe, budget=0.5, learn=1) as cache:
        for seed in range(3):
            with pytest.warns(LayerCacheWarning, match=why):
                np.testing.assert_array_equal(picture(pipe, seed, **call), full[seed])
        assert cache.report().used == 1.0


def test_multistep_samplers_are_learnt_with(pipe):
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    full = picture(pipe, 2)
    with layercache.enabled(pipe, budget=0.5, learn=2):
        for seed in range(2):
            picture(pipe, seed)
        assert 35 < psnr(picture(pipe, 2), full) < 100


def test_a_target_out_of_reach_is_said_and_computed(pipe):
    full = picture(pipe, 1)
    with layercache.enabled(pipe, min_psnr=99.0, learn=1):
        picture(pipe, 0)
        with pytest.warns(LayerCacheWarning, match="min_psnr=99 was not reached"):
            np.testing.assert_array_equal(picture(pipe, 1), full)


def test_an_interrupted_call_and_fit_lose_nothing(pipe, monkeypatch):
    full = picture(pipe, 1)

    def interrupt(*args):
        raise KeyboardInterrupt

    with layercache.enabled(pipe, budget=0.5, learn=1) as cache:
        with pytest.raises(KeyboardInterrupt):
            picture(pipe, 0, callback_on_step_end=interrupt)
        picture(pipe, 0)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Fit, "run", interrupt)
            picture(pipe, 1)
        assert 40 < psnr(picture(pipe, 1), full) < 100
        assert cache.report().generations == 2


def test_the_pipeline_stays_what_it_is(pipe):
    cls = type(pipe)
    cache = layercache.enable(pipe, budget=0.5, learn=4)
    assert isinstance(pipe, cls) and type(pipe).__name__ == cls.__name__
    assert type(copy.copy(pipe)) is cls and type(pickle.loads(pickle.dumps(pipe))) is cls
    with pytest.raises(CacheStateError, match="already enabled"):
        layercache.enable(pipe, budget=0.5, learn=4)
    assert cache.report().forwards == 0
    layercache.disable(pipe)
    assert type(pipe) is cls


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ({"budget": 0.5, "speedup": 2.0}, BudgetError, "budget and speedup"),
        ({"budget": 1.5}, BudgetError, "budget is a share"),
        ({"speedup": 1.0}, BudgetError, "speedup is above 1"),
        ({"min_psnr": 0.0}, BudgetError, "min_psnr is above 0"),
        ({"budget": 0.5, "learn": -1}, ArgumentError, "learn is a number"),
        ({"budget": 0.5, "learn": "less"}, ArgumentError, "learn is a number"),
    ],
)
def test_targets_out_of_range(pipe, target, error, message):
    with pytest.raises(error, match=message):
        layercache.enable(pipe, **target)


def test_what_cannot_be_learnt_on(pipe):
    with pytest.raises(MethodError, match="only a pipeline"):
        layercache.enable(pipe.transformer, budget=0.5, learn=4)


def test_a_models_identity_is_the_same_wherever_its_weights_are():
    """Offloading and timestep tables move some of them."""

    class Elsewhere(torch.nn.Parameter):
        device = property(lambda self: torch.device("cuda", 0))

    model = tiny_pipeline(1).transformer
    (before,) = search_files._firsts(model)
    layer = model.transformer_blocks[0].img_mod[1]
    layer.weight = Elsewhere(layer.weight.detach())
    assert layer.weight.device.type == "cuda" and torch.equal(search_files._firsts(model)[0], before)
    with torch.no_grad():
        layer.weight[0, 0] += 1.0
    assert (search_files._firsts(model)[0] != before).sum() == 1
