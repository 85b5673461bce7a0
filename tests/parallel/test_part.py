"""Work for fewer processes than a crew has, on simulated ones."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layercache.parallel.part import by_first


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("scale")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_others_take_part_in_every_exchange(scale: ModuleType, count: int) -> None:
    exchanged = []

    def work(crew: Any) -> tuple[int, list[int], list[int]]:
        found = crew.gather(crew.share(range(5)))
        with crew.together():
            return crew.world, found, crew.map(lambda number: 2 * number, range(3))

    def task(crew: Any) -> tuple:
        found = by_first(crew, count, work)
        exchanged.append(crew.meeting.turn)
        return found, crew.gather([crew.rank])  # all are in step behind it

    wanted = (min(count, 3), [0, 1, 2, 3, 4], [0, 2, 4]), [0, 1, 2]
    assert scale.on_threads(task, scale.Meeting(3)) == [wanted] * 3
    assert len(set(exchanged)) <= 2 and min(exchanged) >= 3  # none waited for the end alone


@pytest.mark.parametrize("count", [1, 2])
def test_errors_reach_the_others(scale: ModuleType, count: int) -> None:
    def in_a_task(crew: Any) -> Any:
        return crew.map(lambda number: 1 // (number - 1), range(3))

    def outside(crew: Any) -> Any:
        if crew.leads:
            raise ZeroDivisionError("here")
        return crew.gather([0])

    def task(crew: Any) -> list:
        found: list = []
        for work in (in_a_task, outside):
            try:
                by_first(crew, count, work)
            except ZeroDivisionError as error:
                found.append(type(error).__name__)
        return found + crew.gather([crew.rank])

    assert scale.on_threads(task, scale.Meeting(3)) == [["ZeroDivisionError"] * 2 + [0, 1, 2]] * 3
    with pytest.raises(KeyboardInterrupt):
        scale.on_threads(lambda crew: by_first(crew, count, _stopped), scale.Meeting(3))


def _stopped(crew: Any) -> None:
    if crew.leads:
        raise KeyboardInterrupt
    crew.gather([0])
