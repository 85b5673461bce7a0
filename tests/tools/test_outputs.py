"""Where commands write: checked before anything is loaded or runs."""

import os
import resource
import signal
from contextlib import contextmanager

import pytest
import typer
from typer.testing import CliRunner

import layercache
from layercache.errors import FileFormatError
from layercache.schedule.schedule import Schedule
from layercache.tools.cli import app as command_line
from layercache.tools.cli.common import read_prompts
from support.profiles import made_profile

OUTPUTS = ("output", "json_to", "plot", "checkpoint")
WORDS = {"plan": ["--budget", "0.7"], "generate": ["-p", "cat"], "edit": ["--set", "made_by.note=x"]}
READS = {"profile": "profile.safetensors", "file": "schedule.json", "schedule": "schedule.json"}


def commands(group=None, before=()):
    """Every command with the options that name a file or folder to write: ``(words, options by argument)``."""
    group = group or typer.main.get_command(command_line.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
            continue
        options = {p.name: max(p.opts, key=len) for p in command.params if p.name in OUTPUTS}
        needed = [READS[p.name] for p in command.params if p.name in READS and p.param_type_name == "argument"]
        if options:
            yield (*before, name), needed, options


CASES = [(words, reads, option) for words, reads, options in commands() for option in options.values()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    profile = made_profile(steps=6, distance=4, span=4)
    profile.save(tmp_path / "profile.safetensors")
    layercache.plan(profile, 0.8, spans=(1,)).save(tmp_path / "schedule.json")
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.chdir(tmp_path)

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    for module in ("calibrate", "search", "compare", "train_router"):
        name = "load_with_entries" if module == "compare" else "load_with_prompts"
        monkeypatch.setattr(f"layercache.tools.cli.{module}.{name}", load)
    for module in ("generate", "demo"):
        monkeypatch.setattr(f"layercache.tools.cli.{module}.load_pipeline", load)
    monkeypatch.setattr("layercache.tools.cli.bench._measure_peers", load)
    monkeypatch.setattr("layercache.tools.cli.bench._Run", load)
    monkeypatch.setattr("layercache.tools.doctor.diagnose", load)
    return tmp_path


def invoke(*words):
    return CliRunner().invoke(command_line.app, [str(word) for word in words], env={"COLUMNS": "300"})


def test_every_command_that_writes_is_tried():
    assert len(CASES) > 20
    assert {words[-1] for words, _, _ in CASES} >= {
        "calibrate",
        "plan",
        "search",
        "generate",
        "compare",
        "demo",
        "edit",
    }


@pytest.mark.parametrize(("words", "reads", "option"), CASES, ids=lambda value: "-".join(value) if value else "")
def test_an_output_that_cannot_be_written_is_refused_before_the_work(folder, words, reads, option):
    more = WORDS.get(words[-1], [])
    for place in ("file/x.png", "pipe.png", "/dev/null/x.png"):
        if place == "pipe.png" and not (folder / place).exists():
            os.mkfifo(folder / place)
        result = invoke(*words, *reads, *more, option, place)
        assert result.exit_code in (1, 2) and not isinstance(result.exception, AssertionError), result.output
        assert f"for {option}" in result.stderr or f"for '{option}'" in result.stderr, result.stderr
        assert "Traceback" not in result.output and len(result.stderr.strip().splitlines()) <= 6


def test_no_output_is_written_over_another_or_over_what_is_read(folder):
    before = (folder / "profile.safetensors").read_bytes()
    for words in (
        ("plan", "profile.safetensors", "--budget", 0.7, "-o", "profile.safetensors"),
        ("plan", "profile.safetensors", "--budget", 0.7, "-o", "x.json", "--json", "./x.json"),
        ("search", "-o", "front.png"),
        ("train-router", "-o", "router.pt"),
        ("show", "schedule.json", "--plot", "schedule.json"),
    ):
        result = invoke(*words)
        assert result.exit_code == 1 and "written over a file" in result.stderr, result.output
    assert (folder / "profile.safetensors").read_bytes() == before and not (folder / "x.json").exists()


def test_api_checks_the_files_of_a_search_before_it_runs(folder):
    with pytest.raises(layercache.errors.OutputError, match="is no folder") as caught:
        layercache.search(object(), ["cat"], resume=folder / "file" / "search")
    assert caught.value.argument == "resume"
    (folder / "search").mkdir()
    (folder / "search" / "runs.json").write_text("{")
    with pytest.raises(layercache.errors.FileFormatError, match="remove it to start again"):
        layercache.search(object(), ["cat"], resume=folder / "search")


@contextmanager
def small_files():
    """Files may have 512 bytes, as where a disk is full."""
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(folder):
    (folder / "old.json").write_text("as it was")
    before = sorted(path.name for path in folder.iterdir())
    with small_files():
        done = invoke("plan", "profile.safetensors", "--budget", 0.7, "-o", "old.json")
    warning, error = done.stderr.strip().splitlines()
    assert done.exit_code == 1 and warning.startswith("Warning: in a run of 6 steps"), done.output
    assert error.startswith("Error: old.json cannot be written: File too large")
    assert (folder / "old.json").read_text() == "as it was"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_prompts_of_editors_on_windows(tmp_path):
    path = tmp_path / "prompts.txt"
    for content in (b"\xef\xbb\xbfcat\r\ncoffee\r\n", b"cat\ncoffee", b"\xef\xbb\xbf# two\n\n\xef\xbb\xbfcat\rcoffee"):
        path.write_bytes(content)
        assert [entry.sample for entry in read_prompts(None, path)] == ["cat", "coffee"]
    path.write_text("cat\n", encoding="utf-16")
    with pytest.raises(FileFormatError, match="UTF-8"):
        read_prompts(None, path)


# --- layercache schedule edit ------------------------------------------------------------------------------------


def test_fields_are_set_and_the_checksum_is_right_again(folder):
    before = Schedule.load("schedule.json")
    assert invoke("schedule", "edit", "schedule.json", "--set", "made_by.note=by hand", "-o", "new.json").exit_code == 0
    after = Schedule.load("new.json")
    assert after.made_by == {**before.made_by, "note": "by hand"} and after.cells == before.cells
    assert Schedule.load("schedule.json") == before
    step = next(k for k, row in enumerate(before.cells) if row[0] is not None)
    assert invoke("schedule", "edit", "new.json", "--set", f'cells.{step}.0="compute"').exit_code == 0
    assert Schedule.load("new.json").cells[step][0] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "nothing.x=1"], "has no field"),
        (["--set", "made_by"], "FIELD=VALUE"),
        (["--set", "groups=3"], "is damaged"),
        (["--set", 'cells.1.0={"0": 1e300}'], "none is larger than 10000"),
        (["--set", "fingerprint.sigmas.0=NaN"], "not negative"),
    ],
)
def test_an_edit_that_gives_no_schedule_changes_nothing(folder, words, told):
    before = (folder / "schedule.json").read_bytes()
    result = invoke("schedule", "edit", "schedule.json", *words)
    assert result.exit_code in (1, 2) and told in result.stderr, result.output
    assert (folder / "schedule.json").read_bytes() == before


