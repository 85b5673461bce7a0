import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layercache
from layercache.errors import ArgumentError, BudgetError, ScheduleError
from layercache.planning.front import Front, Point
from layercache.planning.plan import weighted_errors
from layercache.schedule.forecast import secant_coefficients
from support.profiles import made_profile
from support.tiny import tiny_pipeline


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.35, 1.0), st.integers(1, 4), st.sampled_from([(), (1, 2, 3), (2, 5)]))
def test_plans_keep_their_promises(seed, budget, groups, spans):
    profile = made_profile(seed, groups=groups)
    schedule = layercache.plan(profile, budget, spans=spans)
    assert schedule.used <= budget + 1e-6
    rows = schedule.cells
    for group in range(groups):
        computed = [i for i in range(20) if rows[i][group] is None]
        assert {0, 1, 2, 19} <= set(computed)
        assert max(np.diff(computed)) <= 9
        for step in range(20):
            cell = rows[step][group]
            if cell is None:
                continue
            older = [i for i in computed if i < step]
            anchor, *base = sorted(cell, reverse=True)
            assert anchor == older[-1]
            assert set(base) <= set(older[-3:-1])
            expected = secant_coefficients(profile.fingerprint.sigmas, step, anchor, base[0] if base else None)
            assert cell == expected
            assert spans or not base


def test_a_target_that_is_no_number_is_refused_with_one_to_give():
    profile = made_profile()
    front = Front((Point(layercache.plan(profile, 0.7), "a", (30.0, 40.0)),), (1.0, 0.1, 0.0))
    for plan_of in (profile, front):
        for target, found in (
            ({"budget": "0.6"}, "the text '0.6'"),
            ({"speedup": "2"}, "the text"),
            ({"budget": True}, "bool"),
        ):
            (name,) = target
            with pytest.raises(ArgumentError, match=f"{name} must be a number, got {found}.*; give {name}="):
                layercache.plan(plan_of, **target)


def test_error_table_is_the_formula():
    profile = made_profile()
    table = weighted_errors(profile, gamma=2.0, kappa=0.5, text_weight=0.1)
    sigmas = profile.fingerprint.sigmas
    relative = profile.relative_errors(0.1, 0.5)[7, 1, 3, 2]
    assert table[7, 1, 3, 2] == pytest.approx((abs(sigmas[8] - sigmas[7]) * relative) ** 2)


