"""``layercache refit``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from layercache._utils.text import shown
from layercache.tools.cli.common import (
    Device,
    Dtype,
    DtypeOption,
    Guidance,
    Height,
    Json,
    Model,
    Printer,
    Prompts,
    PromptsFile,
    Seed,
    Width,
    check_outputs,
)
from layercache.tools.cli.pipelines import call_arguments, load_with_prompts, pictures_of, refused_arguments

ScheduleFile = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="A schedule of whole steps, from 'search' and 'plan'.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The schedule to write.")]
Steps = Annotated[int | None, typer.Option("--steps", min=2, help="Denoising steps; those of the schedule.")]
Samples = Annotated[int, typer.Option(min=1, help="Pictures to fit to, prompts in turn.")]


def refit(
    schedule: ScheduleFile,
    output: Output = Path("refitted.json"),
    model: Model = "demo",
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    num_inference_steps: Steps = None,
    samples: Samples = 8,
    seed: Seed = 1000,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Fit a schedule's forecasts anew: to other weights (a LoRA, a checkpoint), guidance, size or number of steps.

    It costs one full run and one cached run per picture, against the many schedules that a search runs.

    Example: `layercache refit schedule.json --model my-finetune --prompts-file prompts.txt -o schedule-finetune.json`
    """
    import layercache
    from layercache._utils.metrics import summarise

    check_outputs({"output": output, "json_to": json_to}, [schedule, prompts_file])
    plan = layercache.Schedule.load(schedule)
    pipe, found = load_with_prompts(model, prompts, prompts_file, device, dtype)
    settings = call_arguments(pipe, guidance_scale, height, width)
    settings["num_inference_steps"] = num_inference_steps or plan.num_steps
    with refused_arguments():
        pictures, seeds = pictures_of(pipe, found, samples), range(seed, seed + samples)
        point = layercache.refit(pipe, plan, pictures, seeds=seeds, **settings)
    point.schedule.save(output)
    fitted, expected = summarise(point.psnr), summarise(point.likely)
    printer = Printer(json_to)
    printer.say(
        f"{point.used:.1%} of the steps are computed. PSNR against the full run: mean {fitted.mean:.1f} dB on the "
        f"{fitted.count} pictures it was fitted to; expected of others {expected.mean:.1f}, 10 % of them below "
        f"{expected.quantile10:.1f}.",
        f"schedule: {shown(output)}",
    )
    printer.figures({"kind": "refit", "used": point.used, "calibration": asdict(fitted), "expected": asdict(expected)})
