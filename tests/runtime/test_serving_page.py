"""The page on serving runs as printed, with schedules of whole steps as searches give them."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.demo.model import CLASS_NAMES, pack_patches
from layercache.planning.rollout import skipping
from layercache.runtime.report import CacheReport
from support.tiny import fingerprint, mixed_cells, schedule_for, shifted_sigmas, tiny_pipeline

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
REQUESTS, LOOP, BATCH, METRICS = re.findall(r"^```python\n(.*?)^```", PAGE.split("## Memory")[0], re.M | re.S)
SKIPPED, OTHER = [0, 1, 3, 5], [0, 2]
STEPS = 8


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def searched(pipe):
    return skipping(fingerprint(pipe.transformer, shifted_sigmas(STEPS)), SKIPPED)


def noise(seed: int) -> torch.Tensor:
    return pack_patches(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


def denoise(pipe):
    ids = torch.tensor([CLASS_NAMES.index("cat")])

    def call(transformer, latents, timestep):
        count = len(latents)
        with torch.no_grad():
            return transformer(
                hidden_states=latents,
                encoder_hidden_states=pipe.class_encoder(ids).expand(count, -1, -1),
                timestep=timestep.expand(count) / 1000,
                img_shapes=[(1, 8, 8)] * count,
                return_dict=False,
            )[0]

    return call


def test_requests_of_a_pipeline(pipe, searched, capsys):
    other = skipping(fingerprint(pipe.transformer, shifted_sigmas(5)), OTHER)
    names = {"layercache": layercache, "pipe": pipe, "prompt": "cat", "schedule": searched, "other_schedule": other}
    exec(REQUESTS, names)
    cache = names["cache"]
    report = cache.requests.report("user-18")
    assert str(report) in capsys.readouterr().out
    assert isinstance(report, CacheReport) and report.used == other.used and report.forwards == 2 * 5
    assert cache.metrics()["generations"] == 2 and list(cache.requests.routers) == ["user-18"]
    pytest.importorskip("prometheus_client")
    exec(METRICS, names)
    from prometheus_client import REGISTRY

    said = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    assert {name for name in re.findall(r"layercache_\w+", PAGE) if name not in said} == set()
    REGISTRY.unregister(names["collector"])
    layercache.disable(pipe)


@pytest.mark.parametrize("inside", [True, False], ids=["step inside", "step behind the block"])
def test_a_loop_of_your_own(pipe, searched, inside):
    """Requests in turn, each with a sampler; also where that steps behind the block of its request."""
    sigmas = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    expected = []
    with layercache.enabled(pipe, searched):
        for seed in (0, 1):
            made = pipe("cat", STEPS, guidance_scale=1.0, latents=noise(seed), output_type="latent")
            expected.append(made.images)
    enable, block = LOOP.split("\n\n")
    head, call, step = block.strip().split("\n")
    turn = "\n".join([head, call, step if inside else step.strip()])
    names = {"layercache": layercache, "transformer": pipe.transformer, "schedule": searched, "denoise": denoise(pipe)}
    exec(enable, names | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}, names)
    loops = []
    for seed in (0, 1):
        sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        sampler.set_timesteps(sigmas=sigmas)
        sampler.set_begin_index(0)
        loops.append(dict(names, own_scheduler=sampler, latents=noise(seed)))
    for step_index in range(STEPS):
        for seed, loop in enumerate(loops):
            loop["timestep"] = loop["own_scheduler"].timesteps[step_index]
            exec(turn.replace("user-19", f"user-{seed}"), loop)
    layercache.disable(pipe.transformer)
    for loop, latents in zip(loops, expected, strict=True):
        torch.testing.assert_close(loop["latents"], latents, rtol=0, atol=0)


def test_a_batch_of_requests(pipe):
    names = {"layercache": layercache, "transformer": pipe.transformer, "denoise": denoise(pipe)}
    names |= {"group_schedule": schedule_for(pipe, mixed_cells(STEPS)), "batch_of_three": noise(0).expand(3, -1, -1)}
    exec(BATCH, names | {"timestep": torch.tensor(1000.0)}, names)
    assert names["velocity"].shape[0] == 3 and len(names["cache"].requests) == 2
    layercache.disable(pipe.transformer)
