"""``layercache doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from layercache.tools.cli.common import Json, Printer, check_outputs


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Also say what this pipeline lacks: a folder, a name on the Hub, one file, 'demo'."),
    ] = None,
    ops: Annotated[
        bool, typer.Option("--ops", help="Import everything, and list what each operation will run on.")
    ] = False,
    json_to: Json = None,
) -> None:
    """Check the installation: packages, compiled core, GPU; with --model, what a pipeline lacks here.

    Ends with exit code 0 when layercache can be used. Put the output of `layercache doctor --ops` into a bug report.

    Example: `layercache doctor --model black-forest-labs/FLUX.1-dev`
    """
    from layercache.tools.doctor import diagnose
    from layercache.tools.report.machine import machine_line

    check_outputs({"json_to": json_to})
    printer = Printer(json_to)
    diagnosis = diagnose(model, ops)
    printer.say(diagnosis, machine_line(diagnosis.machine))
    printer.figures(diagnosis.to_json())
    raise typer.Exit(0 if diagnosis.usable else 1)
