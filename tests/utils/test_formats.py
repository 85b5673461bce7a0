"""Files of another kind in the place of ours: what they are, what was expected, and what to do about it."""

from __future__ import annotations

import json
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from layercache._utils.formats import JOURNAL, KINDS, format_of, going_on, what_holds, what_is
from layercache.errors import FileFormatError
from layercache.planning.front import Front, Point
from layercache.planning.profile import StabilityProfile
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.schedule.schedule import Schedule
from layercache.tools.cli import app
from planning.test_plan import made_profile

LOADERS = {
    "layercache schedule": Schedule.load,
    "layercache module schedule": ModuleSchedule.load,
    "layercache profile": StabilityProfile.load,
    "layercache front": Front.load,
}
# words of the tools that read, which say nothing to people
JARGON = ("codec", "utf-8", "byte", "char", "column", "Error", "Expecting", "header", "deserializ", "Errno", "object")
STRANGE = {
    "picture.png": "is a PNG picture",
    "picture.json": "is a JPEG picture",
    "empty.json": "is empty",
    "blank.safetensors": "is empty",
    "checkpoint.pt": "is a ZIP archive or a torch checkpoint",
    "pickled.json": "is a Python pickle",
    "array.npy": "is a NumPy array",
    "weights.safetensors": "is a file of tensors (safetensors) that is not layercache's, such as a model's weights",
    "cut.safetensors": "is a file of tensors (safetensors) that is not whole (was it cut off?)",
    "list.json": "is JSON of another kind",
    "config.json": "is JSON of another kind",
    "figures.json": "holds figures, as --json writes them",
    "half.json": "is not a whole JSON file (was it cut off or edited?)",
    "deep.json": "is not a whole JSON file (was it cut off or edited?)",
    "notes.txt": "is a text file",
    "noise.bin": "is a binary file of an unknown kind",
    "page.html": "is a web page",
    "pointer.safetensors": "is a pointer of Git LFS, whose file was not fetched",
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
    PIL.Image.new("RGB", (8, 8)).save(path / "picture.json", "JPEG")
    torch.save({"a": torch.zeros(2)}, path / "checkpoint.pt")
    np.save(path / "array.npy", np.zeros(3))
    save_file({"w": np.zeros((4, 4), np.float32)}, path / "weights.safetensors")
    contents = {
        "empty.json": b"",
        "blank.safetensors": b" \n",
        "pickled.json": pickle.dumps({"a": 1}),
        "cut.safetensors": (path / "layercache profile").read_bytes()[:100],
        "list.json": b"[1, 2]",
        "config.json": b'{"format": 3, "_class_name": "FluxTransformer2DModel"}',
        "figures.json": b'{"kind": "schedule", "used": 0.5}',
        "half.json": (path / "layercache schedule").read_bytes()[:-40],
        "deep.json": b"[" * 100_000,
        "notes.txt": "ein Füchslein".encode(),
        "noise.bin": bytes(range(256)),
        "page.html": b"<!DOCTYPE html><html></html>",
        "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    }
    for name, content in contents.items():
        (path / name).write_bytes(content)
    (path / "folder").mkdir()
    return path


def refused(load, path) -> str:
    with pytest.raises(FileFormatError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path} ")
    assert not [word for word in JARGON if word in text.removeprefix(str(path))]
    return text.removeprefix(f"{path} ")


@pytest.mark.parametrize("wanted", LOADERS)
@pytest.mark.parametrize("name", STRANGE)
def test_files_of_other_programs(folder, name, wanted):
    told = f"{STRANGE[name]}; a {wanted} is expected, as {KINDS[wanted].writers} it"
    assert refused(LOADERS[wanted], folder / name) == told
    assert what_is(folder / name) == STRANGE[name]
    assert format_of(folder / name) == ("layercache schedule" if name == "half.json" else None)


@pytest.mark.parametrize("wanted", LOADERS)
@pytest.mark.parametrize("found", LOADERS)
def test_each_of_ours_in_the_place_of_another(folder, found, wanted):
    assert format_of(folder / found) == found
    if found == wanted:
        assert LOADERS[wanted](folder / found).save(folder / "again").read_bytes() == (folder / found).read_bytes()
        return
    text = refused(LOADERS[wanted], folder / found)
    assert text.startswith(f"is a {found}, which {KINDS[found].reader} reads; a {wanted} is expected, ")
    plans = wanted == "layercache schedule" and found in ("layercache profile", "layercache front")
    way = "plan one from it with layercache.plan" if plans else f"as {KINDS[wanted].writers} it"
    assert text.endswith(way)


def test_readers_and_writers_are_there():
    import layercache.schedule

    for kind, load in LOADERS.items():
        named: object = layercache
        for part in KINDS[kind].reader.split(".")[1:]:
            named = getattr(named, part)
        assert named == load
        assert KINDS[kind].saver == f"{load.__self__.__name__}.save"
        command = KINDS[kind].command.strip("'").split()[1]
        assert command in CliRunner().invoke(app.app, ["--help"]).stdout


@pytest.mark.parametrize("wanted", LOADERS)
def test_files_that_were_cut_off(folder, tmp_path, wanted):
    whole = (folder / wanted).read_bytes()
    for share in (0.02, 0.3, 0.9):
        path = tmp_path / "cut"
        path.write_bytes(whole[: int(share * len(whole))])
        assert "not whole" in refused(LOADERS[wanted], path) or "not a whole" in refused(LOADERS[wanted], path)


@pytest.mark.parametrize("wanted", ["layercache schedule", "layercache module schedule", "layercache front"])
def test_every_entry_may_be_missing_or_of_another_form(folder, tmp_path, wanted):
    """No traceback of the parser's own, whatever is wrong in the file."""
    data, path = json.loads((folder / wanted).read_text()), tmp_path / "edited.json"
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


def test_what_contradicts_itself_is_said_in_the_schedules_own_words(folder, tmp_path):
    data, path = json.loads((folder / "layercache schedule").read_text()), tmp_path / "edited.json"
    path.write_text(json.dumps({**data, "groups": [[0, 5]]}))
    assert refused(Schedule.load, path) == (
        "is damaged: groups end at block 5, the model has 6 blocks; take another copy, or what 'layercache plan' and "
        "Schedule.save write anew"
    )
    path.write_text(json.dumps({**data, "fingerprint": {**data["fingerprint"], "sigmas": [1.0]}, "cells": []}))
    assert "is damaged: a schedule needs a step at least" in refused(Schedule.load, path)
    path.write_text(json.dumps({**data, "version": 99}))
    assert refused(Schedule.load, path).endswith("upgrade layercache")
    front = json.loads((folder / "layercache front").read_text())
    del front["points"][0]["schedule"]["cells"]
    path.write_text(json.dumps(front))
    with pytest.raises(FileFormatError, match=f"^schedule 0 of {path} is damaged: it has no entry 'cells'"):
        Front.load(path)
    front["points"][0]["psnr"] = []
    path.write_text(json.dumps(front))
    with pytest.raises(FileFormatError, match="no PSNR of any picture"):
        Front.load(path)


def test_profiles_without_a_table_or_an_entry(folder, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "p.safetensors"
    with safe_open(str(folder / "layercache profile"), framework="numpy") as file:
        header, tables = json.loads(file.metadata()["header"]), {name: file.get_tensor(name) for name in file.keys()}
    save_file({k: v for k, v in tables.items() if k != "text_norm_l1"}, path, {"header": json.dumps(header)})
    assert "is damaged: the table text_norm_l1 is missing; take another copy" in refused(StabilityProfile.load, path)
    save_file(tables, path, {"header": json.dumps({k: v for k, v in header.items() if k != "eta"})})
    assert "is damaged: it has no entry 'eta'" in refused(StabilityProfile.load, path)
    save_file(tables, path, {"header": "{"})
    assert "not layercache's" in refused(StabilityProfile.load, path)
    save_file(tables, path, {"header": '{"format": "other"}'})
    assert "JSON of another kind" not in refused(StabilityProfile.load, path)
    save_file(tables | {"image_error_l1": np.zeros(3)}, path, {"header": json.dumps(header)})
    assert "is damaged" in refused(StabilityProfile.load, path)


def test_a_file_that_may_not_be_read(folder, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    assert "cannot be read (Permission denied); a layercache schedule" in refused(
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
    with pytest.raises(FileFormatError, match="^my schedule is .*; a layercache schedule is expected"):
        Schedule.from_json(text, "my schedule")


@pytest.mark.parametrize("name", ["picture.png", "empty.json", "half.json", "checkpoint.pt", "layercache front"])
def test_what_cannot_be_gone_on_with(folder, name):
    found = STRANGE.get(name, "is a layercache front")
    ends = "name another file, or remove it to start again$"
    with pytest.raises(FileFormatError, match=ends) as caught, going_on(folder / name, JOURNAL):
        json.loads((folder / name).read_bytes())["samples"]
    assert f"cannot go on from {folder / name}: it {found};" in str(caught.value)
    with pytest.raises(FileFormatError, match=ends) as caught, going_on(folder / name):
        torch.load(folder / name, weights_only=True)["format"]
    told = "is damaged, or of another kind" if name == "checkpoint.pt" else found
    assert f"cannot go on from {folder / name}: it {told};" in str(caught.value)


def test_a_character_cut_in_two_is_still_text():
    assert what_holds("ä".encode() * 3000) == "is a text file"
    assert what_holds(b"a" + "ä".encode() * 3000) == "is a text file"


# --- on the command line -----------------------------------------------------------------------------------------


def said(*arguments: object) -> str:
    result = CliRunner().invoke(app.app, [str(a) for a in arguments], env={"COLUMNS": "100", "LAYERCACHE_DEBUG": ""})
    assert result.exit_code in (1, 2) and "Traceback" not in result.output, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("name", sorted(set(STRANGE) - {"folder", "nowhere", "half.json"}))
def test_show_plan_and_generate_say_what_a_file_is(folder, name):
    kinds = "a layercache schedule, a layercache module schedule, a layercache profile or a layercache front"
    assert f"Error: {folder / name} {STRANGE[name]}; {kinds} is expected" in said("show", folder / name)
    assert f"{STRANGE[name]}; a layercache profile or a layercache front is expected, as 'layercache calibrate'" in (
        said("plan", folder / name, "--budget", 0.5)
    )
    assert f"{STRANGE[name]}; a layercache profile is expected" in said("plan", folder / name, "--pareto")
    assert f"{STRANGE[name]}; a layercache schedule or a layercache module schedule is expected" in (
        said("generate", "-p", "cat", "--schedule", folder / name)
    )


def test_ours_in_the_wrong_place_on_the_command_line(folder, tmp_path):
    for name in ("layercache profile", "layercache front"):
        text = said("generate", "-p", "cat", "--schedule", folder / name, "-o", tmp_path / "x.png")
        assert text.endswith("is expected, plan one from it with 'layercache plan'.")
    for name in ("layercache schedule", "layercache module schedule"):
        assert "is a schedule already" in said("plan", folder / name, "--budget", 0.5)
    for name in ("layercache schedule", "layercache front"):
        assert f"is a {name}, which" in said("plan", folder / name, "--pareto")
    assert "not a whole JSON file" in said("show", folder / "half.json")


def test_prompts_files_and_described_models(folder, tmp_path):
    text = said("calibrate", "--prompts-file", folder / "picture.png")
    assert "--prompts-file" in text and "is a PNG picture; a text file (UTF-8) with one prompt per line" in text
    assert "holds no prompt" in said("calibrate", "--prompts-file", folder / "empty.json")
    (tmp_path / "m.json").write_bytes((folder / "layercache schedule").read_bytes())
    for path, told in ((tmp_path / "m.json", "is a layercache schedule"), (folder / "picture.json", "a JPEG picture")):
        assert f"{told}; name a file with the entries pipeline and components" in (
            said("generate", "-p", "a fox", "--model", path, "--device", "cpu")
        )
