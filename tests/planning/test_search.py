"""Rollouts, the search and its front, on a tiny untrained pipeline."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import layercache
from layercache.errors import (
    BudgetError,
    CacheStateError,
    CalibrationError,
    FileFormatError,
    LayerCacheWarning,
    ScheduleMismatchError,
)
from layercache.planning.fit import HOLD, Forecast
from layercache.planning.front import Front, Point, quality
from layercache.planning.plan import weighted_errors
from layercache.planning.rollout import Rollouts, psnr_of, skipping, with_terms_of
from layercache.planning.scores import cell_needs, step_needs, step_weights, velocity_errors
from layercache.planning.search import _with_exchanged, search
from layercache.runtime.attachment import attachment_of
from layercache.schedule.forecast import reforecast
from layercache.tools.report.front import (
    FrontRow,
    front_table,
    order_sentence,
    rows_of,
    save_front_page,
    save_front_plot,
)
from support.text import plain_text
from support.tiny import generators, mixed_cells, schedule_for, tiny_pipeline

STEPS = 8
PROMPTS = [["cat", "coffee"], "rocket"]
SEEDS = [3, 4, 5]
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def rollouts(pipe):
    return Rollouts(pipe, PROMPTS, SEEDS, **CALL)


@pytest.fixture(scope="module")
def profile(pipe):
    """With seconds that do not depend on what else the machine does."""
    profile = layercache.calibrate(pipe, ["cat"], progress=False, max_distance=6, max_span=6, **CALL)
    return replace(profile, group_seconds=(0.9, 1.0, 1.1), reuse_seconds=(0.001,) * 3, fixed_seconds=0.1)


def pictures(pipe, schedule=None):
    """What the pipeline itself draws for the samples."""
    results = []
    for prompt, seed, count in (("cat coffee".split(), 3, 2), ("rocket", 5, 1)):
        seeds = generators(count, seed)
        call = CALL | {"generator": seeds if count > 1 else seeds[0], "output_type": "np"}
        if schedule is None:
            results.append(pipe(prompt, **call).images)
        else:
            with layercache.enabled(pipe, schedule):
                results.append(pipe(prompt, **call).images)
    return results


def test_the_full_run_is_the_pipelines_own(pipe, rollouts):
    for a, b in zip(pictures(pipe), rollouts.pictures, strict=True):
        np.testing.assert_array_equal(a, b)
    assert rollouts.branches == ("cond", "uncond")
    assert rollouts.num_steps == STEPS
    assert rollouts.is_euler


@pytest.mark.parametrize("forecast", [Forecast(terms=3), Forecast("open", terms=2), Forecast("teacher", terms=2), HOLD])
def test_a_fitted_schedule_gives_the_same_when_it_is_used(pipe, rollouts, forecast):
    rollout = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 3, 4, 7]), forecast)
    for a, b, full in zip(pictures(pipe, rollout.schedule), _split(rollout.psnr), rollouts.pictures, strict=True):
        np.testing.assert_allclose(psnr_of(full, a), b, rtol=1e-9)


def _split(values):
    return [values[:2], values[2:]]


def test_group_schedules_are_steered_too(pipe, rollouts):
    plain = schedule_for(pipe, mixed_cells())
    schedule = replace(plain, fingerprint=rollouts.fingerprint)
    as_it_is, steered = rollouts.run(schedule), rollouts.run(schedule, Forecast(terms=3))
    assert as_it_is.schedule.velocities == ()
    assert steered.quality > as_it_is.quality
    for a, b, full in zip(pictures(pipe, steered.schedule), _split(steered.psnr), rollouts.pictures, strict=True):
        np.testing.assert_allclose(psnr_of(full, a), b, rtol=1e-9)


def test_steering_hits_the_full_run_where_it_can(rollouts):
    """With as many free terms as needed the latents are back on the full run's; one sample, so it can be exact."""
    rollout = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 2, 3, 4, 5, 7]), Forecast(terms=4, ridge=1e-12))
    hold = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 2, 3, 4, 5, 7]), HOLD)

    def drift(rollout, step):
        pairs = zip(rollout.traces, rollouts.full, strict=True)
        return sum(float((t.latents[step] - f.latents[step]).pow(2).sum()) for t, f in pairs)

    assert drift(rollout, 6) == 0
    assert 0 < drift(rollout, 7) < drift(hold, 7)


