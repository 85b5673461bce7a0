"""`layercache.enable(pipe)` with nothing else, diffusers' own ``enable_cache``, and what `report()` says of both."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig

import layercache
from layercache._utils.imports import after_import
from layercache.errors import CacheStateError, LayerCacheWarning, MethodError
from layercache.methods import FBCache
from layercache.methods.automatic import Automatic, taylorseer_for
from layercache.runtime.timing import ForwardTimes
from support.tiny import fingerprint, generate, shifted_sigmas, tiny_pipeline
from support.zoo_pipelines import PIPELINES, _wan_two_experts
from support.zoo_pipelines import generate as generate_any


@pytest.fixture
def pipe():
    return tiny_pipeline(2)


def test_the_first_generation_is_cached(pipe, caplog):
    caplog.set_level("DEBUG", "layercache")
    full = generate(pipe, steps=12)
    cache = layercache.enable(pipe)
    with pytest.warns(LayerCacheWarning, match="no schedule is known yet for this QwenImageTransformer2DModel"):
        found = generate(pipe, steps=12)
    report = cache.report()
    assert report.used == pytest.approx(8 / 12) and not report.in_full and report.expected_psnr is None
    assert report.speedup is not None and "measured on the transformer's forwards" in str(report)
    assert 0 < (found - full).norm() < 0.2 * full.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        generate(pipe, steps=8)
    layercache.disable(pipe)
    torch.testing.assert_close(generate(pipe, steps=12), full, rtol=0, atol=0)
    assert caplog.messages == ["QwenImageTransformer2DModel runs by Target", *["a generation has ended"] * 2]


def test_what_was_learnt_is_taken_by_the_next_process(pipe, caplog):
    caplog.set_level("INFO", "layercache")

    def draw(pipe, seed):
        generator = torch.Generator().manual_seed(seed)
        return pipe("cat", num_inference_steps=6, generator=generator, output_type="np").images

    with layercache.enabled(pipe, learn=2) as cache:
        for seed in range(3):
            learnt = draw(pipe, seed)
        report = cache.report()
        assert len(report.in_full) == 1 and report.in_full.popitem()[1] == 2 * 6 * 2
    assert sum(text.startswith("learnt from 2 generations: ") for text in caplog.messages) == 1
    other = tiny_pipeline(2)
    with layercache.enabled(other) as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        again = draw(other, 2)
        mean, tenth = cache.report().expected_psnr
    assert (again == learnt).all() and 100 > mean >= tenth > 20


@pytest.mark.parametrize("name", ["cogvideox, DDIM", "cogvideox, DPM", "mochi", "pixart", "wan, UniPC"])
def test_where_no_universal_schedule_can_be_planned(name, caplog):
    """Other noise levels, samplers that add noise or count no steps: reused all the same, close to the full run."""
    caplog.set_level("INFO", "layercache")
    pipe, call = PIPELINES[name]()
    full = generate_any(pipe, call)
    with pytest.warns(LayerCacheWarning), layercache.enabled(pipe, budget=0.7) as cache:
        found = generate_any(pipe, call)
    assert cache.report().used <= 0.7 and not cache.report().fallback_rows
    assert 0 < (found - full).norm() < 0.1 * full.norm()
    why = [message for message in caplog.messages if message.startswith("no universal schedule for this run: ")]
    other = cache.schedule.made_by["method"] == "taylorseer"
    assert len(why) == (other and cache.substitute.method.groups is None)  # else none was tried


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_bare_transformer_without_a_scheduler_decides_as_it_runs(pipe, is_compiled):
    transformer = torch.compile(pipe.transformer, backend="eager") if is_compiled else pipe.transformer
    with pytest.warns(LayerCacheWarning, match="FBCache is taken"):
        cache = layercache.enable(transformer, budget=0.65)
    assert isinstance(cache.method, FBCache) and cache.method.threshold == pytest.approx(0.075)
    layercache.disable(pipe)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12, 30, 50])
def test_taylorseer_keeps_to_its_budget(pipe, steps, order):
    prints = fingerprint(pipe.transformer, shifted_sigmas(steps))
    for budget in (0.1, 0.2, 0.33, 0.5, 0.6, 2 / 3, 0.9):
        schedule = taylorseer_for(steps, budget, order=order).schedule(prints)
        assert schedule.used * steps <= max(2, budget * steps) + 1e-9
        assert steps < 8 or Automatic(budget=budget, groups=((0, 2),)).schedule(prints).velocities == ()
    last = [schedule.is_skipped(k) for k in range(steps - round(steps / 10), steps)]
    assert not any(last)  # of the largest budget


class OwnSampler:
    """Euler's steps, as a pipeline of one's own may take them, with nothing else of diffusers' schedulers."""

    order, begin_index = 1, 0

    def set_timesteps(self, count, device=None, **options):
        self.sigmas = torch.linspace(1, 0, count + 1)
        self.timesteps, self.step_index, self.num_inference_steps = 1000 * self.sigmas[:-1], 0, count

    def set_begin_index(self, index):
        pass

    def step(self, velocity, timestep, latents, return_dict=False, **options):
        before, after = self.sigmas[self.step_index :][:2]
        self.step_index += 1
        return (latents + (after - before) * velocity,)


