"""Options, printing and parsing that several commands share.

A parameter of a command has the name of the library's argument that it sets, whatever its option is called, so that
an error about an argument can be printed with the option.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.files import check_output, saved_anyway
from layercache._utils.processes import leads
from layercache._utils.text import shown
from layercache.errors import OutputError
from layercache.tools.report.console import PlainConsole

if TYPE_CHECKING:
    from layercache.tools.batch.entries import Entry

PIPE_WIDTH = 120
NOTHING_WRITTEN = "Stopped; nothing was written."


class Effort(str, Enum):
    """How many full generations a search may cost: 32, 72, 160."""

    quick, normal, thorough = "quick", "normal", "thorough"


def _check_budget(budget: float | None) -> float | None:
    if budget is not None and not 0 < budget <= 1:
        raise typer.BadParameter(f"{budget:g} is not a share of the block time above 0 and at most 1, such as 0.6.")
    return budget


def _bytes_of(megabytes: float | None) -> int | None:
    return None if megabytes is None or megabytes == float("inf") else int(megabytes * 1e6)


EffortOption = Annotated[
    Effort, typer.Option("--effort", help="Full generations of the search in all: quick 32, normal 72, thorough 160.")
]
Steps = Annotated[int, typer.Option("--steps", min=2, help="Denoising steps you will generate with.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first picture, the others follow.")]
Budget = Annotated[
    float | None,
    typer.Option(callback=_check_budget, help="Share of the block time that may be computed, above 0 to 1."),
]
Budgets = Annotated[str, typer.Option(help="Shares of the block time, with commas between them.")]
MaxCacheBytes = Annotated[
    float | None, typer.Option("--max-cache-mb", min=0.0, callback=_bytes_of, help="Store no more than so many MB.")
]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda or cpu; a GPU if there is one.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw it, as a PNG.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON; '-' prints them and only them.")
]


class Printer:
    """Text for people, and figures as JSON where they were asked for; nothing where another process leads."""

    def __init__(self, json_to: str | None):
        self.json_to = json_to
        self.console = PlainConsole(stderr=json_to == "-", quiet=not leads())
        if not self.console.is_terminal:
            # into a file or a pipe, tables keep their columns
            self.console = PlainConsole(stderr=json_to == "-", width=PIPE_WIDTH, quiet=not leads())

    def say(self, *parts: Any, style: str | None = None) -> None:
        for part in parts:
            self.console.print(part, style=style)

    def following(self, *commands: Sequence[object]) -> None:
        """Commands to give next, the first one first; on a line each, however long, so that they can be copied."""
        for number, words in enumerate(commands):
            line = shlex.join(shown(word) for word in ("layercache", *words))
            self.console.print(f"{'or' if number else 'next'}: {line}", style="dim", soft_wrap=True)

    def figures(self, data: Any) -> None:
        from layercache.tools.report.machine import print_json, write_json

        if not leads():
            return
        if self.json_to == "-":
            print_json(data)
        elif self.json_to is not None:
            self.say(f"figures: {save(Path(self.json_to), lambda path: write_json(path, data))}")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence that says what was kept and how to go on."""


@contextmanager
def when_stopped(kept: str, folder: Path | None = None) -> Iterator[None]:
    """Context in which Ctrl-C says what was kept, in a folder where one is given and there is something in it."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        is_empty = folder is not None and not folder.exists()
        raise Interrupted(NOTHING_WRITTEN if is_empty else kept) from error


def save(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes a result, if this process leads; where that fails after all, it goes elsewhere, and the error says where.

    Raises:
        OutputError: it could not be written to ``path``.
    """
    return path if not leads() else saved_anyway(path, write)


def parse_budgets(text: str) -> tuple[float, ...]:
    """``"0.6,0.5"`` as numbers."""
    try:
        budgets = tuple(float(part) for part in text.split(","))
    except ValueError:
        budgets = (0.0,)
    if not all(0 < budget <= 1 for budget in budgets):
        raise typer.BadParameter(f"--budgets takes shares above 0 and at most 1 such as '0.6,0.5'; got {text!r}.")
    return budgets


def parse_spans(text: str) -> tuple[int, ...]:
    """``"1,2,3"`` as numbers; ``"none"`` is empty."""
    if text.strip().lower() in ("", "none"):
        return ()
    try:
        spans = tuple(int(part) for part in text.split(","))
    except ValueError:
        spans = (0,)
    if min(spans) < 1:
        raise typer.BadParameter(f"--spans takes positive numbers such as '1,2,3', or 'none'; got {text!r}.")
    return spans


def read_prompts(prompts: Sequence[str] | None, path: Path | None, seed: int = 0) -> list[Entry]:
    """The prompts that were typed, then those of the file, each with its arguments and its category.

    Args:
        prompts, path: that were given.
        seed: of the first prompt; those without a seed of their own have this one plus their number.

    Raises:
        FileFormatError: the file holds no prompts, or a line of it is no call.
    """
    from layercache.tools.batch.entries import numbered, read_file

    typed = numbered(prompts or (), seed)
    return typed if path is None else [*typed, *read_file(path, seed + len(typed))]


def check_outputs(outputs: Mapping[str, Path | str | None], reads: Sequence[Path | None] = ()) -> None:
    """Refuses what a command could not write, before it does anything, if this process leads.

    Args:
        outputs: the files it writes, by the argument that names each; more than one of an argument are numbered
            behind a dot.
        reads: the files it reads, none of which it may replace.

    Raises:
        OutputError: a file cannot be written, or is named twice.
    """
    if not leads():
        return
    taken = {os.path.realpath(path) for path in reads if path is not None}
    for name, path in outputs.items():
        argument = name.partition(".")[0]
        if path is None or (argument == "json_to" and path == "-"):
            continue
        check_output(path, argument)
        if os.path.realpath(path) in taken:
            raise OutputError(
                f"{shown(path)} would be written over a file that this command reads or writes; name another",
                argument=argument,
            )
        taken.add(os.path.realpath(path))


def check_picture_name(path: Path, option: str) -> None:
    """Refuses a file name whose format no picture can be saved in."""
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"{shown(path)} does not end like a picture; use .png.", param_hint=option)
