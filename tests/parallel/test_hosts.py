"""What hosts the processes of a command: elastic launch, torchrun, Ray; deaths, refusals, and nothing left over."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from layercache.errors import CrewError, LayerCacheError, LayerCacheWarning
from layercache.parallel import on_ray
from layercache.parallel.crew import Crew
from layercache.parallel.launching import launch_here, threads_of
from layercache.tools.cli.common import Printer, save
from layercache.tools.cli.following import with_command
from layercache.tools.cli.loading import choose_device
from layercache.tools.cli.options import CallOptions, ModelOptions
from layercache.tools.cli.workers import LARGEST, WorkerOptions, _named_files, command_running, crew_for
from support import hosted_task
from support.commands import refused, run
from support.hosts import ROOT, alone, arrays_of, command, ended, gone_or_killed, ranks_once, running
from support.profiles import made_profile

CALIBRATE = ("calibrate", "--steps", 8, "--samples", 8, "-p", "cat", "-p", "coffee", "-o", "profile.safetensors")
SQUARES = [0, 1, 4, 9, 16, 25]

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")


# --- without other processes ---------------------------------------------------------------------------------------


def test_wrong_use_is_refused_in_a_sentence_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "--workers: 3 processes cannot share 2 samples" in refused("calibrate", "--samples", 2, "--workers", 3)
    assert "3 processes cannot share 2 samples" in refused("search", "--workers", 3)  # two calls of four pictures
    assert "--ray: say with --workers" in refused("calibrate", "--ray", "local")
    assert "--gpus-per-worker: it is for --ray" in refused("search", "--workers", 2, "--gpus-per-worker", 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert 'pip install "layercache[ray]"' in refused("calibrate", "--workers", 2, "--ray", "local")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "--workers: the processes were started already, by torchrun" in refused("calibrate", "--workers", 2)
    assert "--ray: the processes were started already" in refused("calibrate", "--ray", "auto")
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_lead_print_and_write_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("layercache.tools.cli.app.time.sleep", lambda seconds: None)
    figures = tmp_path / "figures.json"
    printer = Printer(str(figures))
    printer.say("text")
    printer.following(["plan", "profile"])
    printer.figures({"a": 1})
    assert save(tmp_path / "result", lambda path: path.write_text("")) == tmp_path / "result"
    result = run("refit", ROOT / "pyproject.toml")  # no schedule
    assert (result.exit_code, result.output) == (1, "")
    assert run("calibrate", "--ray", "local").output == ""
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_every_process_has_its_gpu_and_its_share_of_the_cores(monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert choose_device(None) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (choose_device(None), choose_device("cpu"), chosen) == ("cuda:1", "cpu", [1])
    assert (choose_device("cuda"), choose_device("cuda:0")) == ("cuda:1", "cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(LayerCacheError, match="4 processes want a GPU each, and there are 2"):
        choose_device(None)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (threads_of(3), threads_of(16), threads_of(3, wanted=5)) == (2, 1, 5)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of(8) == 3


def test_files_of_the_command_line_are_sent_but_no_large_ones(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/000").write_bytes(b"kept")
    for name, size in (("prompts.txt", 3), ("mask.png", 4), ("b.csv", 5), ("large.safetensors", LARGEST + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    words = ["generate", "--prompts-file", "prompts.txt", "--image", "mask_image=mask.png", "--lora=large.safetensors"]
    found = _named_files([*words, "--transfer", "steps=6, prompts=b.csv"])
    assert found == ["prompts.txt", "mask.png", "b.csv"]
    sent = on_ray._contents([*found, "journal"])
    assert {name: len(content) for name, content in sent.items()} == {
        "prompts.txt": 3,
        "mask.png": 4,
        "b.csv": 5,
        "journal/000": 4,
    }


class OtherThreads(Crew):
    """A crew whose processes were given other numbers of threads."""

    def __init__(self) -> None:
        super().__init__()
        self.world = 2

    def together(self):
        return contextlib.nullcontext()

    def differences(self):
        return ["the processes have different numbers of threads: 1, 2"]


def test_what_differs_between_the_processes_is_warned_of_and_kept(monkeypatch):
    monkeypatch.setattr("layercache.parallel.crew.crew_of_environment", OtherThreads)
    fingerprint = made_profile(steps=4).fingerprint
    with command_running():
        with pytest.warns(LayerCacheWarning, match="different numbers of threads: 1, 2"):
            crew_for(WorkerOptions(), samples=2)
        marked = with_command(fingerprint, ModelOptions(), CallOptions(), "cat")
    assert marked.settings["processes"] == ["the processes have different numbers of threads: 1, 2"]
    assert "processes" not in with_command(fingerprint, ModelOptions(), CallOptions(), "cat").settings


# --- on this machine -----------------------------------------------------------------------------------------------


def test_a_command_runs_in_two_processes_and_its_exit_code_is_given(tmp_path, capfd):
    script = hosted_task.__file__
    assert launch_here([script, str(tmp_path), "0", "3"], 2) == 3
    assert json.loads((tmp_path / "squares.json").read_text())["found"] == SQUARES
    printed, errors = capfd.readouterr()
    assert (printed, errors) == (f"process 0 has {SQUARES}\n", "")


@pytest.mark.slow
def test_ten_restarts_in_a_row_meet_no_addresses_of_the_dead(tmp_path, capfd):
    assert launch_here([hosted_task.__file__, str(tmp_path), "10", "0"], 2, restarts=10) == 0
    found = json.loads((tmp_path / "squares.json").read_text())
    assert (found["found"], found["attempt"]) == (SQUARES, 10)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_deaths_beyond_the_restarts_are_one_sentence(tmp_path):
    words = (*CALIBRATE[:-1], tmp_path / "profile.safetensors", "--workers", 2, "--restarts", 0)
    with running(command(*words), tmp_path) as process:
        ranks_once(lambda: _kept(tmp_path) >= 2, process)[1].kill()
        text = ended(process)
    assert process.returncode == 75
    assert text.splitlines()[-1].startswith("Error: process ")
    assert "the same command goes on from what is finished" in text and "Traceback" not in text


@pytest.mark.slow
def test_nobody_waits_for_a_process_that_failed_alone(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)\n")
    monkeypatch.setattr("layercache.parallel.launching.PATIENCE", 1.0)
    with pytest.raises(CrewError, match="process 1 of 2 ended with exit code 3, and others waited"):
        launch_here([str(script)], 2)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 3])
def test_ctrl_c_while_processes_start_ends_all(tmp_path, restarts):
    with running(command(*CALIBRATE, "--workers", 2, "--restarts", restarts), tmp_path) as process:
        ranks_once(lambda: True, process)
        process.send_signal(signal.SIGINT)
        text = ended(process)
    assert process.returncode == 130, text
    assert "Stopped" in text and "started again" not in text and "Error" not in text
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The tables of a calibration in one process."""
    folder = tmp_path_factory.mktemp("reference")
    with running(command(*CALIBRATE), folder) as process:
        ended(process)
    return arrays_of(folder / "profile.safetensors")


