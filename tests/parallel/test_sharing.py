"""Calibration, search and refitting give the same bytes however many processes share the samples."""

from __future__ import annotations

from functools import partial

import pytest

from layercache.parallel.crew import Crew
from support import planning_tasks
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
    tasks = {**TASKS, "refused": planning_tasks.refused, "journal": journal}
    return dict(zip(tasks, run_crew(list(tasks.values()), request.param, folder), strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_results_have_the_same_bytes(alone, shared, name):
    for found in shared[name]:
        assert found == alone[name]


def test_journals_have_the_same_bytes(shared, tmp_path):
    wanted = planning_tasks.journal(Crew(), str(tmp_path / "search"))
    assert all(found == wanted for found in shared["journal"])


def test_errors_are_the_same_in_every_process(alone, shared):
    *named, (kind, few) = shared["refused"][0]
    assert named == alone["refused"][:2]
    assert all("unicorn" in text for _, text in named)
    assert kind == "CalibrationError" and "cannot share 1 sample" in few
    assert all(found == shared["refused"][0] for found in shared["refused"])
