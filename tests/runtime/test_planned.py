"""Methods that plan ahead, enabled by their settings alone; and what all caches have in common."""

import importlib.metadata
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache._utils.compat import scheduler_sigmas
from layercache.errors import CacheStateError, LayerCacheWarning, MethodError, ScheduleError
from layercache.methods import (
    DPCache,
    ERTACache,
    FBCache,
    MagCache,
    MeanCache,
    Spectrum,
    TaylorSeer,
    Uniform,
    installed,
)
from layercache.methods.automatic import Automatic
from layercache.models.registry import fingerprint_of
from layercache.runtime import planned
from layercache.runtime.cache import Cache
from layercache.tools.compare.entries import known_methods
from support.tiny import generate, tiny_pipeline
from support.zoo_pipelines import flux_img2img
from support.zoo_pipelines import generate as generate_any

METHODS = [
    Uniform(interval=2),
    Spectrum(warmup=2),
    TaylorSeer(interval=3, groups=((0, 2), (2, 4))),
    MagCache(ratios=[1.0, 1.01] * 3, threshold=0.2),
    MeanCache([0, 1, 3], [1, 1, 2]),
]
OF_STEPS = [MeanCache((0, 1, 3), (1, 1, 2)), DPCache((0, 1, 2, 4)), ERTACache((0, 1, 2, 4))]


@pytest.fixture
def pipe():
    return tiny_pipeline(layers=4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_runs_as_its_schedule_does_at_any_number_of_steps(pipe, method):
    with layercache.enabled(pipe, method) as cache:
        for steps in (6, 9):
            found = generate(pipe, steps=steps)
            schedule = cache.schedule
            assert cache.report().used < 1 and len(schedule.cells) == steps
            again = generate(pipe, steps=steps)
            assert torch.equal(found, again)
            layercache.disable(pipe)
            with layercache.enabled(
                pipe, method.schedule(fingerprint_of(pipe.transformer, schedule.fingerprint.sigmas, ()))
            ):
                assert torch.equal(generate(pipe, steps=steps), found)
            cache = layercache.enable(pipe, method)


@pytest.mark.parametrize(
    "plan",
    [MeanCache((0, 1, 3), (1, 1, 2)), DPCache((0, 1, 2, 4)), ERTACache((0, 1, 2, 4))],
    ids=lambda plan: plan.name,
)
def test_computed_steps_are_refused_in_a_run_of_another_number(pipe, plan):
    """Which would give wrong pictures; where the number is not known, a warning says so."""
    with layercache.enabled(pipe, replace(plan, num_steps=6)) as cache:
        generate(pipe, steps=6)
        assert cache.report().used < 1
        with pytest.raises(ScheduleError, match="for runs of 6 steps, this run has 9"):
            generate(pipe, steps=9)
    with layercache.enabled(pipe, plan), pytest.warns(LayerCacheWarning, match="give num_steps="):
        generate(pipe, steps=6)


def test_a_run_without_noise_levels_is_refused(pipe):
    with pytest.raises(MethodError, match="enable it on the pipeline"):
        layercache.enable(pipe.transformer, Uniform())


def test_all_caches_answer_the_same_questions(pipe):
    plans = [FBCache(), Uniform(), layercache.methods.EasyCache(), layercache.Schedule.compute_all(prints_of(pipe))]
    for plan in plans:
        with layercache.enabled(pipe, plan) as cache:
            assert isinstance(cache, Cache)
            generate(pipe, steps=4)
            assert cache.report().forwards > 0
            kind, *facts = repr(cache).splitlines()
            assert kind.startswith(f"{type(cache).__name__} on a QwenImageTransformer2DModel") and "8 forwards" in kind
            assert 1 <= len(facts) <= 4 and "groups" in facts[0]


@pytest.mark.parametrize("plan", [FBCache(), layercache.methods.EasyCache(), Uniform(), None])
def test_requests_need_a_schedule(pipe, plan):
    """What serves none says how to get a schedule that does the same, and that one serves them."""
    cache = layercache.enable(pipe, plan)
    for call in (lambda: cache.request("a"), lambda: cache.batch({"a": 1}), lambda: cache.forget("a")):
        with pytest.raises(CacheStateError, match=r"enable\(pipe, schedule\): cache\.(schedule|export_schedule\(\)) g"):
            call()
    generate(pipe, steps=8)
    schedule = cache.schedule if plan is None or isinstance(plan, Uniform) else cache.export_schedule()
    layercache.disable(pipe)
    with layercache.enabled(pipe, schedule) as cache, cache.request("a", FlowMatchEulerDiscreteScheduler(shift=3.0)):
        assert "a" in cache.requests.routers


def prints_of(pipe):
    with layercache.enabled(pipe, Uniform()) as cache:
        generate(pipe, steps=4)
        return cache.schedule.fingerprint


def test_methods_of_other_packages_join_by_an_entry_point(monkeypatch):
    entry = importlib.metadata.EntryPoint("theirs", "layercache.methods.fbcache:FBCache", "layercache.methods")

    def found(group):
        return [entry] if group == "layercache.methods" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found(group))
    assert installed() == {"theirs": FBCache}
    assert "theirs" in known_methods()


