"""What is stored kept in host memory, on a GPU: the same bits, pinned memory, and no wait of the host."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import layercache
from layercache.methods import FasterCache, FBCache, Uniform
from support.tiny import calm_pipeline, generate, mixed_cells, schedule_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside the work need a GPU")


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline().to("cuda")


@pytest.mark.parametrize("kind", ["groups", "velocities", "dynamic", "modules"])
@pytest.mark.parametrize("slices", [1, 3])
def test_the_same_bits_as_on_the_device(pipe, kind, slices):
    plans = {
        "groups": lambda: schedule_for(pipe, mixed_cells()),
        "velocities": lambda: Uniform(interval=3),
        "dynamic": lambda: FBCache(threshold=0.6, order=1),
        "modules": lambda: FasterCache(start=0.4, guidance_interval=4),
    }
    plan = plans[kind]()
    with layercache.enabled(pipe, plan):
        expected = [generate(pipe, seed=seed) for seed in range(3)]
    with layercache.enabled(pipe, plan, offload=slices) as cache:
        found = [generate(pipe, seed=seed) for seed in range(3)]
        report = cache.report()
        buffers = [buffer for state in getattr(cache, "states", {}).values() for buffer in state.images]
        assert all(part.host.is_pinned() for buffer in buffers for part in buffer._parts if part.host is not None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert report.host_bytes > 0 and report.cached_cells > 0


def test_the_host_does_not_wait(pipe):
    """A static schedule: nothing in a generation asks the device, apart from the pipeline's own."""
    schedule = schedule_for(pipe, mixed_cells())
    arguments = {
        "hidden_states": torch.randn(1, 64, 48, device="cuda"),
        "encoder_hidden_states": torch.randn(1, 4, 64, device="cuda"),
        "timestep": torch.ones(1, device="cuda"),
        "img_shapes": [(1, 8, 8)],
    }
    with torch.no_grad(), layercache.enabled(pipe.transformer, schedule, offload=True) as cache:
        for step in range(schedule.num_steps):  # allocates
            with cache.step(step, branch="cond"):
                pipe.transformer(**arguments)
        cache.reset()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(schedule.num_steps - 1):
                with cache.step(step, branch="cond"):
                    pipe.transformer(**arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
