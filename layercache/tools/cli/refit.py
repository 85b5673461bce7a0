"""``layercache refit``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.tools.cli.common import Json, Printer, Seed, check_outputs, save, when_stopped
from layercache.tools.cli.following import generate_with, with_command
from layercache.tools.cli.options import CallOptions, ModelOptions, PromptOptions, with_options
from layercache.tools.cli.pipelines import (
    bring_pictures,
    call_arguments,
    count_calls,
    load_with_prompts,
    pictures_of,
    refused_arguments,
)
from layercache.tools.cli.workers import WorkerOptions, crew_for

if TYPE_CHECKING:
    from layercache.planning.front import Point

ScheduleFile = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="A schedule of whole steps, from 'search' and 'plan'.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The schedule to write.")]
Steps = Annotated[int | None, typer.Option("--steps", min=2, help="Denoising steps; those of the schedule.")]
Samples = Annotated[int, typer.Option(min=1, help="Pictures to fit to, prompts in turn.")]


@with_options
def refit(
    schedule: ScheduleFile,
    model: ModelOptions,
    prompts: PromptOptions,
    call: CallOptions,
    workers: WorkerOptions,
    output: Output = Path("refitted.json"),
    num_inference_steps: Steps = None,
    samples: Samples = 8,
    seed: Seed = 1000,
    json_to: Json = None,
) -> None:
    """Fit a schedule's forecasts anew: to other weights (a LoRA, a checkpoint), guidance, size or number of steps.

    It costs one full run and one cached run per picture, against the many schedules that a search runs.

    Example: `layercache refit schedule.json --model my-finetune --prompts-file prompts.txt -o schedule-finetune.json`
    """
    import layercache

    check_outputs({"output": output, "json_to": json_to}, [schedule, prompts.prompts_file])
    plan = layercache.Schedule.load(schedule)
    crew = crew_for(workers, samples=count_calls(model, samples))
    pipe, found = load_with_prompts(model, prompts, call)
    settings: dict[str, Any] = {"num_inference_steps": num_inference_steps or plan.num_steps}
    settings |= {"crew": crew, **call_arguments(pipe, call, bring_pictures(found))}
    with when_stopped("Stopped; nothing was written."), refused_arguments():
        pictures, seeds = pictures_of(pipe, found, samples), range(seed, seed + samples)
        point = layercache.refit(pipe, plan, pictures, seeds=seeds, **settings)
    if not crew.leads:
        return
    fingerprint = with_command(point.schedule.fingerprint, model, call, found[0])
    _report(Printer(json_to), replace(point, schedule=replace(point.schedule, fingerprint=fingerprint)), output)


def _report(printer: Printer, point: Point, output: Path) -> None:
    from layercache._utils.metrics import summarise

    save(output, point.schedule.save)
    fitted, expected = summarise(point.psnr), summarise(point.likely)
    printer.say(
        f"{point.used:.1%} of the steps are computed. PSNR against the full run: mean {fitted.mean:.1f} dB on the "
        f"{fitted.count} pictures it was fitted to; expected of others {expected.mean:.1f}, 10 % of them below "
        f"{expected.quantile10:.1f}.",
        f"schedule: {shown(output)}",
    )
    printer.following(generate_with(output, point.schedule.fingerprint, "--compare") or ["show", output])
    printer.figures({"kind": "refit", "used": point.used, "calibration": asdict(fitted), "expected": asdict(expected)})
