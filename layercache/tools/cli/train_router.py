"""``layercache train-router``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.tools.cli.common import (
    Budget,
    Json,
    Plot,
    Printer,
    Steps,
    check_outputs,
    check_picture_name,
    save,
    when_stopped,
)
from layercache.tools.cli.following import generate_with, with_command
from layercache.tools.cli.options import CallOptions, ModelOptions, PromptOptions, with_options
from layercache.tools.cli.pipelines import bring_pictures, load_with_prompts, quiet_call, refused_arguments
from layercache.tools.cli.workers import PANEL, WorkerOptions, crew_for

if TYPE_CHECKING:
    from layercache.methods.l2c import LearnedRouter
    from layercache.schedule.module_schedule import ModuleSchedule

GOES_ON = "the same command goes on from there"


@dataclass(frozen=True)
class TrainingWorkers(WorkerOptions):
    """How many processes train a router together, and where they run."""

    workers: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=PANEL,
            min=1,
            metavar="N",
            help="Train with so many processes, one GPU each where there are any: in every round each makes a "
            "generation, and their gradients are averaged.",
        ),
    ] = None


Rounds = Annotated[int, typer.Option(min=1, help="Generations to learn from; with --workers, of each process.")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures per generation.")]
Penalty = Annotated[float, typer.Option(min=0, help="Weight of computing, beside the error.")]
LearningRate = Annotated[float, typer.Option(help="Of AdamW.")]
Period = Annotated[int, typer.Option(min=2, help="From one computed step to the next; 2 is the published one.")]
Shifted = Annotated[
    bool, typer.Option("--shifted", help="Cache the points of the outer grid of single-step DPM-Solver-2.")
]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="Modules with a larger beta are computed.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The schedule to write.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="File kept after every round; OUTPUT.pt if left out. Training goes on from it.")
]


@with_options
def train_router(
    model: ModelOptions,
    prompts: PromptOptions,
    call: CallOptions,
    workers: TrainingWorkers,
    rounds: Rounds = 24,
    batch: Batch = 4,
    penalty: Penalty = 1e-4,
    learning_rate: LearningRate = 0.1,
    period: Period = 2,
    shifted: Shifted = False,
    threshold: Threshold = 0.1,
    budget: Budget = None,
    num_inference_steps: Steps = 30,
    output: Output = Path("router.json"),
    checkpoint: Checkpoint = None,
    plot: Plot = None,
    json_to: Json = None,
) -> None:
    """Train a Learning-to-Cache router: which modules can be left out between computed steps.

    It learns from the model's own generations; the model is not changed. A budget, the share of the modules' time,
    replaces the threshold. Stopped, the same command goes on. Several GPUs: --workers, torchrun, or
    `accelerate launch -m layercache train-router ...`.

    Example: `layercache train-router --rounds 40 --budget 0.7 -o router.json`
    """
    kept = checkpoint or output.with_suffix(".pt")
    check_outputs({"output": output, "checkpoint": kept, "plot": plot, "json_to": json_to}, [prompts.prompts_file])
    _check_plot(plot)
    from layercache.methods.l2c import LearningToCache

    settings = LearningToCache(penalty, learning_rate, rounds, shifted=shifted, period=period)
    crew = crew_for(workers, files=[kept])
    pipe, found = load_with_prompts(model, prompts, call)
    arguments = _latent_only(pipe, quiet_call(pipe, num_inference_steps, call, bring_pictures(found)))
    printer = Printer(json_to)
    with refused_arguments(), when_stopped(f"Stopped. The rounds so far are in {shown(kept)}; {GOES_ON}."):
        router = settings.train(pipe, _samples(found, batch), kept, crew=crew, **arguments)
    if not crew.leads:
        return
    router = replace(router, fingerprint=with_command(router.fingerprint, model, call, found[0]))
    schedule = router.schedule(threshold if budget is None else None, budget)
    save(output, schedule.save)
    _report(printer, router, schedule, {"schedule": output, "checkpoint": kept}, plot)


def _samples(prompts: list[Any], batch: int) -> list[Any]:
    """The prompts in batches, the last one filled from the first ones."""
    from layercache.tools.compare.calls import batched

    return batched(prompts, 0, -(-len(prompts) // batch) * batch, batch)


def _latent_only(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Nothing is decoded that nobody looks at, where the pipeline can leave it out."""
    knows = "output_type" in inspect.signature(type(pipe).__call__).parameters
    return call | ({"output_type": "latent"} if knows else {})


def _check_plot(plot: Path | None) -> None:
    """Refuses a plot that could not be saved before the training, not after it."""
    from layercache.tools.report import plots

    if plot is not None:
        plots.check_installed()
        check_picture_name(plot, "--plot")


def _report(
    printer: Printer, router: LearnedRouter, schedule: ModuleSchedule, files: dict[str, Path], plot: Path | None
) -> None:
    from layercache.tools.report import plots

    if plot is not None:
        files["loss curve"] = plots.save_losses(plot, router.losses, len(router.units))
    first, last = router.losses[0], router.losses[-1]
    printer.say(
        f"squared error {first[0]:.3g} in the first round, {last[0]:.3g} in the last; "
        f"{last[1]:.1f} of {len(router.units)} modules in use at a cache step",
        f"the schedule computes {schedule.used:.1%} of the modules' time",
        *(f"{name}: {shown(path)}" for name, path in files.items()),
    )
    drawing = generate_with(files["schedule"], schedule.fingerprint, "--compare")
    printer.following(drawing or ["show", files["schedule"]])
    printer.figures({"losses": router.losses, "used": schedule.used, "beta": router.beta.tolist()})
