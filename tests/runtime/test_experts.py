"""Pipelines with two transformers: the first runs the early steps, the second the rest (Wan 2.2)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import (
    BudgetError,
    CacheStateError,
    CalibrationError,
    FileFormatError,
    ScheduleError,
    UnsupportedModelError,
)
from layercache.methods import FBCache, PreciseCache, SmoothCache
from layercache.models.registry import spec_for
from layercache.planning.profile import StabilityProfile
from layercache.runtime.attachment import attachment_of
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.forecast import reforecast, secant_coefficients
from layercache.schedule.schedule import Schedule, Velocity
from layercache.tools.report.tables import (
    profile_table,
    schedule_figures,
    schedule_sentences,
    schedule_table,
)
from support.text import plain_text
from support.zoo_pipelines import _wan_two_experts, block_calls, flux_img2img, generate

STEPS, EARLY = 12, 5
RUNS = {"transformer": tuple(range(EARLY)), "transformer_2": tuple(range(EARLY, STEPS))}
NAMES = sorted(RUNS)
GROUPS = ((0, 1), (1, 3), (3, 4))
DISTANCE, SPAN = 3, 2
SIZES = {"max_distance": DISTANCE, "max_span": SPAN, "progress": False}
ENDS = {"protect_first": 1, "protect_last": 1}


@pytest.fixture(scope="module")
def made():
    pipe, call = _wan_two_experts()
    prompts = [{k: v * scale for k, v in call.items() if "embeds" in k} for scale in (1.0, 0.7)]
    settings = {k: v for k, v in call.items() if "embeds" not in k} | {"num_inference_steps": STEPS}
    return pipe, prompts, settings


@pytest.fixture(scope="module")
def profiles(made):
    pipe, prompts, settings = made
    return {name: layercache.calibrate(pipe, prompts, transformer=name, **SIZES, **settings) for name in NAMES}


def enable_both(pipe, first, second):
    return layercache.enable(pipe, first), layercache.enable(pipe.transformer_2, second, pipe.scheduler)


def disable_both(pipe):
    layercache.disable(pipe)
    layercache.disable(pipe.transformer_2)


def evenly_timed(profile):
    """Seconds that were measured beside other work may leave no choice."""
    return replace(profile, group_seconds=(1.0, 2.0, 1.0), reuse_seconds=(0.0,) * 3)


def recorded_residuals(pipe, name, prompt, settings, seed):
    """Of every group of a full run, by plain hooks and in order of the calls: a list of ``{group: residual}``."""
    calls, inputs, hooks = [], {}, []
    blocks = getattr(pipe, name).blocks
    for group, (lo, hi) in enumerate(GROUPS):

        def before(module, args, group=group):
            inputs[group] = args[0]
            if group == 0:
                calls.append({})

        def after(module, args, output, group=group):
            calls[-1][group] = (output - inputs[group]).double().numpy()

        hooks += [blocks[lo].register_forward_pre_hook(before), blocks[hi - 1].register_forward_hook(after)]
    generate(pipe, settings | prompt, seed)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_measured_where_the_expert_runs(made, profiles, name):
    pipe, prompts, settings = made
    profile, runs = profiles[name], RUNS[name]
    assert profile.fingerprint.steps_run == profile.fingerprint.steps == runs
    assert profile.groups == GROUPS and profile.fingerprint.branches == ("cond", "uncond")
    sigmas = profile.fingerprint.sigmas
    assert len(sigmas) == STEPS + 1
    errors = np.zeros(profile.tables["image_error_l1"].shape)
    squares, norms, seen = errors.copy(), np.zeros(errors.shape[:4]), np.zeros((2, 2, STEPS, DISTANCE + 1, SPAN + 1))
    for p, prompt in enumerate(prompts):
        calls = recorded_residuals(pipe, name, prompt, settings, p)
        assert len(calls) == 2 * len(runs)
        residuals = {(b, step): calls[2 * k + b] for k, step in enumerate(runs) for b in range(2)}
        for b, g, i in np.ndindex(2, 3, STEPS):
            if i not in runs:
                continue
            r = residuals[b, i][g]
            norms[p, b, i, g] = np.abs(r).sum()
            for m in range(1, DISTANCE + 1):
                for k in range(SPAN + 1):
                    a, base = i - m, i - m - k
                    if base not in runs:
                        continue
                    c = min((sigmas[i] - sigmas[a]) / (sigmas[a] - sigmas[base]), 4.0) if k else 0.0
                    off = (1 + c) * residuals[b, a][g] - c * residuals[b, base][g] - r
                    errors[p, b, i, g, m, k] = np.abs(off).sum()
                    squares[p, b, i, g, m, k] = np.sqrt(np.square(off).sum())
                    seen[p, b, i, m, k] = 1
    np.testing.assert_array_equal(profile.tables["forecast_seen"], seen)
    np.testing.assert_allclose(profile.tables["image_norm_l1"], norms, rtol=2e-4)
    np.testing.assert_allclose(profile.tables["image_error_l1"], errors, rtol=2e-3, atol=1e-5 * norms.max())
    np.testing.assert_allclose(profile.tables["image_error_l2"], squares, rtol=2e-3, atol=1e-5 * norms.max())
    known = np.isfinite(profile.relative_errors())
    np.testing.assert_array_equal(known, np.repeat(seen[0, 0][:, None] > 0, 3, axis=1))
    changes = profile.stability()
    assert np.isnan(changes[[s for s in range(STEPS) if s not in runs[1:]]]).all()
    assert np.isfinite(changes[list(runs[1:])]).all() and (changes[list(runs[1:])] > 0).all()
    assert min(profile.group_seconds) > 0 and profile.fixed_seconds > 0


def test_the_other_expert_is_not_disturbed(made):
    pipe, prompts, settings = made
    expected = generate(pipe, settings | prompts[0])
    plain = {name: dict(vars(getattr(pipe, name))) for name in NAMES}
    outputs, classes = [], []

    def look(module, args, output):
        outputs.append(output[0])
        classes.append((type(module.blocks), attachment_of(module), "cache_context" in vars(module)))

    hook = pipe.transformer.register_forward_hook(look)
    generate(pipe, settings | prompts[0])
    alone, outputs[:] = list(outputs), []
    layercache.calibrate(pipe, prompts[:1], transformer="transformer_2", **SIZES, **settings)
    hook.remove()
    assert len(alone) == 2 * EARLY and all(torch.equal(a, b) for a, b in zip(alone, outputs, strict=True))
    assert set(classes) == {(torch.nn.ModuleList, None, False)}
    assert {name: dict(vars(getattr(pipe, name))) for name in NAMES} == plain
    assert torch.equal(generate(pipe, settings | prompts[0]), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"forecast": "fitted"}, {"forecast": "newton"}, {"per_branch": True}], ids=str)
def test_plans_keep_to_the_steps_that_are_run(profiles, name, options):
    profile, runs, budget = evenly_timed(profiles[name]), RUNS[name], 0.7
    schedule = layercache.plan(profile, budget, **ENDS, **options)
    for cells in (schedule.cells, *schedule.branch_cells.values()):
        assert {step for step, row in enumerate(cells) if row != ({}, {}, {})} == set(runs)
        assert None not in [cells[step][g] for step in range(STEPS) if step not in runs for g in range(3)]
        anchors = {anchor for row in cells for cell in row for anchor in cell or ()}
        assert anchors and anchors <= set(runs)
        assert cells[runs[0]] == cells[runs[-1]] == (None,) * 3
    own = [schedule.cells_of(branch) for branch in ("cond", "uncond")]
    computed = sum(s for cells in own for row in cells for cell, s in zip(row, (1, 2, 1), strict=True) if cell is None)
    assert schedule.used == pytest.approx(computed / (2 * 4 * len(runs)))
    assert schedule.used <= budget + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_that_of_a_run_of_these_steps_alone(profiles, name):
    """The same tables, cut to the steps that are run, as if there were no others."""
    profile, runs = evenly_timed(profiles[name]), list(RUNS[name])
    prints = profile.fingerprint
    tables = {key: table[:, :, runs] for key, table in profile.tables.items() if key != "forecast_seen"}
    sigmas = prints.sigmas[runs[0] : runs[-1] + 2]
    alone = replace(profile, tables=tables, fingerprint=replace(prints, sigmas=sigmas, steps_run=()))
    for target in ({"budget": 0.7}, {"speedup": 1.1}, {"full_steps": 0.8 * len(runs)}):
        expected = layercache.plan(alone, **target, **ENDS)
        found = layercache.plan(profile, **target, **ENDS)
        assert found.used == pytest.approx(expected.used) and found.made_by["error"] == expected.made_by["error"]
        shifted = [tuple(c and {a + runs[0]: v for a, v in c.items()} for c in row) for row in expected.cells]
        assert [found.cells[step] for step in runs] == shifted


def test_steps_with_gaps_between_them(profiles):
    """Were a transformer to run every other step, distances would still be those between steps."""
    profile = evenly_timed(profiles["transformer_2"])
    prints = profile.fingerprint
    own = (5, 6, 8, 9, 11)
    seen = profile.tables["forecast_seen"].copy()
    for i, m, k in np.ndindex(seen.shape[2:]):
        seen[:, :, i, m, k] *= m >= 1 and {i, i - m, i - m - k} <= set(own)
    gapped = replace(
        profile, tables={**profile.tables, "forecast_seen": seen}, fingerprint=replace(prints, steps_run=own)
    )
    schedule = layercache.plan(gapped, 0.6, **ENDS)
    assert schedule.used <= 0.6 + 1e-9
    errors = gapped.relative_errors()
    total, sizes = 0.0, np.abs(np.diff(prints.sigmas))
    for step, group in np.ndindex(STEPS, 3):
        cell = schedule.cells[step][group]
        assert (step in own) or cell == {}
        if cell:
            anchor, base = max(cell), min(cell)
            assert cell == secant_coefficients(prints.sigmas, step, anchor, base if base < anchor else None)
            total += sizes[step] * errors[step, group, step - anchor, anchor - base]
    assert total > 0 and schedule.made_by["error"] == pytest.approx(total)


@pytest.mark.parametrize("name", NAMES)
def test_smoothcache_of_one_expert(profiles, name):
    """Every reused step is within the bound, by the profile's own table."""
    profile, runs, alpha = evenly_timed(profiles[name]), RUNS[name], 0.3
    schedule = SmoothCache(alpha=alpha, max_distance=DISTANCE).schedule(profile)
    errors, reused = profile.relative_errors(text_weight=0.0), 0
    for step, group in np.ndindex(STEPS, 3):
        cell = schedule.cells[step][group]
        assert (cell == {}) is (step not in runs)
        for anchor in cell or ():
            reused += 1
            assert anchor in runs and errors[step, group, step - anchor, 0] <= alpha
    assert reused and schedule.cells[runs[0]] == schedule.cells[runs[-1]] == (None,) * 3