def test_open_fits_use_the_full_runs_velocities(rollouts):
    """The coefficients of an open fit do not depend on what was skipped before."""
    forecast = Forecast("open", terms=2)
    a = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 3, 4, 5, 7]), forecast).schedule
    b = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 2, 3, 4, 5, 7]), forecast).schedule
    assert a.velocity(6) == b.velocity(6)


def test_a_run_can_begin_where_two_schedules_part(rollouts):
    start = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 3, 4, 7]), Forecast(terms=2))
    other = skipping(rollouts.fingerprint, [0, 1, 3, 5, 7])
    whole, tail = rollouts.run(other, Forecast(terms=2)), rollouts.run(other, Forecast(terms=2), start=start, first=4)
    assert tail.schedule == whole.schedule
    assert tail.psnr == whole.psnr


def test_nothing_is_left_behind(pipe, rollouts):
    rollouts.run(skipping(rollouts.fingerprint, [0, 1, 7]), HOLD)
    assert attachment_of(pipe.transformer) is None
    assert "step" not in pipe.scheduler.__dict__
    assert "maybe_free_model_hooks" not in pipe.__dict__


def test_an_enabled_cache_is_in_the_way(pipe, rollouts):
    with layercache.enabled(pipe, schedule_for(pipe, mixed_cells())), pytest.raises(CacheStateError, match="already"):
        rollouts.run(skipping(rollouts.fingerprint, [0, 7]), HOLD)


def test_a_model_that_breaks_is_refused(rollouts):
    schedule = skipping(rollouts.fingerprint, [0, 1, 7])
    block = rollouts.transformer.transformer_blocks[0]

    def spoil(module, args, output):
        return output[0], output[1] * float("nan")

    handle = block.register_forward_hook(spoil)
    try:
        with pytest.raises(CalibrationError, match="NaN"):
            rollouts.run(schedule, Forecast(terms=2))
    finally:
        handle.remove()
    assert attachment_of(rollouts.transformer) is None


def test_steering_needs_euler_steps(pipe):
    other = tiny_pipeline()
    other.scheduler = _Halved.from_config(other.scheduler.config)
    rollouts = Rollouts(other, ["cat"], [1], **CALL)
    assert not rollouts.is_euler
    with pytest.raises(CalibrationError, match="teacher"):
        rollouts.run(skipping(rollouts.fingerprint, [0, 1, 7]), Forecast())
    assert rollouts.run(skipping(rollouts.fingerprint, [0, 1, 7]), Forecast("teacher")).quality > 0


class _Halved(FlowMatchEulerDiscreteScheduler):
    """Steps otherwise than Euler."""

    def step(self, velocity, timestep, latents, **kwargs):
        return super().step(velocity * 0.5, timestep, latents, **kwargs)


@pytest.mark.parametrize(("prompts", "seeds", "message"), [([], None, "at least one"), (["cat"], [1, 2], "one seed")])
def test_bad_samples(pipe, prompts, seeds, message):
    with pytest.raises(CalibrationError, match=message):
        Rollouts(pipe, prompts, seeds, **CALL)


def test_cache_bytes_are_what_is_allocated(pipe, rollouts):
    for schedule in (
        replace(schedule_for(pipe, mixed_cells()), fingerprint=rollouts.fingerprint),
        rollouts.run(skipping(rollouts.fingerprint, [0, 1, 4]), Forecast(terms=3)).schedule,
    ):
        with layercache.enabled(pipe, schedule) as cache:
            pipe(["cat", "coffee"], **CALL)
            assert cache.report().cache_bytes == rollouts.cache_bytes(schedule)


