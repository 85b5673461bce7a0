"""``layercache calibrate``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

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
    Steps,
    Width,
    check_outputs,
)
from layercache.tools.cli.pipelines import call_arguments, load_with_prompts, refused_arguments

DEMO_SAMPLES = 3


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


def calibrate(
    model: Model = "demo",
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    samples: Samples = None,
    seed: Seed = 0,
    num_inference_steps: Steps = 30,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    partition: PartitionOption = Partition.thirds,
    num_groups: Groups = 3,
    sensitivity: SensitivityOption = None,
    output: Output = Path("profile.safetensors"),
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Measure a model once: how much each group of layers changes from step to step, and what it costs.

    Use the steps, size and guidance you will generate with; a schedule holds for these only.
    Three prompts are enough to begin with.

    Example: `layercache calibrate --model Qwen/Qwen-Image --steps 50 --guidance 4 -p "a red fox" -p "an old map"
    -p "a city at night" -o qwen.safetensors`
    """
    check_outputs({"output": output, "json_to": json_to}, [prompts_file])
    pipe, found = load_with_prompts(model, prompts, prompts_file, device, dtype)
    # without prompts, one sample of the demo model is a picture of every class
    entries: list[Any] = found if prompts or prompts_file else [found]
    count = samples or (len(entries) if prompts or prompts_file else DEMO_SAMPLES)
    settings = {
        "num_inference_steps": num_inference_steps,
        "partition": partition.value,
        "num_groups": num_groups,
        "sensitivity": sensitivity.value if sensitivity else None,
        **call_arguments(pipe, guidance_scale, height, width),
    }
    _measure(Printer(json_to), pipe, [entries[k % len(entries)] for k in range(count)], seed, settings, output)


def _measure(
    printer: Printer, pipe: Any, prompts: list[Any], seed: int, settings: dict[str, Any], output: Path
) -> None:
    import layercache
    from layercache.tools.report import tables

    with refused_arguments():
        profile = layercache.calibrate(pipe, prompts, seeds=range(seed, seed + len(prompts)), **settings)
    profile.save(output)
    printer.say(tables.profile_sentences(profile), f"profile: {shown(output)}")
    printer.say(f"next: layercache plan {shown(output)} --budget 0.6", style="dim")
    printer.figures(tables.profile_figures(profile))
