"""Crews of processes on this machine, for tests: started by spawn, talking on loopback, bounded in time."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing as mp
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from layercache.parallel.crew import Crew, crew_of_environment


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Context in which torch has one thread, as in the processes of a crew: other numbers give other bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LIMIT = 120.0  # seconds after which processes that have not ended are ended

Task = Callable[[Crew], Any]


def run_crew(tasks: Sequence[Task], world: int, folder: Path, limit: float = LIMIT) -> list[list[Any]]:
    """What tasks, functions of modules (or their partials) that take a crew, give: per task, by rank.

    Processes run the tasks one after the other. An error is given as it was raised; of a process that died, ``None``.
    """
    if world == 1:
        return [[_outcome(task, Crew())] for task in tasks]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    targets = [functools.partial(_rank, list(tasks), rank, world, port, folder, limit) for rank in range(world)]
    processes = [context.Process(target=target, daemon=True) for target in targets]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    for process in processes:
        process.join(timeout=max(0.0, end - time.monotonic()))
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "processes of the crew did not end"
    files = [[folder / f"{number}-{rank}.pickle" for rank in range(world)] for number in range(len(tasks))]
    return [[pickle.loads(path.read_bytes()) if path.exists() else None for path in paths] for paths in files]


def _rank(tasks: list[Task], rank: int, world: int, port: int, folder: Path, limit: float) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it is ignored, as in jobs of a shell
    import torch

    torch.set_num_threads(1)
    crew = crew_of_environment(timeout=limit)
    for number, task in enumerate(tasks):
        (folder / f"{number}-{rank}.pickle").write_bytes(pickle.dumps(_outcome(task, crew)))
    crew.close()


def _outcome(task: Task, crew: Crew) -> Any:
    try:
        return task(crew)
    except Exception as error:
        return error
