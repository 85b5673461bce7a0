"""Velocities on their way to the sampler: stored, combined, skipped; against a loop written out here."""

import pytest
import torch

import layercache
from layercache.errors import CacheStateError, NonFiniteResidualError, NonFiniteWarning, ScheduleError
from layercache.runtime.velocity import combine
from layercache.schedule.memory_plan import lay_out
from layercache.schedule.schedule import Schedule, Velocity
from support.operators import Operators
from support.tiny import (
    PROMPTS,
    fingerprint,
    generate,
    generators,
    mixed_cells,
    schedule_for,
    shifted_sigmas,
    tiny_pipeline,
)

STEPS = 8
SKIP = ({},)
RUN = (None,)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def schedule_of(pipe, rows, velocities, steps=STEPS, groups=((0, 6),)) -> Schedule:
    prints = fingerprint(pipe.transformer, shifted_sigmas(steps))
    return Schedule(prints, groups, tuple(rows), (1.0,) * len(groups), velocities=tuple(velocities))


def skipping(pipe, computed=(0, 1, 3, 6, 7)) -> Schedule:
    """Skips some steps, forecasts from one to three velocities there, and bends computed steps too."""
    rows, velocities = [], []
    for step in range(STEPS):
        older = [k for k in computed if k < step][::-1]
        rows.append(RUN if step in computed else SKIP)
        if step in computed:
            velocities.append(Velocity({step: 0.97, older[0]: 0.05}, -0.01) if step > 2 else None)
        else:
            weights = (1.4, -0.3, -0.15)
            velocities.append(Velocity(dict(zip(older[:3], weights, strict=False)), 0.02))
    return schedule_of(pipe, rows, velocities)


def by_hand(pipe, schedule, steps=STEPS, guidance=4.0, seed=0) -> torch.Tensor:
    """The same generation without the library: every term of every velocity in float64."""
    given, raw = [], {}
    inner = pipe.scheduler.step

    def step(velocity, timestep, latents, **kwargs):
        k = len(given)
        raw[k] = velocity
        rule = schedule.velocity(k)
        if rule is not None:
            terms = sum(c * raw[s].double() for s, c in rule.terms.items())
            velocity = (terms + rule.latents * latents.double()).float()
        given.append(velocity)
        return inner(velocity, timestep, latents, **kwargs)

    pipe.scheduler.step = step
    try:
        return generate(pipe, steps=steps, guidance_scale=guidance, seed=seed)
    finally:
        del pipe.scheduler.step


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_skipped_and_bent_steps_equal_the_loop_by_hand(pipe, guidance):
    schedule = skipping(pipe)
    expected = by_hand(pipe, schedule, guidance=guidance)
    with layercache.enabled(pipe, schedule) as cache:
        first = generate(pipe, guidance_scale=guidance)
        second = generate(pipe, guidance_scale=guidance)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, second)
    assert cache.report().fallback_rows == 0
    assert cache.report().used == pytest.approx(5 / 8)


def test_velocities_over_cached_groups(pipe):
    """Group rows and velocities compose: the raw velocity of a cached row is a term like any other."""
    plain = schedule_for(pipe, mixed_cells())
    velocities = [None, None, *(Velocity({k: 1.1, k - 1: 0.1, k - 2: -0.2}) for k in range(2, STEPS))]
    steered = Schedule(plain.fingerprint, plain.groups, plain.cells, plain.group_seconds, velocities=tuple(velocities))
    seen = []
    inner = pipe.scheduler.step

    def record(velocity, timestep, latents, **kwargs):
        rule = velocities[len(seen)]
        seen.append(velocity)
        if rule is not None:
            velocity = sum(c * seen[s].double() for s, c in rule.terms.items()).float()
        return inner(velocity, timestep, latents, **kwargs)

    pipe.scheduler.step = record
    with layercache.enabled(pipe, plain):
        expected = generate(pipe)
    del pipe.scheduler.step
    with layercache.enabled(pipe, steered):
        torch.testing.assert_close(generate(pipe), expected, rtol=1e-5, atol=1e-5)


def test_a_skipped_step_runs_no_block_and_stores_no_residual(pipe):
    calls = []
    hooks = [
        b.register_forward_hook(lambda *_, k=k: calls.append(k))
        for k, b in enumerate(pipe.transformer.transformer_blocks)
    ]
    schedule = skipping(pipe)
    with layercache.enabled(pipe, schedule) as cache:
        generate(pipe)
        report = cache.report()
    for hook in hooks:
        hook.remove()
    assert len(calls) == 5 * 2 * 6
    # only velocities are kept: 64 tokens of 48 numbers per picture
    assert report.cache_bytes == lay_out(schedule, True).velocity_slots * len(PROMPTS) * 64 * 48 * 4


def test_slots_are_shared_by_liveness(pipe):
    schedule = skipping(pipe)
    layout = lay_out(schedule, True)
    last = {s: k for k, v in enumerate(schedule.velocities) if v for s in v.terms if s < k}
    alive = max(sum(s < k <= last[s] for s in last) for k in range(STEPS))
    assert layout.velocity_slots <= alive + 1
    assert [row.capture is not None for row in layout.velocities] == [k in last for k in range(STEPS)]


def test_the_scheduler_is_restored(pipe):
    before = dict(pipe.scheduler.__dict__)
    full = generate(pipe)
    layercache.enable(pipe, skipping(pipe))
    assert "step" in pipe.scheduler.__dict__
    layercache.disable(pipe)
    assert set(pipe.scheduler.__dict__) == set(before)
    assert torch.equal(generate(pipe), full)


