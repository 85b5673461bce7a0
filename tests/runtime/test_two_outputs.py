"""Whole steps of a model with two outputs, video and sound, each with a sampler of its own (LTX-2)."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2 import pipeline_ltx2

import layercache
from layercache.errors import CacheStateError, CalibrationError, ScheduleError
from layercache.methods import EasyCache, Uniform
from layercache.planning.fit import Forecast
from layercache.planning.rollout import Rollouts, psnr_of, skipping
from layercache.planning.samples import pictures_in
from layercache.planning.search_files import KeptRun, SearchFiles
from layercache.runtime.attachment import attachment_of
from layercache.schedule.schedule import Schedule, Velocity
from support.zoo_pipelines import _ltx2

STEPS = 5
COMPUTED = [0, 1, 3]


@pytest.fixture(scope="module")
def made():
    pipe, call = _ltx2()
    call |= {"num_inference_steps": STEPS}
    own = {name: value for name, value in call.items() if "prompt" in name}
    samples = [own, {name: 0.7 * v if v.is_floating_point() else v for name, v in own.items()}]
    return pipe, samples, {name: value for name, value in call.items() if name not in own}


def generate(pipe, call, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    output = pipe(**call, generator=torch.Generator().manual_seed(seed))
    return output.frames, output.audio


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def is_clean(pipe) -> bool:
    return attachment_of(pipe.transformer) is None and not {"step", "__deepcopy__"} & set(vars(pipe.scheduler))


class Holding(FlowMatchEulerDiscreteScheduler):
    """Takes the velocity of the newest computed step, and lists its own; copies of it do the same."""

    def step(self, velocity, *args, **kwargs):
        here = self.step_index or 0
        held = self.__dict__.setdefault("held", {})
        held[here] = velocity
        return super().step(held[max(k for k in COMPUTED if k <= here)], *args, **kwargs)


def test_both_outputs_are_held(made):
    """As if each sampler were given the velocity of the newest computed step."""
    pipe, (sample, _), rest = made
    plain = pipe.scheduler
    schedule = skipping(Rollouts(pipe, [sample], **rest).fingerprint, COMPUTED)
    full = generate(pipe, rest | sample)
    pipe.scheduler = Holding()
    expected = generate(pipe, rest | sample)
    pipe.scheduler = plain
    blocks = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(
        lambda *_: blocks.append(pipe.scheduler.step_index or 0)
    )
    with layercache.enabled(pipe, schedule) as cache:
        found = generate(pipe, rest | sample)
        report = cache.report()
    hook.remove()
    assert sorted(set(blocks)) == COMPUTED and report.fallback_rows == 0 and report.used == 0.6
    # one velocity of each output, at a time
    assert report.cache_bytes == sum(output[0].numel() * 4 for output in full)
    for a, b, c in zip(found, expected, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.equal(a, c)
    assert is_clean(pipe) and equal(generate(pipe, rest | sample), full)


def test_forecasts_are_fitted_to_both(made):
    pipe, samples, rest = made
    held = skipping(Rollouts(pipe, samples[:1], **rest).fingerprint, COMPUTED)
    point = layercache.refit(pipe, held, samples, progress=False, **rest)
    schedule = Schedule.from_json(point.schedule.to_json())
    assert schedule == point.schedule and len(schedule.further_velocities) == 1
    last = [schedule.velocity(STEPS - 1, output) for output in range(2)]
    assert all(last) and last[0] != last[1]
    full = [pipe(**rest, **own, generator=torch.Generator().manual_seed(k)) for k, own in enumerate(samples)]
    for plan in (schedule, Schedule.compute_all(schedule.fingerprint)):
        with layercache.enabled(pipe, plan):
            found = [pipe(**rest, **own, generator=torch.Generator().manual_seed(k)) for k, own in enumerate(samples)]
        if plan is schedule:
            pairs = zip(full, found, strict=True)
            psnr = [value for a, b in pairs for value in psnr_of(pictures_in(a), pictures_in(b))]
            assert psnr == pytest.approx(point.psnr, rel=1e-4)
        else:
            assert all(equal((a.frames, a.audio), (b.frames, b.audio)) for a, b in zip(full, found, strict=True))


def test_the_files_of_a_search_hold_both(made, tmp_path):
    pipe, samples, rest = made
    first, again = (Rollouts(pipe, samples[:1], files=SearchFiles(tmp_path), **rest) for _ in range(2))
    for one, other in zip(first.outputs[0], again.outputs[0], strict=True):
        assert equal(one.latents, other.latents) and equal(one.taken, other.taken)
    assert first.outputs[0][0].latents[0].shape != first.outputs[0][1].latents[0].shape
    further = ((None, *[Velocity({0: 1.0}, 0.5)] * 4),)
    kept = KeptRun((0, 1), "steer", (40.0,), (None,) * 5, None, further)
    assert KeptRun.from_json(kept.to_json()) == kept


def test_sound_has_coefficients_of_its_own(made):
    """By those of the video it goes further astray; a schedule without its own takes them for both."""
    pipe, (sample, _), rest = made
    rollouts = Rollouts(pipe, [sample], **rest)
    fitted = rollouts.run(skipping(rollouts.fingerprint, COMPUTED), Forecast(terms=2)).schedule
    _, full = generate(pipe, rest | sample)
    errors = []
    for plan in (
        fitted,
        replace(fitted, further_velocities=(fitted.velocities,)),
        replace(fitted, further_velocities=()),
    ):
        with layercache.enabled(pipe, plan):
            errors.append(float((generate(pipe, rest | sample)[1] - full).norm()))
    assert errors[1] == errors[2] and errors[0] < 0.8 * errors[1]


def test_methods_that_decide(made):
    pipe, (sample, _), rest = made
    full = generate(pipe, rest | sample)
    with layercache.enabled(pipe, Uniform(interval=2)) as cache:
        assert not equal(generate(pipe, rest | sample), full) and cache.report().used == 0.6
    with layercache.enabled(pipe, EasyCache(threshold=5.0, warmup=1)) as cache:
        found = generate(pipe, rest | sample)
        plan = cache.export_schedule()
        assert cache.report().used < 1
    with layercache.enabled(pipe, plan):
        assert equal(generate(pipe, rest | sample), found)
    assert is_clean(pipe)


def test_copies_of_the_scheduler(made):
    """Those that the pipeline does not make for its second output know nothing of the cache."""
    pipe, (sample, _), rest = made
    with layercache.enabled(pipe, Uniform(interval=2)):
        generate(pipe, rest | sample)
        for other in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
            assert "step" not in vars(other) or "MethodPatch" not in type(vars(other)["step"]).__name__
            assert not callable(vars(other).get("__deepcopy__")) and copy.deepcopy(other).config == other.config


def test_a_second_sampler_that_is_not_known(made, monkeypatch):
    pipe, (sample, _), rest = made
    monkeypatch.setattr(
        pipeline_ltx2, "copy", SimpleNamespace(deepcopy=lambda scheduler: type(scheduler).from_config(scheduler.config))
    )
    with layercache.enabled(pipe, Uniform(interval=2)):
        with pytest.raises(CacheStateError, match="further output whose sampler is not known"):
            generate(pipe, rest | sample)
    with pytest.raises(CalibrationError, match="second output was stepped 0 times"):
        Rollouts(pipe, [sample], **rest)
    assert is_clean(pipe)


def test_contradictions(made):
    pipe, (sample, _), rest = made
    schedule = skipping(Rollouts(pipe, [sample], **rest).fingerprint, COMPUTED)
    for wrong in ((Velocity({0: 1.0}),), tuple(None for _ in range(STEPS))):
        with pytest.raises(ScheduleError, match="velocities for 5 steps|has no velocity"):
            Schedule(
                schedule.fingerprint, schedule.groups, schedule.cells, (1.0,), {}, schedule.velocities, {}, (wrong,)
            )


def test_frames_and_sound_count_the_same():
    frames, sound = np.zeros((1, 2, 4, 4, 3), np.float32), np.zeros((1, 1, 10), np.float32)
    full = SimpleNamespace(frames=frames, audio=sound)
    for found, error in (
        (SimpleNamespace(frames=frames + 0.1, audio=sound), 0.01 / 2),
        (SimpleNamespace(frames=frames, audio=torch.from_numpy(sound + 0.1)), 0.01 / 8),  # its range is 2
    ):
        assert psnr_of(pictures_in(full, 1), pictures_in(found, 1)) == pytest.approx([-10 * np.log10(error)])
