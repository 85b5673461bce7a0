"""``layercache generate``."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.files import check_output_folder
from layercache._utils.text import shown
from layercache.tools.cli import results
from layercache.tools.cli.common import Json, Printer, check_outputs, save, when_stopped
from layercache.tools.cli.files import load_schedule
from layercache.tools.cli.generate_many import ManyPrompts, check_one, draw_many
from layercache.tools.cli.options import CallOptions, ModelOptions, with_options
from layercache.tools.cli.pipelines import (
    call_arguments,
    check_demo_prompts,
    figures_of_call,
    folded,
    load_pipeline,
    refused_arguments,
    report_tables,
)
from layercache.tools.cli.workers import WorkerOptions

if TYPE_CHECKING:
    import numpy as np

    from layercache.runtime.report import CacheReport
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.schedule.schedule import Schedule

    Plan = Schedule | ModuleSchedule | None

DEFAULT_STEPS = 30
SHOWN_FRAMES = 4  # of a video, in the comparison

Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="What to draw.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Draw many: a text file with one prompt per line; JSON lines (.jsonl) with an object of the call's "
        'arguments each: {"prompt": "a fox", "seed": 3, "negative_prompt": "blur", "image": "first.png"}; or a table '
        "(.csv) whose first line names the same as columns.",
    ),
]
ScheduleFile = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="A schedule from 'plan' or 'train-router'; nothing is cached without."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed of the starting noise; of many prompts of the first one, the others follow.")
]
OwnSteps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Denoising steps; those of the schedule if left out, 30 without one."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="What to write: a picture (.png), a video (.mp4, .gif), or a folder of frames; picture.png or video.mp4 "
        "if left out. Of many prompts a folder, 'pictures' if left out, in which the same command goes on.",
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Also draw without a cache; print PSNR, SSIM and times; save both. Of many prompts note PSNR and times.",
    ),
]
FoldTimesteps = Annotated[
    bool,
    typer.Option(
        "--fold-timesteps",
        help="Keep what layers make of the timestep alone as tables, and move their weights to the host: less memory, "
        "the same bits. Refused where nothing can be kept so.",
    ),
]


@dataclass(frozen=True)
class Drawn:
    """One picture ``[H, W, C]`` or video ``[F, H, W, C]`` in 0..1, how long it took, and what the cache reports."""

    pixels: np.ndarray = field(repr=False)
    seconds: float
    cache: CacheReport | None
    sound: np.ndarray | None = field(repr=False, default=None)


@with_options
def generate(
    model: ModelOptions,
    call: CallOptions,
    workers: WorkerOptions,
    prompt: Prompt = None,
    prompts_file: PromptsFile = None,
    schedule: ScheduleFile = None,
    seed: Seed = 0,
    num_inference_steps: OwnSteps = None,
    output: Output = None,
    compare: Compare = False,
    fold_timesteps: FoldTimesteps = False,
    json_to: Json = None,
) -> None:
    """Draw a picture or a video with a schedule; or one of every prompt of a file, with a manifest, into a folder.

    Example: `layercache generate --model Qwen/Qwen-Image --guidance 4 --schedule qwen-60.json
    -p "a red fox" -o fox.png --compare`
    """
    if compare and schedule is None:
        raise typer.BadParameter("--compare needs a --schedule to compare with the full run.")
    if prompts_file is not None and prompt is None:
        steps, places = num_inference_steps, (output, compare, json_to, fold_timesteps)
        return draw_many(ManyPrompts(prompts_file, model, call, workers, schedule, seed, steps, *places), DEFAULT_STEPS)
    if prompt is None or prompts_file is not None:
        raise typer.BadParameter("give a --prompt, or a --prompts-file.", param_hint="--prompt")
    check_one(workers)
    _check(output, compare, json_to, schedule)
    plan = load_schedule(schedule) if schedule is not None else None
    steps = num_inference_steps or (plan.num_steps if plan is not None else DEFAULT_STEPS)
    pipe = load_pipeline(model, call)
    place = results.output_for(pipe, output)
    if output is None:
        _check(place, compare, json_to, schedule)
    check_demo_prompts(pipe, [prompt])
    arguments = {"prompt": prompt, "num_inference_steps": steps, **call_arguments(pipe, call)}
    printer = Printer(json_to)
    figures = {"kind": "generation", "model": model.model, "seed": seed, **figures_of_call(arguments, call)}
    with when_stopped("Stopped; nothing was written."), folded(pipe, fold_timesteps, arguments) as tables:
        drawn, full = _draw_all(pipe, arguments, seed, plan, compare)
    figures |= report_tables(printer, tables)
    _report(printer, figures, drawn, full, _File(pipe, place, call.frame_rate))


def _check(output: Path | None, compare: bool, json_to: str | None, schedule: Path | None) -> None:
    """Names and places of what is to be written, and the packages that are needed for it."""
    results.check_name(output)
    outputs: dict[str, Path | str | None] = {"json_to": json_to}
    if output is not None:
        if results.is_folder(output):
            check_output_folder(output, "output")
        else:
            outputs["output"] = output
        if compare:
            outputs["output.comparison"] = _comparison_file(output)
    check_outputs(outputs, [schedule])
    if compare:
        _check_extras()


def _check_extras() -> None:
    """Names the packages that are missing before the long part, not after it."""
    from layercache._utils import metrics
    from layercache.tools.report import plots

    metrics.check_installed()
    plots.check_installed()


def _draw_all(pipe: Any, call: dict[str, Any], seed: int, plan: Plan, compare: bool) -> tuple[Drawn, Drawn | None]:
    """The picture, and that of the full run where they are to be compared."""
    with refused_arguments():
        if compare:
            # once more beforehand: the first run of a process also pays for kernels being built and memory found
            _draw(pipe, call, seed, plan, "warm-up")
        drawn = _draw(pipe, call, seed, plan, "drawing")
        return drawn, _draw(pipe, call, seed, None, "full run") if compare else None


def _draw(pipe: Any, call: dict[str, Any], seed: int, plan: Plan, label: str) -> Drawn:
    import torch

    import layercache
    from layercache.schedule.schedule import call_arguments as arguments_of_plan

    call = {**call, **arguments_of_plan(plan)}
    pipe.set_progress_bar_config(desc=label)
    generator = torch.Generator("cpu").manual_seed(seed)
    with layercache.enabled(pipe, plan) if plan is not None else nullcontext() as cache:
        start = time.perf_counter()
        # pictures arrive in host memory, so nothing is left running when the call returns
        result = pipe(generator=generator, output_type="np", **call)
        seconds = time.perf_counter() - start
        pixels, sound = results.pixels_of(result), results.sound_of(result)
        return Drawn(pixels, seconds, cache.report() if cache is not None else None, sound)


@dataclass(frozen=True)
class _File:
    """Where a pipeline's result is written."""

    pipe: Any
    output: Path
    wanted_rate: float | None

    def save(self, drawn: Drawn) -> dict[str, Path]:
        """What was written, by what it is."""
        rate = results.frame_rate_of(self.pipe, self.wanted_rate)
        written = save(self.output, lambda path: results.save_pixels(drawn.pixels, path, rate))
        files = {"picture" if drawn.pixels.ndim == 3 else "video": written}
        heard = drawn.sound
        if heard is not None:
            sampling = results.sampling_rate_of(self.pipe)
            sound = self.output.with_suffix(".wav")
            files["sound"] = save(sound, lambda path: results.save_sound(heard, path, sampling))
        return files