def test_a_sampler_without_a_configuration(pipe):
    pipe.scheduler = OwnSampler()
    full = generate(pipe)
    with pytest.warns(LayerCacheWarning), layercache.enabled(pipe) as cache:
        assert 0 < (generate(pipe) - full).norm() < 0.1 * full.norm()
    assert cache.report().used < 0.7


def test_runs_of_few_steps_are_computed_in_full(pipe):
    full = generate(pipe, steps=4)
    with (
        layercache.enabled(pipe) as cache,
        pytest.warns(LayerCacheWarning, match="a run of 4 steps is computed in full"),
    ):
        found = generate(pipe, steps=4)
    torch.testing.assert_close(found, full, rtol=0, atol=0)
    assert cache.report().used == 1.0


def test_budgets_out_of_range():
    for budget in (-0.1, 1.5):
        with pytest.raises(MethodError, match="budget must be"):
            Automatic(budget=budget)


def test_diffusers_own_way(pipe):
    transformer, full = pipe.transformer, generate(pipe)
    with pytest.warns(LayerCacheWarning):
        transformer.enable_cache(layercache.CacheConfig(budget=0.5, scheduler=pipe.scheduler))
    assert transformer.is_cache_enabled
    with pytest.raises(CacheStateError):
        transformer.enable_cache(layercache.CacheConfig(FBCache()))
    generate(pipe)
    assert layercache.cache_of(pipe).report().used == pytest.approx(0.5)
    transformer.disable_cache()
    assert not transformer.is_cache_enabled
    with pytest.raises(CacheStateError, match="no layercache cache"):
        layercache.cache_of(pipe)
    torch.testing.assert_close(generate(pipe), full, rtol=0, atol=0)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))  # diffusers' own go where they went
    with pytest.raises(CacheStateError, match="a diffusers cache is enabled"):
        transformer.enable_cache(layercache.CacheConfig(FBCache()))
    transformer.disable_cache()


def test_the_first_use_of_layercache_may_be_a_config(monkeypatch):
    """`enable_cache` is looked up before its argument, in whichever order the packages were imported."""
    name = "diffusers.models.cache_utils"
    code = "import sys, layercache; print([getattr(finder, 'name', '') for finder in sys.meta_path])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert repr(name) in done.stdout, done.stderr  # it waits for diffusers, which is not imported yet
    monkeypatch.setattr(diffusers.models, "cache_utils", None)
    monkeypatch.delitem(sys.modules, name)
    after_import(name, layercache._accept_cache_config)
    mixin = importlib.import_module(name).CacheMixin
    assert mixin not in diffusers.QwenImageTransformer2DModel.__mro__

    class Model(mixin, diffusers.QwenImageTransformer2DModel):
        """With `enable_cache` as it is behind an import of diffusers that comes second."""

    sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 1, "joint_attention_dim": 8}
    model = Model(**sizes, axes_dims_rope=(4, 6, 6))
    with pytest.warns(LayerCacheWarning, match="FBCache is taken"):
        model.enable_cache(layercache.CacheConfig(budget=0.5))
    assert model.is_cache_enabled


def test_speedup_of_forwards(monkeypatch):
    now = iter([0.0, 9.0, 10.0, 14.0, 20.0, 21.0, 30.0, 35.0, 37.0, 40.0, 41.0])
    monkeypatch.setattr("layercache.runtime.timing.moment", lambda device: next(now))
    times, cpu = ForwardTimes(), torch.device("cpu")
    assert times.speedup() is None
    times.start(cpu)
    times.stop(cpu, True)  # the first one is left out, and not timed
    for full in (True, False, False):
        times.start(cpu)
        times.stop(cpu, full)
    assert times.speedup() == pytest.approx((10.0 - 9.0) / ((1.0 + 6.0 + 9.0) / 3))
    with times.beside(cpu):  # for the next one
        pass
    times.start(cpu)
    times.stop(cpu, False)
    assert times.speedup() == pytest.approx((10.0 - 9.0) / ((1.0 + 6.0 + 9.0 + 2.0 + 1.0) / 4))


def test_forwards_are_timed_where_they_run(pipe):
    """Offloaded weights are elsewhere between forwards."""
    pipe.transformer.register_parameter("offloaded", torch.nn.Parameter(torch.zeros(1, device="meta")))
    with pytest.warns(LayerCacheWarning), layercache.enabled(pipe) as cache:
        generate(pipe)
        assert cache.report().speedup is not None


def test_forwards_of_both_transformers_are_timed():
    pipe, call = _wan_two_experts()
    pipe.register_to_config(boundary_ratio=1.0)  # the first runs one step
    with pytest.warns(LayerCacheWarning), layercache.enabled(pipe) as cache:
        generate_any(pipe, call)
        assert cache.report().speedup is not None
