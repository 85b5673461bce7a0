"""The plug-ins of serving engines, on as much of these as they hold on to."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import layercache
from layercache.errors import ArgumentError
from layercache.methods import FBCache, Universal
from layercache.schedule import Schedule
from layercache.tools.engines import log, sglang, vllm_omni
from layercache.tools.engines.plans import Plans
from support import tiny
from support.engine_stubs import OMNI, SGLANG, Loop, OmniPipeline, installed, request, tiny_pipeline

STEPS = 6


@pytest.fixture(autouse=True)
def fresh(monkeypatch, caplog):
    monkeypatch.setattr(log, "_warned", set())
    monkeypatch.setattr(vllm_omni, "_waiting", set())
    vllm_omni.backend_class.cache_clear()
    caplog.set_level("WARNING", "layercache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of schedules: of 6 steps half of which are skipped, and of 4 that are all computed."""
    path = tmp_path_factory.mktemp("schedules")
    transformer = tiny_pipeline().transformer
    prints = [tiny.fingerprint(transformer, tiny.shifted_sigmas(steps)) for steps in (STEPS, 4)]
    Universal(budget=0.5).schedule(prints[0]).save(path / "6.json")
    Schedule.compute_all(prints[1]).save(path / "4.json")
    cells = [({step - 1: 1.0} if step % 2 else None, None) for step in range(STEPS)]
    groups = tiny.schedule_for(tiny_pipeline(), cells, ((0, 1), (1, 2)))
    (path / "other").mkdir()
    groups.save(path / "other" / "groups.json")
    return path


@pytest.fixture(scope="module")
def expected(folder):
    """What `layercache.enable` gives by the schedule, and the full runs by their numbers of steps."""
    pipe = tiny_pipeline()
    full = {steps: tiny.generate(pipe, steps=steps) for steps in (4, 5, STEPS)}
    with layercache.enabled(pipe, Schedule.load(folder / "6.json")):
        return tiny.generate(pipe, steps=STEPS), full


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "layercache"]


class Sglang:
    """A worker of SGLang, with its diffusers backend and its own pipelines."""

    def __init__(self) -> None:
        place = "sglang.multimodal_gen.runtime"
        sglang.register()
        sglang.register()  # twice is once
        registry = importlib.import_module(f"{place}.platforms.plugins")
        getattr(registry, "HookRegistry", SimpleNamespace(apply_hooks=lambda: None)).apply_hooks()
        backend = importlib.import_module(f"{place}.pipelines.diffusers_pipeline")
        stages = importlib.import_module(f"{place}.pipelines_core.stages.denoising")
        self.pipe, self.loop = tiny_pipeline(), Loop()
        self.server = SimpleNamespace(cache_dit_config=None)
        self.execution = backend.DiffusersExecutionStage(self.pipe)
        self.stage = stages.DenoisingStage(self.loop)

    def by_diffusers(self, steps: int, **options) -> torch.Tensor:
        batch = request(steps, **options)
        run = getattr(self.execution, "forward", None) or self.execution._renamed
        return run(batch, self.server).output

    def by_itself(self, steps: int, **more) -> torch.Tensor:
        batch = request(steps, deepcopy(self.loop.scheduler))
        vars(batch).update(more)
        return self.stage.forward(batch)


@pytest.fixture
def worker(monkeypatch, tmp_path, folder):
    monkeypatch.setenv(sglang.VARIABLE, str(folder))
    with installed(SGLANG, tmp_path):
        yield Sglang()


def test_sglang_diffusers_backend_gives_what_enable_gives(worker, expected, caplog):
    cached, full = expected
    assert not torch.equal(cached, full[STEPS])
    for _ in range(2):
        assert torch.equal(worker.by_diffusers(STEPS), cached)
        assert torch.equal(worker.by_diffusers(4), full[4])  # another schedule, of which all is computed
    assert torch.equal(worker.by_diffusers(STEPS, layercache=False), full[STEPS])
    assert not warnings_of(caplog)
    for _ in range(2):
        assert torch.equal(worker.by_diffusers(5), full[5])
    levels = [1 - k / 10 for k in range(STEPS)]
    with_others = tiny.generate(tiny_pipeline(), steps=STEPS, sigmas=levels)
    for _ in range(2):  # generators are as they were, though the cached run had drawn from them
        assert torch.equal(worker.by_diffusers(STEPS, sigmas=levels), with_others)
    texts = warnings_of(caplog)
    assert len(texts) == 2 and "5 steps" in texts[0] and "noise schedule differs" in texts[1]
    assert torch.equal(worker.by_diffusers(STEPS), cached)