def test_errors_of_velocities_against_a_loop(rollouts):
    table = velocity_errors(rollouts, 3, 2)
    sigmas = rollouts.sigmas
    ratio = (sigmas[5] - sigmas[3]) / (sigmas[3] - sigmas[1])
    expected = np.mean(
        [float(((1 + ratio) * t.raw[3] - ratio * t.raw[1] - t.raw[5]).abs().mean()) for t in rollouts.full]
    )
    assert table[5, 0, 2, 2] == pytest.approx(expected * abs(sigmas[6] - sigmas[5]), rel=1e-5)
    assert np.isinf(table[1, 0, 2]).all()


def test_needs_are_zero_where_nothing_was_missed(rollouts):
    forecast = Forecast(terms=3)
    rollout = rollouts.run(skipping(rollouts.fingerprint, [0, 1, 2, 4, 7]), forecast)
    needs = step_needs(rollout, rollouts, forecast)
    assert needs[0] == np.inf
    assert (needs[1:] > 0).all()
    step, length = 3, rollouts.sigmas[4] - rollouts.sigmas[3]
    missed = [
        float((t.taken[step] - (f.latents[4] - t.latents[3]) / length).pow(2).mean())
        for t, f in zip(rollout.traces, rollouts.full, strict=True)
    ]
    assert needs[step] == pytest.approx(abs(length) * np.sqrt(np.mean(missed)), rel=1e-4)


def run_search(pipe, profile, **settings):
    settings = {"budgets": (0.75, 0.5), "trials": 1, "progress": False, **settings}
    return search(pipe, PROMPTS, seeds=SEEDS, profiles=profile, **settings, **CALL)


@pytest.fixture(scope="module")
def front(pipe, profile):
    return run_search(pipe, profile, validation=(["temple"], [9]))


def test_the_front_keeps_what_it_promises(pipe, rollouts, front):
    assert [p.used for p in front.points] == sorted(p.used for p in front.points)
    qualities = [quality(p.psnr, 0.5) for p in front.points]
    assert qualities == sorted(qualities)
    assert [note.split(":")[0] for note in front.notes] == ["budget 0.75", "budget 0.5"]
    assert all("whole steps" in note and "groups" in note for note in front.notes)
    for point in front.points:
        assert rollouts.run(point.schedule).psnr == pytest.approx(point.psnr, rel=1e-9)
        assert len(point.held_out) == 1


@pytest.fixture(scope="module")
def whole(pipe, profile):
    """A front whose groups had no memory to store anything in."""
    velocities = 8 * 2 * 3 * 32 * 32 * 4
    front = run_search(pipe, profile, budgets=(0.5,), trials=1, max_cache_bytes=velocities)
    assert front.points and all(len(p.schedule.groups) == 1 for p in front.points)
    return front


def test_schedules_of_whole_steps_carry_the_measured_seconds(pipe, profile, whole):
    blocks = sum(profile.group_seconds)
    for schedule in (point.schedule for point in whole.points):
        assert schedule.group_seconds == (blocks,) and schedule.is_timed
        skipped = sum(schedule.is_skipped(step) for step in range(STEPS))
        assert schedule.used == (STEPS - skipped) / STEPS
        with layercache.enabled(pipe, schedule) as cache:
            pipe("cat", generator=generators(1)[0], output_type="latent", **CALL)
            assert cache.report().used == schedule.used
            assert cache.metrics()["seconds_saved"] == pytest.approx(skipped * blocks)


def test_old_fronts_without_measured_seconds_stay_as_they_are(pipe, whole, tmp_path):
    path = whole.save(tmp_path / "front.json")
    data = json.loads(path.read_text())
    del data["checksum"]
    for point in data["points"]:
        point["schedule"]["group_seconds"] = [1.0]
    path.write_text(json.dumps(data))
    old, new = Front.load(path).points[0].schedule, whole.points[0].schedule
    assert not old.is_timed and (old.cells, old.velocities, old.used) == (new.cells, new.velocities, new.used)
    with layercache.enabled(pipe, old) as cache:
        pipe("cat", generator=generators(1)[0], output_type="latent", **CALL)
        assert cache.report().used == new.used and cache.metrics()["seconds_saved"] == 0.0