def test_forecasts_never_take_a_step_that_was_not_run(profiles):
    schedule = layercache.plan(evenly_timed(profiles["transformer_2"]), 0.5, **ENDS)
    for changed in (reforecast(schedule, "newton", 7), reforecast(schedule, "taylor", 7)):
        assert min(anchor for row in changed.cells for cell in row for anchor in cell or ()) >= EARLY


def test_pictures_and_computed_blocks(made, profiles):
    pipe, prompts, settings = made
    call = settings | prompts[0]
    full = generate(pipe, call)
    plans = [layercache.plan(evenly_timed(profiles[name]), 0.7, **ENDS) for name in NAMES]
    caches = enable_both(pipe, *plans)
    try:
        seen = []
        for name in NAMES:
            with block_calls(pipe, getattr(pipe, name)) as calls:
                cached = generate(pipe, call)
            seen.append(calls)
        assert torch.equal(cached, generate(pipe, call))
    finally:
        disable_both(pipe)
    for name, schedule, calls, cache in zip(NAMES, plans, seen, caches, strict=True):
        assert set(calls["forwards"]) == set(RUNS[name])
        for end, group in (("first", 0), ("last", 2)):
            expected = {step: 2 for step in RUNS[name] if schedule.cells[step][group] is None}
            assert dict(calls[end]) == expected
        report = cache.report()
        assert report.fallback_rows == 0 and report.generations == 3
        assert report.used == pytest.approx(schedule.used)
        assert report.cache_bytes == profiles[name].cache_bytes(schedule)
    assert not torch.equal(cached, full) and float((cached - full).abs().max()) < 0.5 * float(full.abs().max())
    assert torch.equal(generate(pipe, call), full)


