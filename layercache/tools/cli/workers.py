"""Options of the processes that share out a command's samples, and how the command starts them.

A command takes a parameter ``workers: WorkerOptions``, and after its checks calls `crew_for`, which gives the crew of
this process. Where other processes are to be started, that call starts them with the same command line, waits, and
ends the command with their exit code. What follows it is run by all of them: errors are raised by all and printed by
the leader; `Printer`, `save` and `check_outputs` do nothing in the others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from layercache._utils.processes import HOSTED

if TYPE_CHECKING:
    from layercache.parallel.crew import Crew

PANEL = "Workers"

GIVEN: ContextVar[Sequence[str]] = ContextVar("the words of the command line", default=())
_RUNNING: ContextVar[contextlib.ExitStack | None] = ContextVar("what ends with the command", default=None)


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


def crew_for(options: WorkerOptions, samples: int | None = None) -> Crew:
    """The crew of this process; where the options ask for other processes, starts those and ends the command.

    Args:
        options: of the command.
        samples: how many there are to share, where that is known before the model is loaded.

    Raises:
        typer.BadParameter: the options contradict each other, the environment, or the number of samples.
        typer.Exit: the processes have ended; its exit code is theirs.
    """
    from layercache.parallel.crew import Crew, crew_of_environment

    _check(options)
    if not os.environ.get(HOSTED) and (options.workers or options.ray):
        raise NotImplementedError  # launching follows
    _set_threads(options.threads)
    crew = crew_of_environment() if os.environ.get("RANK") else Crew()
    _check_samples(crew.world, samples)
    running = _RUNNING.get()
    if crew.world > 1 and running is not None:
        running.callback(crew.close)
        running.enter_context(crew.together())
    return crew


@contextlib.contextmanager
def command_running() -> Iterator[None]:
    """Context of a command, at whose end its processes wait for each other."""
    with contextlib.ExitStack() as stack:
        token = _RUNNING.set(stack)
        try:
            yield
        finally:
            _RUNNING.reset(token)


def _check(options: WorkerOptions) -> None:
    if os.environ.get("RANK") and not os.environ.get(HOSTED):
        for name, value in (("--workers", options.workers), ("--ray", options.ray)):
            if value is not None:
                raise typer.BadParameter(
                    "the processes were started by torchrun, or another launcher, already (RANK is set); leave it out.",
                    param_hint=name,
                )


def _check_samples(world: int, samples: int | None) -> None:
    if samples is not None and world > samples:
        raise typer.BadParameter(
            f"{world} processes cannot share {samples} samples; take fewer, or more samples.",
            param_hint="--workers",
        )


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