def test_budgets_speedups_and_qualities_are_chosen(front):
    assert layercache.plan(front, 0.5).used <= 0.5
    assert layercache.plan(front, 0.75).used <= 0.75
    best = front.points[-1]
    top = max(p.calibration.mean for p in front.points)
    assert layercache.plan(front, min_psnr=top) == next(p for p in front.points if p.calibration.mean == top).schedule
    assert front.choose(speedup=1.0) == best
    speed = front.speedup(front.points[0])
    assert front.choose(speedup=speed) == front.points[0]
    for condition in ({"budget": 0.01}, {"speedup": 50.0}, {"min_psnr": 1000.0}, {}, {"budget": 0.5, "speedup": 2.0}):
        with pytest.raises(BudgetError):
            front.choose(**condition)
    for condition in ({"budget": 0.0}, {"budget": 1.5}, {"speedup": 0.5}):
        with pytest.raises(BudgetError):
            front.choose(**condition)


@pytest.mark.slow
def test_refinement_never_loses(pipe, profile):
    plain = run_search(pipe, profile, trials=0, budgets=(0.5,))
    refined = run_search(pipe, profile, trials=6, budgets=(0.5,))
    assert quality(refined.points[-1].psnr, 0.5) >= quality(plain.points[-1].psnr, 0.5)


@pytest.mark.slow
def test_a_journal_changes_nothing(pipe, profile, front, tmp_path):
    found = run_search(pipe, profile, resume=tmp_path / "journal.json")
    assert [p.schedule for p in found.points] == [p.schedule for p in front.points]


@pytest.mark.slow
def test_the_search_is_deterministic_and_goes_on_where_it_stopped(pipe, profile, tmp_path):
    journal, settings = tmp_path / "journal.json", {"budgets": (0.5,), "trials": 0}
    first = run_search(pipe, profile, resume=journal, **settings)
    again = run_search(pipe, profile, resume=journal, **settings)
    assert [p.schedule for p in again.points] == [p.schedule for p in first.points]
    assert again.tried < first.tried
    edited = json.loads(journal.read_text())
    del edited["checksum"], edited["results"][list(edited["results"])[-1]]
    journal.write_text(json.dumps(edited))
    with pytest.warns(LayerCacheWarning, match="no checksum"):
        resumed = run_search(pipe, profile, resume=journal, **settings)
    assert [p.schedule for p in resumed.points] == [p.schedule for p in first.points]
    # of another search, and broken
    with pytest.raises(ScheduleMismatchError, match="other samples"):
        search(pipe, ["cat"], seeds=[1], profiles=profile, resume=journal, progress=False, **CALL)
    journal.write_text("{")
    with pytest.raises(FileFormatError, match="remove it"):
        run_search(pipe, profile, resume=journal)


def test_a_time_limit_ends_the_trials(pipe, profile):
    assert run_search(pipe, profile, trials=50, time_limit=0.0, budgets=(0.5,)).tried < 20


def test_a_memory_limit_leaves_out_what_stores_more(pipe, profile, rollouts, front):
    one = 2 * 64 * 48 * 4  # a velocity of two pictures
    limited = run_search(pipe, profile, budgets=(0.5,), trials=1, max_cache_bytes=2 * one)
    assert max(rollouts.cache_bytes(p.schedule) for p in front.points) > 2 * one
    assert 0 < max(rollouts.cache_bytes(p.schedule) for p in limited.points) <= 2 * one
    assert run_search(pipe, profile, budgets=(0.5,), trials=0, max_cache_bytes=one - 1).points == ()


def test_terms_of_a_forecast_are_known_before_it_is_fitted(rollouts):
    for forecast in (
        Forecast(terms=3),
        Forecast(terms=2, everywhere=False),
        Forecast("teacher", terms=4, everywhere=False),
    ):
        schedule = skipping(rollouts.fingerprint, [0, 1, 2, 4, 5, 7])
        fitted = rollouts.run(schedule, forecast).schedule
        expected = with_terms_of(schedule, forecast)
        for step in range(3, STEPS):
            a, b = fitted.velocity(step), expected.velocity(step)
            assert (a and set(a.terms)) == (b and set(b.terms))