def test_sglang_own_pipelines_give_what_enable_gives(worker, expected, caplog, monkeypatch):
    cached, full = expected
    assert torch.equal(worker.by_itself(STEPS), cached) and worker.loop.calls == 2 * 3
    assert torch.equal(worker.by_itself(4), full[4])
    with pytest.raises(InterruptedError), monkeypatch.context() as patch:
        patch.setattr(worker.loop, "guided", Interrupting(worker.loop.guided, 2))
        worker.by_itself(STEPS)
    assert torch.equal(worker.by_itself(STEPS), cached)  # nothing is left of the one before
    assert torch.equal(worker.by_itself(STEPS, is_warmup=True), full[STEPS]) and not warnings_of(caplog)
    for _ in range(2):
        assert torch.equal(worker.by_itself(5), full[5])
        assert torch.equal(worker.by_itself(STEPS, enable_teacache=True), full[STEPS])
    predict = worker.stage._predict_noise_with_cfg
    worker.stage._predict_noise_with_cfg = lambda **call: [predict(**call), predict(**call)][1]
    assert torch.equal(worker.by_itself(STEPS), full[STEPS])  # two evaluations a step
    texts = warnings_of(caplog)
    assert len(texts) == 3 and all(map(str.__contains__, texts, ("5 steps", "another cache", "several velocities")))


class Interrupting:
    def __init__(self, call, after: int):
        self.call, self.left = call, after

    def __call__(self, *args):
        self.left -= 1
        if self.left < 0:
            raise InterruptedError
        return self.call(*args)


@pytest.mark.parametrize(
    "renamed, by_diffusers, by_itself",
    [
        ({"HookRegistry": "Registry"}, False, False),
        ({"def forward(self, batch, server_args)": "def _renamed(self, batch, server_args)"}, False, True),
        ({"server_args": "settings"}, False, True),
        ({"diffusers_pipe": "pipeline"}, False, True),
        ({"_predict_noise_with_cfg": "_renamed"}, True, False),
        ({"timestep_index": "index"}, True, False),
    ],
)
def test_an_sglang_with_other_names_runs_uncached(
    renamed, by_diffusers, by_itself, monkeypatch, tmp_path, folder, expected, caplog
):
    cached, full = expected
    monkeypatch.setenv(sglang.VARIABLE, str(folder / "6.json"))
    with installed(SGLANG, tmp_path, **renamed):
        worker = Sglang()
        for _ in range(2):
            assert torch.equal(worker.by_diffusers(STEPS), cached if by_diffusers else full[STEPS])
            assert torch.equal(worker.by_itself(STEPS), cached if by_itself else full[STEPS])
    errors = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert len(errors) == 1, [record.getMessage() for record in errors]


@pytest.mark.parametrize(
    "plan, text",
    [
        ("nowhere.json", "no file"),
        ("FBCache(threshold=-1)", "threshold"),
        ("FBCache(0.1)", "by name"),
        ("FBCache(level=1)", "level"),
    ],
)
def test_plans_that_are_none_are_refused(plan, text):
    with pytest.raises((ArgumentError, layercache.LayerCacheError), match=text):
        Plans.read(plan)


def test_methods_by_name_and_schedules_of_groups(monkeypatch, tmp_path, folder, expected, caplog):
    """Methods run on diffusers' pipelines; an engine's own pipelines refuse what looks into blocks."""
    assert Plans.read("FBCache(threshold=0.1)").method == FBCache(threshold=0.1)
    assert Plans.read("Universal").method == Universal()
    with pytest.raises(ArgumentError, match="second schedule"):
        Plans.read([str(folder), str(folder / "other")])
    monkeypatch.setenv(sglang.VARIABLE, "Universal(budget=0.5)")
    with installed(SGLANG, tmp_path / "method"):
        worker = Sglang()
        assert torch.equal(worker.by_diffusers(STEPS), worker.by_itself(STEPS))
        assert worker.loop.calls == 2 * 3 and not warnings_of(caplog)
    monkeypatch.setenv(sglang.VARIABLE, str(folder / "other"))
    with installed(SGLANG, tmp_path / "groups"):
        worker = Sglang()
        assert not torch.equal(worker.by_diffusers(STEPS), expected[1][STEPS])
        assert torch.equal(worker.by_itself(STEPS), expected[1][STEPS])
    (warning,) = warnings_of(caplog)
    assert "groups of blocks" in warning


