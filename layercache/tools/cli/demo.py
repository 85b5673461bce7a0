"""``layercache demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layercache._utils.files import check_output_folder
from layercache.tools.cli.common import Budget, Device, Json, Printer, check_outputs, when_stopped
from layercache.tools.cli.options import ModelOptions
from layercache.tools.cli.pipelines import load_pipeline


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures and figures.")] = Path(
        "demo-output"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Only 10 steps and 4 pictures.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    budget: Budget = 0.6,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures to compare.")] = 24,
    device: Device = None,
    json_to: Json = None,
) -> None:
    """See what caching does to speed and pictures, on a small model that comes along.

    It generates the same pictures in full, with LayerCache as planned and as searched, and with whole-step reuse at
    the same budget, prints speed and similarity, and saves pictures to look at. Two minutes on two CPU cores.

    Example: `layercache demo --budget 0.5`
    """
    from layercache.tools.demo import run_demo

    check_output_folder(output, "output")
    check_outputs({"json_to": json_to})
    assert budget is not None  # it has a default
    printer = Printer(json_to)
    pipe = load_pipeline(ModelOptions(device=device))
    settings: dict[str, Any] = {"steps": steps, "budget": budget, "seeds": seeds, "quick": quick}
    with when_stopped("Stopped; nothing was written."):
        result = run_demo(output, **settings, console=printer.console, pipe=pipe)
    printer.say(result)
    printer.figures(result.figures)