def test_a_profile_of_something_else_is_refused(pipe, profile):
    with pytest.raises(BudgetError):
        run_search(pipe, profile, budgets=(0.0,))
    other = layercache.calibrate(pipe, ["cat"], progress=False, num_inference_steps=STEPS, guidance_scale=1.0)
    with pytest.raises(ScheduleMismatchError, match="branches"):
        run_search(pipe, other)


def test_files(front, tmp_path):
    path = front.save(tmp_path / "front.json")
    assert Front.load(path) == front
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(FileFormatError, match="whole"):
        Front.load(path)
    path.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(FileFormatError, match="upgrade"):
        Front.load(path)
    with pytest.raises(FileFormatError, match="does not exist"):
        Front.load(tmp_path / "none.json")


def test_dominated_points_are_dropped(rollouts):
    cheap, dear = (skipping(rollouts.fingerprint, steps) for steps in ([0, 4], [0, 2, 4]))
    points = [Point(cheap, "a", (30.0,)), Point(dear, "b", (29.0,)), Point(dear, "c", (31.0,))]
    assert [p.origin for p in Front.of(points, (1.0, 0.1, 0.01)).points] == ["a", "c"]
    astray = Point(dear, "d", (60.0,) * 4 + (10.0,))  # a good mean, one bad picture
    for tail, origins in ((0.0, ["a", "d"]), (1.0, ["a", "c"])):
        front = Front.of([*points, astray], (1.0, 0.1, 0.01), tail=tail)
        assert [p.origin for p in front.points] == origins


def test_table_plot_and_page(front, tmp_path):
    rows = rows_of(front)
    text = plain_text(front_table(rows, "a title"), width=200)
    assert f"{front.points[0].validation.mean:.2f}" in text
    assert save_front_plot(tmp_path / "f.png", rows).read_bytes().startswith(b"\x89PNG")
    page = save_front_page(tmp_path / "f.html", rows, "<budget>").read_text()
    assert "&lt;budget&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="data:image/png;base64,' in page


def row(used, psnr, held_out=()):
    return FrontRow("layercache", used, used, "by hand", psnr, held_out)


def test_what_is_said_of_the_order_holds_in_the_figures():
    rising = [row(0.75, (50.0, 52.0)), row(0.5, (45.0, 47.0)), row(0.25, (30.0, 31.0))]
    assert order_sentence(rising) == "Every schedule has a higher mean PSNR than all that use less."
    judged = [row(0.75, (50.0, 52.0), (41.0,)), row(0.5, (45.0, 47.0), (42.0,)), row(0.25, (30.0, 31.0), (30.0,))]
    assert order_sentence(judged) == (
        "1 of 3 schedules has no higher mean PSNR than one that uses less: they were chosen on 2 other pictures, and 1 "
        "held-out picture is few to tell neighbours apart."
    )
    upside_down = [row(used, (50.0,) * 16, (50.0 - used,) * 12) for used in (0.75, 0.5, 0.25)]
    assert order_sentence(upside_down) == (
        "2 of 3 schedules have no higher mean PSNR than one that uses less: they were chosen on 16 other pictures, and "
        "12 held-out pictures are few to tell neighbours apart."
    )
    # a front weighs the 10 % quantile too
    steadier = [row(0.75, (40.0, 44.0)), row(0.5, (20.0, 65.0))]
    assert order_sentence(steadier) == (
        "1 of 2 schedules has no higher mean PSNR than one that uses less: it was chosen for its worst pictures too, "
        "the 10 % quantile."
    )


def test_nothing_is_said_of_an_order_where_there_is_none():
    assert order_sentence([]) == order_sentence([row(0.5, (40.0,))]) == ""
    same = [row(0.75, (40.004,)), row(0.5, (40.001,))]  # the same figure in the table
    assert order_sentence(same).startswith("1 of 2 schedules has no higher")


def test_psnr_by_hand():
    a, b = np.zeros((2, 2, 2, 3)), np.zeros((2, 2, 2, 3))
    b[1] += 0.1
    assert psnr_of(a, b) == pytest.approx([100.0, 20.0])
    with pytest.raises(CalibrationError, match="NaN"):
        psnr_of(a, b * np.nan)