@pytest.mark.parametrize("method", [FBCache(threshold=0.6), PreciseCache(alpha=1.0, window=2)], ids=lambda m: m.name)
def test_decisions_of_each_are_replayed(made, method):
    """Each of its own steps alone; a run that was broken off is none."""
    pipe, prompts, settings = made
    call = settings | prompts[0]

    def fail(pipe, step, timestep, kwargs):
        if step == EARLY:
            raise KeyboardInterrupt
        return kwargs

    caches = enable_both(pipe, method, method)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, call | {"callback_on_step_end": fail})
        with pytest.raises(CacheStateError, match=f"run a whole generation of {STEPS} steps first.*'cond': {EARLY}"):
            caches[0].export_schedule()
        decided = generate(pipe, call)
        schedules = [Schedule.from_json(cache.export_schedule().to_json()) for cache in caches]
        assert any(cache.report().cached_cells for cache in caches)
    finally:
        disable_both(pipe)
    assert [schedule.fingerprint.steps_run for schedule in schedules] == [RUNS[name] for name in NAMES]
    caches = enable_both(pipe, *schedules)
    try:
        assert torch.equal(generate(pipe, call), decided)
        assert [cache.report().fallback_rows for cache in caches] == [0, 0]
    finally:
        disable_both(pipe)


