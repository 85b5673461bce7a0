"""Calibration against a literal, slow transcription, and what it refuses."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import CalibrationError, FileFormatError, ScheduleError, ScheduleMismatchError
from layercache.models.spec import ModelSpec
from layercache.planning.observer import Observer
from layercache.planning.profile import StabilityProfile, readable
from layercache.schedule.forecast import secant_coefficients
from layercache.schedule.partition import cut, cut_by_curves
from support.tiny import GROUPS, LAYERS, SlopeTransformer, fingerprint, shifted_sigmas, tiny_pipeline

layercache.register_model(ModelSpec("SlopeTransformer", timestep="timestep"))

STEPS, DISTANCE, SPAN = 6, 3, 2
PROMPTS = [["cat", "coffee"], ["grass", "rocket"]]


def calibrate(pipe, prompts=PROMPTS, **options):
    settings = {"num_inference_steps": STEPS, "max_distance": DISTANCE, "max_span": SPAN, "progress": False}
    return layercache.calibrate(pipe, prompts, **{**settings, **options})


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def profile(pipe):
    return calibrate(pipe)


def recorded_residuals(pipe, prompts, seed):
    """Residuals of every block of a full run, taken with plain forward hooks: [branch][step][group][stream]."""
    inputs, rows = {}, []
    hooks = []
    for group, (lo, hi) in enumerate(GROUPS):
        first, last = pipe.transformer.transformer_blocks[lo], pipe.transformer.transformer_blocks[hi - 1]

        def before(module, args, kwargs, group=group):
            inputs[group] = (kwargs["hidden_states"], kwargs["encoder_hidden_states"])

        def after(module, args, kwargs, output, group=group):
            text, image = output
            rows.append((image - inputs[group][0], text - inputs[group][1]))

        hooks.append(first.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(last.register_forward_hook(after, with_kwargs=True))
    generator = torch.Generator().manual_seed(seed)
    pipe(prompts, num_inference_steps=STEPS, generator=generator, output_type="latent")
    for hook in hooks:
        hook.remove()
    # one entry per group, then per branch, then per step
    return [[rows[(i * 2 + b) * 3 : (i * 2 + b) * 3 + 3] for i in range(STEPS)] for b in range(2)]


def test_every_statistic_against_a_transcription(pipe, profile):
    sigmas = shifted_sigmas(STEPS)
    assert profile.fingerprint.sigmas == pytest.approx(sigmas, abs=1e-6)
    assert profile.fingerprint.branches == ("cond", "uncond")
    expected = {name: np.zeros_like(table) for name, table in profile.tables.items()}
    for p, prompts in enumerate(PROMPTS):
        residuals = recorded_residuals(pipe, prompts, p)
        for b, i, g, s in np.ndindex(2, STEPS, 3, 2):
            stream, r = ("image", "text")[s], residuals[b][i][g][s].double()
            expected[f"{stream}_norm_l1"][p, b, i, g] = r.abs().sum()
            if stream == "image":
                expected["image_norm_l2"][p, b, i, g] = r.square().sum().sqrt()
            for m in range(1, min(DISTANCE, i) + 1):
                for k in range(min(SPAN, i - m) + 1):
                    a = i - m
                    ra = residuals[b][a][g][s].double()
                    c = (sigmas[i] - sigmas[a]) / (sigmas[a] - sigmas[a - k]) if k else 0.0
                    c = min(c, 4.0)
                    error = (1 + c) * ra - c * residuals[b][a - k][g][s].double() - r
                    expected[f"{stream}_error_l1"][p, b, i, g, m, k] = error.abs().sum()
                    if stream == "image":
                        expected["image_error_l2"][p, b, i, g, m, k] = error.square().sum().sqrt()
    for name, table in profile.tables.items():
        if name == "image_gram":
            continue  # test_residual_fits.py
        np.testing.assert_allclose(table, expected[name], rtol=2e-4, err_msg=name)


def test_relative_errors_and_stability(profile):
    tables = profile.tables
    image = tables["image_error_l1"][..., 2, 1] / tables["image_norm_l1"]
    text = tables["text_error_l1"][..., 2, 1] / tables["text_norm_l1"]
    errors = profile.relative_errors(text_weight=0.3)
    np.testing.assert_allclose(errors[4, 0, 2, 1], (image + 0.3 * text)[:, :, 4, 0].mean())
    np.testing.assert_allclose(errors[4, 2, 2, 1], image[:, :, 4, 2].mean(), err_msg="last group: no text")
    robust = profile.relative_errors(text_weight=0, kappa=1.5)[4, 1, 2, 1]
    np.testing.assert_allclose(robust, image[:, :, 4, 1].mean() + 1.5 * image[:, :, 4, 1].std())
    exists = readable(STEPS, DISTANCE, SPAN)
    assert np.isfinite(errors[np.repeat(exists[:, None], 3, 1)]).all()
    assert np.isinf(errors[~np.repeat(exists[:, None], 3, 1)]).all()
    stability = profile.stability()
    assert np.isnan(stability[0]).all()
    step = (tables["image_error_l1"][:, :, 3, 1, 1, 0] / tables["image_norm_l1"][:, :, 3, 1]).mean()
    np.testing.assert_allclose(stability[3, 1], step)


def test_a_zero_residual_must_be_computed(profile):
    tables = {name: table.copy() for name, table in profile.tables.items()}
    tables["image_norm_l1"][0, 0, 3, 1] = 0
    import dataclasses

    changed = dataclasses.replace(profile, tables=tables)
    assert np.isinf(changed.relative_errors()[3, 1, 1, 0])


def test_costs_are_positive_and_add_up(profile):
    assert all(s > 0 for s in profile.group_seconds)
    assert all(0 < r < s for r, s in zip(profile.reuse_seconds, profile.group_seconds, strict=True))
    assert profile.fixed_seconds > 0


def test_no_more_residuals_are_kept_than_needed(pipe, monkeypatch):
    seen = []
    original = Observer.capture

    def watch(self, *args):
        original(self, *args)
        seen.append(max(len(w) for b in self._branches.values() for w in b.windows))

    monkeypatch.setattr(Observer, "capture", watch)
    calibrate(pipe, PROMPTS[:1], max_distance=2, max_span=1)
    assert max(seen) == 1 + 2 + 1


def test_calibration_leaves_no_trace(pipe):
    before = sorted(pipe.transformer.__dict__), type(pipe.transformer.transformer_blocks), sorted(pipe.__dict__)
    calibrate(pipe, PROMPTS[:1])
    with pytest.raises(RuntimeError):
        calibrate(pipe, PROMPTS[:1], callback_on_step_end=lambda *a: (_ for _ in ()).throw(RuntimeError("stop")))
    after = sorted(pipe.transformer.__dict__), type(pipe.transformer.transformer_blocks), sorted(pipe.__dict__)
    assert after == before


def test_bare_transformer():
    model, sigmas = SlopeTransformer(), (1.0, 0.9, 0.7, 0.4, 0.0)
    image, text = torch.randn(2, 5, 16), torch.randn(2, 3, 16)

    def run(k):
        for sigma in sigmas[:-1]:
            model(image, text, timestep=torch.tensor(sigma))

    profile = layercache.calibrate(model, run=run, samples=2, sigmas=sigmas, max_span=2, progress=False)
    errors = profile.relative_errors()
    # the residuals are linear in sigma up to the text mixed in, which is linear too
    assert np.nanmax(errors[3, :, 1, 1]) < 1e-5
    assert errors[3, :, 1, 0].min() > 1e-3
    coefficients = secant_coefficients(sigmas, 3, 2, 1)
    assert sum(coefficients.values()) == pytest.approx(1)


def calls_of(pipe, monkeypatch, fails_at=None):
    """The seeds of the pipeline's calls from now on."""
    seeds, original = [], type(pipe).__call__

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        seeds.append(kwargs["generator"].initial_seed())
        if len(seeds) == fails_at:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", call)
    return seeds