def omni(pipeline=None, backend="layercache", **config):
    """A runner of vLLM-Omni with a pipeline of its own."""
    vllm_omni.register()
    vllm_omni.register()
    module = importlib.import_module(vllm_omni.RUNNER)
    return module.Runner(pipeline or OmniPipeline(), backend, config)


@pytest.mark.parametrize("imported_before", [False, True])
def test_vllm_omni_gives_what_enable_gives(imported_before, tmp_path, folder, expected, caplog):
    cached, full = expected
    with installed(OMNI, tmp_path):
        if imported_before:
            importlib.import_module(vllm_omni.RUNNER)
        runner = omni(schedule=str(folder))
        assert torch.equal(runner.execute(STEPS), cached) and runner.pipeline.calls == 2 * 3
        assert torch.equal(runner.execute(4), full[4])
        guided = runner.pipeline.guided
        runner.pipeline.guided = lambda latents, t: Interrupting(guided, 0)(latents, t)
        with pytest.raises(InterruptedError):
            runner.execute(STEPS)
        runner.pipeline.guided = guided
        assert torch.equal(runner.execute(STEPS), cached)
        runner.execute(1)  # as it is tried out at the start
        assert not warnings_of(caplog)
        for _ in range(2):
            assert torch.equal(runner.execute(5), full[5])
        (warning,) = warnings_of(caplog)
        assert "5 steps" in warning
        assert torch.equal(omni(runner.pipeline, schedule=str(folder)).execute(STEPS), cached)  # started anew
        assert omni(backend="none").cache_backend is None
        with pytest.raises(ValueError, match="Unsupported"):
            omni(backend="unknown")


class OtherLoop(OmniPipeline):
    """A pipeline that asks for predictions, and takes the sampler's steps itself."""

    def forward(self, steps):
        latents = self.start(self.scheduler, steps)
        for t in self.scheduler.timesteps:
            noise_pred = self.predict_noise_maybe_with_cfg(True, 4.0, {"latents": latents, "t": t})
            latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
        return latents


@pytest.mark.parametrize(
    "pipeline, renamed, text",
    [
        (Loop, {}, "does not go through"),
        (OtherLoop, {}, "takes other steps"),
        (OmniPipeline, {"CacheBackend": "Cache"}, "another base class"),
        (OmniPipeline, {"self.config, self.enabled = config, False": "raise TypeError('new')"}, "another base class"),
    ],
)
def test_a_vllm_omni_with_other_names_runs_uncached(pipeline, renamed, text, tmp_path, folder, expected, caplog):
    one = pipeline()
    if pipeline is Loop:
        one.forward = lambda steps: OmniPipeline.forward(_like_omni(one), steps)
    with installed(OMNI, tmp_path, **renamed):
        runner = omni(one, schedule=str(folder / "6.json"))
        for _ in range(2):
            assert torch.equal(runner.execute(STEPS), expected[1][STEPS])
    (warning,) = warnings_of(caplog)
    assert text in warning


def _like_omni(loop: Loop) -> OmniPipeline:
    other = OmniPipeline.__new__(OmniPipeline)
    vars(other).update(vars(loop))
    return other


def test_a_vllm_omni_that_chooses_otherwise_refuses_the_name(tmp_path, caplog):
    """Before anything runs; we say why."""
    with installed(OMNI, tmp_path, get_cache_backend="choose"):
        with pytest.raises(ValueError, match="Unsupported"):
            omni()
    (warning,) = warnings_of(caplog)
    assert "get_cache_backend" in warning


def test_entry_points_import_nothing_until_they_are_called():
    groups = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    named = [
        one
        for group in ("sglang.multimodal_gen.plugins", "vllm_omni.general_plugins")
        for one in groups[group].values()
    ]
    code = (
        "import importlib, sys, layercache\n"
        "assert not any(name.startswith('layercache.tools') for name in sys.modules)\n"
        f"for place in {named!r}:\n"
        "    module, _, name = place.partition(':')\n"
        "    getattr(importlib.import_module(module), name)()\n"
        "print([name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
