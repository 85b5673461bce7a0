"""Methods that plan ahead, enabled by their settings alone; and what all caches have in common."""

import importlib.metadata

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache._utils.compat import scheduler_sigmas
from layercache.errors import CacheStateError, LayerCacheWarning, MethodError
from layercache.methods import FBCache, MagCache, MeanCache, TaylorSeer, Uniform, installed
from layercache.models.registry import fingerprint_of
from layercache.runtime import planned
from layercache.runtime.cache import Cache
from layercache.tools.compare.entries import known_methods
from support.tiny import generate, tiny_pipeline

METHODS = [
    Uniform(interval=2),
    TaylorSeer(interval=3, order=1),
    TaylorSeer(interval=3, groups=((0, 2), (2, 4))),
    MagCache(ratios=[1.0, 1.01] * 3, threshold=0.2),
    MeanCache([0, 1, 3], [1, 1, 2]),
]


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