def test_pictures_may_be_tensors(pipe):
    rollouts = Rollouts(pipe, ["cat"], [1], output_type="pt", **CALL)
    assert isinstance(rollouts.pictures[0], np.ndarray)
    assert torch.is_tensor(rollouts.full[0].raw[0])


def test_quality_weighs_the_tail():
    psnr = (60.0,) * 9 + (10.0,)
    assert quality(psnr, 0.0) == pytest.approx(55.0)
    assert quality(psnr, 1.0) == pytest.approx(np.quantile(psnr, 0.1))
    assert quality(psnr, 0.5) == pytest.approx((55.0 + np.quantile(psnr, 0.1)) / 2)


@pytest.mark.slow
def test_step_weights_by_hand(pipe, rollouts):
    """One velocity held in a plain loop, the rest computed: how far the end moves over how far the step moved."""
    weights = step_weights(rollouts, STEPS - 1)

    def end_with(held):
        ends, steps = [], []
        inner = pipe.scheduler.step

        def step(velocity, timestep, latents, **kwargs):
            steps.append(velocity)
            k = (len(steps) - 1) % STEPS
            return inner(steps[-2] if k == held else velocity, timestep, latents, **kwargs)

        pipe.scheduler.step = step
        try:
            for prompt, seed, count in ((PROMPTS[0], 3, 2), (PROMPTS[1], 5, 1)):
                seeds = generators(count, seed)
                call = CALL | {"generator": seeds if count > 1 else seeds[0], "output_type": "latent"}
                ends.append(pipe(prompt, **call).images)
        finally:
            del pipe.scheduler.step
        return ends, steps

    full, velocities = end_with(None)
    expected = []
    for held in range(1, STEPS):
        ends, _ = end_with(held)
        moved = sum(float((a - b).abs().mean()) for a, b in zip(ends, full, strict=True))
        gap = sum(float((velocities[k + held - 1] - velocities[k + held]).abs().mean()) for k in (0, STEPS))
        expected.append(moved / gap / abs(rollouts.sigmas[held + 1] - rollouts.sigmas[held]))
    ratio = weights[1:] / np.array(expected)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    assert weights.mean() == pytest.approx(1.0)


@pytest.mark.slow
def test_search_with_step_weights(pipe, profile):
    front = run_search(pipe, profile, budgets=(0.6,), trials=0, step_probes=4)
    assert front.points


def test_exchanged_cells_keep_the_budget_and_read_what_is_there(pipe, profile):
    schedule = layercache.plan(profile, 0.7, protect_first=1, protect_last=1)
    group, out = next((g, k) for g in range(3) for k in range(1, STEPS) if schedule.cells[k][g] is None)
    into = next(k for k in range(1, STEPS) if schedule.cells[k][group] is not None)
    other = reforecast(_with_exchanged(schedule, group, out, into), "secant")
    assert other.cells[into][group] is None
    assert other.cells[out][group] is not None
    changed = [
        (k, g) for k in range(STEPS) for g in range(3) if (other.cells[k][g] is None) != (schedule.cells[k][g] is None)
    ]
    assert sorted(changed) == sorted([(out, group), (into, group)])
    assert other.used == pytest.approx(schedule.used)
    needs = cell_needs(profile, schedule)
    table = weighted_errors(profile, 1.0, 0.0, 0.1)
    anchor = max(k for k in range(into) if schedule.cells[k][group] is None)
    assert needs[into, group] == table[into, group, into - anchor, 0]
    assert np.isinf(needs[0]).all()


@pytest.mark.slow
def test_groups_are_refined_where_they_are_close(pipe, profile, monkeypatch):
    monkeypatch.setattr("layercache.planning.search.WORTH_REFINING", 1000.0)
    front = run_search(pipe, profile, budgets=(0.7,), trials=4)
    origins = [p.origin for p in front.points]
    assert front.tried > run_search(pipe, profile, budgets=(0.7,), trials=0).tried + 4
    assert origins