def test_a_larger_budget_is_no_worse_and_a_full_one_computes():
    profile = made_profile(3)
    errors = [layercache.plan(profile, b).made_by["error"] for b in (0.4, 0.6, 0.8, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert layercache.plan(profile, 1.0).used == pytest.approx(1)


def test_speedup_is_reached_by_the_measured_seconds():
    profile = made_profile(1)
    schedule = layercache.plan(profile, speedup=1.4)
    blocks = sum(profile.group_seconds)
    seconds = 20 * profile.fixed_seconds
    for row in schedule.cells:
        for cell, compute, reuse in zip(row, profile.group_seconds, profile.reuse_seconds, strict=True):
            seconds += compute if cell is None else reuse
    reached = 20 * (profile.fixed_seconds + blocks) / seconds
    assert 1.4 <= reached < 1.6


def test_bad_budgets():
    profile = made_profile()
    for budget in (0, -1, 1.2, float("nan")):
        with pytest.raises(BudgetError, match="share of the block time"):
            layercache.plan(profile, budget)
    with pytest.raises(BudgetError, match="cannot be met: at least 0"):
        layercache.plan(profile, 0.05)
    with pytest.raises(BudgetError, match=r"speedup of 50 .* would be"):
        layercache.plan(profile, speedup=50)
    with pytest.raises(BudgetError, match="at most"):
        layercache.plan(profile, speedup=2.9)
    with pytest.raises(BudgetError, match="at least 1"):
        layercache.plan(profile, speedup=0.5)


WAYS = "budget=0.6 (share of the block time), full_steps=12 (the same, as so many full steps)"


def test_without_a_target_every_way_to_give_one_is_named():
    with pytest.raises(BudgetError) as caught:
        layercache.plan(made_profile())
    assert str(caught.value) == (
        f"give a target: {WAYS} or speedup=1.4 (of the whole denoising loop); min_psnr is for a front of measured "
        "schedules (layercache.search)"
    )
    with pytest.raises(BudgetError) as caught:
        layercache.plan(Front((), (1.0, 0.1, 0.0)))
    assert str(caught.value) == (
        f"give a target: {WAYS}, speedup=1.4 (of the whole denoising loop) or min_psnr=40 (mean PSNR in dB)"
    )


@pytest.mark.parametrize("source", [made_profile(), Front((), (1.0, 0.1, 0.0))], ids=["profile", "front"])
@pytest.mark.parametrize("targets", list(itertools.combinations(("budget", "full_steps", "speedup", "min_psnr"), 2)))
def test_two_targets_are_refused_by_name(source, targets):
    with pytest.raises(BudgetError, match=f"^give one target, not {' and '.join(targets)}: budget=0.6 .*speedup=1.4"):
        layercache.plan(source, **dict.fromkeys(targets, 2.0))


@pytest.mark.parametrize(
    "setting",
    [
        *({name: value} for name in ("history", "max_run") for value in (0, -1, 1.5, "3")),
        *({name: value} for name in ("protect_first", "protect_last") for value in (-1, 0.5)),
        *({"order": value} for value in (-1, 8, 1.0)),
        *({"spans": value} for value in ([0], [1, -2], [1.5])),
        *({name: value} for name in ("kappa", "text_weight") for value in (-0.1, math.inf, math.nan)),
        *({"gamma": value} for value in (0, -1, math.inf, math.nan)),
        *({"tau": value} for value in (-0.1, 1.0, math.inf, math.nan)),
        {"method": "fastest"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ScheduleError, match=f"^{name} must be .*got "):
        layercache.plan(made_profile(), 0.6, **setting)


def test_more_than_there_are_steps_is_as_much_as_there_is():
    plain = layercache.plan(made_profile(), 0.6, history=20, max_run=20, spans=(1, 2, 3))
    huge = layercache.plan(made_profile(), 0.6, history=10**20, max_run=10**20, spans=(1, 2, 3, 10**20))
    assert huge.cells == plain.cells


def test_a_profile_knows_no_psnr():
    with pytest.raises(BudgetError, match="^min_psnr needs a front of measured schedules: run layercache.search first"):
        layercache.plan(made_profile(), min_psnr=40)


def test_an_infinite_cell_is_computed():
    profile = made_profile()
    tables = {name: table.copy() for name, table in profile.tables.items()}
    tables["image_norm_l1"][0, 0, 10, 1] = 0
    schedule = layercache.plan(dataclasses.replace(profile, tables=tables), 0.5)
    assert schedule.cells[10][1] is None


def test_full_steps_are_a_budget():
    profile = made_profile()
    steps = profile.fingerprint.num_steps
    assert layercache.plan(profile, full_steps=0.6 * steps).cells == layercache.plan(profile, 0.6).cells
    for wrong in ({"full_steps": 0}, {"full_steps": steps + 1}, {"full_steps": 5, "budget": 0.5}):
        with pytest.raises(BudgetError):
            layercache.plan(profile, **wrong)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_memory_is_kept_to_what_is_allowed(share):
    pipe = tiny_pipeline()
    call = {"num_inference_steps": 12, "guidance_scale": 3.0}
    profile = layercache.calibrate(pipe, [["cat", "grass"]], progress=False, **call)
    free = layercache.plan(profile, 0.6)
    limit = int(share * profile.cache_bytes(free))
    try:
        schedule = layercache.plan(profile, 0.6, max_cache_bytes=limit)
    except BudgetError as error:
        least = int(re.search(r"(\d+) bytes are needed", str(error)).group(1))
        assert limit < least <= profile.cache_bytes(free)
        assert share < 1
        return
    assert schedule.used <= 0.6 + 1e-9
    assert profile.cache_bytes(schedule) <= limit
    with layercache.enabled(pipe, schedule) as cache:
        pipe(["cat", "grass"], **call)
        assert cache.report().cache_bytes == profile.cache_bytes(schedule)
