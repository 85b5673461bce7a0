"""What is stored kept in host memory: the same bits, the order of the copies, and the memory of both sides."""

import weakref

import pytest
import torch

import layercache
from layercache import ops
from layercache.errors import CacheStateError
from layercache.methods import EasyCache, FBCache, PreciseCache, Uniform
from layercache.runtime import offload
from layercache.schedule.memory_plan import stored_bytes
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.staging_plan import staged_bytes
from support.tiny import (
    GROUPS,
    PROMPTS,
    calm_pipeline,
    fingerprint,
    generate,
    mixed_cells,
    schedule_for,
    shifted_sigmas,
    tiny_pipeline,
)

STEPS = 8
LATENTS = len(PROMPTS) * 64 * 48 * 4
STREAMS = {name: (len(PROMPTS) * 64 * 56 * 4, len(PROMPTS) * 4 * 56 * 4) for name in ("cond", "uncond")}


class DeferredLane:
    """Copies that are made as late as the order of the events allows, and from memory that was not freed before."""

    def __init__(self, device=None):
        self.queued = []

    def queue(self, copy):
        self.queued.append(copy)
        return len(self.queued)

    def join(self, done):
        for number in range(done):
            copy, self.queued[number] = self.queued[number], None
            if copy is not None:
                copy()

    def wait(self):
        self.join(len(self.queued))


class DeferredTransfers(offload.Transfers):
    """Of a device whose copies run beside its work: what is on its way holds NaN until it has arrived."""

    def lane(self, device):
        return self._lanes.setdefault(device, DeferredLane())

    def stage(self, shape, dtype, device):
        made = super().stage(shape, dtype, device)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(255)


@pytest.fixture(scope="module")
def pipe():
    return calm_pipeline()


def modules_of(pipe) -> ModuleSchedule:
    """Attention and feed-forward reused by turns, and one wholly reused step."""
    from layercache.models.registry import spec_for
    from layercache.runtime.modules import module_units

    units = tuple(unit.name for unit in module_units(pipe.transformer, spec_for(pipe.transformer)))
    rows = tuple(
        tuple(step < 2 or step == STEPS - 1 or (step + unit) % 2 == 0 for unit in range(len(units)))
        for step in range(STEPS)
    )
    return ModuleSchedule(fingerprint(pipe.transformer, shifted_sigmas(STEPS)), units, rows, frozenset({4}))


PLANS = {
    "groups": lambda pipe: schedule_for(pipe, mixed_cells()),
    "velocities": lambda pipe: Uniform(interval=3),
    "dynamic": lambda pipe: FBCache(threshold=0.6, order=1),
    "rows": lambda pipe: PreciseCache(alpha=2.0, cached_blocks=0.5),
    "whole steps": lambda pipe: EasyCache(threshold=1.0),
    "modules": modules_of,
}


@pytest.mark.parametrize(
    ("kind", "storage", "slices", "deferred"),
    [
        ("groups", "same", True, False),
        ("groups", "compact", 3, True),
        ("groups", "float32", 100, True),
        ("velocities", "same", True, True),
        ("dynamic", "same", 2, True),
        ("rows", "same", 2, True),
        ("whole steps", "same", True, True),
        ("modules", "same", True, True),
    ],
)
def test_the_same_bits_from_host_memory(pipe, kind, storage, slices, deferred, monkeypatch):
    """Also where every copy is as late as the events allow; and all that is stored is on the host."""
    plan = PLANS[kind](pipe)
    with layercache.enabled(pipe, plan, storage=storage) as cache:
        expected, stored = generate(pipe), cache.report()
    if deferred:
        for module in ("host_storage", "modules", "whole_step"):
            monkeypatch.setattr(f"layercache.runtime.{module}.Transfers", DeferredTransfers)
    with layercache.enabled(pipe, plan, storage=storage, offload=slices) as cache:
        assert torch.equal(generate(pipe), expected)
        report = cache.report()
        assert deferred or torch.equal(generate(pipe), expected)
    assert stored.cached_cells and report.cached_cells == stored.cached_cells and stored.host_bytes == 0
    assert report.cache_bytes == stored.cache_bytes and 0 < report.staged_bytes
    decides = kind in ("dynamic", "rows", "whole steps")  # what those decide by stays on the device
    assert (report.host_bytes < report.cache_bytes) if decides else (report.host_bytes == report.cache_bytes)
    assert report.device_bytes == report.cache_bytes - report.host_bytes + report.staged_bytes


