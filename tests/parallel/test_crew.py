"""Crews: samples in order, terms added in sample order, errors raised by all."""

from __future__ import annotations

from functools import partial

import pytest

from layercache.errors import CalibrationError, CrewError, ScheduleMismatchError
from layercache.parallel.crew import Crew, crew_of_environment
from support import crew_tasks
from support.crew_tasks import SAMPLES
from support.crews import run_crew

TASKS = (
    crew_tasks.shared,
    crew_tasks.two_tasks_fail,
    partial(crew_tasks.two_tasks_fail, keep=False),
    partial(crew_tasks.one_fails, is_last=False),
    partial(crew_tasks.one_fails, is_last=True),
    crew_tasks.leader_cannot_write,
    crew_tasks.interrupted,
    crew_tasks.a_task_fails_unsendably,
    crew_tasks.gathered_sizes,
    crew_tasks.all_are_interrupted,
    crew_tasks.others_differ,
    crew_tasks.one_dies,
)


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    return run_crew(TASKS, 3, tmp_path_factory.mktemp("crew"), limit=60.0)


def test_samples_are_shared_and_gathered_in_their_order(of_three):
    squares = [k * k for k in range(7)]
    for world, results in (1, [crew_tasks.shared(Crew())]), (3, of_three[0]):
        for rank, found in enumerate(results):
            pairs = [*enumerate(squares), *((k, -k) for k in range(7))] if rank == 0 else []
            assert found == (SAMPLES[rank::world], SAMPLES, 0, squares, pairs, [], [])


def test_values_of_any_length_are_gathered(of_three):
    assert of_three[8] == [[True] * 6] * 3


def test_the_first_error_in_sample_order_is_raised_by_all(of_three):
    with pytest.raises(CalibrationError) as alone:
        crew_tasks.two_tasks_fail(Crew())
    for error in (alone.value, *of_three[1], *of_three[2]):
        assert (type(error), str(error), error.argument) == (CalibrationError, "sample 3 is bad", "prompts")


def test_an_error_in_one_process_is_raised_by_all_which_go_on_together(of_three):
    names = [found[0] for found in of_three[3]]
    assert names == ["LayerCacheError", "Unsendable", "LayerCacheError"]
    assert [found[0] for found in of_three[4]] == ["ValueError"] * 3
    assert all(found[1:] == [0, 1, 2] for found in of_three[3] + of_three[4])
    assert [str(error) for error in of_three[5]] == ["the disk is full"] * 3
    assert [str(error) for error in of_three[7]] == ["Unsendable: 1 and 2"] * 3


def test_ctrl_c_in_one_process_ends_all(of_three):
    assert of_three[6] == ["interrupted"] * 3


def test_ctrl_c_in_all_processes_leaves_them_in_step(of_three):
    assert of_three[9] == [["interrupted", 0, 1, 2]] * 3


def test_processes_with_another_model_are_refused(of_three):
    for error in of_three[10]:
        assert isinstance(error, ScheduleMismatchError)
        assert str(error).startswith("process 2 has another model than process 0")


def test_a_process_that_died_is_an_error_of_its_own(of_three):
    first, died, third = of_three[11]
    assert died is None
    assert "lost the connection" in first and "lost the connection" in third


def test_half_an_environment_is_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(CrewError, match="WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"):
        crew_of_environment()
    monkeypatch.delenv("RANK")
    assert repr(crew_of_environment()) == "Crew()"
