"""``layercache doctor``."""

from __future__ import annotations

import typer

from layercache.tools.cli.common import Json, Printer, check_outputs


def doctor(json_to: Json = None) -> None:
    """Check the installation: packages, compiled core, GPU, and what each operation will run on.

    Ends with exit code 0 when layercache can be used. Put its output into a bug report.

    Example: `layercache doctor --json doctor.json`
    """
    from layercache.tools.doctor import diagnose
    from layercache.tools.report.machine import machine_line

    check_outputs({"json_to": json_to})
    printer = Printer(json_to)
    diagnosis = diagnose()
    printer.say(diagnosis, machine_line(diagnosis.machine))
    printer.figures(diagnosis.to_json())
    raise typer.Exit(0 if diagnosis.usable else 1)
