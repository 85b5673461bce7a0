"""Files of another kind in the place of ours: what they are, what was expected, and what to do about it."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from layercache._utils.formats import CUT_OFF, JOURNAL, KINDS, NEITHER, format_of, going_on, what_is
from layercache.errors import FileFormatError
from layercache.planning.front import Front, Point
from layercache.planning.profile import StabilityProfile
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule
from layercache.tools.cli import app
from support.profiles import made_profile

LOADERS = {
    "layercache schedule": Schedule.load,
    "layercache module schedule": ModuleSchedule.load,
    "layercache profile": StabilityProfile.load,
    "layercache front": Front.load,
}
# words of the tools that read, which say nothing to people
JARGON = ("codec", "utf-8", "byte", "char", "column", "Error", "Expecting", "header", "deserializ", "Errno", "object")
STRANGE = {
    "picture.png": NEITHER,
    "empty.json": "is empty",
    "blank.safetensors": "is empty",
    "checkpoint.pt": NEITHER,
    "weights.safetensors": "is a file of tensors that is not layercache's, such as a model's weights",
    "cut.safetensors": CUT_OFF,
    "config.json": "is JSON of another kind",
    "half.json": CUT_OFF,
    "deep.json": CUT_OFF,
    "notes.txt": NEITHER,
    "folder": "is a folder",
    "nowhere": "does not exist",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of every kind."""
    path = tmp_path_factory.mktemp("files")
    profile = made_profile(steps=6, distance=4, span=4)
    schedule = Schedule.compute_all(profile.fingerprint)
    profile.save(path / "layercache profile")
    schedule.save(path / "layercache schedule")
    Front((Point(schedule, "by hand", (40.0,)),), (1.0, 0.1, 0.0)).save(path / "layercache front")
    ModuleSchedule(profile.fingerprint, ("a", "b"), ((True, True),) * 6).save(path / "layercache module schedule")
    PIL.Image.new("RGB", (8, 8)).save(path / "picture.png")
    torch.save({"a": torch.zeros(2)}, path / "checkpoint.pt")
    save_file({"w": np.zeros((4, 4), np.float32)}, path / "weights.safetensors")
    contents = {
        "empty.json": b"",
        "blank.safetensors": b" \n",
        "cut.safetensors": (path / "layercache profile").read_bytes()[:100],
        "config.json": b'{"format": 3, "_class_name": "FluxTransformer2DModel"}',
        "half.json": (path / "layercache schedule").read_bytes()[:-40],
        "deep.json": b"[" * 100_000,
        "notes.txt": "ein Füchslein".encode(),
    }
    for name, content in contents.items():
        (path / name).write_bytes(content)
    (path / "folder").mkdir()
    return path


def unsealed(path) -> dict:
    """The entries of a JSON file without its checksum."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}


def refused(load, path) -> str:
    with pytest.raises(FileFormatError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path} ")
    assert not [word for word in JARGON if word in text.removeprefix(str(path))]
    return text.removeprefix(f"{path} ")


@pytest.mark.parametrize("name", STRANGE)
def test_files_of_other_programs(folder, name):
    for wanted, load in LOADERS.items():
        expected = f"expected a {wanted} file, as {KINDS[wanted][0]} writes it"
        assert refused(load, folder / name) == f"{STRANGE[name]}; {expected}"
    assert what_is(folder / name) == STRANGE[name] and format_of(folder / name) is None


@pytest.mark.parametrize("wanted", LOADERS)
def test_each_of_ours_in_the_place_of_another(folder, wanted):
    for found in LOADERS:
        assert format_of(folder / found) == found
        if found == wanted:
            assert LOADERS[wanted](folder / found).save(folder / "again").read_bytes() == (folder / found).read_bytes()
            continue
        text = refused(LOADERS[wanted], folder / found)
        assert text.startswith(f"is a {found} file, which {KINDS[found][1]} reads; expected a {wanted} file, ")


def test_readers_are_there():
    import layercache.schedule

    for kind, load in LOADERS.items():
        named: object = layercache
        for part in KINDS[kind][1].split(".")[1:]:
            named = getattr(named, part)
        assert named == load
        command = KINDS[kind][0].split("'")[1].split()[1]
        assert command in CliRunner().invoke(app.app, ["--help"]).stdout


@pytest.mark.parametrize("wanted", LOADERS)
def test_files_that_were_cut_off(folder, tmp_path, wanted):
    whole = (folder / wanted).read_bytes()
    for share in (0.02, 0.3, 0.9):
        path = tmp_path / "cut"
        path.write_bytes(whole[: int(share * len(whole))])
        assert "not whole" in refused(LOADERS[wanted], path)


@pytest.mark.filterwarnings("ignore:.* has no checksum")
@pytest.mark.parametrize("wanted", ["layercache schedule", "layercache module schedule", "layercache front"])
def test_every_entry_may_be_missing_or_of_another_form(folder, tmp_path, wanted):
    """No traceback of the parser's own, whatever is wrong in the file."""
    data, path = unsealed(folder / wanted), tmp_path / "edited.json"
    required = {"fingerprint", "groups", "cells", "group_seconds", "steps", "units", "seconds", "points", "tried"}
    for key in set(data) - {"format", "version"}:
        path.write_text(json.dumps({k: v for k, v in data.items() if k != key}))
        if key in required:
            assert f"is damaged: it has no entry '{key}'" in refused(LOADERS[wanted], path)
        for value in (None, 7, "text", [], [[]], {}, [None], {"a": None}, [1e999], float("nan")):
            path.write_text(json.dumps({**data, key: value}))
            try:
                LOADERS[wanted](path)
            except FileFormatError as error:
                text = str(error).removeprefix(str(path))
                assert not [word for word in JARGON if word in text], (key, value, text)


