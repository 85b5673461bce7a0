"""Profiles and fronts with numbers or tables that are never measured; searches of models that are not searched."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import layercache
from layercache.errors import CalibrationError, FileFormatError, LayerCacheWarning
from layercache.planning.front import Front, Point
from layercache.planning.profile import StabilityProfile
from layercache.schedule.schedule import Schedule
from support.profiles import made_profile

INF = float("inf")
STEPS, WIDTH = 6, 1 + 3 + 2


@pytest.fixture(scope="module")
def profile():
    made = made_profile(steps=STEPS, groups=2, distance=3, span=2)
    gram = np.broadcast_to(np.eye(WIDTH), (2, 2, STEPS, 2, WIDTH, WIDTH)).copy()
    sizes = ((8, 8), (8, 8))
    return dataclasses.replace(made, tables={**made.tables, "image_gram": gram}, stream_bytes=sizes)


def header(**values):
    return lambda head, tables: head.update(values)


def fingerprint(**values):
    return lambda head, tables: head["fingerprint"].update(values)


def table(name, change):
    return lambda head, tables: tables.__setitem__(name, np.ascontiguousarray(change(tables[name])))


def with_value(value):
    def change(array):
        array = array.copy()
        array[0, 0, 2, 0] = value
        return array

    return change


CHANGES = {
    **{f"eta {value}": header(eta=value) for value in (INF, float("nan"))},
    **{f"fixed seconds {value}": header(fixed_seconds=value) for value in (INF, -1.0, 1e300)},
    "reuse seconds negative": header(reuse_seconds=[-1e9] * 2),
    "reuse seconds of one group": header(reuse_seconds=[0.1]),
    "group seconds zero": header(group_seconds=[0.0, 1.0]),
    "stream bytes infinite": header(stream_bytes=[[INF, INF]] * 2),
    "stream bytes negative": header(stream_bytes=[[-5, -7]] * 2),
    "stream bytes of one branch": header(stream_bytes=[[5, 7]]),
    "sigmas infinite": fingerprint(sigmas=[INF] * (STEPS + 1)),
    "a sigma not a number": fingerprint(sigmas=[1.0, float("nan"), *[0.5] * (STEPS - 1)]),
    "a sigma negative": fingerprint(sigmas=[1.0, -0.1, *[0.0] * (STEPS - 1)]),
    "steps fewer": fingerprint(sigmas=[1.0, 0.5, 0.0]),
    "branches more": fingerprint(branches=["a", "b", "c"]),
    "gram flat": table("image_gram", lambda g: g.reshape(*g.shape[:4], -1)),
    "gram of 2 x 2": table("image_gram", lambda g: g[..., :2, :2]),
    "gram not square": table("image_gram", lambda g: g[..., :1]),
    "gram of fewer steps": table("image_gram", lambda g: g[:, :, :2]),
    "gram of fewer groups": table("image_gram", lambda g: g[:, :, :, :1]),
    "gram negative": table("image_gram", lambda g: -g),
    "gram infinite": table("image_gram", with_value(INF)),
    "gram of integers": table("image_gram", lambda g: g.astype(np.int64)),
    "error negative": table("image_error_l1", with_value(-1.0)),
    "error beyond float32": table("text_error_l1", with_value(1e300)),
    "norm not a number": table("image_norm_l1", with_value(float("nan"))),
    "norm of no dims": table("image_norm_l2", lambda t: t.reshape(-1)),
    "errors of no distance": table("image_error_l1", lambda t: t[..., :0, :]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_profile_of_another_form_is_refused_when_it_is_loaded(profile, tmp_path, name):
    with safe_open(str(profile.save(tmp_path / "p.safetensors")), framework="numpy") as file:
        head, tables = json.loads(file.metadata()["header"]), {key: file.get_tensor(key) for key in file.keys()}
    del head["checksum"]
    CHANGES[name](head, tables)
    save_file(tables, tmp_path / "other.safetensors", {"header": json.dumps(head)})
    with pytest.raises(FileFormatError, match="is damaged: "), pytest.warns(LayerCacheWarning):
        StabilityProfile.load(tmp_path / "other.safetensors")


def test_a_profile_of_0_1_loads(profile, tmp_path):
    with safe_open(str(profile.save(tmp_path / "p.safetensors")), framework="numpy") as file:
        head, tables = json.loads(file.metadata()["header"]), {key: file.get_tensor(key) for key in file.keys()}
    del head["checksum"]
    save_file(tables, tmp_path / "old.safetensors", {"header": json.dumps(head | {"version": 1})})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = StabilityProfile.load(tmp_path / "old.safetensors")
    assert loaded.fingerprint == profile.fingerprint
    assert layercache.plan(loaded, 0.7, spans=(1,)) == layercache.plan(profile, 0.7, spans=(1,))


@pytest.mark.parametrize("seconds", [(0.0, 0.1, 0.0), (1.0, -0.1, 0.0), (1.0, 0.1, INF), (float("nan"), 0.1, 0.0)])
def test_a_front_with_impossible_seconds_is_refused(profile, seconds):
    with pytest.raises(CalibrationError, match="seconds are not usable"):
        Front((Point(Schedule.compute_all(profile.fingerprint), "", (40.0,)),), seconds)


def test_a_front_without_a_psnr_is_refused(profile):
    with pytest.raises(CalibrationError, match="not a number"):
        Front((Point(Schedule.compute_all(profile.fingerprint), "", (float("nan"),)),), (1.0, 0.1, 0.0))
