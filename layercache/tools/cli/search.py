"""``layercache search``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.files import check_output_folder, remove
from layercache._utils.processes import leads
from layercache._utils.text import shown
from layercache.errors import BudgetError
from layercache.tools.cli.common import (
    Budgets,
    Effort,
    EffortOption,
    Json,
    MaxCacheBytes,
    Printer,
    Seed,
    check_outputs,
    parse_budgets,
    save,
    when_stopped,
)
from layercache.tools.cli.following import budget_of, front_with_command
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
    from layercache.planning.front import Front

Output = Annotated[Path, typer.Option("--output", "-o", help="The front to write.")]
Steps = Annotated[int, typer.Option("--steps", min=2, help="Denoising steps.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Pictures to fit to, prompts in turn: 8, or 16 if thorough.")]
Validation = Annotated[int, typer.Option(min=0, help="Further pictures, with other seeds, that nothing is fitted to.")]
FreeSigmas = Annotated[
    bool,
    typer.Option("--free-sigmas", help="Move the noise levels too, where that gives more: one run more per budget."),
]
TimeLimit = Annotated[float | None, typer.Option(min=0.0, help="Seconds after which no further schedule is run.")]


@with_options
def search(
    model: ModelOptions,
    prompts: PromptOptions,
    call: CallOptions,
    workers: WorkerOptions,
    output: Output = Path("front.json"),
    num_inference_steps: Steps = 30,
    effort: EffortOption = Effort.normal,
    samples: Samples = None,
    validation: Validation = 16,
    budgets: Budgets = "0.75,0.6,0.5,0.4,0.33,0.25",
    time_limit: TimeLimit = None,
    max_cache_bytes: MaxCacheBytes = None,
    free_sigmas: FreeSigmas = False,
    seed: Seed = 1000,
    json_to: Json = None,
) -> None:
    """Find the best schedule for every budget by running a few on the model; costs at most --effort full generations.

    It writes a front, from which 'plan' picks a schedule at once, and beside it the front as a plot (.png) and a page
    (.html). Stopped or killed, the same command goes on from the folder beside it (.search).

    Example: `layercache search --model Qwen/Qwen-Image --steps 50 --guidance 4 --prompts-file prompts.txt
    -o front.json`, then `layercache plan front.json --budget 0.5`
    """
    folder = _check(output, json_to, prompts.prompts_file)
    settings: dict[str, Any] = {"time_limit": time_limit, "max_cache_bytes": max_cache_bytes, "effort": effort.value}
    settings |= {"budgets": parse_budgets(budgets), "num_inference_steps": num_inference_steps, "resume": folder}
    samples, printer = samples or (16 if effort is Effort.thorough else 8), Printer(json_to)
    shared = min(count_calls(model, count) for count in (samples, validation or samples))
    crew = crew_for(workers, samples=shared, files=[folder])
    pipe, found = load_with_prompts(model, prompts, call)
    arguments = call_arguments(pipe, call, bring_pictures(found))
    settings |= {"crew": crew, **arguments, **_levels(free_sigmas, arguments)}
    _say_cost(printer, samples, validation, settings)
    with when_stopped(f"Stopped. What was run is kept in {shown(folder)}; the same command goes on from there."):
        front = _search(pipe, _pictures(pipe, found, samples, validation, seed) | settings)
    if not crew.leads:
        return
    _save(printer, front_with_command(front, model, call, found[0]), output)
    _say_end(printer, front, folder)


def _check(output: Path, json_to: str | None, prompts_file: Path | None) -> Path:
    """Checks where the search writes; the folder from which it could go on."""
    from layercache.tools.report import pages, plots

    outputs = {"output": output, "output.plot": output.with_suffix(".png"), "output.page": output.with_suffix(".html")}
    folder = output.with_suffix(".search")
    check_outputs({**outputs, "json_to": json_to}, [prompts_file])
    if leads():
        check_output_folder(folder, "output")
    plots.check_installed()
    pages.check_installed()
    return folder


def _levels(are_free: bool, call: dict[str, Any]) -> dict[str, str]:
    if are_free and "sigmas" in call:
        raise typer.BadParameter("noise levels are given by --arg sigmas=..., so that none are free.")
    return {"sigmas": "free"} if are_free else {}


def _say_end(printer: Printer, front: Front, folder: Path) -> None:
    from layercache.planning.search import ENDED_EARLY

    if any(note.startswith(ENDED_EARLY) for note in front.notes):
        printer.say(f"The same command goes on from {shown(folder)}.", style="dim")
    else:
        remove(folder)


def _say_cost(printer: Printer, samples: int, validation: int, settings: dict[str, Any]) -> None:
    """What the search will cost, before anything runs."""
    from layercache.planning.search import PICTURES, search_cost

    pictures = min(samples, PICTURES[settings["effort"]])
    steps, budgets, effort = settings["num_inference_steps"], settings["budgets"], settings["effort"]
    with refused_arguments():
        cost, schedules = search_cost(pictures, steps, budgets, effort, settings.get("sigmas") == "free")
    further = f"; then {validation} more pictures in full, and by each schedule of the front" if validation else ""
    printer.say(
        f"{cost:.1f} full generations in all: {pictures} pictures in full, and by {schedules} schedules{further}. The "
        "time is known once the first is done.",
        style="dim",
    )


def _pictures(pipe: Any, prompts: list[Any], samples: int, validation: int, seed: int) -> dict[str, Any]:
    """The calibration pictures, and those with the seeds behind them for validation."""

    last = seed + samples
    held_out = (pictures_of(pipe, prompts, validation), range(last, last + validation)) if validation else None
    return {"prompts": pictures_of(pipe, prompts, samples), "seeds": range(seed, last), "validation": held_out}


def _search(pipe: Any, settings: dict[str, Any]) -> Front:
    import layercache

    with refused_arguments():
        front = layercache.search(pipe, **settings)
    if not front.points:
        raise BudgetError(
            "no schedule keeps to these budgets and to the memory allowed; allow more of either", argument="budgets"
        )
    return front


def _save(printer: Printer, front: Front, output: Path) -> None:
    from layercache.tools.report.front import front_table, order_sentence, rows_of, save_front_page, save_front_plot

    fingerprint = front.points[0].schedule.fingerprint
    title = f"{fingerprint.model_class}, {fingerprint.num_steps} steps"
    rows = rows_of(front)
    save(output, front.save)
    save_front_plot(output.with_suffix(".png"), rows, title)
    page = save_front_page(output.with_suffix(".html"), rows, title, front=front)
    order = [order_sentence(rows)] if len(rows) > 1 else []
    printer.say(
        front_table(rows, title), *order, *map(shown, front.notes), f"front: {shown(output)}", f"page: {shown(page)}"
    )
    printer.following(["plan", output, "--budget", budget_of(front)])
    printer.figures({"kind": "front", "runs": front.tried, "points": [row.to_json() for row in rows]})