def test_a_budget_of_one_changes_no_bit(made, profiles):
    pipe, prompts, settings = made
    call = settings | prompts[1]
    full = generate(pipe, call)
    plans = [layercache.plan(profiles[name], 1.0) for name in NAMES]
    assert [plan.used for plan in plans] == [1.0, 1.0]
    caches = enable_both(pipe, *plans)
    try:
        assert torch.equal(generate(pipe, call), full)
        assert [cache.report().fallback_rows for cache in caches] == [0, 0]
    finally:
        disable_both(pipe)


def test_another_boundary_is_computed_where_nothing_was_planned(made, profiles):
    """The second expert begins earlier than where it was measured: those steps are computed, and counted."""
    pipe, prompts, settings = made
    call = settings | prompts[0]
    schedule = layercache.plan(evenly_timed(profiles["transformer_2"]), 0.7, **ENDS)
    before = pipe.config.boundary_ratio
    pipe.register_to_config(boundary_ratio=0.8)
    try:
        with layercache.enabled(pipe.transformer_2, schedule, pipe.scheduler) as cache:
            with block_calls(pipe, pipe.transformer_2) as calls:
                generate(pipe, call)
            earlier = min(calls["forwards"])
            assert earlier < EARLY and cache.report().fallback_rows == 2 * (EARLY - earlier)
        computed = {step for step in RUNS["transformer_2"] if schedule.cells[step][0] is None}
        assert set(calls["first"]) == computed | set(range(earlier, EARLY))
    finally:
        pipe.register_to_config(boundary_ratio=before)


def test_files_keep_the_steps(profiles, tmp_path):
    profile = profiles["transformer_2"]
    loaded = StabilityProfile.load(profile.save(tmp_path / "late.safetensors"))
    assert loaded.fingerprint == profile.fingerprint
    schedule = layercache.plan(loaded, 0.8, **ENDS)
    path = schedule.save(tmp_path / "late.json")
    assert Schedule.load(path) == schedule and '"steps_run": [5, 6, 7, 8, 9, 10, 11]' in path.read_text()
    damaged = json.loads(path.read_text())
    del damaged["checksum"]
    path.write_text(json.dumps(damaged).replace("[5, 6, 7, 8, 9, 10, 11]", "[5, 6, 7, 8, 9, 10, 12]"))
    with pytest.raises(FileFormatError, match=r"late\.json.*steps_run"):
        Schedule.load(path)


