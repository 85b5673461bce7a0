"""``layercache search``."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.errors import BudgetError, ScheduleMismatchError
from layercache.tools.cli.common import (
    Budgets,
    Device,
    Dtype,
    DtypeOption,
    Guidance,
    Height,
    Json,
    MaxCacheBytes,
    Model,
    Printer,
    Prompts,
    PromptsFile,
    Width,
    check_outputs,
    parse_budgets,
)
from layercache.tools.cli.pipelines import call_arguments, is_demo, load_with_prompts, refused_arguments

if TYPE_CHECKING:
    from layercache.planning.front import Front

Profile = Annotated[
    Path | None,
    typer.Argument(exists=True, dir_okay=False, help="A profile from 'calibrate', to search its groups of layers too."),
]


class Effort(enum.StrEnum):
    """How many full generations a search may cost: 32, 72, 160."""

    quick, normal, thorough = "quick", "normal", "thorough"


EffortOption = Annotated[
    Effort | None,
    typer.Option("--effort", help="Full generations in all: quick 32, normal 72 (default), thorough 160."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The front to write.")]
Steps = Annotated[
    int | None, typer.Option("--steps", min=2, help="Denoising steps: 30 by default, with a profile those it is of.")
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Pictures to fit to, prompts in turn; 8, or 16 with a profile or thorough.")
]
Validation = Annotated[int, typer.Option(min=0, help="Further pictures, with other seeds, that nothing is fitted to.")]
Trials = Annotated[int | None, typer.Option(min=0, help="With a profile: exchanges to try per budget, 40 by default.")]
TimeLimit = Annotated[float | None, typer.Option(min=0.0, help="Seconds after which no further exchange is tried.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first picture, the others follow.")]


def search(
    profile: Profile = None,
    output: Output = Path("front.json"),
    model: Model = "demo",
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    num_inference_steps: Steps = None,
    effort: EffortOption = None,
    samples: Samples = None,
    validation: Validation = 16,
    budgets: Budgets = "0.75,0.6,0.5,0.4,0.33,0.25",
    trials: Trials = None,
    time_limit: TimeLimit = None,
    max_cache_bytes: MaxCacheBytes = None,
    seed: Seed = 1000,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Find the best schedule for every budget by running a few on the model; costs at most --effort full generations.

    It writes a front, from which 'plan' picks a schedule at once, and beside it the front as a plot (.png) and a page
    (.html). With a profile, groups of layers are searched too, for several times the cost.

    Example: `layercache search --model Qwen/Qwen-Image --steps 50 --guidance 4 --prompts-file prompts.txt
    -o front.json`, then `layercache plan front.json --budget 0.5`
    """
    import layercache

    outputs = {"output": output, "output.plot": output.with_suffix(".png"), "output.page": output.with_suffix(".html")}
    settings: dict[str, Any] = {"time_limit": time_limit, "max_cache_bytes": max_cache_bytes, "trials": trials}
    settings |= {"budgets": parse_budgets(budgets), "effort": effort}
    if profile is None:
        settings["num_inference_steps"] = num_inference_steps or 30
        samples = samples or (16 if effort is Effort.thorough else 8)
    else:
        outputs["output.journal"] = settings["resume"] = output.with_suffix(".journal.json")
        settings["profiles"] = layercache.StabilityProfile.load(profile)
        steps = settings["num_inference_steps"] = settings["profiles"].fingerprint.num_steps
        if num_inference_steps not in (None, steps):
            raise ScheduleMismatchError(f"the profile is of {steps} steps; leave out --steps", argument="steps")
    check_outputs({**outputs, "json_to": json_to}, [profile, prompts_file])
    pipe, found = load_with_prompts(model, prompts, prompts_file, device, dtype)
    settings |= call_arguments(pipe, guidance_scale, height, width)
    _write_front(Printer(json_to), pipe, _pictures(pipe, found, samples or 16, validation, seed) | settings, output)


def _pictures(pipe: Any, prompts: list[str], samples: int, validation: int, seed: int) -> dict[str, Any]:
    """The calibration pictures, and those with the seeds behind them for validation."""

    def chosen(count: int) -> list[Any]:
        names = [prompts[k % len(prompts)] for k in range(count)]
        # the demo model is small enough for all pictures in one batch
        return [names] if is_demo(pipe) else names

    last = seed + samples
    held_out = (chosen(validation), range(last, last + validation)) if validation else None
    return {"prompts": chosen(samples), "seeds": range(seed, last), "validation": held_out}


def _write_front(printer: Printer, pipe: Any, settings: dict[str, Any], output: Path) -> None:
    import layercache
    from layercache.tools.report import plots

    plots.check_installed()
    with refused_arguments():
        front = layercache.search(pipe, **settings)
    if not front.points:
        raise BudgetError(
            "no schedule keeps to these budgets and to the memory allowed; allow more of either", argument="budgets"
        )
    fingerprint = front.points[0].schedule.fingerprint
    _save(printer, front, f"{fingerprint.model_class}, {fingerprint.num_steps} steps", output)


def _save(printer: Printer, front: Front, title: str, output: Path) -> None:
    from layercache.tools.report.front import front_table, order_sentence, rows_of, save_front_page, save_front_plot

    rows = rows_of(front)
    front.save(output)
    save_front_plot(output.with_suffix(".png"), rows, title)
    page = save_front_page(output.with_suffix(".html"), rows, title)
    order = [order_sentence(rows)] if len(rows) > 1 else []
    printer.say(
        front_table(rows, title), *order, *map(shown, front.notes), f"front: {shown(output)}", f"page: {shown(page)}"
    )
    printer.say(f"next: layercache plan {shown(output)} --budget {front.points[0].used:.2f}", style="dim")
    printer.figures({"kind": "front", "runs": front.tried, "points": [row.to_json() for row in rows]})