def test_the_editor_gets_the_schedule_without_its_checksum(folder, monkeypatch):
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", "sed -i s/budget/allowed/")
    before = Schedule.load("schedule.json")
    assert invoke("schedule", "edit", "schedule.json").exit_code == 0
    assert Schedule.load("schedule.json").made_by["allowed"] == before.made_by["budget"]
    changed = (folder / "schedule.json").read_bytes()
    monkeypatch.setenv("EDITOR", "sed -i s/compute/compote/")
    result = invoke("schedule", "edit", "schedule.json")
    assert result.exit_code == 1 and "what you edited is in" in result.stderr
    os.unlink(result.stderr.strip().rstrip(".").rsplit(" ", 1)[-1])
    for editor, told in (("false", "ended with code 1"), ("no-such-editor", "set EDITOR")):
        monkeypatch.setenv("EDITOR", editor)
        result = invoke("schedule", "edit", "schedule.json")
        assert result.exit_code == 1 and told in result.stderr
    assert (folder / "schedule.json").read_bytes() == changed


def test_an_edited_file_is_refused_until_the_line_of_its_checksum_is_gone(folder):
    text = (folder / "schedule.json").read_text().replace('"budget"', '"allowed"')
    (folder / "schedule.json").write_text(text)
    result = invoke("show", "schedule.json")
    assert result.exit_code == 1 and "layercache schedule edit" in result.stderr
    (folder / "schedule.json").write_text("".join(line for line in text.splitlines(True) if '"checksum"' not in line))
    result = invoke("show", "schedule.json")
    assert result.exit_code == 0 and result.stderr.startswith("Warning: schedule.json has no checksum")