@pytest.mark.parametrize("slices", [1, 3])
def test_device_memory_is_known_before_the_run(pipe, slices):
    schedules = [schedule_for(pipe, mixed_cells())]
    prints = fingerprint(pipe.transformer, shifted_sigmas(STEPS))
    schedules.append(Uniform(interval=3).schedule(prints))
    for schedule in schedules:
        with layercache.enabled(pipe, schedule, offload=slices) as cache:
            generate(pipe)
            report = cache.report()
        planned = staged_bytes(schedule, STREAMS, LATENTS, slices=slices, tokens=(64, 4), launch_terms=ops.MAX_TERMS)
        assert report.staged_bytes == planned
        assert report.host_bytes == stored_bytes(schedule, STREAMS, LATENTS)
    assert schedules[0].groups == GROUPS


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "rows"])
def test_what_a_method_stored_is_freed_when_its_generation_ends(pipe, kind, offload):
    with layercache.enabled(pipe, PLANS[kind](pipe), offload=offload) as cache:
        made, new_buffer, buffers = 0, cache.storage.new_buffer, weakref.WeakSet()

        def recorded():
            nonlocal made
            made += 1
            buffer = new_buffer()
            buffers.add(buffer)
            return buffer

        cache.storage.new_buffer = recorded
        generate(pipe)
        assert made and not any(buffer.nbytes for buffer in buffers)


def test_mixed_dtypes_and_batches_of_requests(pipe):
    """Under autocast groups give another dtype than they take; in a batch each request has residuals of its own."""
    schedule = schedule_for(pipe, mixed_cells())
    runs, batches = [], []
    for options in ({}, {"offload": 2}):
        with layercache.enabled(pipe, schedule, **options) as cache:
            with torch.autocast("cpu", torch.bfloat16):
                runs.append(generate(pipe, steps=STEPS))
            batches.append(batched(pipe.transformer, cache))
    assert torch.equal(*runs) and torch.equal(*batches)


@torch.no_grad()
def batched(transformer, cache) -> torch.Tensor:
    """Four steps of two requests in one batch."""
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 64, 48, generator=generator), torch.randn(2, 4, 64, generator=generator)
    for step in range(4):
        with cache.batch({"a": 1, "b": 1}), cache.step(step, branch="cond"):
            velocity = transformer(
                hidden_states=latents,
                encoder_hidden_states=text,
                timestep=torch.full((2,), 1.0 - step / STEPS),
                img_shapes=[(1, 8, 8)] * 2,
            )[0]
        latents = latents - velocity / STEPS
    assert sum(report.cached_cells for report in map(cache.requests.report, ("a", "b")))
    return latents


def test_refusals():
    pipe = tiny_pipeline()
    schedule = schedule_for(pipe, mixed_cells())
    for wrong in (0, -1, 2.0, "host"):
        with pytest.raises(CacheStateError, match="how many slices"):
            layercache.enable(pipe, schedule, offload=wrong)
    with layercache.enabled(pipe, schedule, offload=True):
        other = type(pipe)(
            pipe.transformer, pipe.class_encoder, type(pipe.scheduler).from_config(pipe.scheduler.config)
        )
        with pytest.raises(CacheStateError, match="with offload=1"):
            layercache.enable(other, schedule)
        pipe.transformer.compile(backend="eager")
        try:
            with pytest.raises(CacheStateError, match="compiled whole"):
                generate(pipe)
        finally:
            pipe.transformer._compiled_call_impl = None