def test_a_run_that_begins_in_the_middle_computes_what_is_missing(pipe):
    """As img2img does: where a velocity was never stored, the model runs, for all branches."""
    schedule = skipping(pipe)
    begin = pipe.scheduler.set_begin_index
    timesteps = pipe.scheduler.set_timesteps

    def late(**kwargs):
        timesteps(**kwargs)
        pipe.scheduler.timesteps = pipe.scheduler.timesteps[2:]

    pipe.scheduler.set_begin_index = lambda _: begin(2)
    pipe.scheduler.set_timesteps = late
    try:
        full = generate(pipe)
        with layercache.enabled(pipe, schedule) as cache:
            cached = generate(pipe)
            report = cache.report()
    finally:
        del pipe.scheduler.set_begin_index, pipe.scheduler.set_timesteps
    # step 2 lacks its anchors 0 and 1; 4 and 5 read them too; 3 and 6 are computed but cannot all be bent
    assert report.fallback_rows == 2 * 3
    assert torch.isfinite(cached).all()
    assert torch.nn.functional.mse_loss(cached, full) < torch.nn.functional.mse_loss(full, torch.zeros_like(full))


def test_an_exception_leaves_nothing_behind(pipe):
    schedule = skipping(pipe)

    def stop(_pipe, step, _time, values):
        if step == 4:
            raise KeyboardInterrupt
        return values

    with layercache.enabled(pipe, schedule):
        fresh = generate(pipe)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, seed=5, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), fresh)


def test_own_loop_with_a_scheduler(pipe):
    schedule, transformer = skipping(pipe), pipe.transformer
    expected = by_hand(pipe, schedule, guidance=1.0)
    noise = torch.cat([torch.randn(1, 3, 32, 32, generator=g) for g in generators(2)])
    from layercache.demo.model import pack_patches

    latents = pack_patches(noise)
    text = pipe.class_encoder(torch.tensor(pipe.class_ids(list(PROMPTS))))
    scheduler = pipe.scheduler
    with torch.no_grad(), layercache.enabled(transformer, schedule, scheduler):
        scheduler.set_timesteps(sigmas=[k / STEPS for k in range(STEPS, 0, -1)])
        for time in scheduler.timesteps:
            velocity = transformer(
                hidden_states=latents,
                encoder_hidden_states=text,
                timestep=time.expand(2) / 1000,
                img_shapes=[(1, 8, 8)] * 2,
                return_dict=False,
            )[0]
            latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_refusals(pipe):
    with pytest.raises(CacheStateError, match="scheduler"):
        layercache.enable(pipe.transformer, skipping(pipe))
    rows, none = [RUN] * STEPS, [None] * STEPS
    with pytest.raises(ScheduleError, match="no velocity"):
        schedule_of(pipe, [RUN, SKIP, *rows[2:]], none)
    with pytest.raises(ScheduleError, match="step 3"):
        schedule_of(pipe, [RUN, SKIP, *rows[2:]], [None, Velocity({3: 1.0}), *none[2:]])
    with pytest.raises(ScheduleError, match="step 1"):
        schedule_of(pipe, [RUN, SKIP, *rows[2:]], [None, Velocity({0: 1.0}), Velocity({1: 1.0}), *none[3:]])
    with pytest.raises(ScheduleError, match="finite"):
        schedule_of(pipe, rows, [None, Velocity({1: float("nan")}), *none[2:]])
    with pytest.raises(ScheduleError, match="combines no residual"):
        schedule_of(pipe, [(None, None), ({}, None), *[(None, None)] * 6], none, groups=((0, 3), (3, 6)))


def test_a_scheduler_that_steps_without_the_model_is_refused(pipe):
    with layercache.enabled(pipe, skipping(pipe)):
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5])
        with pytest.raises(CacheStateError, match="last called for step"):
            pipe.scheduler.step(torch.zeros(1, 4, 4), pipe.scheduler.timesteps[0], torch.zeros(1, 4, 4))


def test_file_keeps_velocities(pipe, tmp_path):
    schedule = skipping(pipe)
    assert Schedule.load(schedule.save(tmp_path / "s.json")) == schedule
    plain = schedule_for(pipe, mixed_cells())
    assert "velocities" not in plain.to_json()


@pytest.mark.parametrize("count", [1, 9, 10, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_any_number_of_terms(count, dtype):
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(2, 4, 6, 6, generator=generator).to(dtype) for _ in range(count)]
    weights = torch.randn(count, generator=generator).tolist()
    copy = torch.zeros_like(tensors[0])
    result = combine(tensors, weights, (0, copy))
    expected = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * 4)
    assert torch.equal(copy, tensors[0])


def test_one_launch_and_no_host_read_per_step(pipe):
    """Of latent-sized work a bent step does one linear map, in which the fresh velocity is stored too."""
    ours, reads = [], []
    schedule = skipping(pipe)
    with layercache.enabled(pipe, schedule) as cache:
        generate(pipe)
        track = cache.track
        velocity, latents = torch.randn(2, 64, 48), torch.randn(2, 64, 48)
        run = object()
        for step in range(STEPS):
            track.begin(step, run)
            with Operators() as operators:
                track.replace_velocity(velocity, latents)
            ours += operators.ours
            reads += operators.host_reads
    assert ours == ["linear_map"] * sum(row.changes for row in cache.layout.velocities)
    assert not reads


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_velocity_is_reported_when_the_generation_ends(pipe, value):
    schedule = skipping(pipe)

    def spoil(module, args, output):
        return output[0], output[1] * value

    with layercache.enabled(pipe, schedule) as cache:
        clean = generate(pipe)
        handle = pipe.transformer.transformer_blocks[2].register_forward_hook(spoil)
        with pytest.warns(NonFiniteWarning, match="velocity"):
            generate(pipe)
        with pytest.raises(NonFiniteResidualError, match="velocity"):
            cache.check()
        handle.remove()
        assert torch.equal(generate(pipe), clean)