def test_a_second_pipeline_joins(pipe):
    """As with equal schedules; another method is refused."""
    other = type(pipe)(pipe.transformer, pipe.class_encoder, FlowMatchEulerDiscreteScheduler(shift=1.5))
    other.set_progress_bar_config(disable=True)
    expected = []
    for one in (pipe, other):
        with layercache.enabled(one, budget=0.5, learn=0):
            expected.append(generate(one))
    cache = layercache.enable(pipe, budget=0.5, learn=0)
    assert layercache.enable(other, budget=0.5, learn=0) is cache
    with pytest.raises(CacheStateError, match="already enabled"):
        layercache.enable(other, budget=0.4, learn=0)
    for _ in range(2):
        for one, found in zip((pipe, other), expected, strict=True):
            assert torch.equal(generate(one), found)
    layercache.disable(other)
    assert "step" not in vars(pipe.scheduler) and "step" not in vars(other.scheduler)


@pytest.mark.parametrize("option", ["storage", "num_steps", "process_group", "scheduler"])
def test_options_that_nothing_without_a_plan_makes_use_of_are_refused(pipe, option):
    value = {"storage": "float32", "num_steps": 4}.get(option, FlowMatchEulerDiscreteScheduler(shift=2.0))
    for target in ({}, {"learn": 4}):
        with pytest.raises(CacheStateError, match=option):
            layercache.enable(pipe, **{option: value}, **target)
    assert type(pipe).__name__ == "DemoPipeline" and "step" not in vars(pipe.scheduler)


def test_a_second_pipeline_with_another_storage_is_refused(pipe):
    """It would join a cache whose residuals are stored in another way than it asks for."""
    other = type(pipe)(pipe.transformer, pipe.class_encoder, FlowMatchEulerDiscreteScheduler(shift=3.0))
    grouped = TaylorSeer(interval=3, groups=((0, 2), (2, 4)))
    for plan in (grouped, grouped.schedule(prints_of(pipe))):
        cache = layercache.enable(pipe, plan, storage="float32")
        with pytest.raises(CacheStateError, match="stores residuals as .float32.: give .* storage=.float32. too"):
            layercache.enable(other, plan)
        assert "step" not in vars(other.scheduler)
        assert layercache.enable(other, plan, storage="float32") is cache
        layercache.disable(pipe)


@pytest.mark.parametrize(
    "method",
    [
        Uniform(interval=3),
        TaylorSeer(interval=2, order=2),
        MagCache(ratios=[1.0, 1.01] * 6, threshold=0.2),
        Automatic(budget=0.5, groups=((0, 4),)),
    ],
    ids=lambda method: method.name,
)
def test_a_run_that_begins_in_the_middle_is_planned_for_the_steps_that_run(method):
    pipe, call = flux_img2img()
    call |= {"num_inference_steps": 12, "strength": 0.75}
    with layercache.enabled(pipe, method) as cache:
        generate_any(pipe, call)
        report, schedule = cache.report(), cache.schedule
    assert schedule.fingerprint.steps == tuple(range(3, 12)) and not schedule.is_skipped(3)
    assert report.fallback_rows == 0 and report.used == pytest.approx(schedule.used) and schedule.used < 0.7
    whole = replace(schedule.fingerprint, steps_run=())
    shifted = method.schedule(replace(whole, sigmas=whole.sigmas[3:]))  # as of a run of nine steps
    if method.name != "magcache":  # whose ratios are those of a step
        assert [schedule.is_skipped(3 + step) for step in range(9)] == [shifted.is_skipped(step) for step in range(9)]


def test_noise_levels_are_read_once_in_a_run(pipe, monkeypatch):
    """Reading them waits for the device; forwards behind the last step do not ask for them."""
    read = []
    monkeypatch.setattr(planned, "scheduler_sigmas", lambda scheduler: read.append(1) or scheduler_sigmas(scheduler))
    with layercache.enabled(pipe, Uniform(interval=2)):
        generate(pipe, steps=4)
        assert len(read) == 1
        inputs = {"hidden_states": torch.zeros(1, 64, pipe.transformer.config.in_channels), "img_shapes": [(1, 8, 8)]}
        inputs |= {"timestep": torch.tensor([0.5]), "encoder_hidden_states": torch.zeros(1, 1, 64)}
        with torch.no_grad(), pytest.warns(LayerCacheWarning, match="takes no step"):
            for _ in range(3):
                pipe.transformer(**inputs)
        assert len(read) == 1


def test_the_report_counts_the_runs_of_all_schedules(pipe):
    with layercache.enabled(pipe, TaylorSeer(interval=2)) as cache:
        for steps in (8, 4, 8):
            generate(pipe, steps=steps)
        report = cache.report()
    computed = [sum(not one.is_skipped(k) for k in range(one.num_steps)) for one in cache._schedules.values()]
    assert report.generations == 3 and report.forwards == 2 * 20
    assert report.used == pytest.approx((2 * max(computed) + min(computed)) / 20)
