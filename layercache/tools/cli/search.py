"""``layercache search``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.errors import BudgetError
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

Profile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A profile from 'calibrate'.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The front to write.")]
Samples = Annotated[int, typer.Option(min=1, help="Pictures to fit to, prompts in turn.")]
Validation = Annotated[int, typer.Option(min=0, help="Further pictures, with other seeds, that nothing is fitted to.")]
Trials = Annotated[int, typer.Option(min=0, help="Exchanges of steps to try per budget.")]
TimeLimit = Annotated[float | None, typer.Option(min=0.0, help="Seconds after which no further exchange is tried.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first picture, the others follow.")]


def search(
    profile: Profile,
    output: Output = Path("front.json"),
    model: Model = "demo",
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    samples: Samples = 16,
    validation: Validation = 16,
    budgets: Budgets = "0.75,0.6,0.5,0.4,0.33,0.25",
    trials: Trials = 40,
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
    """Run candidate schedules on the model and keep the best for every budget (minutes).

    Forecasts are fitted to what the candidates miss: many decibels better than a plan from the profile alone. It writes
    a front, from which 'plan' picks a schedule at once, and beside it the front as a plot (.png) and a page (.html).

    Example: `layercache search qwen.safetensors --model Qwen/Qwen-Image --guidance 4 --prompts-file prompts.txt
    -o front.json`, then `layercache plan front.json --budget 0.5`
    """
    import layercache

    journal = output.with_suffix(".journal.json")
    outputs = {"output": output, "output.plot": output.with_suffix(".png"), "output.page": output.with_suffix(".html")}
    check_outputs({**outputs, "output.journal": journal, "json_to": json_to}, [profile, prompts_file])
    settings: dict[str, Any] = {"trials": trials, "time_limit": time_limit, "max_cache_bytes": max_cache_bytes}
    settings |= {"budgets": parse_budgets(budgets), "resume": journal}
    measured = layercache.StabilityProfile.load(profile)
    pipe, found = load_with_prompts(model, prompts, prompts_file, device, dtype)
    settings |= {"profiles": measured, "num_inference_steps": measured.fingerprint.num_steps}
    settings |= call_arguments(pipe, guidance_scale, height, width)
    _write_front(Printer(json_to), pipe, _pictures(pipe, found, samples, validation, seed) | settings, output)


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
    fingerprint = settings["profiles"].fingerprint
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
