import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercache.errors import FileFormatError, LayerCacheError, LayerCacheWarning, ScheduleError, ScheduleMismatchError
from layercache.methods.fixed import TaylorSeer
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.forecast import secant_coefficients
from layercache.schedule.schedule import Schedule, Velocity
from layercache.schedule.step_mask import StepMask

SIGMAS = (1.0, 0.8, 0.6, 0.3, 0.0)


def fingerprint(**changes) -> Fingerprint:
    values = {
        "model_class": "QwenImageTransformer2DModel",
        "config_hash": "0123456789ab",
        "num_blocks": 4,
        "sigmas": SIGMAS,
        "branches": ("cond", "uncond"),
        "package_version": "0.1.0",
    }
    return Fingerprint(**{**values, **changes})


def schedule(cells=None) -> Schedule:
    cells = cells or ((None, None), (None, None), ({1: 1.5, 0: -0.5}, None), (None, {2: 1.0}))
    return Schedule(fingerprint(), ((0, 1), (1, 4)), cells, (1.0, 3.0), {"method": "by hand"})


def test_used_is_weighted_by_group_seconds():
    # computed seconds: 4 + 4 + 3 + 1 of 16
    assert schedule().used == pytest.approx(12 / 16)


@pytest.mark.parametrize("seconds", [0.1, 0.0123, 1 / 3, 7e-4])
def test_as_many_steps_of_every_group_are_that_share_whatever_the_seconds(seconds):
    prints = fingerprint(sigmas=tuple(np.linspace(1, 0, 51)))
    for computed in range(1, 51):
        rows = ((None,),) * computed + (({0: 1.0},),) * (50 - computed)
        assert Schedule(prints, ((0, 4),), rows, (seconds,)).used == computed / 50
        apart = tuple(row * 3 for row in rows)
        assert Schedule(prints, ((0, 1), (1, 2), (2, 4)), apart, (seconds, 0.3, 0.1)).used == computed / 50


def test_numbers_of_blocks_are_no_measured_seconds():
    assert schedule().group_seconds == (1.0, 3.0) and not schedule().is_timed
    assert not Schedule.compute_all(fingerprint()).is_timed
    assert dataclasses.replace(schedule(), group_seconds=(0.1, 0.3)).is_timed
    assert not dataclasses.replace(schedule(), group_seconds=(1.0, 1.0)).is_timed
    assert not TaylorSeer(interval=2, groups=((0, 1), (1, 4))).schedule(fingerprint()).is_timed


def test_step_masks_are_as_the_engines_read_them():
    """Steps reused by blocks or skipped by velocities are 0; cache-dit reads the bins as the same mask."""
    cache_dit = pytest.importorskip("cache_dit")
    reused = ((None, None),) * 2 + (({1: 1.5}, {1: 1.0}), (None, None))
    assert schedule(reused).to_step_mask() == (1, 1, 0, 1)
    skipping = dataclasses.replace(
        schedule(),
        cells=((None, None), ({}, {})) * 2,
        velocities=(None, Velocity({0: 1.0}), None, Velocity({2: 1.0})),
    )
    mask = skipping.to_step_mask()
    assert (mask, mask.to_text(), mask.to_bins()) == ((1, 0, 1, 0), "1,0,1,0", ((1, 1), (1, 1)))
    for one in (mask, StepMask((1, 1, 0, 1, 0, 0, 1))):
        computed, cached = map(list, one.to_bins())
        assert cache_dit.steps_mask(compute_bins=computed, cache_bins=cached, total_steps=len(one)) == list(one)
    with pytest.raises(ScheduleError, match="step 2 in part"):
        schedule().to_step_mask()
    first = {"fingerprint": fingerprint(steps_run=(0, 1, 2)), "velocities": (None, Velocity({0: 1.0}), None, None)}
    with pytest.raises(ScheduleError, match="runs at 3 of 4"):
        dataclasses.replace(skipping, **first).to_step_mask()


def test_file_round_trip(tmp_path):
    path = schedule().save(tmp_path / "plan.json")
    assert Schedule.load(path) == schedule()
    rows = [line for line in path.read_text().splitlines() if '"compute"' in line]
    assert len(rows) == 4, "one readable line per step"


@pytest.mark.parametrize(
    "cells",
    [
        ((None, None),) * 3,
        (({0: 1.0}, None), (None, None), (None, None), (None, None)),
        ((None, None), ({0: 1.0}, None), ({1: 1.0}, None), (None, None)),
        ((None, None), ({}, None), (None, None), (None, None)),
        ((None, None), ({0: float("nan")}, None), (None, None), (None, None)),
        ((None,), (None,), (None,), (None,)),
    ],
    ids=["rows", "reads-itself", "reads-cached", "empty", "nan", "groups"],
)
def test_contradictions_are_refused(cells):
    with pytest.raises(ScheduleError):
        schedule(cells)


