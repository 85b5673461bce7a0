"""Commands in processes of their own, which start others: seen from outside, and bounded in time."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors.numpy import load_file

LIMIT = 150.0  # seconds
LOOPBACK_ONLY = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "-")
ROOT = Path(__file__).parents[2]


@functools.cache
def alone() -> tuple[str, ...]:
    """Words before a command that give it a network of its own with nothing but the loopback, where that is allowed."""
    if not all(map(shutil.which, ("unshare", "ip"))):
        return ()
    return () if subprocess.run([*LOOPBACK_ONLY, "true"], capture_output=True).returncode else LOOPBACK_ONLY


def command(*words: object) -> list[str]:
    """The words that run a command of layercache."""
    return [sys.executable, "-m", "layercache", *map(str, words)]


@contextmanager
def running(words: Sequence[str], folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Context with a process that runs, whose descendants are all gone at the end; its output is one text."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "RAY_ADDRESS")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    own |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    process = subprocess.Popen(words, cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        family = _family(process.pid)
        process.kill()
        process.wait()
        gone_or_killed(family)


def ended(process: subprocess.Popen[str]) -> str:
    """What a process has printed, once it has ended, and all that it started."""
    family = _family(process.pid)
    text, _ = process.communicate(timeout=LIMIT)
    gone_or_killed(family)
    return text


def gone_or_killed(family: Sequence[psutil.Process], wait: float = 20.0) -> None:
    """Fails where one of the processes still runs."""
    _, alive = psutil.wait_procs(family, timeout=wait)
    for one in alive:
        one.kill()
    assert not alive, f"left over: {alive}"


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that share out the samples, in no order."""
    found = []
    for one in _family(process.pid):
        with suppress(psutil.Error):  # gone by now
            words = " ".join(one.cmdline())
            if "multiprocessing.spawn" in words or words.startswith("ray::_Host"):
                found.append(one)
    return found


def ranks_once(condition: Callable[[], bool], process: subprocess.Popen[str], count: int = 2) -> list[psutil.Process]:
    """The processes that share out the samples, as soon as something is so; they are sought before."""
    found: list[psutil.Process] = []

    def are_there() -> bool:
        found[:] = ranks_of(process)
        return len(found) == count

    wait_until(are_there, process)
    wait_until(condition, process)
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Waits for what a running process does."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def arrays_of(path: Path) -> dict[str, bytes]:
    """The tables of a profile as bytes."""
    return {name: array.tobytes() for name, array in load_file(path).items()}
