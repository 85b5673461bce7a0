"""Methods that plan ahead, enabled by their settings alone; and what all caches have in common."""

import importlib.metadata

import pytest
import torch

import layercache
from layercache.errors import MethodError
from layercache.methods import FBCache, MagCache, MeanCache, TaylorSeer, Uniform, installed
from layercache.models.registry import fingerprint_of
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