def test_files_of_whole_runs_are_as_before(profiles):
    prints = replace(profiles["transformer"].fingerprint, steps_run=())
    assert "steps_run" not in prints.to_json() and Fingerprint.from_json(prints.to_json()) == prints
    assert prints.steps == tuple(range(STEPS))


def test_contradictions_are_refused(profiles):
    prints = profiles["transformer_2"].fingerprint
    whole = Schedule.compute_all(prints, GROUPS)
    assert whole.used == 1.0 and whole.is_skipped(0) and not whole.is_skipped(EARLY)
    with pytest.raises(ScheduleError, match="step 0 is none of those at which the transformer runs"):
        replace(whole, cells=((None,) * 3, *whole.cells[1:]))
    with pytest.raises(ScheduleError, match="reads step 4"):
        replace(whole, cells=(*whole.cells[:6], ({4: 1.0}, None, None), *whole.cells[7:]))
    with pytest.raises(ScheduleError, match="no velocity"):
        replace(whole, cells=(*whole.cells[:6], ({}, {}, {}), *whole.cells[7:]))
    with pytest.raises(ScheduleError, match="step 0 has a velocity"):
        replace(whole, velocities=(Velocity({0: 1.0}), *[None] * (STEPS - 1)))
    for wrong in ((3, 2), (1, 1), (-1, 2), (0, STEPS)):
        with pytest.raises(ScheduleError, match="steps_run"):
            replace(prints, steps_run=wrong)


def test_what_is_shown(profiles, tmp_path):
    from layercache.tools.report.plots import MapPanel, save_maps

    profile = evenly_timed(profiles["transformer_2"])
    schedule = layercache.plan(profile, 0.7, **ENDS)
    figures = schedule_figures(schedule)
    assert figures["num_steps"] == STEPS and figures["steps_run"] == list(RUNS["transformer_2"])
    for group in figures["groups"]:
        assert group["skipped_steps"] == 0
        assert sum(group[f"{kind}_steps"] for kind in ("computed", "reused", "forecast")) == len(RUNS["transformer_2"])
    text = schedule_sentences(schedule)
    assert f"12 steps, of which the transformer runs {STEPS - EARLY} (5-11)" in text and "skipped" not in text
    assert f"of {STEPS - EARLY} steps" in text
    lines = plain_text(schedule_table(schedule)).splitlines()
    assert not any(word in line for line in lines for word in ("skip", "None"))
    assert "nan" not in plain_text(profile_table(profile))
    panel = MapPanel("late", GROUPS, profile.fingerprint.sigmas, None, schedule)
    both = replace(panel, stability=profile.stability())
    assert save_maps(tmp_path / "map.png", [panel, both]).stat().st_size > 1000


def test_measured_partition_and_sensitivity(made):
    pipe, prompts, settings = made
    for name in NAMES:
        profile = layercache.calibrate(
            pipe, prompts[:1], transformer=name, partition="measured", num_groups=2, sensitivity="substitution",
            **SIZES, **settings
        )  # fmt: skip
        assert len(profile.groups) == 2
        weights = profile.sensitivity()
        unknown = [step for step in range(STEPS) if step not in RUNS[name][1:]]
        assert (weights[unknown] == 1).all() and (weights[list(RUNS[name][1:])] != 1).all()
        layercache.plan(profile, 0.9, **ENDS)


def test_another_sampler(made):
    from diffusers import UniPCMultistepScheduler

    pipe, prompts, settings = made
    sampler, before = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), pipe.scheduler
    pipe.scheduler = sampler
    try:
        own = [
            layercache.calibrate(pipe, prompts[:1], transformer=name, **SIZES, **settings).fingerprint.steps
            for name in NAMES
        ]
    finally:
        pipe.scheduler = before
    assert own[0] and own[1] and own[0] + own[1] == tuple(range(STEPS))


