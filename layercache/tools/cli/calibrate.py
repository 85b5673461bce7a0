"""``layercache calibrate``."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.files import check_output_folder, remove
from layercache._utils.processes import leads
from layercache._utils.text import shown
from layercache.tools.cli.common import Json, Printer, Steps, check_outputs, read_prompts, save, when_stopped
from layercache.tools.cli.following import with_command
from layercache.tools.cli.options import CallOptions, ModelOptions, PromptOptions, with_options, words_of
from layercache.tools.cli.pipelines import bring_pictures, call_arguments, load_with_prompts, refused_arguments
from layercache.tools.cli.workers import WorkerOptions, crew_for

if TYPE_CHECKING:
    from layercache.planning.profile import StabilityProfile

DEMO_SAMPLES = 3
BUDGETS = (0.6, 0.7, 0.8, 0.9, 1.0)


class Partition(str, Enum):
    """Ways to cut the blocks into groups."""

    thirds = "thirds"
    sixth = "sixth"
    measured = "measured"
    whole = "whole"


class Sensitivity(str, Enum):
    """How the sensitivity of a group is measured."""

    substitution = "substitution"
    random = "random"


Samples = Annotated[
    int | None, typer.Option(min=1, help="Generations to measure, prompts in turn; one per prompt if left out.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the first sample, the others follow.")]
PartitionOption = Annotated[Partition, typer.Option(help="How to cut the blocks into groups.")]
Groups = Annotated[int, typer.Option("--groups", min=1, help="Number of groups of the 'measured' partition.")]
SensitivityOption = Annotated[
    Sensitivity | None, typer.Option(help="Also measure what a group's error does to the result (twice the time).")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The profile to write.")]


@with_options
def calibrate(
    model: ModelOptions,
    prompts: PromptOptions,
    call: CallOptions,
    workers: WorkerOptions,
    samples: Samples = None,
    seed: Seed = 0,
    num_inference_steps: Steps = 30,
    partition: PartitionOption = Partition.thirds,
    num_groups: Groups = 3,
    sensitivity: SensitivityOption = None,
    output: Output = Path("profile.safetensors"),
    json_to: Json = None,
) -> None:
    """Measure a model once: how much each group of layers changes from step to step, and what it costs.

    It is for schedules per group of layers, which 'plan' makes in a second; 'search' needs no profile and finds better
    ones. Use the steps, size and guidance you will generate with; three prompts are enough to begin with. Stopped or
    killed, the same command goes on from the folder beside the profile (.samples).

    Example: `layercache calibrate --model Qwen/Qwen-Image --steps 50 --guidance 4 -p "a red fox" -p "an old map"
    -p "a city at night" -o qwen.safetensors`
    """
    kept = _check(output, json_to, prompts.prompts_file)
    given = len(read_prompts(prompts.prompts, prompts.prompts_file))
    count = samples or given or DEMO_SAMPLES
    crew = crew_for(workers, samples=count, files=[kept])
    pipe, found = load_with_prompts(model, prompts, call)
    # without prompts, one sample of the demo model is a picture of every class
    entries: list[Any] = found if given else [found]
    settings = {
        "num_inference_steps": num_inference_steps,
        "partition": partition.value,
        "num_groups": num_groups,
        "sensitivity": sensitivity.value if sensitivity else None,
        "crew": crew,
        "resume": kept,
        **call_arguments(pipe, call, bring_pictures(found)),
    }
    chosen = [entries[k % len(entries)] for k in range(count)]
    with when_stopped(
        f"Stopped. Finished samples are kept in {shown(kept)}; the same command goes on from there.", kept
    ):
        profile = _measure(pipe, chosen, seed, settings)
    if not crew.leads:
        return
    profile = replace(profile, fingerprint=with_command(profile.fingerprint, model, call, found[0]))
    save(output, profile.save)
    remove(kept)
    again = ["search", *words_of(model), *words_of(call), *words_of(prompts), "--steps", num_inference_steps]
    _report(Printer(json_to), profile, output, again)


def _check(output: Path, json_to: str | None, prompts_file: Path | None) -> Path:
    """Checks where the command writes; the folder from which it could go on."""
    check_outputs({"output": output, "json_to": json_to}, [prompts_file])
    folder = output.with_suffix(".samples")
    if leads():
        check_output_folder(folder, "output")
    return folder


def _measure(pipe: Any, prompts: list[Any], seed: int, settings: dict[str, Any]) -> StabilityProfile:
    import layercache

    with refused_arguments():
        return layercache.calibrate(pipe, prompts, seeds=range(seed, seed + len(prompts)), **settings)


def _report(printer: Printer, profile: StabilityProfile, output: Path, search: list[Any]) -> None:
    from layercache.tools.report import tables

    printer.say(tables.profile_sentences(profile), f"profile: {shown(output)}")
    printer.following([*search, "--output", output.with_suffix(".front.json")], *_plan(profile, output))
    printer.figures(tables.profile_figures(profile))


def _plan(profile: StabilityProfile, output: Path) -> list[list[Any]]:
    """The command that plans from the profile, for the smallest of some budgets that it can keep to."""
    import layercache
    from layercache.errors import LayerCacheError

    for budget in BUDGETS:
        try:
            layercache.plan(profile, budget)
        except LayerCacheError:
            continue
        return [["plan", output, "--budget", budget]]
    return []