def _kept(folder: Path) -> int:
    """Samples that a calibration has finished and kept so far."""
    return len([*folder.glob("profile.samples/[!.]*")])


HOSTS = {"here": ("--workers", 2), "ray": ("--workers", 2, "--ray", "local")}


@pytest.mark.slow
@pytest.mark.parametrize("host", ["here", pytest.param("ray", marks=needs_ray)])
def test_a_killed_process_changes_no_bit(host, reference, tmp_path):
    before = alone() if host == "ray" else ()
    with running([*before, *command(*CALIBRATE, *HOSTS[host])], tmp_path) as process:
        ranks_once(lambda: _kept(tmp_path) >= 2, process)[1].kill()
        text = ended(process)
    assert process.returncode == 0, text
    assert "A process died; all were started again (restart 1)." in text
    assert text.count("profile: profile.safetensors") == 1 and "Traceback" not in text
    assert arrays_of(tmp_path / "profile.safetensors") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["profile.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("host", ["here", pytest.param("ray", marks=needs_ray)])
def test_with_a_killed_driver_all_end_and_the_same_command_goes_on(host, reference, tmp_path):
    before = alone() if host == "ray" else ()
    with running([*before, *command(*CALIBRATE, *HOSTS[host])], tmp_path) as process:
        ranks = ranks_once(lambda: _kept(tmp_path) >= 2, process)
        process.kill()
        gone_or_killed(ranks)
    kept = _kept(tmp_path)
    if not kept:  # Ray ends its processes some seconds later, when they may be done
        assert host == "ray" and arrays_of(tmp_path / "profile.safetensors") == reference
        return
    assert 2 <= kept < 8
    with running(command(*CALIBRATE, "--workers", 1), tmp_path) as process:
        text = ended(process)
    assert f"{kept}/8" in text  # what the bar begins with
    assert arrays_of(tmp_path / "profile.safetensors") == reference


@pytest.mark.slow
def test_torchrun_needs_no_option(reference, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    with running([*words, *command(*CALIBRATE)[1:]], tmp_path, GLOO_SOCKET_IFNAME="lo") as process:
        text = ended(process)
    assert process.returncode == 0, text
    assert text.count("profile: profile.safetensors") == 1
    assert arrays_of(tmp_path / "profile.safetensors") == reference


# --- on Ray --------------------------------------------------------------------------------------------------------

FAR = """
import functools, json, sys
from pathlib import Path
from layercache.errors import CrewError
from layercache.parallel.on_ray import launch_on_ray
from support import hosted_task

# the processes see another file than the driver's, as on another machine
write = Path.write_text
Path.write_text = lambda path, text: write(path, "other" if path.name == "mark" else text)

if __name__ == "__main__":
    function = functools.partial(hosted_task.share, folder="inside", deaths=1)
    try:
        launch_on_ray(function, 2, address="local", gpus=1)
    except CrewError as error:
        print(error)
    print(json.dumps(launch_on_ray(function, 2, address="local", files=["inside", "missing"])))
"""


@pytest.mark.slow
@needs_ray
def test_the_recipe_of_the_page_runs_as_it_stands(tmp_path):
    (recipe,) = re.findall(r"^layercache (.*--ray local.*)$", (ROOT / "docs/distributed.md").read_text(), re.M)
    with running([*alone(), *command(*shlex.split(recipe))], tmp_path) as process:
        text = ended(process)
    assert process.returncode == 0, text
    profile = tmp_path / "profile.safetensors"
    wanted = tmp_path / "wanted.safetensors"
    with running(command("calibrate", "--samples", 2, "--steps", 8, "-o", wanted), tmp_path) as process:
        ended(process)
    assert arrays_of(profile) == arrays_of(wanted)


@pytest.mark.slow
@needs_ray
def test_on_other_machines_files_are_sent_to_and_fro(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/given.txt").write_text("a prompt")
    (tmp_path / "far.py").write_text(FAR)
    (tmp_path / "temporary").mkdir()
    folders = {"TMPDIR": str(tmp_path / "temporary"), "RAY_TMPDIR": tempfile.gettempdir()}  # sockets have short names
    with running([*alone(), sys.executable, "far.py"], tmp_path, **folders) as process:
        text = ended(process)
    assert "2 processes with 1 GPU each need 2, and the Ray cluster has 0" in text
    assert text.count("process 0 has") == 1 and "process 1 has" not in text
    assert text.splitlines()[-1] == json.dumps([SQUARES, SQUARES])
    found = json.loads((tmp_path / "inside/squares.json").read_text())
    assert (found["found"], found["attempt"], found["given"]) == (SQUARES, 1, "a prompt")
    assert found["folder"] != str(tmp_path) and found["folder"].endswith(str(tmp_path))
    assert not list((tmp_path / "temporary").iterdir())
