"""The command line: ``layercache`` and its commands.

Nothing heavy is imported here, so that help and mistakes in the arguments are answered at once.
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from layercache import __version__
from layercache._utils.processes import AGAIN, HOSTED, leads
from layercache._utils.text import cleaned, shown
from layercache.errors import CrewError, LayerCacheError, LayerCacheWarning
from layercache.tools.cli import bench, schedule
from layercache.tools.cli.calibrate import calibrate
from layercache.tools.cli.compare import compare
from layercache.tools.cli.demo import demo
from layercache.tools.cli.doctor import doctor
from layercache.tools.cli.generate import generate
from layercache.tools.cli.plan import plan
from layercache.tools.cli.refit import refit
from layercache.tools.cli.search import search
from layercache.tools.cli.show import models, show
from layercache.tools.cli.train_router import train_router
from layercache.tools.cli.ui import ui
from layercache.tools.cli.workers import GIVEN

COMMANDS = (demo, search, plan, generate, refit, calibrate, compare, train_router, show, models, doctor, ui)
PARETO = "--pareto"
_UsageError: Any = typer.BadParameter.__base__  # typer may bring a click of its own
_COMMAND = "layercache.command"  # in the context: the command that was given

# Options that set an argument of several names: the guidance of a pipeline with two forwards.
SAME = {"true_cfg_scale": "guidance_scale"}


class Commands(TyperGroup):
    """Commands whose errors are a sentence instead of a traceback (which ``LAYERCACHE_DEBUG=1`` brings back)."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if parent is None:
            GIVEN.set(tuple(args))
        return super().make_context(info_name, args, parent, **extra)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] == "plan" and PARETO in args:
            # until 0.1 the search was an option of 'plan', with a profile; for one release the old form still works
            typer.echo(f"'layercache plan {PARETO}' is 'layercache search' now, which needs no profile.", err=True)
            args = ["search", *(word for word in args[1:] if word != PARETO and not word.endswith(".safetensors"))]
        name, command, rest = super().resolve_command(ctx, args)
        ctx.meta[_COMMAND] = command
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except _UsageError as error:
            if not leads():
                raise _ended_behind(2) from None
            error.message = cleaned(error.message)
            raise
        except BrokenPipeError:
            raise  # `| head` has seen enough; the framework ends quietly
        except KeyboardInterrupt as error:
            if leads():
                typer.echo(f"\n{cleaned(str(error)) or 'Stopped; nothing was written.'}", err=True)
            raise typer.Exit(130) from None
        except (LayerCacheError, OSError) as error:
            if os.environ.get("LAYERCACHE_DEBUG") == "1":
                raise
            again = isinstance(error, CrewError) and error.argument is None
            if not leads() or (again and os.environ.get(HOSTED)):
                raise _ended_behind(AGAIN if again else 1) from None
            from layercache.tools.report.console import PlainConsole

            console = PlainConsole(stderr=True)
            console.print(_sentence(error, ctx.meta.get(_COMMAND)), style="red", soft_wrap=True)
            raise typer.Exit(AGAIN if again else 1) from None


def _ended_behind(code: int) -> typer.Exit:
    """The end of a process whose error another one prints.

    As soon as a process has ended, torchrun ends all of them, and the one that prints it must come before that.
    """
    if not os.environ.get(HOSTED):
        time.sleep(1.0)
    return typer.Exit(code)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning of the library as a sentence; others as Python shows them."""
    if not leads():
        return
    if issubclass(category, LayerCacheWarning):
        typer.echo(f"Warning: {cleaned(str(message))}.", err=True)
    else:
        typer.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def _sentence(error: Exception, command: Any = None) -> str:
    """The message of an error, behind the option that set the argument it refuses."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {shown(error.filename)}" if error.filename else error.strerror
    text = text.strip() or type(error).__name__
    option = option_of(command, getattr(error, "argument", None))
    text = f"Invalid value for {option}: {text}" if option else text
    return f"Error: {text}" if text.endswith((".", "!", "?")) else f"Error: {text}."


def option_of(command: Any, argument: str | None) -> str | None:
    """The long form of the option of a command that sets an argument of the library, if one does."""
    if command is None or argument is None:
        return None
    name = SAME.get(argument, argument)
    options = [max(one.opts, key=len) for one in command.params if one.name == name]
    return next((option for option in options if option.startswith("--")), None)


app = typer.Typer(
    name="layercache",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Faster picture generation: layercache computes a transformer's layer groups only at the steps that need it.

    Start with `layercache demo`: it runs on any machine and downloads nothing.

    For your own model: `search` finds the best schedule for every amount of compute by running a few, `plan`
    takes one out, `generate` draws with it, `refit` fits it to changed weights, `compare` runs every method
    beside it; `ui` opens a page to play with. `calibrate` measures groups of layers, for schedules that `plan`
    makes without a search. `show` explains a file, `schedule edit` changes one, `doctor` checks your
    installation, `bench` measures the ops.
    """,
    epilog="Set LAYERCACHE_DEBUG=1 to see the traceback of an error.",
)

for function in COMMANDS:
    app.command(function.__name__.replace("_", "-"))(function)
app.add_typer(bench.app, name="bench", cls=Commands)
app.add_typer(schedule.app, name="schedule", cls=Commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layercache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``layercache`` command."""
    app()


if __name__ == "__main__":
    main()
