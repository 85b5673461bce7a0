"""Forecasts of residuals fitted from the profile's inner products, against least squares on the residuals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import CalibrationError, ScheduleError
from layercache.planning.fit import fit_residuals
from layercache.planning.profile import StabilityProfile
from support.tiny import GROUPS, generators, mixed_cells, schedule_for, tiny_pipeline

STEPS = 8
CALL = {"num_inference_steps": STEPS, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def profile(pipe):
    return layercache.calibrate(pipe, ["cat"], seeds=[0], progress=False, max_distance=5, max_span=4, **CALL)


@pytest.fixture(scope="module")
def residuals(pipe):
    """[step][group] of the same full run, by plain hooks."""
    starts, rows, hooks = {}, [], []
    blocks = pipe.transformer.transformer_blocks
    for group, (lo, hi) in enumerate(GROUPS):

        def before(module, args, kwargs, group=group):
            starts[group] = kwargs["hidden_states"]

        def after(module, args, output, group=group):
            rows.append((output[1] - starts[group]).double().flatten())

        hooks += [
            blocks[lo].register_forward_pre_hook(before, with_kwargs=True),
            blocks[hi - 1].register_forward_hook(after),
        ]
    pipe("cat", generator=generators(1)[0], output_type="latent", **CALL)
    for hook in hooks:
        hook.remove()
    return [rows[k : k + len(GROUPS)] for k in range(0, len(rows), len(GROUPS))]


def made_for(pipe, profile):
    plain = schedule_for(pipe, mixed_cells())
    return layercache.Schedule(profile.fingerprint, plain.groups, plain.cells, plain.group_seconds)


def test_inner_products(profile, residuals):
    gram = profile.gram(5, 1)
    expected = torch.stack([residuals[k][1] for k in range(5, -1, -1)])
    np.testing.assert_allclose(gram[:6, :6], (expected @ expected.T).numpy(), rtol=1e-4)
    assert (gram[6:] == 0).all()


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_against_least_squares(pipe, profile, residuals, terms):
    schedule = made_for(pipe, profile)
    fitted = fit_residuals(profile, schedule, terms, ridge=1e-9)
    checked = 0
    for step, row in enumerate(schedule.cells):
        for group, cell in enumerate(row):
            if cell is None:
                assert fitted.cells[step][group] is None
                continue
            older = [k for k in range(step - 1, -1, -1) if schedule.cells[k][group] is None][:terms]
            found = fitted.cells[step][group]
            assert list(found) == older
            columns = torch.stack([residuals[k][group] for k in older], dim=1).numpy()
            target = residuals[step][group].numpy()
            best = np.linalg.lstsq(columns, target, rcond=None)[0]
            least = np.linalg.norm(columns @ best - target)
            ours = np.linalg.norm(columns @ np.array([found[k] for k in older]) - target)
            assert ours == pytest.approx(least, rel=2e-3)
            checked += 1
    assert checked > 8


def test_coefficients_sum_to_one_unless_free(pipe, profile):
    fitted = fit_residuals(profile, made_for(pipe, profile), 3, free_sum=False)
    for row in fitted.cells:
        for cell in row:
            assert cell is None or sum(cell.values()) == pytest.approx(1.0)


def test_plans_with_every_forecast(pipe, profile):
    settings = {"protect_first": 2, "protect_last": 1}
    plain = layercache.plan(profile, 0.7, **settings)
    for forecast, order in (("fitted", 1), ("fitted", 2), ("newton", 2), ("taylor", 1), ("hold", 1)):
        schedule = layercache.plan(profile, 0.7, forecast=forecast, order=order, **settings)
        assert [[c is None for c in row] for row in schedule.cells] == [[c is None for c in row] for row in plain.cells]
        assert schedule.made_by["forecast"] == forecast
        with layercache.enabled(pipe, schedule):
            assert torch.isfinite(pipe("cat", output_type="latent", **CALL).images).all()
    with pytest.raises(ScheduleError, match="unknown forecast"):
        layercache.plan(profile, 0.7, forecast="spline", **settings)


def test_files_keep_the_inner_products_and_old_ones_say_so(profile, tmp_path):
    loaded = StabilityProfile.load(profile.save(tmp_path / "p.safetensors"))
    np.testing.assert_array_equal(loaded.gram(4, 0), profile.gram(4, 0))
    old = {name: table for name, table in profile.tables.items() if name != "image_gram"}
    with pytest.raises(CalibrationError, match="calibrate again"):
        replace(profile, tables=old).gram(4, 0)
    spoiled = {**profile.tables, "image_gram": profile.tables["image_gram"] * np.nan}
    with pytest.raises(CalibrationError, match="not finite"):
        replace(profile, tables=spoiled)
    with pytest.raises(ScheduleError, match="1 to 8"):
        fit_residuals(profile, layercache.Schedule.compute_all(profile.fingerprint), 9)


def test_branches_with_cells_of_their_own_are_fitted_apart(pipe):
    call = CALL | {"guidance_scale": 4.0}
    both = layercache.calibrate(pipe, ["cat"], seeds=[0], progress=False, max_distance=5, max_span=4, **call)
    first, second = both.fingerprint.branches
    schedule = made_for(pipe, both)
    fitted = fit_residuals(both, replace(schedule, branch_cells={second: schedule.cells}))
    assert fitted.cells != fitted.branch_cells[second]
    for branch, cells in enumerate((fitted.cells, fitted.branch_cells[second])):
        gram = np.zeros_like(both.tables["image_gram"])
        gram[:, branch] = both.tables["image_gram"][:, branch]
        alone = replace(both, tables={**both.tables, "image_gram": gram})
        assert cells == fit_residuals(alone, schedule).cells
