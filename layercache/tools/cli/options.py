"""Options of the model and of its call, declared once for every command that runs a model.

A command takes a parameter of the type `ModelOptions`, `CallOptions`, `PromptOptions` or `WorkerOptions` (of the module
`workers`); `with_options` puts the options of that group in its place on the command line, and hands the command one
frozen object.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from layercache.tools.cli.workers import command_running

MODEL, CALL, PROMPTS = "Model", "Call of the pipeline", "Prompts"
"""Headings in the help of a command."""


class Dtype(str, Enum):
    """Number formats a model can be loaded in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@dataclass(frozen=True)
class ModelOptions:
    """Which model runs, with what in it, and where."""

    model: Annotated[
        str,
        typer.Option(
            rich_help_panel=MODEL,
            help="'demo' for the bundled model, a Hugging Face model id, a folder with a pipeline, a .safetensors file "
            "of a whole pipeline (with --pipeline), or a .json file that describes one with random weights "
            "(examples/tiny_flux.json).",
        ),
    ] = "demo"
    pipeline: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MODEL,
            metavar="CLASS",
            help="Class of diffusers to load the model with, such as FluxImg2ImgPipeline from a folder of FLUX.1.",
        ),
    ] = None
    transformer: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=MODEL,
            metavar="[NAME=]PATH",
            help="Another transformer in the pipeline: a folder, a hub id, a .safetensors or a .gguf file; "
            "transformer_2=PATH for the second one of Wan 2.2.",
        ),
    ] = None
    controlnet: Annotated[
        str | None, typer.Option(rich_help_panel=MODEL, metavar="PATH", help="A ControlNet: a folder, or a hub id.")
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=MODEL,
            metavar="PATH[:WEIGHT]",
            help="A LoRA: a file, a folder or a hub id; may be repeated.",
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MODEL,
            metavar="CLASS",
            help="Sampler in the place of the pipeline's, with its settings: a class of diffusers, such as "
            "UniPCMultistepScheduler.",
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(rich_help_panel=MODEL, help="Where to run, such as cuda or cpu; a GPU if there is one."),
    ] = None
    dtype: Annotated[
        Dtype, typer.Option(rich_help_panel=MODEL, help="Number format of the model ('demo' is always float32).")
    ] = Dtype.bfloat16


@dataclass(frozen=True)
class CallOptions:
    """Arguments of the pipeline's call, beside prompt, steps and seed."""

    guidance_scale: Annotated[
        float | None,
        typer.Option(
            "--guidance", rich_help_panel=CALL, help="Guidance scale; the pipeline's own default if left out."
        ),
    ] = None
    negative_prompt: Annotated[
        str | None, typer.Option(rich_help_panel=CALL, help="What guidance leads away from.")
    ] = None
    image: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=CALL,
            metavar="[NAME=]FILE",
            help="Picture that the pipeline takes (img2img, edit, image-to-video, ControlNet); may be repeated, and "
            "mask_image=FILE names the argument of the call.",
        ),
    ] = None
    height: Annotated[int | None, typer.Option(rich_help_panel=CALL, min=1, help="Height in pixels.")] = None
    width: Annotated[int | None, typer.Option(rich_help_panel=CALL, min=1, help="Width in pixels.")] = None
    num_frames: Annotated[int | None, typer.Option(rich_help_panel=CALL, min=1, help="Frames of a video.")] = None
    frame_rate: Annotated[
        float | None, typer.Option("--fps", rich_help_panel=CALL, min=0.1, help="Frames of a video per second.")
    ] = None
    arg: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=CALL,
            metavar="NAME=VALUE",
            help="Any other argument of the call, such as strength=0.8; the value is JSON, else text; may be repeated.",
        ),
    ] = None


@dataclass(frozen=True)
class PromptOptions:
    """The prompts of a command that runs several."""

    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", rich_help_panel=PROMPTS, help="A prompt; may be repeated."),
    ] = None
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=PROMPTS,
            exists=True,
            dir_okay=False,
            help="A text file with one prompt per line; a table (.csv) whose first line names the columns prompt, "
            "category, seed and arguments of the call; or JSON lines (.jsonl) with the same.",
        ),
    ] = None


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose groups of options are single options on the command line."""
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {
        p.name: p.annotation for p in signature.parameters.values() if dataclasses.is_dataclass(p.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        group = groups.get(parameter.name)
        parameters += [parameter] if group is None else _parameters_of(group)

    @functools.wraps(function)
    def command(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        with command_running():
            function(**made, **values)

    # one kind, for options without a default follow those of a group, which have one
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return command


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in dataclasses.fields(group)
    ]


def words_of(options: Any) -> list[str]:
    """The words on a command line that set what differs from a group's defaults."""
    words: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default or value in (None, [], ()):
            continue
        option = option_of_field(type(options), field.name)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            text = one.value if isinstance(one, Enum) else f"{one:g}" if isinstance(one, float) else str(one)
            words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return words


def option_of_field(group: Any, name: str) -> str:
    """The long form of the option that sets a field of a group."""
    declared = get_args(get_type_hints(group, include_extras=True)[name])[1]
    # typer keeps the first name of an option in an Annotated as its default
    names = [text for text in (declared.default, *(declared.param_decls or ())) if isinstance(text, str)]
    return next((text for text in names if text.startswith("--")), f"--{name.replace('_', '-')}")