def _report(printer: Printer, figures: dict[str, Any], drawn: Drawn, full: Drawn | None, file: _File) -> None:
    from layercache.tools.report.machine import machine_info

    files, cache = file.save(drawn), drawn.cache
    figures |= {"seconds": drawn.seconds, "cache": asdict(cache) if cache is not None else None, **files}
    for name, path in files.items():
        printer.say(f"{name}: {shown(path)} ({drawn.seconds:.2f} s)")
    if cache is not None:
        printer.say(str(cache))
        if full is not None:
            figures["comparison"] = _compare(printer, drawn, full, cache.used, file.output)
    printer.figures(figures | {"machine": machine_info()})


def _comparison_file(output: Path) -> Path:
    """Beside the picture."""
    return output.with_name(f"{output.stem}-comparison.png")


def _compare(printer: Printer, drawn: Drawn, full: Drawn, used: float, output: Path) -> dict[str, Any]:
    """Prints the figures of both runs and saves both pictures, or frames of both videos, beside their difference."""
    from layercache._utils import metrics
    from layercache.tools.report import plots, tables

    psnr, ssim = (compare(full.pixels[None], drawn.pixels[None]) for compare in (metrics.psnr, metrics.ssim))
    measured = [
        tables.Measured("full", 1.0, full.seconds),
        tables.Measured("cached", used, drawn.seconds, tuple(psnr), tuple(ssim)),
    ]
    rows = []
    for name, before, after in _stills(full.pixels, drawn.pixels):
        rows.append(plots.PictureRow(name, [before, after, plots.difference(before, after)[0]]))
    titles = ["full", f"cached, {psnr[0]:.1f} dB", f"|difference| x{plots.DIFFERENCE_GAIN:g}"]
    beside = save(_comparison_file(output), lambda path: plots.save_pictures(path, rows, titles, smallest=256))
    printer.say(tables.comparison_table(measured), f"comparison: {shown(beside)}")
    return {"file": beside, "runs": [row.to_json(full.seconds) for row in measured]}


def _stills(full: np.ndarray, drawn: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Pictures of both to look at: themselves, or some frames of a video, over all of it."""
    if full.ndim == 3:
        return [("", full, drawn)]
    last = len(full) - 1
    chosen = sorted({round(last * k / (SHOWN_FRAMES - 1)) for k in range(SHOWN_FRAMES)})
    return [(f"frame {k}", full[k], drawn[k]) for k in chosen]
