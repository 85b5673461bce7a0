"""``layercache compare``."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from layercache._utils.files import check_output_folder
from layercache._utils.text import shown
from layercache.tools.cli.common import (
    Budgets,
    Device,
    Dtype,
    DtypeOption,
    Effort,
    EffortOption,
    Guidance,
    Height,
    Json,
    Model,
    Printer,
    Prompts,
    PromptsFile,
    Width,
    batches_of,
    check_outputs,
    parse_budgets,
)
from layercache.tools.cli.pipelines import load_with_prompts, quiet_call, refused_arguments

if TYPE_CHECKING:
    from layercache.tools.compare.run import Comparison

SHOWN = 8

Methods = Annotated[
    str, typer.Option(help="Names with commas between them; 'ours', 'peers' or 'all' for all of a kind.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Pictures to compare.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures per call.")]
Calibration = Annotated[int, typer.Option(min=1, help="Pictures to fit and tune on, with other seeds.")]
FourSteps = Annotated[int, typer.Option("--steps", min=4, help="Denoising steps.")]
Folder = Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Folder; a comparison in it goes on.")]


def compare(
    model: Model = "demo",
    methods: Methods = "all",
    budgets: Budgets = "0.75,0.5,0.33",
    seeds: Seeds = 12,
    batch: Batch = 4,
    calibration: Calibration = 8,
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    num_inference_steps: FourSteps = 30,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    effort: EffortOption = Effort.normal,
    output: Folder = Path("comparison"),
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Compare every caching method, and the caches of other packages, on one model, the same seeds and budgets.

    Thresholds are tuned on calibration pictures so that every method comes as close to each budget as it can; PSNR and
    SSIM are of other seeds. Given again with the same folder, it goes on where it was stopped.

    Example: `layercache compare --methods layercache,meancache,fbcache,diffusers:fbcache --budgets 0.6,0.4`
    """
    check_output_folder(output, "output")
    check_outputs({"json_to": json_to}, [prompts_file])
    names, shares = _method_names(methods), parse_budgets(budgets)
    pipe, found = load_with_prompts(model, prompts, prompts_file, device, dtype)
    call = quiet_call(pipe, num_inference_steps, guidance_scale, height, width)
    from layercache.tools.compare.entries import CalibratedModel
    from layercache.tools.compare.run import Comparison

    output.mkdir(parents=True, exist_ok=True)
    tuned_on, seeds_behind = batches_of(found, seeds, calibration, batch), list(range(seeds, seeds + calibration))
    calibrated = CalibratedModel(pipe, tuned_on, seeds_behind, call, shares, effort.value, output / "search")
    comparison = Comparison(calibrated, batches_of(found, 0, seeds, batch), list(range(seeds)), output)
    _run(Printer(json_to), comparison, names, f"{model}, {num_inference_steps} steps, {seeds} pictures")


def _method_names(text: str) -> list[str]:
    """The methods that were asked for; what is missing or unknown is refused before anything is loaded."""
    from layercache.tools.compare.entries import METHODS, PEERS, check_methods
    from layercache.tools.report import pages, plots

    plots.check_installed()
    pages.check_installed()
    kinds = {"ours": list(METHODS), "peers": list(PEERS), "all": [*METHODS, *PEERS]}
    names = kinds.get(text) or [name.strip() for name in text.split(",") if name.strip()]
    check_methods(names)
    return names


def _run(printer: Printer, comparison: Comparison, names: list[str], title: str) -> None:
    from layercache.tools.compare.report import comparison_table, failures, save_comparison

    with refused_arguments(), printer.console.status(Text("comparing")) as status:
        outcomes = comparison.run(names, lambda text: status.update(Text(shown(text))))
    prompts = [prompt for batch in comparison.prompts for prompt in batch][:SHOWN]
    files = save_comparison(comparison, outcomes, [textwrap.shorten(prompt, 16) for prompt in prompts], title)
    printer.say(comparison_table(outcomes, title, printer.console.width), *failures(outcomes), "")
    printer.say(*(f"{name}: {shown(path)}" for name, path in files.items()))
    printer.figures({"outcomes": [asdict(outcome) for outcome in outcomes]})
