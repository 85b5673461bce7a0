"""Options of the processes that share out a command's samples, and how the command starts them.

A command takes a parameter ``workers: WorkerOptions``, and after its checks calls `crew_for`, which gives the crew of
this process. Where other processes are to be started, that call starts them with the same command line, waits, and
ends the command with their exit code. What follows it is run by all of them: errors are raised by all and printed by
the leader; `Printer`, `save` and `check_outputs` do nothing in the others.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from layercache._utils.processes import AGAIN, HOSTED
from layercache.errors import CrewError, LayerCacheWarning

if TYPE_CHECKING:
    from layercache.parallel.crew import Crew

PANEL = "Workers"
COMMAND = ("-m", "layercache")
LARGEST = 64 << 20  # bytes of a file that is sent to other machines

GIVEN: ContextVar[Sequence[str]] = ContextVar("the words of the command line", default=())
_RUNNING: ContextVar[contextlib.ExitStack | None] = ContextVar("what ends with the command", default=None)
_CREW: ContextVar[Crew | None] = ContextVar("the crew that runs the command line", default=None)
_HAS_JOINED: ContextVar[bool] = ContextVar("whether the processes of the command are in step", default=False)
_DIFFERENCES: ContextVar[Sequence[str]] = ContextVar("what differs between its processes", default=())


@dataclass(frozen=True)
class WorkerOptions:
    """How many processes share out the samples of a command, and where they run."""

    workers: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PANEL,
            min=1,
            metavar="N",
            help="Share the samples out to so many processes, one GPU each where there are any. The result is the "
            "same, whatever the number.",
        ),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PANEL,
            metavar="local|auto|ADDRESS",
            help="Run the processes (--workers) on Ray: on this machine alone, on the cluster that it belongs to, or "
            "on that at an address.",
        ),
    ] = None
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(rich_help_panel=PANEL, min=0.0, help="GPUs of each process on Ray: 1 where there are any."),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(rich_help_panel=PANEL, min=1, help="Threads of each process: the cores divided by --workers."),
    ] = None
    restarts: Annotated[
        int,
        typer.Option(rich_help_panel=PANEL, min=0, help="How often the processes are started again where one died."),
    ] = 3


def crew_for(
    options: WorkerOptions, samples: int | None = None, files: Sequence[str | os.PathLike[str] | None] = ()
) -> Crew:
    """The crew of this process; where the options ask for other processes, starts those and ends the command.

    Args:
        options: of the command.
        samples: how many there are to share, where that is known before the model is loaded.
        files: files and folders to go on from, which are sent to the machines of a Ray cluster; files that the command
            line names are sent anyway.

    Raises:
        typer.BadParameter: the options contradict each other, the environment, or the number of samples.
        typer.Exit: the processes have ended; its exit code is theirs.
    """
    from layercache.parallel.crew import crew_of_environment

    _check(options)
    if not os.environ.get(HOSTED) and (options.ray is not None or (options.workers or 1) > 1):
        _check_samples(options.workers or 1, samples)
        raise typer.Exit(_launch(options, [path for path in files if path is not None]))
    _set_threads(options.threads)
    given = _CREW.get()
    crew = given or crew_of_environment()
    _check_samples(crew.world, samples)
    if crew.world > 1:
        _join(crew, is_own=given is None)
    return crew


@contextlib.contextmanager
def command_running() -> Iterator[None]:
    """Context of a command, at whose end its processes wait for each other."""
    with contextlib.ExitStack() as stack:
        running, found = _RUNNING.set(stack), _DIFFERENCES.set(())
        try:
            yield
        finally:
            _RUNNING.reset(running)
            _DIFFERENCES.reset(found)


def differences() -> Sequence[str]:
    """What differs between the processes that run the command, a sentence each, for the files that they make."""
    return _DIFFERENCES.get()


def _join(crew: Crew, is_own: bool) -> None:
    """From here on an error of one process is raised by all, until the command ends."""
    from layercache.parallel.crew import ATTEMPT

    running = _RUNNING.get()
    _HAS_JOINED.set(True)
    if running is not None:
        if is_own:
            running.callback(crew.close)
        running.enter_context(crew.together())
    restarts = os.environ.get(ATTEMPT) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if crew.leads and restarts != "0":
        # behind the progress bar of the one before
        typer.echo(f"\nA process died; all were started again (restart {restarts}).", err=True)
    found = tuple(crew.differences())
    _DIFFERENCES.set(found)
    for sentence in found:
        warnings.warn(f"{sentence}; the last digits of the result may depend on it", LayerCacheWarning, stacklevel=2)


def _check(options: WorkerOptions) -> None:
    """Refuses options that contradict each other, or what started this process."""
    wants = {"--workers": options.workers, "--ray": options.ray}
    if os.environ.get("RANK") and not os.environ.get(HOSTED):
        for name, value in wants.items():
            if value is not None:
                raise typer.BadParameter(
                    "the processes were started already, by torchrun or another launcher (RANK is set); leave it out.",
                    param_hint=name,
                )
    if options.ray is not None and options.workers is None:
        raise typer.BadParameter("say with --workers how many processes to run on Ray.", param_hint="--ray")
    if options.gpus_per_worker is not None and options.ray is None:
        raise typer.BadParameter("it is for --ray; without, a process has one GPU.", param_hint="--gpus-per-worker")


def _check_samples(world: int, samples: int | None) -> None:
    if samples is not None and world > samples:
        raise typer.BadParameter(
            f"{world} processes cannot share {samples} sample{'' if samples == 1 else 's'}; take fewer processes, or "
            "more samples.",
            param_hint="--workers",
        )


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


# --- starting the processes ----------------------------------------------------------------------------------------


def _launch(options: WorkerOptions, files: list[str | os.PathLike[str]]) -> int:
    """Runs the same command line in other processes, and gives its exit code."""
    words = tuple(GIVEN.get())
    try:
        return _launch_on_ray(options, words, files) if options.ray is not None else _launch_here(options, words)
    except CrewError as error:
        if error.argument is None:
            typer.echo(err=True)  # behind the progress bar
        raise


def _launch_here(options: WorkerOptions, words: Sequence[str]) -> int:
    from layercache.parallel.launching import launch_here

    return launch_here((*COMMAND, *words), options.workers or 1, options.restarts, options.threads)


def _launch_on_ray(options: WorkerOptions, words: Sequence[str], files: list[str | os.PathLike[str]]) -> int:
    from layercache.parallel.on_ray import launch_on_ray

    try:
        codes = launch_on_ray(
            functools.partial(run_words, words),
            options.workers or 1,
            address=options.ray,
            gpus=options.gpus_per_worker,
            cpus=options.threads,
            restarts=options.restarts,
            files=[*files, *_named_files(words)],
        )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            "Stopped. Where the command keeps what is finished, the same command goes on from there."
        ) from error
    return next((code for code in codes if code), 0)


def run_words(words: Sequence[str], crew: Crew) -> int:
    """Runs a command line as one of a crew's processes, and gives its exit code."""
    from layercache.parallel.launching import exit_code_of, run_python

    token, joined = _CREW.set(crew), _HAS_JOINED.set(False)
    try:
        code = exit_code_of(functools.partial(run_python, (*COMMAND, *words)))
        if code and not _HAS_JOINED.get():  # refused before the others could be asked, who wait
            with contextlib.suppress(SystemExit), crew.together():
                raise SystemExit(code)
    finally:
        _CREW.reset(token)
        _HAS_JOINED.reset(joined)
    if code == AGAIN:
        raise CrewError("the connection to another process was lost")
    return code


def _named_files(words: Sequence[str]) -> list[str]:
    """Files that a command line names, but those of models, which every machine has, or fetches."""
    values = [(word, word.partition("=")[2], *(part.partition("=")[2] for part in word.split(","))) for word in words]
    paths = [path for one in values for path in dict.fromkeys(one) if path and os.path.isfile(path)]
    return [path for path in paths if os.path.getsize(path) <= LARGEST]