def test_a_pipeline_with_the_second_expert_alone():
    """Diffusers leaves the first one out where a run never comes to it."""
    pipe, call = _wan_two_experts()
    pipe.register_modules(transformer=None)
    pipe.register_to_config(boundary_ratio=2.0)
    prompt = {k: v for k, v in call.items() if "embeds" in k}
    settings = {k: v for k, v in call.items() if k not in prompt}
    with pytest.raises(UnsupportedModelError, match="no 'transformer'; its transformers are transformer_2"):
        layercache.calibrate(pipe, [prompt], **SIZES, **settings)
    profile = layercache.calibrate(pipe, [prompt], transformer="transformer_2", **SIZES, **settings)
    assert profile.fingerprint.steps_run == ()


def test_img2img_is_planned_for_the_steps_that_it_takes():
    """A run that begins in the middle is the same thing."""
    pipe, call = flux_img2img()
    call |= {"num_inference_steps": 10, "strength": 0.7}
    sample = {"image": call.pop("image")}
    profile = layercache.calibrate(pipe, [sample], **SIZES, **call)
    assert profile.fingerprint.steps_run == tuple(range(3, 10))
    schedule = layercache.plan(profile, 0.7, **ENDS)
    with layercache.enabled(pipe, schedule) as cache:
        generate(pipe, call | sample)
        assert cache.report().fallback_rows == 0 and cache.report().used == pytest.approx(schedule.used, abs=0.02)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_refusals(made, profiles):
    pipe, prompts, settings = made
    with pytest.raises(UnsupportedModelError, match="'transformer_3'.*transformer, transformer_2"):
        layercache.calibrate(pipe, prompts, transformer="transformer_3", **settings)
    with pytest.raises(BudgetError, match="cannot be met: at least 0"):
        layercache.plan(profiles["transformer"], 0.05)
    with layercache.enabled(pipe, layercache.plan(profiles["transformer"], 1.0)):
        with pytest.raises(CacheStateError, match="enabled on transformer;.*disable"):
            layercache.calibrate(pipe, prompts, transformer="transformer_2", **SIZES, **settings)


def test_velocities_of_each_experts_own_steps(made, profiles):
    """Every second step of each is skipped, and its velocity held."""
    pipe, prompts, settings = made
    call = settings | prompts[0]
    plans = {}
    for name, profile in profiles.items():
        steps = profile.fingerprint.steps
        skipped = {step for place, step in enumerate(steps) if place % 2}
        cells = [None if step in steps and step not in skipped else {} for step in range(STEPS)]
        velocities = tuple(Velocity({step - 1: 1.0}) if step in skipped else None for step in range(STEPS))
        plans[name] = Schedule(profile.fingerprint, ((0, 4),), tuple((c,) for c in cells), (1.0,), {}, velocities)
    held, step = [], pipe.scheduler.step

    def holding(velocity, *args, **kwargs):
        held.append(velocity)
        place = len(held) - 1
        place -= place % 2 if place < EARLY else (place - EARLY) % 2
        return step(held[place], *args, **kwargs)

    pipe.scheduler.step = holding
    try:
        expected = generate(pipe, call)
    finally:
        del pipe.scheduler.step
    full = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    first, _ = enable_both(pipe, plans["transformer"], plans["transformer_2"])
    found = generate(pipe, call)
    disable_both(pipe)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert first.report().used < 1
    assert "step" not in vars(pipe.scheduler) and torch.equal(generate(pipe, call), full)


def test_an_interrupted_run_is_incomplete(made):
    pipe, prompts, settings = made

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= EARLY
        return kwargs

    for name in NAMES:
        with pytest.raises(CalibrationError, match="incomplete"):
            layercache.calibrate(pipe, prompts, transformer=name, callback_on_step_end=stop, **SIZES, **settings)


def test_an_expert_that_never_runs(made):
    pipe, prompts, settings = made
    before = pipe.config.boundary_ratio
    pipe.register_to_config(boundary_ratio=0.0)
    try:
        with pytest.raises(CalibrationError, match="never called"):
            layercache.calibrate(pipe, prompts, transformer="transformer_2", **SIZES, **settings)
    finally:
        pipe.register_to_config(boundary_ratio=before)


def test_spec_is_that_of_one_expert(made):
    assert spec_for(made[0].transformer) is spec_for(made[0].transformer_2)
