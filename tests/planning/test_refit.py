"""Residual forecasts fitted beside the full model: against least squares on tensors that plain hooks recorded."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import layercache
from layercache.errors import ScheduleError
from layercache.planning.fit import Forecast, fit_residuals
from layercache.planning.refit import TARGETS, _Products, _solve, refit, run_terms, with_terms
from layercache.planning.rollout import Rollouts
from layercache.runtime.attachment import attachment_of
from support.marks import slow
from support.tiny import GROUPS, schedule_for, tiny_pipeline

STEPS = 8
PROMPTS, SEEDS = [["cat", "coffee"], "rocket"], [3, 4, 5]
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def rollouts(pipe):
    return Rollouts(pipe, PROMPTS, SEEDS, **CALL)


def made_for(pipe, rollouts, cached):
    """Everything computed but the cells ``(step, group)``, which reuse the newest."""
    plain = schedule_for(pipe, [[None] * len(GROUPS)] * STEPS)
    rows = [[None] * len(GROUPS) for _ in range(STEPS)]
    for step, group in cached:
        anchor = max(k for k in range(step) if (k, group) not in cached)
        rows[step][group] = {anchor: 1.0}
    cells = tuple(tuple(row) for row in rows)
    return layercache.Schedule(rollouts.fingerprint, plain.groups, cells, plain.group_seconds)


def streams_of(pipe, prompt, seeds, schedule=None):
    """Image stream in front of and behind every group: ``[call][group] -> (in, out)``, calls as they come."""
    calls, hooks = [], []
    transformer = pipe.transformer

    def begin(module, args):
        calls.append([None] * (len(GROUPS) + 1))

    blocks = transformer.transformer_blocks
    hooks.append(transformer.register_forward_pre_hook(begin))
    for group, (lo, hi) in enumerate(GROUPS):

        def before(module, args, kwargs, group=group):
            calls[-1][group] = kwargs["hidden_states"].double()

        def after(module, args, output, group=group):
            calls[-1][group + 1] = output[1].double()

        hooks += [
            blocks[lo].register_forward_pre_hook(before, with_kwargs=True),
            blocks[hi - 1].register_forward_hook(after),
        ]
    generator = [torch.Generator().manual_seed(s) for s in seeds]
    call = CALL | {"generator": generator if isinstance(prompt, list) else generator[0], "output_type": "latent"}
    if schedule is None:
        pipe(prompt, **call)
    else:
        with layercache.enabled(pipe, schedule):
            pipe(prompt, **call)
    for hook in hooks:
        hook.remove()
    return calls


def branch_calls(calls, step):
    return calls[2 * step : 2 * step + 2]


@pytest.fixture(scope="module")
def full(pipe):
    return [streams_of(pipe, ["cat", "coffee"], [3, 4]), streams_of(pipe, "rocket", [5])]


def least_squares(columns, target):
    return np.linalg.lstsq(columns, target, rcond=None)[0]


@pytest.mark.parametrize("target", TARGETS)
def test_the_first_cached_run_is_the_least_squares_of_the_full_runs(pipe, rollouts, full, target):
    """Nothing has drifted there, so both targets are the residuals of the full runs, over samples and branches."""
    schedule = made_for(pipe, rollouts, [(4, 1), (4, 2)])
    rollout = refit(rollouts, schedule, target, terms=2, rounds=1, ridge=1e-9)
    found = rollout.schedule.cells[4]
    assert list(found[1]) == list(found[2]) == [3, 2]

    def residual(calls, group):
        return torch.cat([(c[group + 1] - c[group]).flatten() for c in calls])

    def stacked(step, group):
        return torch.cat([residual(branch_calls(calls, step), group) for calls in full])

    columns = torch.stack([stacked(k, g) for g in (1, 2) for k in (3, 2)], dim=1).numpy()
    wanted = (stacked(4, 1) + stacked(4, 2)).numpy()
    best = least_squares(columns, wanted)
    ours = np.array([found[g][k] for g in (1, 2) for k in (3, 2)])
    least, reached = (np.linalg.norm(columns @ c - wanted) for c in (best, ours))
    assert reached == pytest.approx(least, rel=1e-3)
    assert least < 0.9 * np.linalg.norm(columns @ np.array([1.0, 0, 1.0, 0]) - wanted)


@pytest.mark.parametrize("target", [TARGETS[0], *slow(*TARGETS[1:])])
def test_a_drifted_run_is_fitted_to_its_target(pipe, rollouts, full, target):
    schedule = made_for(pipe, rollouts, [(3, 0), (5, 2)])
    first = refit(rollouts, schedule, target, terms=2, rounds=1, ridge=1e-9).schedule
    # the second round sees the streams of a run by what the first one found
    second = refit(rollouts, first, target, terms=2, rounds=1, ridge=1e-9).schedule
    if second.cells == first.cells:
        pytest.skip("the first round was better")
    own = [streams_of(pipe, ["cat", "coffee"], [3, 4], first), streams_of(pipe, "rocket", [5], first)]
    wanted, columns = [], []
    for mine, reference in zip(own, full, strict=True):
        for a, b in zip(branch_calls(mine, 5), branch_calls(reference, 5), strict=True):
            # group 2 is the last: its input is what group 1 gave
            start = a[2] if target == "steer" else b[2]
            wanted.append((b[3] - start).flatten())
        columns.append([torch.cat([(c[3] - c[2]).flatten() for c in branch_calls(mine, k)]) for k in (4, 3)])
    matrix = torch.stack([torch.cat([c[k] for c in columns]) for k in range(2)], dim=1).numpy()
    right = torch.cat(wanted).numpy()
    best = least_squares(matrix, right)
    ours = np.array([second.cells[5][2][k] for k in (4, 3)])
    least, reached = (np.linalg.norm(matrix @ c - right) for c in (best, ours))
    assert reached == pytest.approx(least, rel=1e-3)


def test_one_group_one_branch_agrees_with_the_open_fit(pipe):
    call = CALL | {"guidance_scale": 1.0}
    rollouts = Rollouts(pipe, ["cat"], [0], **call)
    profile = layercache.calibrate(pipe, ["cat"], seeds=[0], progress=False, max_distance=5, max_span=4, **call)
    schedule = replace(made_for(pipe, rollouts, [(5, 1)]), fingerprint=profile.fingerprint)
    opened = fit_residuals(profile, schedule, 3).cells[5][1]
    for target in TARGETS:
        found = refit(rollouts, schedule, target, terms=3, rounds=1).schedule.cells[5][1]
        assert found == pytest.approx(opened, rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_refits_are_repeatable_and_the_best_is_kept(pipe, rollouts):
    schedule = made_for(pipe, rollouts, [(s, g) for s in (3, 5, 6) for g in range(3) if (s, g) != (6, 0)])
    schedule = with_terms(schedule, 2)
    first, again = (refit(rollouts, schedule, forecast=Forecast(terms=2)) for _ in range(2))
    assert first.psnr == again.psnr and first.schedule == again.schedule
    assert first.quality >= rollouts.run(schedule, Forecast(terms=2)).quality
    replayed = rollouts.run(first.schedule)
    assert replayed.psnr == pytest.approx(first.psnr, abs=0.05)
    assert attachment_of(pipe.transformer) is None


def test_branches_of_their_own_are_fitted_on_their_own(pipe, rollouts):
    shared = made_for(pipe, rollouts, [(4, 1)])
    other = made_for(pipe, rollouts, [(5, 1)])
    cond, uncond = rollouts.branches
    schedule = replace(shared, branch_cells={uncond: other.cells})
    found = refit(rollouts, schedule, terms=2, rounds=1, ridge=1e-9).schedule
    assert found.cells[4][1] is not None and found.cells[5][1] is None
    assert found.branch_cells[uncond][5][1] is not None and found.branch_cells[uncond][4][1] is None


def test_terms_of_a_run():
    row = ({1: 1.0}, {3: 1.0, 2: 0.5}, None, {0: 1.0}, {})
    assert run_terms(row, 1) == [(1, 0), (3, 1), (2, 1)]
    assert run_terms(row, 3) == [(0, 3)]


@pytest.mark.parametrize("spoil", ["equal", "zero", "single"])
def test_solutions_without_full_rank_stay_finite(spoil):
    rng = np.random.default_rng(0)
    a, target = rng.normal(size=40), rng.normal(size=40)
    columns = {"equal": [a, a, a], "zero": [a, 0 * a, a], "single": [a]}[spoil]
    terms = [(9 - k, 0) for k in range(len(columns))]
    rows = np.stack([target, *columns])
    solution = _solve(_Products(terms, rows @ rows.T), 1e-3)
    reached = np.linalg.norm(np.stack(columns, axis=1) @ solution - target)
    assert np.isfinite(solution).all() and reached <= np.linalg.norm(a - target)


def test_wrong_settings_are_refused(pipe, rollouts):
    schedule = made_for(pipe, rollouts, [(4, 1)])
    with pytest.raises(ScheduleError, match="unknown target"):
        refit(rollouts, schedule, "open")
    with pytest.raises(ScheduleError, match="1 to 8"):
        refit(rollouts, schedule, terms=0)
