"""``layercache ui``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.tools.cli.options import CallOptions, ModelOptions, with_options
from layercache.tools.cli.pipelines import load_pipeline

FrontFile = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="A front from 'search'; without one, schedules from other models' runs."
    ),
]
Host = Annotated[str, typer.Option(help="Where to serve; 0.0.0.0 for every interface of the machine.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")]
Share = Annotated[bool, typer.Option("--share", help="Also under a public address of gradio's; needs the network.")]


@with_options
def ui(
    model: ModelOptions,
    call: CallOptions,
    front: FrontFile = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    share: Share = False,
) -> None:
    """Open a page to play with: full and cached pictures side by side, for any budget.

    Example: `layercache ui --model Qwen/Qwen-Image --front front.json`
    """
    from layercache._utils.formats import FRONT
    from layercache.tools.cli.files import load
    from layercache.tools.ui import check_installed, serve

    check_installed()
    found: Any = None if front is None else load(front, FRONT)
    typer.echo(f"loading {shown(model.model)}, and warming up")
    serve(load_pipeline(model, call), found, call, host=host, port=port, share=share)
