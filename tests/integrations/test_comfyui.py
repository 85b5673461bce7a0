"""The nodes of ComfyUI, on as much of it as they hold on to."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layercache.errors import MethodError, ScheduleMismatchError
from layercache.planning.trace import Trace
from layercache.schedule import Schedule
from support.comfy_stub import Guider, sample_heun

SIGMAS = torch.tensor([1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.0])
PLACE = Path(__file__).parents[2] / "integrations" / "comfyui" / "__init__.py"
_spec = importlib.util.spec_from_file_location("layercache_comfyui", PLACE)
pack = importlib.util.module_from_spec(_spec)
sys.modules["layercache_comfyui"] = pack
_spec.loader.exec_module(pack)
caching, recording = sys.modules["layercache_comfyui.caching"], sys.modules["layercache_comfyui.recording"]


def noise(seed: int) -> torch.Tensor:
    return torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made():
    recorder = recording.Recorder()
    for seed in range(2):
        Guider(recorder).sample(noise(seed), SIGMAS)
    return recorder.runs, recording.schedule_of(recorder.like_newest, 0.5)


def test_a_schedule_made_from_recorded_runs_gives_what_its_velocities_say(made):
    _, schedule = made
    cache = caching.Caching(schedule)
    guider = Guider(cache)
    found = guider.sample(noise(5), SIGMAS)
    assert guider.calls == 4 and "4 forecast" in str(cache) and guider.model_options == {}
    x, trace, plain = noise(5), Trace(), Guider(None)
    for step, (here, there) in enumerate(zip(SIGMAS[:-1], SIGMAS[1:], strict=True)):
        own = None if schedule.is_skipped(step) else (x - plain.denoised(x, here.expand(2))) / here
        trace.add(x, own)
        x = x + (there - here) * trace.combined(schedule.velocity(step), step)
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_all_computed_and_tails_are_the_uncached_run(made):
    runs, schedule = made
    every = caching.Caching(Schedule.compute_all(runs[0].fingerprint))
    full = Guider(caching.Caching(schedule))
    full.attached.outer = lambda executor, *args: executor(*args)
    assert torch.equal(Guider(every).sample(noise(5), SIGMAS), full.sample(noise(5), SIGMAS))
    assert caching.first_step(schedule, tuple(SIGMAS[3:].tolist())) == 3  # denoise


def test_refusals_and_interrupted_runs(made):
    _, schedule = made
    cache = caching.Caching(schedule)
    with pytest.raises(MethodError, match="heun"):
        Guider(cache).sample(noise(5), SIGMAS, sample_heun)
    with pytest.raises(ScheduleMismatchError, match="none of its own"):
        Guider(cache).sample(noise(5), SIGMAS * 0.9)
    other = replace(schedule, fingerprint=replace(schedule.fingerprint, num_blocks=1, config_hash="other"))
    with pytest.raises(ScheduleMismatchError, match="made for Identity"):
        Guider(caching.Caching(other)).sample(noise(5), SIGMAS)
    guider = Guider(cache)
    guider.fails_at = 2
    with pytest.raises(InterruptedError):
        guider.sample(noise(5), SIGMAS)
    assert guider.model_options == {} and "interrupted" in str(cache)
    assert torch.equal(Guider(cache).sample(noise(5), SIGMAS), Guider(cache).sample(noise(5), SIGMAS))
