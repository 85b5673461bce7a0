"""What the processes of test_crew.py do."""

from __future__ import annotations

import os
import signal
import threading
import time

from layercache.errors import CalibrationError, CrewError
from layercache.parallel.crew import BLOCK, Crew

SAMPLES = [f"sample {k}" for k in range(7)]


def shared(crew: Crew) -> tuple:
    """Everything a crew does with seven samples."""
    own = crew.share(SAMPLES)
    seen: list[tuple[int, int]] = []
    squares = crew.map(lambda k: k * k, range(7), lambda k, value: seen.append((k, value)))
    kept = crew.map(lambda k: -k, range(7), lambda k, value: seen.append((k, value)), keep=False)
    return own, crew.gather(own), crew.agree(crew.rank), squares, seen, kept, crew.differences()


def two_tasks_fail(crew: Crew, keep: bool = True) -> list[int]:
    def task(number: int) -> int:
        if number in (3, 4):
            raise CalibrationError(f"sample {number} is bad", argument="prompts")
        return number

    return crew.map(task, range(6), keep=keep)


def gathered_sizes(crew: Crew) -> list[bool]:
    """Values of all lengths around that of a block, those of other processes longer or shorter."""
    found = []
    for size in (0, BLOCK - 200, BLOCK - 8, BLOCK, BLOCK + 1, 5 * BLOCK):
        values = [bytes([k]) * (size if k == 1 else k) for k in range(crew.world)]
        found.append(crew.gather([values[crew.rank]]) == values)
    return found


class Unsendable(Exception):
    """Cannot be read again once written, for want of its second argument."""

    def __init__(self, first: int, second: int):
        super().__init__(f"{first} and {second}")


def one_fails(crew: Crew, is_last: bool) -> list:
    """The error of process 1 as all see it, who are in step again behind it."""
    found: list = []
    try:
        with crew.together():
            crew.gather([0])
            if crew.rank == 1:
                raise ValueError("here") if is_last else Unsendable(1, 2)
            if not is_last:
                crew.gather([1])
    except Exception as error:
        found.append(type(error).__name__)
    return [*found, *crew.gather([crew.rank])]


def a_task_fails_unsendably(crew: Crew) -> list[int]:
    def task(number: int) -> int:
        raise Unsendable(1, 2)

    return crew.map(task, range(3))


def leader_cannot_write(crew: Crew) -> list[int]:
    def write(task: int, result: int) -> None:
        raise OSError("the disk is full")

    return crew.map(lambda k: k, range(2), write)


def interrupted(crew: Crew) -> str:
    try:
        with crew.together():
            if crew.rank == 0:
                os.kill(os.getpid(), signal.SIGINT)
            crew.gather([1])
    except KeyboardInterrupt:
        return "interrupted"
    return "went on"


def all_are_interrupted(crew: Crew) -> list:
    """Ctrl-C comes to all: one computes and ends, the others wait for it, and hear of their own afterwards."""
    found: list = []
    try:
        with crew.together():
            if crew.rank == 0:
                time.sleep(1.0)
                os.kill(os.getpid(), signal.SIGINT)
            else:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            crew.gather([1])
    except KeyboardInterrupt:
        found.append("interrupted")
    return [*found, *crew.gather([crew.rank])]


def others_differ(crew: Crew) -> None:
    crew.check_same("a model" if crew.rank < 2 else "another", "another model")


def one_dies(crew: Crew) -> str:
    """The last task, since one process is gone behind it."""
    if crew.rank == 1:
        os._exit(7)
    try:
        crew.gather([1])
    except CrewError as error:
        return str(error)
    return "not noticed"
