"""``layercache generate``."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Width,
    check_outputs,
    check_picture_name,
)
from layercache.tools.cli.files import load_schedule
from layercache.tools.cli.pipelines import call_arguments, check_demo_prompts, load_pipeline, refused_arguments

if TYPE_CHECKING:
    import numpy as np

    from layercache.runtime.report import CacheReport
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.schedule.schedule import Schedule

DEFAULT_STEPS = 30

Prompt = Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")]
ScheduleFile = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="A schedule from 'plan' or 'train-router'; nothing is cached without."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the starting noise.")]
OwnSteps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Denoising steps; those of the schedule if left out, 30 without one."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")]
Compare = Annotated[
    bool, typer.Option("--compare", help="Also draw without a cache; print PSNR, SSIM and times; save both.")
]


@dataclass(frozen=True)
class Drawn:
    """One picture ``[H, W, 3]`` in 0..1, how long it took, and what the cache reports."""

    picture: np.ndarray
    seconds: float
    cache: CacheReport | None


def generate(
    prompt: Prompt,
    model: Model = "demo",
    schedule: ScheduleFile = None,
    seed: Seed = 0,
    num_inference_steps: OwnSteps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    output: Output = Path("picture.png"),
    compare: Compare = False,
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Draw a picture with a schedule.

    Example: `layercache generate --model Qwen/Qwen-Image --guidance 4 --schedule qwen-60.json
    -p "a red fox" -o fox.png --compare`
    """
    if compare and schedule is None:
        raise typer.BadParameter("--compare needs a --schedule to compare with the full run.")
    check_picture_name(output, "--output")
    beside = {"output.comparison": _comparison_file(output)} if compare else {}
    check_outputs({"output": output, **beside, "json_to": json_to}, [schedule])
    if compare:
        _check_extras()
    plan = load_schedule(schedule) if schedule is not None else None
    steps = num_inference_steps or (plan.num_steps if plan is not None else DEFAULT_STEPS)
    pipe = load_pipeline(model, device, dtype)
    check_demo_prompts(pipe, [prompt])
    call = {"prompt": prompt, "num_inference_steps": steps, **call_arguments(pipe, guidance_scale, height, width)}
    if plan is not None:
        from layercache.planning.samples import call_settings

        plan.fingerprint.warn_of(call_settings(call))
    drawn, full = _draw_all(pipe, call, seed, plan, compare)
    figures = {"kind": "generation", "model": model, "seed": seed, **call}
    _report(Printer(json_to), figures, drawn, full, output)


def _check_extras() -> None:
    """Names the packages that are missing before the long part, not after it."""
    from layercache._utils import metrics
    from layercache.tools.report import plots

    metrics.check_installed()
    plots.check_installed()


def _draw_all(
    pipe: Any, call: dict[str, Any], seed: int, plan: Schedule | ModuleSchedule | None, compare: bool
) -> tuple[Drawn, Drawn | None]:
    """The picture, and that of the full run where they are to be compared."""
    with refused_arguments():
        if compare:
            # once more beforehand: the first run of a process also pays for kernels being built and memory found
            _draw(pipe, call, seed, plan, "warm-up")
        drawn = _draw(pipe, call, seed, plan, "drawing")
        return drawn, _draw(pipe, call, seed, None, "full run") if compare else None


def _draw(pipe: Any, call: dict[str, Any], seed: int, plan: Schedule | ModuleSchedule | None, label: str) -> Drawn:
    import torch

    import layercache

    pipe.set_progress_bar_config(desc=label)
    generator = torch.Generator("cpu").manual_seed(seed)
    with layercache.enabled(pipe, plan) if plan is not None else nullcontext() as cache:
        start = time.perf_counter()
        # pictures arrive in host memory, so nothing is left running when the call returns
        picture = pipe(generator=generator, output_type="np", **call).images[0]
        seconds = time.perf_counter() - start
        return Drawn(picture, seconds, cache.report() if cache is not None else None)


def _report(printer: Printer, figures: dict[str, Any], drawn: Drawn, full: Drawn | None, output: Path) -> None:
    from layercache.tools.report.machine import machine_info

    _save_picture(drawn.picture, output)
    cache = drawn.cache
    figures |= {"seconds": drawn.seconds, "picture": output, "cache": asdict(cache) if cache is not None else None}
    printer.say(f"picture: {shown(output)} ({drawn.seconds:.2f} s)")
    if cache is not None:
        printer.say(str(cache))
        if full is not None:
            figures["comparison"] = _compare(printer, drawn, full, cache.used, output)
    printer.figures(figures | {"machine": machine_info()})


def _save_picture(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    from layercache._utils.files import write_atomically

    image = Image.fromarray((picture * 255).round().astype("uint8"))
    write_atomically(path, lambda temporary: image.save(temporary))


def _comparison_file(output: Path) -> Path:
    """Beside the picture."""
    return output.with_name(f"{output.stem}-comparison.png")


def _compare(printer: Printer, drawn: Drawn, full: Drawn, used: float, output: Path) -> dict[str, Any]:
    """Prints the figures of both runs and saves both pictures beside their difference."""
    from layercache._utils import metrics
    from layercache.tools.report import plots, tables

    psnr, ssim = metrics.psnr(full.picture, drawn.picture), metrics.ssim(full.picture, drawn.picture)
    measured = [
        tables.Measured("full", 1.0, full.seconds),
        tables.Measured("cached", used, drawn.seconds, tuple(psnr), tuple(ssim)),
    ]
    beside = _comparison_file(output)
    panels = [full.picture, drawn.picture, plots.difference(full.picture, drawn.picture)[0]]
    titles = ["full", f"cached, {psnr[0]:.1f} dB", f"|difference| x{plots.DIFFERENCE_GAIN:g}"]
    plots.save_pictures(beside, [plots.PictureRow("", panels)], titles, smallest=256)
    printer.say(tables.comparison_table(measured), f"comparison: {shown(beside)}")
    return {"file": beside, "runs": [row.to_json(full.seconds) for row in measured]}
