"""Calibration, search and refitting give the same bytes however many processes share the samples."""

from __future__ import annotations

import json
from functools import partial

import pytest

from layercache.parallel.crew import Crew
from support import compare_tasks, planning_tasks
from support.crews import run_crew

TASKS = {
    "calibrate": planning_tasks.calibrated,
    "measured": partial(planning_tasks.calibrated, partition="measured", sensitivity="substitution"),
    "search": planning_tasks.searched,
    "stopped": partial(planning_tasks.searched, time_limit=0.0),
    "refit": planning_tasks.refitted,
}


@pytest.fixture(scope="module")
def alone():
    return {name: task(Crew()) for name, task in TASKS.items()} | {"refused": planning_tasks.refused(Crew())}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def shared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharing")
    journal = partial(planning_tasks.journal, folder=str(folder / "search"))
    begun = str(folder / "begun alone")
    planning_tasks.searched(Crew(), begun, time_limit=0.0)
    going_on = {
        "begun alone": partial(planning_tasks.searched, folder=begun),
        "begun by all": partial(planning_tasks.searched, folder=str(folder / "begun by all"), time_limit=0.0),
        "samples": partial(planning_tasks.calibrated, resume=str(folder / "samples")),
    }
    methods = compare_tasks.METHODS | (compare_tasks.MORE if request.param == 3 else {})
    compared = partial(compare_tasks.compared, folder=str(folder), methods=methods)
    tasks = {**TASKS, **going_on, "refused": planning_tasks.refused, "journal": journal, "compare": compared}
    found = dict(zip(tasks, run_crew(list(tasks.values()), request.param, folder), strict=True))
    return {"methods": methods, "folder": folder} | found


@pytest.mark.parametrize("name", TASKS)
def test_results_have_the_same_bytes(alone, shared, name):
    for found in shared[name]:
        assert found == alone[name]


@pytest.mark.slow
def test_free_noise_levels_have_the_same_bytes(tmp_path):
    task = partial(planning_tasks.searched, sigmas="free")
    wanted = task(Crew())
    assert "noise levels moved" in wanted[-1]
    assert run_crew([task], 2, tmp_path)[0] == [wanted, wanted]


def test_journals_have_the_same_bytes(shared, tmp_path):
    wanted = planning_tasks.journal(Crew(), str(tmp_path / "search"))
    assert all(found == wanted for found in shared["journal"])


def test_another_number_of_processes_goes_on(alone, shared):
    """With a search that one process, or several, began; and with a calibration that lacks a sample."""
    assert all(found == alone["search"] for found in shared["begun alone"])
    assert planning_tasks.searched(Crew(), str(shared["folder"] / "begun by all")) == alone["search"]
    samples = shared["folder"] / "samples"
    (samples / "groups-001.safetensors").unlink()
    first = (samples / "groups-000.safetensors").stat().st_mtime_ns
    assert planning_tasks.calibrated(Crew(), resume=samples) == alone["calibrate"]
    assert (samples / "groups-000.safetensors").stat().st_mtime_ns == first


def test_errors_are_the_same_in_every_process(alone, shared):
    *named, (kind, few) = shared["refused"][0]
    assert named == alone["refused"][:2]
    assert all("unicorn" in text for _, text in named)
    assert kind == "CalibrationError" and "cannot share 1 sample" in few
    assert all(found == shared["refused"][0] for found in shared["refused"])


def test_comparisons_and_their_files_have_the_same_bytes(shared, tmp_path):
    outcomes, files = compare_tasks.compared(Crew(), str(tmp_path), shared["methods"])
    errors = [error for outcome in outcomes if (error := json.loads(outcome)["error"])]
    assert errors == ["RuntimeError: no temples", "ZeroDivisionError: in one of them"] * 2  # with other settings too
    assert len(files) == 2 + len(outcomes) - 4  # full pictures, and those of what did not fail
    leader, *others = shared["compare"]
    assert leader == (outcomes, files)
    assert all(found == (outcomes, {}) for found in others)


@pytest.mark.slow
def test_cache_dit_decides_in_each_process_alone(tmp_path):
    """It averages over all processes of torch.distributed, and waits for those that run fewer pictures."""
    pytest.importorskip("cache_dit")
    wanted = compare_tasks.cached_by_cache_dit(Crew())
    assert run_crew([compare_tasks.cached_by_cache_dit], 2, tmp_path)[0] == [wanted, wanted]
