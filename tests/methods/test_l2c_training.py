"""Learning-to-Cache's training: any period, any known model, stops, several processes; against plain hooks."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.errors import MethodError, ScheduleMismatchError, UnsupportedModelError
from layercache.methods.l2c import LearningToCache
from layercache.parallel.crew import Crew
from layercache.runtime.attachment import attachment_of
from support import router_training as plain
from support.crews import one_thread, run_crew
from support.forwards import next_step
from support.hosts import command, ended, running
from support.marks import slow
from support.router_training import CALL, PROMPTS, SETTINGS, STEPS
from support.zoo import MODELS as MODEL_CLASSES
from support.zoo import build
from support.zoo_pipelines import PIPELINES, _ltx2, _wan_two_experts, flux_controlnet, flux_img2img, generate

HARD = replace(SETTINGS, straight_through=0.5)
OTHERS = {
    "ltx 2": (_ltx2, "transformer"),
    "flux, ControlNet": (flux_controlnet, "transformer"),
    "flux img2img": (flux_img2img, "transformer"),
    "wan 2.2, early": (_wan_two_experts, "transformer"),
    "wan 2.2, late": (_wan_two_experts, "transformer_2"),
}
# Z-Image's guidance ends early, which a training refuses (tests/runtime/test_modules.py)
MODELS = {name: (make, "transformer") for name, make in PIPELINES.items() if name != "z-image"} | OTHERS
DAILY = ("cogvideox, DDIM",)


@pytest.fixture(scope="module")
def router():
    return plain.trained(Crew())


@pytest.mark.parametrize("settings", [SETTINGS, *slow(HARD, replace(SETTINGS, period=4), replace(SETTINGS, period=2))])
def test_a_training_is_the_published_one_at_every_period(router, settings):
    found = router if settings is SETTINGS else plain.trained(Crew(), settings=settings)
    torch.testing.assert_close(found.theta, plain.reference(settings), rtol=0, atol=2e-3)
    moved = (found.theta - plain.trained(Crew(), settings=replace(settings, rounds=1)).theta).abs().max()
    assert moved > 0.02  # ten times what they may differ by


def test_the_steps_of_a_period(router):
    cached = [not all(row) for row in router.schedule(1.0).computed]
    assert cached == [False, True, True, False, True]
    assert router.theta.shape == (3, 6) and router.fingerprint.steps_run == ()
    assert LearningToCache(period=3, shifted=True).cache_places(8) == [2, 3, 5, 6]
    assert LearningToCache(shifted=True).cache_places(6) == [2, 4]
    assert 0.4 <= router.schedule(budget=0.45).used <= 0.45
    with pytest.raises(MethodError, match="caching 2 steps of 3 needs 0.400 at least"):
        router.schedule(budget=0.3)
    for wrong, message in ((1, "at least 2"), (2.5, "a whole number")):
        with pytest.raises(MethodError, match=f"period must be {message}"):
            LearningToCache(period=wrong)


def test_a_stopped_training_goes_on_to_the_same_bytes(router, tmp_path, monkeypatch, caplog):
    """Stopped by Ctrl-C in the middle of the second round; by a pipeline that draws numbers of its own, too."""
    pipe, calls = plain.pipeline(), [0]
    step = type(pipe.scheduler).step
    drawn = []

    def stepped(self, *args, **kwargs):
        drawn.append(float(torch.rand(())))
        calls[0] += 1
        if calls[0] == STEPS + 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    expected = plain.trained(Crew(), str(whole))
    monkeypatch.setattr(type(pipe.scheduler), "step", stepped)
    with pytest.raises(KeyboardInterrupt):
        plain.trained(Crew(), str(parts))
    shutil.copy(parts, tmp_path / "kept.pt")
    with caplog.at_level(logging.INFO, "layercache"):
        found = plain.trained(Crew(), str(parts))
    logged = [record.getMessage().split(":")[0] for record in caplog.records]
    assert [text for text in logged if text.startswith("router")] == ["router, round 2 of 2"]
    assert parts.read_bytes() == whole.read_bytes() != (tmp_path / "kept.pt").read_bytes()
    assert found.schedule(0.5).to_json() == expected.schedule(0.5).to_json() == router.schedule(0.5).to_json()
    assert drawn[-STEPS:][:3] == drawn[STEPS : STEPS + 3]
    calls[0] = 0
    again = plain.trained(Crew(), str(parts))  # finished: nothing runs
    assert calls == [0] and torch.equal(again.theta, found.theta) and again.fingerprint == found.fingerprint
    with pytest.raises(ScheduleMismatchError, match="other settings"):
        plain.trained(Crew(), str(parts), replace(SETTINGS, period=2))


@pytest.mark.parametrize("name", [*DAILY, *slow(*(name for name in MODELS if name not in DAILY))])
def test_every_known_pipeline_trains(name):
    make, component = MODELS[name]
    pipe, call = make()
    sample = {key: value for key, value in call.items() if "prompt" in key or "image" in key}
    rest = {key: value for key, value in call.items() if key not in sample}
    settings = LearningToCache(rounds=1, period=3, learning_rate=0.3)
    router = settings.train(pipe, [sample], progress=False, transformer=component, **rest)
    own = router.fingerprint.steps
    assert len(router.theta) == len(settings.cache_places(len(own))) and torch.isfinite(router.theta).all()
    assert router.losses[0][0] > 0
    model = getattr(pipe, component)
    target = pipe if component == "transformer" else model
    full = generate(pipe, call)
    for limit, is_full in ((0.0, True), (0.5, False)):
        schedule = router.schedule(limit)
        with layercache.enabled(target, schedule, pipe.scheduler) as cache:
            found = generate(pipe, call)
            assert cache.report().fallback_rows == 0
        assert all(map(torch.equal, found, full)) == is_full
    assert attachment_of(model) is None and all(p.grad is None for p in model.parameters())


class Loop:
    """A loop of steps around a bare transformer, in the manner of a pipeline."""

    def __init__(self, name: str):
        self.transformer, self.inputs = build(name)
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def __call__(self, prompt=None, generator=None, num_inference_steps=4):
        self.scheduler.set_timesteps(num_inference_steps)
        self.scheduler.set_begin_index(0)
        latents, found = torch.zeros(1, 4), []
        key = "x" if "x" in self.inputs else "hidden_states"
        for number, time in enumerate(self.scheduler.timesteps):
            given, scale = self.inputs[key], 1 - 0.2 * number
            own = [one * scale for one in given] if isinstance(given, list) else given * scale
            found += [part.clone() for part in next_step(self.transformer, self.inputs | {key: own})]
            self.scheduler.step(latents, time, latents)
        return found


@pytest.mark.slow
def test_every_class_trains_through_which_gradients_pass():
    settings = LearningToCache(rounds=1, period=3, by_cost=False)
    refused = []
    for name in MODEL_CLASSES:
        pipe = Loop(name)
        try:
            router = settings.train(pipe, ["any"], progress=False, num_inference_steps=4)
        except UnsupportedModelError:
            refused.append(name)
            continue
        start = torch.randn(2, len(router.units), generator=torch.Generator().manual_seed(0))
        assert router.theta.shape == start.shape and (router.theta != start).all(), name
        full = pipe()
        for limit, is_full in ((0.0, True), (0.5, False)):
            with layercache.enabled(pipe, router.schedule(limit)) as cache:
                assert all(map(torch.equal, pipe(), full)) == is_full, name
                assert cache.report().fallback_rows == 0
    assert refused == ["HiDreamImageTransformer2DModel"]


@pytest.mark.slow
def test_weights_of_half_precision():
    pipe = plain.pipeline()
    pipe.transformer.to(torch.bfloat16)
    router = SETTINGS.train(pipe, PROMPTS, progress=False, **CALL)
    assert router.theta.dtype == torch.float32 and torch.isfinite(router.theta).all() and router.losses[0][0] > 0


@pytest.mark.parametrize("name", ["cogvideox, DDIM", *slow("qwen-image", "wan", "sd3", "hunyuan video")])
def test_gradient_checkpointing_changes_nothing(name):
    """Its backward pass runs every block once more."""
    pipe, call = PIPELINES[name]()
    sample = {key: value for key, value in call.items() if "prompt" in key}
    rest = {key: value for key, value in call.items() if key not in sample} | {"num_inference_steps": 3}
    settings = LearningToCache(rounds=1, period=3, by_cost=False)
    plainly = settings.train(pipe, [sample], progress=False, **rest)
    pipe.transformer.enable_gradient_checkpointing()
    checkpointed = settings.train(pipe, [sample], progress=False, **rest)
    torch.testing.assert_close(checkpointed.theta, plainly.theta)


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_of_two_processes_are_averaged(tmp_path):
    tasks = [
        plain.trained,
        partial(plain.trained, checkpoint=str(tmp_path / "r.pt"), settings=replace(SETTINGS, rounds=1)),
        partial(plain.trained, checkpoint=str(tmp_path / "r.pt")),
        partial(plain.trained, settings=replace(SETTINGS, by_cost=True)),
    ]
    with one_thread():
        (first, second), _, resumed, timed = run_crew(tasks, 2, tmp_path)
        torch.testing.assert_close(first.theta, plain.reference(SETTINGS, 2), rtol=0, atol=2e-3)
        with pytest.raises(ScheduleMismatchError, match="other settings"):
            plain.trained(Crew(), str(tmp_path / "r.pt"))
    assert torch.equal(first.theta, second.theta) and first.losses == second.losses
    assert all(torch.equal(one.theta, first.theta) for one in resumed)
    assert timed[0].seconds == timed[1].seconds and torch.equal(timed[0].theta, timed[1].theta)


@pytest.mark.slow
def test_processes_that_accelerate_starts_train_one_router(tmp_path):
    launch = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    few = ("--steps", 4, "--rounds", 1, "--batch", 1, "--period", 3)
    words = command("train-router", *few, "-p", "cat", "-p", "rocket")
    by_accelerate = [words[0], "-m", "accelerate.commands.launch", *launch, *words[1:]]
    with running(by_accelerate, tmp_path, GLOO_SOCKET_IFNAME="lo") as process:
        text = ended(process)
    assert process.returncode == 0 and text.count("schedule: router.json") == 1, text
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["router.json", "router.pt"]
    before = torch.load(tmp_path / "router.pt")["losses"]
    words[words.index("--rounds") + 1] = "2"
    with running([*words, "--workers", "2"], tmp_path) as process:
        text = ended(process)
    assert process.returncode == 0, text
    assert torch.load(tmp_path / "router.pt")["losses"][:1] == before