@pytest.mark.filterwarnings("ignore:.* has no checksum")
def test_what_contradicts_itself_is_said_in_the_schedules_own_words(folder, tmp_path):
    data, path = unsealed(folder / "layercache schedule"), tmp_path / "edited.json"
    path.write_text(json.dumps({**data, "groups": [[0, 5]]}))
    assert refused(Schedule.load, path) == (
        "is damaged: groups end at block 5, the model has 6 blocks; use another copy, or write it again with "
        "'layercache plan' or Schedule.save"
    )
    path.write_text(json.dumps({**data, "fingerprint": {**data["fingerprint"], "sigmas": [1.0]}, "cells": []}))
    assert "is damaged: a schedule needs a step at least" in refused(Schedule.load, path)
    path.write_text(json.dumps({**data, "version": 99}))
    assert refused(Schedule.load, path).endswith("upgrade it")
    front = unsealed(folder / "layercache front")
    del front["points"][0]["schedule"]["cells"]
    path.write_text(json.dumps(front))
    with pytest.raises(FileFormatError, match=f"^schedule 0 of {path} is damaged: it has no entry 'cells'"):
        Front.load(path)
    front["points"][0]["psnr"] = []
    path.write_text(json.dumps(front))
    with pytest.raises(FileFormatError, match="no PSNR of any picture"):
        Front.load(path)


@pytest.mark.filterwarnings("ignore:.* has no checksum")
def test_profiles_without_a_table_or_an_entry(folder, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "p.safetensors"
    with safe_open(str(folder / "layercache profile"), framework="numpy") as file:
        header, tables = json.loads(file.metadata()["header"]), {name: file.get_tensor(name) for name in file.keys()}
    del header["checksum"]
    save_file({k: v for k, v in tables.items() if k != "text_norm_l1"}, path, {"header": json.dumps(header)})
    assert "is damaged: the table text_norm_l1 is missing; use another copy" in refused(StabilityProfile.load, path)
    save_file(tables, path, {"header": json.dumps({k: v for k, v in header.items() if k != "eta"})})
    assert "is damaged: it has no entry 'eta'" in refused(StabilityProfile.load, path)
    save_file(tables, path, {"header": "{"})
    assert "not whole" in refused(StabilityProfile.load, path)
    save_file(tables, path, {"header": '{"format": "other"}'})
    assert "JSON of another kind" not in refused(StabilityProfile.load, path)
    save_file(tables | {"image_error_l1": np.zeros(3)}, path, {"header": json.dumps(header)})
    assert "is damaged" in refused(StabilityProfile.load, path)


def test_a_file_that_may_not_be_read(folder, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    assert "cannot be read (Permission denied); expected a layercache schedule file" in refused(
        Schedule.load, folder / "layercache schedule"
    )


def test_json_of_other_editors(folder, tmp_path):
    text, path = (folder / "layercache schedule").read_text(), tmp_path / "s.json"
    expected = Schedule.load(folder / "layercache schedule")
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert Schedule.load(path) == expected
    path.write_text(json.dumps(dict(sorted(json.loads(text).items())), indent=8))
    assert Schedule.load(path) == expected and format_of(path) == "layercache schedule"
    assert Schedule.from_json("\ufeff" + text) == expected


@pytest.mark.parametrize("text", ["", "{", "\ud800", "\x00", "null", "3"])
def test_texts_that_are_no_schedule(text):
    with pytest.raises(FileFormatError, match="^my schedule is .*; expected a layercache schedule file"):
        Schedule.from_json(text, "my schedule")


@pytest.mark.parametrize("name", ["picture.png", "empty.json", "layercache front"])
def test_what_cannot_be_gone_on_with(folder, name):
    found = STRANGE.get(name, "is a layercache front file")
    ends = "name another file, or remove it to start again$"
    with pytest.raises(FileFormatError, match=ends) as caught, going_on(folder / name, JOURNAL):
        json.loads((folder / name).read_bytes())["samples"]
    assert f"cannot go on from {folder / name}: it {found};" in str(caught.value)
    with pytest.raises(FileFormatError, match=ends) as caught, going_on(folder / name):
        torch.load(folder / name, weights_only=True)["format"]
    found = "is damaged, or of another kind" if found == NEITHER else found
    assert f"cannot go on from {folder / name}: it {found};" in str(caught.value)


# --- on the command line -----------------------------------------------------------------------------------------


def said(*arguments: object) -> str:
    result = CliRunner().invoke(app.app, [str(a) for a in arguments], env={"COLUMNS": "100", "LAYERCACHE_DEBUG": ""})
    assert result.exit_code in (1, 2) and "Traceback" not in result.output, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.stderr.replace("│", " ").split())


def test_commands_say_what_a_file_is_and_which_they_expect(folder):
    for name in ("picture.png", "config.json", "half.json"):
        asked = {
            "layercache schedule": said("show", folder / name),
            "layercache profile": said("plan", folder / name, "--budget", 0.5),
            "layercache module schedule": said("generate", "-p", "cat", "--schedule", folder / name),
        }
        for wanted, text in asked.items():
            assert f"{folder / name} {STRANGE[name]}; expected a layercache" in text and f"a {wanted} file" in text
    assert "is a schedule already" in said("plan", folder / "layercache schedule", "--budget", 0.5)
