"""Processes of this machine that run one command line and share out its samples.

They are hosted by the elastic launcher of torch: where one dies, all are started again, and go on from what the command
kept on the disk.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from layercache._utils.processes import AGAIN, HOSTED, THREADS, leads
from layercache.errors import CrewError

SINGLE_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of torch: each start has a store of its own, so that none reads the addresses of the dead."""

INTERFACE = "GLOO_SOCKET_IFNAME"
PATIENCE = 60.0
"""Seconds in which the other processes end behind one that failed; as a rule they have raised the same error."""

WAITED, STOPPED = "waited", "stopped"
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C has ended."""

_LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing")
_LOOK = 0.5  # seconds between two looks of a process at whether the others are there


def launch_here(argv: Sequence[str], workers: int, restarts: int = 3, threads: int | None = None) -> int:
    """Runs a command line of Python in several processes of this machine; gives its exit code, the leader's first.

    Each process has RANK, WORLD_SIZE and LOCAL_RANK in its environment, for `crew_of_environment`. What the processes
    that do not lead print is not shown.

    Args:
        argv: what stands behind ``python`` on the command line: ``("-m", "layercache", "calibrate", ...)``, or a script
            and its arguments.
        workers: how many processes.
        restarts: how often all of them are started again where one died, or lost another one.
        threads: of each process; OMP_NUM_THREADS, or the cores divided by ``workers``, by default.

    Raises:
        CrewError: a process died, and did so after every restart.
        KeyboardInterrupt: Ctrl-C, of which a process died that was just starting.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Ctrl-C is ours; older versions of torch cannot leave it out
    can_choose = "signals_to_handle" in LaunchConfig.__dataclass_fields__
    more: dict[str, Any] = {"signals_to_handle": "SIGTERM,SIGHUP"} if can_choose else {}
    with (
        tempfile.TemporaryDirectory(prefix="layercache-") as logs,
        _environment(workers, threads),
        _interrupts_passed(Path(logs, STOPPED)),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            run_id=f"layercache-{os.getpid()}-{time.monotonic_ns()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=restarts,
            logs_specs=DefaultLogsSpecs(log_dir=logs, local_ranks_filter={0}),
            **more,
        )
        waited, stopped = Path(logs, WAITED), Path(logs, STOPPED)
        try:
            codes = elastic_launch(config, _run)(tuple(argv), logs, PATIENCE)
        except ChildFailedError as error:
            if stopped.exists():
                raise KeyboardInterrupt from None
            number, failure = error.get_first_failure()
            if not waited.exists():
                what = f"process {number} of {workers} {_end_of(failure.exitcode)}"
                raise CrewError(gave_up(what, restarts)) from None
        if waited.exists():
            rank, code = waited.read_text().split()
            raise CrewError(
                f"process {rank} of {workers} ended with exit code {code}, and others waited for it in vain; give the "
                "command without --workers to see why",
                argument="workers",
            )
    return next((codes[rank] for rank in sorted(codes) if codes[rank]), 0)


def gave_up(what: str, restarts: int) -> str:
    """A sentence for processes that died again and again, and ``what`` happened last."""
    again = f", after {restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
    return f"{what}{again}; the same command goes on from what is finished"


def threads_of(workers: int, wanted: int | None = None) -> int:
    """Threads of each of several processes of this machine: those wanted, OMP_NUM_THREADS, or a share of the cores."""
    if wanted is None and os.environ.get(THREADS, "").isdigit():
        wanted = int(os.environ[THREADS])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted or max(1, cores // workers)


def _end_of(code: int) -> str:
    """How a process ended, from its exit code."""
    if code == AGAIN:
        return "lost the connection to another one, which had stopped answering"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was ended by {name}" + (", which the system sends where memory is short" if name == "SIGKILL" else "")


@contextlib.contextmanager
def _environment(workers: int, threads: int | None) -> Iterator[None]:
    """Context with the environment variables of the processes that are started in it, and without torch's messages."""
    more = {SINGLE_STORE: "1", HOSTED: "1", THREADS: str(threads_of(workers, threads))}
    if sys.platform == "linux":
        more[INTERFACE] = os.environ.get(INTERFACE) or "lo"
    ignored = [os.environ.get("PYTHONWARNINGS"), "ignore::UserWarning:multiprocessing.resource_tracker"]
    more["PYTHONWARNINGS"] = ",".join(filter(None, ignored))  # of what a process that was killed has left behind
    before = {name: os.environ.get(name) for name in (*more, "TORCHELASTIC_SIGNALS_TO_HANDLE", "LOGLEVEL")}
    loggers = {name: logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(_LOGGERS)}
    levels = {name: logger.level for name, logger in loggers.items()}
    os.environ |= {"LOGLEVEL": "CRITICAL"} | more
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for name, level in levels.items():
            loggers[name].setLevel(level)


@contextlib.contextmanager
def _interrupts_passed(stopped: Path) -> Iterator[None]:
    """Context in which Ctrl-C reaches the processes, which end in order; a second one ends them at once.

    A process that is just starting dies of it; the file ``stopped`` says that it is not to be started again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def passed(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stopped.touch()
        for process in multiprocessing.active_children():
            with contextlib.suppress(OSError):
                os.kill(process.pid or 0, signal.SIGINT)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, passed)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- one process -------------------------------------------------------------------------------------------------


def _run(argv: tuple[str, ...], folder: str, patience: float) -> int:
    """One process of `launch_here`: runs the command line, and gives its exit code.

    An error that a restart may mend ends the process; the launcher then starts all of them again.
    """
    if Path(folder, WAITED).exists():
        return 1
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and Path(folder, STOPPED).exists():
        if leads():
            print("\nStopped while the processes were starting.", file=sys.stderr)
        return INTERRUPTED
    failed, ended = Path(folder, f"failed-{os.environ['TORCHELASTIC_RESTART_COUNT']}"), threading.Event()
    threading.Thread(target=_watch, args=(os.getppid(), failed, patience, ended), daemon=True).start()
    signal.signal(signal.SIGINT, _interrupt_once)
    code = exit_code_of(lambda: run_python(argv))
    ended.set()
    if code == AGAIN:
        raise SystemExit(AGAIN)
    if code:
        failed.write_text(f"{os.environ['RANK']} {code}")
    return code


def exit_code_of(command: Callable[[], object]) -> int:
    """Runs a command that ends as a program does, and gives its exit code; the leader prints an error."""
    try:
        command()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        if leads():
            print(end.code, file=sys.stderr)
        return 1
    except CrewError:
        return AGAIN
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException:
        if leads():
            traceback.print_exc()
        return 1
    return 0


def run_python(argv: Sequence[str]) -> dict[str, Any]:
    """Runs a command line of Python in this process: ``("-m", module, ...)``, or a script and its arguments."""
    if argv[0] == "-m":
        sys.argv = list(argv[1:])
        return runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    sys.argv = list(argv)
    return runpy.run_path(argv[0], run_name="__main__")


def _watch(parent: int, failed: Path, patience: float, ended: threading.Event) -> None:
    """Ends this process as soon as its parent is gone, or where it waits for one that has failed."""
    since = float("inf")
    while os.getppid() == parent:
        time.sleep(_LOOK)
        if not ended.is_set() and failed.exists():
            since = min(since, time.monotonic())
            if time.monotonic() - since > patience:
                failed.with_name(WAITED).write_text(failed.read_text())
                os._exit(AGAIN)
    os._exit(1)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Ctrl-C comes twice, from the terminal and from the parent; the second one must not break off the first's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