def test_a_stopped_calibration_goes_on(tmp_path, monkeypatch):
    """Of both passes over the samples; what is measured, the seconds of finished samples too, is what it was."""
    pipe, settings = tiny_pipeline(), {"partition": "measured", "num_groups": 2}
    wanted = calibrate(pipe, resume=tmp_path / "kept", **settings)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        seeds = calls_of(pipe, patched, fails_at=4)
        calibrate(pipe, resume=tmp_path / "stopped", **settings)
    assert seeds == [0, 1, 0, 1]
    seeds = calls_of(pipe, monkeypatch)
    found = calibrate(pipe, resume=tmp_path / "stopped", **settings)
    assert seeds == [1]
    assert found.groups == wanted.groups and found.samples == wanted.samples
    assert all(np.array_equal(found.tables[name], table) for name, table in wanted.tables.items())
    again = calibrate(pipe, resume=tmp_path / "stopped", **settings)
    assert again.to_bytes() == found.to_bytes() and seeds == [1]


def test_files_of_another_calibration_are_refused(tmp_path, pipe):
    calibrate(pipe, resume=tmp_path)
    for other in ({"num_inference_steps": 5}, {"seeds": [1, 2]}, {"max_span": 1}, {"guidance_scale": 2.0}):
        with pytest.raises(ScheduleMismatchError, match="a calibration of another model, other samples or settings"):
            calibrate(pipe, resume=tmp_path, **other)
    (file,) = tmp_path.glob("*-001.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FileFormatError, match="cannot go on"):
        calibrate(pipe, resume=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_statistic_is_refused_with_its_cell(value):
    pipe = tiny_pipeline()

    def spoil(module, args, output):
        """The eighth call is the unconditional one of step 3; the bad element is taken out again behind the group."""
        spoil.calls += 1
        text, image = output
        if spoil.calls == 2 * 3 + 2:
            image = image.clone()
            image[0, 0, 0] = value
        return text, image

    def mend(module, args, kwargs):
        return args, {**kwargs, "hidden_states": torch.nan_to_num(kwargs["hidden_states"], 0, 0, 0)}

    spoil.calls = 0
    pipe.transformer.transformer_blocks[3].register_forward_hook(spoil)
    pipe.transformer.transformer_blocks[4].register_forward_pre_hook(mend, with_kwargs=True)
    with pytest.raises(CalibrationError, match=r"sample 0, branch 1, step 3, group 1.*branch uncond"):
        calibrate(pipe, PROMPTS[:1])


def test_bad_calls(pipe):
    with pytest.raises(CalibrationError, match="at least one prompt"):
        calibrate(pipe, [])
    with pytest.raises(CalibrationError, match="at least one prompt"):
        calibrate(pipe, None)
    with pytest.raises(CalibrationError, match="2 prompts, 1 seeds"):
        calibrate(pipe, seeds=[0])
    with pytest.raises(CalibrationError, match="bare transformer"):
        layercache.calibrate(pipe.transformer, ["cat"])
    with pytest.raises(CalibrationError, match="max_distance"):
        calibrate(pipe, max_distance=0)
    with pytest.raises(ScheduleError, match="unknown partition"):
        calibrate(pipe, partition="halves")
    with pytest.raises(ScheduleError, match="tile"):
        calibrate(pipe, partition=[(0, 2), (3, 6)])
    with pytest.raises(CalibrationError, match="incomplete"):
        layercache.calibrate(SlopeTransformer(), run=lambda k: None, samples=1, sigmas=(1.0, 0.5, 0.0), progress=False)


def test_profile_file(tmp_path, profile):
    path = profile.save(tmp_path / "profile.safetensors")
    loaded = StabilityProfile.load(path)
    assert loaded.fingerprint == profile.fingerprint
    assert loaded.groups == profile.groups
    assert loaded.group_seconds == profile.group_seconds
    for name, table in profile.tables.items():
        if name == "image_gram":
            continue  # test_residual_fits.py
        np.testing.assert_array_equal(loaded.tables[name], table)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no header", "newer", "nan", "text"])
def test_damaged_profiles_are_refused(tmp_path, profile, damage):
    import json

    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = profile.save(tmp_path / "profile.safetensors")
    with safe_open(str(path), framework="numpy") as file:
        header = json.loads(file.metadata()["header"])
        tables = {name: file.get_tensor(name) for name in file.keys()}
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("{}")
    elif damage == "no header":
        save_file(tables, path)
    elif damage == "newer":
        save_file(tables, path, metadata={"header": json.dumps({**header, "version": 99})})
    elif damage == "nan":
        tables["image_error_l1"][0, 0, 3, 1, 1, 0] = np.nan
        save_file(tables, path, metadata={"header": json.dumps(header)})
    with pytest.raises(FileFormatError, match=r"profile\.safetensors"):
        StabilityProfile.load(path)


def test_named_partitions():
    assert cut("thirds", [60]) == ((0, 20), (20, 40), (40, 60))
    assert cut("thirds", [16]) == ((0, 5), (5, 11), (11, 16))
    assert cut("sixth", [60]) == ((0, 10), (10, 50), (50, 60))
    assert cut("whole", [60]) == ((0, 60),)
    assert cut("thirds", [19, 38]) == ((0, 19), (19, 38), (38, 57))
    assert cut("sixth", [19, 38]) == ((0, 19), (19, 48), (48, 57))
    assert cut("sixth", [4]) == ((0, 4),)
    assert cut([(0, 1), (1, 4)], [4]) == ((0, 1), (1, 4))


@pytest.mark.parametrize("seed", range(5))
def test_measured_partition_is_the_best_one(seed):
    """Against every way of cutting."""
    import itertools

    curves = np.random.default_rng(seed).random((7, 8))
    groups = cut_by_curves(curves, 3)

    def scatter(edges):
        return sum(curves[:, lo:hi].var(axis=1).sum() * (hi - lo) for lo, hi in itertools.pairwise(edges))

    best = min(scatter((0, a, b, 8)) for a, b in itertools.combinations(range(1, 8), 2))
    assert scatter((0, *(hi for _, hi in groups))) == pytest.approx(best)


def test_measured_partition_runs(pipe):
    profile = calibrate(pipe, PROMPTS[:1], partition="measured", num_groups=2)
    assert len(profile.groups) == 2
    assert profile.groups[-1][1] == LAYERS
    expected = fingerprint(pipe.transformer, profile.fingerprint.sigmas)
    assert replace(profile.fingerprint, settings={}) == replace(expected, settings={})


# --- branches that are left out ---------------------------------------------------------------------------------------

LEFT_OUT = {("uncond", 2), ("uncond", 4), ("uncond", 5)}


@pytest.fixture(scope="module")
def replayed(pipe):
    """Profiles of the same calls of the transformer: all of them, and without those that are left out."""
    calls, transformer = [], pipe.transformer
    record = transformer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipe(["cat"], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent")
    record.remove()
    named = [(name, step) for step in range(STEPS) for name in ("cond", "uncond")]

    def profile_without(left_out, **options):
        def run(k):
            for (name, step), kwargs in zip(named, calls, strict=True):
                if (name, step) not in left_out:
                    with transformer.cache_context(name, step_index=step):
                        transformer(**kwargs)

        settings = {"samples": 1, "sigmas": shifted_sigmas(STEPS), "max_distance": DISTANCE, "max_span": SPAN}
        return layercache.calibrate(transformer, run=run, progress=False, **settings, **options)

    return profile_without


@pytest.mark.parametrize("sensitivity", [None, "substitution"])
def test_a_branch_that_is_left_out_at_some_steps(replayed, sensitivity):
    whole, part = replayed(set(), sensitivity=sensitivity), replayed(LEFT_OUT, sensitivity=sensitivity)
    assert "forecast_seen" not in whole.tables
    seen = part.tables["forecast_seen"][0]
    called = np.array([[(name, i) not in LEFT_OUT for i in range(STEPS)] for name in ("cond", "uncond")])
    for b, i, m, k in np.ndindex(2, STEPS, DISTANCE + 1, SPAN + 1):
        needed = (i, i - m, i - m - k)
        assert seen[b, i, m, k] == (m >= 1 and min(needed) >= 0 and all(called[b, list(needed)]))
    for name in ("image_error_l1", "image_error_l2", "text_error_l1"):
        known = np.broadcast_to(seen[:, :, None] > 0, whole.tables[name][0].shape)
        np.testing.assert_allclose(part.tables[name][0][known], whole.tables[name][0][known], rtol=1e-5)
        assert (part.tables[name][0][~known] == 0).all()
    for name in ("image_norm_l1", "image_norm_l2", "text_norm_l1"):
        np.testing.assert_allclose(part.tables[name][0][called], whole.tables[name][0][called], rtol=1e-6)
    # step 3 from step 2 exists in one branch, step 3 from step 1 in both
    ratios = whole.tables["image_error_l1"][0] / whole.tables["image_norm_l1"][0][..., None, None]
    errors = part.relative_errors(text_weight=0)
    np.testing.assert_allclose(errors[3, :, 1, 0], ratios[0, 3, :, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(errors[3, :, 2, 0], ratios[:, 3, :, 2, 0].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(part.stability()[3], ratios[0, 3, :, 1, 0], rtol=1e-5)
    assert np.isinf(part.relative_errors(branch=1)[4]).all() and np.isfinite(errors[4, :, 1, 0]).all()
    np.testing.assert_allclose(
        part.gram(3, 1, branch=1)[[0, 0, 2], [0, 2, 2]], whole.gram(3, 1, 1)[[0, 0, 2], [0, 2, 2]]
    )
    assert (part.gram(3, 1, branch=1)[1] == 0).all() and (part.gram(3, 1, branch=1)[:, 1] == 0).all()
    if sensitivity:
        cond = whole.tables["velocity_response"][0, 0, 3] / whole.tables["substitute_error"][0, 0, 3]
        np.testing.assert_allclose(part.sensitivity()[3], cond, rtol=1e-3)


def test_profiles_with_branches_left_out_are_saved_and_planned_with(replayed, tmp_path):
    part = replayed(LEFT_OUT)
    loaded = StabilityProfile.load(part.save(tmp_path / "part.safetensors"))
    np.testing.assert_array_equal(loaded.tables["forecast_seen"], part.tables["forecast_seen"])
    schedule = layercache.plan(loaded, budget=0.7)
    assert schedule.fingerprint.branches == ("cond", "uncond")
    assert any(cell is not None for row in schedule.cells for cell in row)
