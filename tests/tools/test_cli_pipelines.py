"""The command line on tiny pipelines of diffusers that were saved as folders: every model, by the printed commands.

The daily tests take each model from calibration to a picture or video; the slow ones also search and compare on each.
"""

from __future__ import annotations

import json
import wave
from pathlib import Path

import PIL.Image
import pytest

import layercache
from layercache.planning.search import EFFORTS
from layercache.schedule.schedule import Schedule
from support import saved_pipelines as saved
from support.commands import done, frames_of, printed, run

STEPS = 6
MORE_STEPS = {"wan-2.2": 12, "flux-img2img": 10}  # of which a transformer runs half
OTHER_METHOD = {"ltx-2": "fbcache", "cogvideox": "fbcache"}  # where whole steps cannot be skipped
pytestmark = pytest.mark.usefixtures("short_searches")
VIDEOS = [name for name in saved.MODELS if not name.startswith(("flux", "sd3", "qwen"))]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved.prepare(monkeypatch)


# --- every model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", saved.MODELS)
def test_from_calibration_to_a_file_by_the_printed_commands(folder, name):
    words = saved.words_for(folder, name)
    search, plan = printed(done("calibrate", *words, "-p", "a fox", "--steps", steps_of(name), width=60))
    assert search[0] == "search" and set(words) <= set(search)
    (generate,) = printed(done(*plan, width=60))
    assert set(words) <= set(generate) and Schedule.load("schedule.json").used < 1
    output = done(*generate[:-1], "--json", "figures.json")  # without --compare
    figures = json.loads(Path("figures.json").read_text())
    schedule = Schedule.load("schedule.json")
    assert figures["cache"]["used"] == pytest.approx(schedule.used) and figures["prompt"] == "a fox"
    if name in VIDEOS:
        assert "video: video.mp4" in output
        frames = frames_of(Path("video.mp4"))
        assert len(frames) > 1 and frames[0].shape == (32, 32, 3)
    else:
        assert PIL.Image.open("picture.png").size == (32, 32)
    if name == "ltx-2":
        with wave.open("video.wav") as sound:
            assert sound.getparams()[:3] == (2, 2, 16000) and sound.getnframes() > 50


def steps_of(name: str) -> int:
    return MORE_STEPS.get(name, STEPS)


def search_words(name: str) -> tuple[object, ...]:
    more = ("--effort", "quick", "--samples", 2, "--validation", 1, "--budgets", "0.75")
    return ("--steps", steps_of(name), "-p", "a fox", "-p", "a cat", *more)


def test_from_a_search_to_a_file_by_the_printed_commands(folder, monkeypatch):
    monkeypatch.setitem(EFFORTS, "quick", 5)  # two schedules
    whole_way(folder, "wan-i2v")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in saved.MODELS if name != "wan-i2v"])
def test_search_on_every_model(folder, name):
    whole_way(folder, name)


def whole_way(folder: Path, name: str) -> None:
    words = saved.words_for(folder, name)
    (plan,) = printed(done("search", *words, *search_words(name), width=60))
    front = layercache.Front.load("front.json")
    assert front.points[0].held_out and not Path("front.search").exists()
    (generate,) = printed(done(*plan, width=60))
    output = done(*generate, "--json", "figures.json")
    cached = json.loads(Path("figures.json").read_text())["comparison"]["runs"][1]
    assert cached["psnr"]["count"] == 1 and cached["psnr"]["mean"] > 5
    assert "comparison: " in output
    (again,) = printed(done("refit", "schedule.json", *words, "-p", "a fox", "--samples", 1, width=60))
    assert again[-2:] == ["refitted.json", "--compare"]


@pytest.mark.slow
@pytest.mark.parametrize("name", saved.MODELS)
def test_compare_on_every_model(folder, name):
    words = saved.words_for(folder, name)
    counts = ("--seeds", 2, "--calibration", 1, "--steps", steps_of(name), "--budgets", "0.75", "-p", "a fox")
    methods = f"{OTHER_METHOD.get(name, 'uniform')},layercache-planned,invardiff"
    done("compare", *words, *counts, "--methods", methods, "--json", "figures.json")
    outcomes = json.loads(Path("figures.json").read_text())["outcomes"]
    assert [outcome["error"] for outcome in outcomes] == ["", "", ""]
    assert all(len(outcome["psnr"]) == 2 for outcome in outcomes) and max(one["used"] for one in outcomes[1:]) <= 0.76
    videos = 2 if name.startswith(("wan", "ltx", "cogvideox", "hunyuan-video")) else 0
    assert all(len(outcome["frame_psnr"]) == len(outcome["temporal_psnr"]) == videos for outcome in outcomes)


# --- a comparison that is finished ----------------------------------------------------------------------------------


def test_a_finished_comparison_loads_nothing(folder, monkeypatch):
    flux = saved.saved_in(folder, "flux")
    counts = ("--seeds", 2, "--calibration", 1, "--steps", STEPS, "--budgets", "0.75", "-p", "a fox")
    words = ("compare", "--model", flux, *saved.SMALL, *saved.SHORT, *counts)
    # one of them fails for good on this model
    first = done(*words, "--methods", "uniform,diffusers:seacache", "--json", "first.json")
    assert "finished before" not in first

    def loaded(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr("layercache.tools.cli.compare.load_with_entries", loaded)
    again = done(*words, "--methods", "uniform,diffusers:seacache", "--json", "again.json")
    assert "finished before" in again and "--retry" in again
    assert json.loads(Path("first.json").read_text()) == json.loads(Path("again.json").read_text())
    for other in (
        ("--methods", "fbcache"),
        ("--methods", "uniform", "--seeds", 3),
        ("--methods", "uniform", "--retry"),
    ):
        with pytest.raises(AssertionError, match="loaded"):
            run(*words, *other)