@pytest.mark.parametrize("value", [1e300, -1.1e4, float("inf"), float("nan")])
def test_coefficients_that_give_no_picture_are_refused(tmp_path, value):
    whole = schedule()
    with pytest.raises(ScheduleError, match=r"cell \(step 3, group 1\) has the coefficient"):
        dataclasses.replace(whole, cells=(*whole.cells[:3], (None, {2: value})))
    with pytest.raises(ScheduleError, match="velocity of step 1 has the coefficient"):
        dataclasses.replace(whole, velocities=(None, Velocity({1: value}), None, None))
    with pytest.raises(ScheduleError, match="velocity of step 1 has the coefficient"):
        dataclasses.replace(whole, velocities=(None, Velocity({1: 1.0}, latents=value), None, None))
    with pytest.raises(ScheduleError, match="one positive number per group"):
        dataclasses.replace(whole, group_seconds=(value, -value))
    data = json.loads(whole.to_json())
    del data["checksum"]
    data["cells"][3][1] = {"2": value}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match="coefficient"), pytest.warns(LayerCacheWarning):
        Schedule.load(tmp_path / "plan.json")


def test_large_coefficients_of_fits_are_kept():
    whole = dataclasses.replace(schedule(), velocities=(None, Velocity({1: 9.5, 0: -8.5}), None, None))
    assert Schedule.from_json(whole.to_json()) == whole


@pytest.mark.parametrize("groups", [((0, 2),), ((0, 2), (3, 4)), ((0, 2), (2, 2), (2, 4)), ((1, 4),)])
def test_groups_must_tile_the_blocks(groups):
    with pytest.raises(ScheduleError, match="block"):
        Schedule(fingerprint(), groups, ((None,) * len(groups),) * 4, (1.0,) * len(groups))


def damaged_files() -> dict[str, str]:
    whole = schedule().to_json()
    data = json.loads(whole)
    return {
        "empty": "",
        "truncated": whole[: len(whole) // 2],
        "other kind": json.dumps({"format": "something else"}),
        "list": "[1, 2]",
        "newer": json.dumps({**data, "version": 99}),
        "no version": json.dumps({**data, "version": None}),
        "no cells": json.dumps({k: v for k, v in data.items() if k != "cells"}),
        "bad cell": json.dumps({**data, "cells": [["compute", 7]] * 4}),
        "contradiction": json.dumps({**data, "cells": [[{"0": 1.0}, "compute"]] * 4}),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_files_are_refused(tmp_path, name):
    path = tmp_path / "plan.json"
    path.write_text(damaged_files()[name])
    with pytest.raises(FileFormatError, match=r"plan\.json") as caught:
        Schedule.load(path)
    if name == "newer":
        assert "upgrade" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileFormatError, match="does not exist"):
        Schedule.load(tmp_path / "nowhere.json")


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = schedule().save(tmp_path / "plan.json")
    before = path.read_text()

    def full(self, *args, **kwargs):
        self.open("w").write("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        dataclasses.replace(schedule(), made_by={}).save(path)
    monkeypatch.undo()
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_fingerprint_says_what_differs():
    prints = fingerprint()
    prints.check_model("QwenImageTransformer2DModel", "0123456789ab", 4)
    prints.check_sigmas([s + 5e-4 for s in SIGMAS])
    with pytest.raises(ScheduleMismatchError, match="FluxTransformer2DModel"):
        prints.check_model("FluxTransformer2DModel", "0123456789ab", 4)
    with pytest.raises(ScheduleMismatchError, match="60 blocks"):
        prints.check_model("QwenImageTransformer2DModel", "0123456789ab", 60)
    with pytest.raises(ScheduleMismatchError, match="4 steps, this run has 2.*num_inference_steps=4"):
        prints.check_sigmas((1.0, 0.5, 0.0))
    with pytest.raises(ScheduleMismatchError, match=r"sigma\[2\]"):
        prints.check_sigmas((1.0, 0.8, 0.5, 0.3, 0.0))
    with pytest.raises(ScheduleMismatchError):
        prints.check_sigmas((1.0, float("nan"), 0.6, 0.3, 0.0))


def test_errors_share_one_base():
    assert issubclass(ScheduleError, LayerCacheError)
    assert issubclass(FileFormatError, LayerCacheError)


@given(
    st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3, unique_by=lambda x: round(x, 2)),
    st.floats(-3, 3),
    st.floats(-3, 3),
)
def test_secant_is_exact_for_linear_residuals(levels, offset, slope):
    sigmas = sorted(levels, reverse=True)
    coefficients = secant_coefficients(sigmas, 2, 1, 0)
    assert sum(coefficients.values()) == pytest.approx(1)
    exact = (sigmas[2] - sigmas[1]) / (sigmas[1] - sigmas[0]) <= 4
    predicted = sum(c * (offset + slope * sigmas[i]) for i, c in coefficients.items())
    if exact:
        assert predicted == pytest.approx(offset + slope * sigmas[2], abs=1e-9)
    else:
        assert coefficients == {1: 5.0, 0: -4.0}


def test_secant_refuses_bad_anchors():
    assert secant_coefficients(SIGMAS, 3, 1) == {1: 1.0}
    for anchor, base in [(3, 1), (1, 1), (1, 2), (1, -1)]:
        with pytest.raises(ScheduleError):
            secant_coefficients(SIGMAS, 3, anchor, base)
    assert secant_coefficients((1.0, 1.0, 0.5), 2, 1, 0) == {1: 1.0}  # no slope between two evaluations at one sigma
