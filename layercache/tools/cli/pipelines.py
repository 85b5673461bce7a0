"""Pipelines of the commands: prompts, pictures and arguments of the call."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from layercache._utils.text import shown
from layercache.errors import LayerCacheError, LayerCacheWarning, MissingExtraError, UnsupportedModelError
from layercache.tools.cli.common import Printer, read_prompts
from layercache.tools.cli.loading import is_like_demo, load_model, split_name
from layercache.tools.cli.options import CallOptions, ModelOptions, PromptOptions

if TYPE_CHECKING:
    from layercache.tools.batch.entries import Entry

DEMO_GUIDANCE = 4.0
IMAGE_ARGUMENTS = ("image", "control_image", "images", "reference_images")
"""Arguments of a call that a picture without a name is for; the first that the pipeline has."""
OWN = ("prompt", "generator", "output_type", "return_dict", "num_inference_steps", "callback", "callback_on_step_end")
"""Arguments of a call that the commands set themselves."""
BATCH = 4  # pictures in a call of the demo model
OPTIONS = {"num_inference_steps": "--steps", "prompt": "--prompt"}


def load_pipeline(model: ModelOptions, call: CallOptions | None = None, pictures_follow: bool = False) -> Any:
    """The pipeline of the options; what of the call can be wrong without it is refused before it is loaded."""
    if call is None:
        return load_model(model)
    read_images(call)
    read_args(call)
    return load_model(model, lambda cls: check_call(cls, call, pictures_follow))


def load_with_prompts(model: ModelOptions, prompts: PromptOptions, call: CallOptions) -> tuple[Any, list[Any]]:
    """A pipeline and the prompts to run it on; without any, the demo model gets the names of all its classes.

    Prompts of a file that name arguments of the call are mappings of these, with their pictures.
    """
    pipe, entries = load_with_entries(model, prompts, call)
    return pipe, [entry.sample for entry in entries]


def load_with_entries(model: ModelOptions, prompts: PromptOptions, call: CallOptions) -> tuple[Any, list[Entry]]:
    """As `load_with_prompts`, with categories and seeds."""
    from layercache.tools.batch.entries import check_arguments, numbered

    found = read_prompts(prompts.prompts, prompts.prompts_file)
    if not found and model.model != "demo" and not is_like_demo(model.model):
        raise typer.BadParameter("give at least one --prompt, or a --prompts-file.", param_hint="--prompt")
    pipe = load_pipeline(model, call, any(entry.inputs() for entry in found))
    if not found:
        from layercache.demo.model import CLASS_NAMES

        found = numbered(CLASS_NAMES)
    check_demo_prompts(pipe, [entry.prompt for entry in found])
    check_arguments(pipe, found)
    return pipe, found


def bring_pictures(prompts: Iterable[Any]) -> bool:
    """Whether prompts, as `load_with_prompts` gives them, have pictures among their arguments."""
    from layercache.tools.batch.entries import takes_pictures

    return any(takes_pictures(name) for prompt in prompts if isinstance(prompt, Mapping) for name in prompt)


def is_demo(pipe: Any) -> bool:
    """Whether it is the pipeline of the bundled model."""
    from layercache.demo.pipeline import DemoPipeline

    return isinstance(pipe, DemoPipeline)


def check_demo_prompts(pipe: Any, prompts: Sequence[str]) -> None:
    """Refuses prompts that the demo model, which knows classes only, cannot draw; before anything runs."""
    if not is_demo(pipe):
        return
    try:
        for prompt in prompts:
            pipe.class_ids(prompt)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="--prompt") from None


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def gives_video(pipe: Any) -> bool:
    """Whether a pipeline's calls give videos, as far as their arguments say."""
    return "num_frames" in parameters_of(pipe) or "num_videos_per_prompt" in parameters_of(pipe)


# --- arguments of the call ---------------------------------------------------------------------------------------


def read_images(call: CallOptions) -> dict[str, list[Any]]:
    """The pictures of the options by the names they were given; ``""`` of those without one.

    Raises:
        typer.BadParameter: a file is missing, or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    found: dict[str, list[Any]] = {}
    for text in call.image or ():
        name, path = split_name(text, "")
        try:
            with Image.open(path) as picture:
                found.setdefault(name, []).append(picture.convert("RGB"))
        except UnidentifiedImageError:
            raise typer.BadParameter(f"{shown(path)} is no picture.", param_hint="--image") from None
        except OSError as error:
            reason = error.strerror or "it is no picture"
            raise typer.BadParameter(f"{shown(path)} cannot be read: {reason}.", param_hint="--image") from None
    return found


def read_args(call: CallOptions) -> dict[str, Any]:
    """What ``--arg`` sets: JSON, or else text."""
    found: dict[str, Any] = {}
    for text in call.arg or ():
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise typer.BadParameter(f"{shown(text)!r} is not NAME=VALUE.", param_hint="--arg")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def call_arguments(pipe: Any, call: CallOptions, pictures_follow: bool = False) -> dict[str, Any]:
    """Arguments of the pipeline's call, by the names this pipeline has for them.

    Args:
        pipe, call: the pipeline, and the options.
        pictures_follow: whether prompts bring pictures of their own, so that none need be among the options.

    Raises:
        UnsupportedModelError, typer.BadParameter: as `check_call`.
    """
    check_call(type(pipe), call, pictures_follow)
    accepted = parameters_of(pipe)
    wanted: dict[str, Any] = {"height": call.height, "width": call.width, "num_frames": call.num_frames}
    wanted["negative_prompt"] = call.negative_prompt
    if call.guidance_scale is not None:
        guidance = guidance_arguments(pipe, accepted, call.guidance_scale)
        wanted = guidance | {name: value for name, value in wanted.items() if value is not None}
    arguments = {name: value for name, value in wanted.items() if value is not None}
    _refuse_options(type(pipe), accepted, arguments)
    if call.frame_rate is not None and "frame_rate" in accepted:
        arguments["frame_rate"] = call.frame_rate
    for name, pictures in read_images(call).items():
        arguments[name or _image_argument(accepted)] = pictures[0] if len(pictures) == 1 else pictures
    arguments |= read_args(call)
    _warn_of_idle_prompt(call, accepted, arguments)
    return arguments


def check_call(cls: type, call: CallOptions, pictures_follow: bool = False) -> None:
    """Refuses what a pipeline of this class would refuse of its call, whatever its weights are.

    Args:
        cls, call: the class, and the options.
        pictures_follow: whether prompts bring pictures of their own, so that none need be among the options.

    Raises:
        UnsupportedModelError: the class takes no such option.
        typer.BadParameter: an argument of ``--arg`` or ``--image`` that it lacks, or a picture is missing; the message
            lists its own.
    """
    accepted = inspect.signature(cls.__call__).parameters
    given = {name for name in ("height", "width", "num_frames", "negative_prompt") if getattr(call, name) is not None}
    if call.guidance_scale is not None and "true_cfg_scale" not in accepted:
        given.add("guidance_scale")
    _refuse_options(cls, accepted, given)
    pictures = _check_images(cls, accepted, call)
    _check_args(cls, accepted, call)
    needed = [name for name in accepted if "image" in name and accepted[name].default is inspect.Parameter.empty]
    if not pictures_follow and (missing := [name for name in needed if name not in {*pictures, *read_args(call)}]):
        raise typer.BadParameter(f"{cls.__name__} needs a picture ({missing[0]}).", param_hint="--image")


def _refuse_options(cls: type, accepted: Any, given: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(accepted))
    if unknown:
        raise UnsupportedModelError(
            f"{cls.__name__} takes no {', '.join(unknown)}; leave the option out", argument=unknown[0]
        )


def guidance_arguments(pipe: Any, accepted: Any, guidance: float) -> dict[str, Any]:
    """Distilled models embed ``guidance_scale``; ``true_cfg_scale`` is a second forward with a negative prompt."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    distilled = bool(getattr(config, "guidance_embeds", False))
    if "true_cfg_scale" not in accepted or distilled:
        return {"guidance_scale": guidance}
    arguments: dict[str, Any] = {"true_cfg_scale": guidance}
    if guidance > 1 and "negative_prompt" in accepted:
        arguments["negative_prompt"] = " "  # without one the second forward is silently left out
    return arguments


def _image_argument(accepted: Any) -> str:
    """What a picture without a name is for; empty where the call takes none."""
    return next((known for known in IMAGE_ARGUMENTS if known in accepted), "")


def _check_images(cls: type, accepted: Any, call: CallOptions) -> list[str]:
    """The names of the call that pictures are given for."""
    names = [split_name(text, "")[0] for text in call.image or ()]
    found = [name or _image_argument(accepted) for name in names]
    for name, target in zip(names, found, strict=True):
        if target not in accepted:
            takes = [known for known in accepted if "image" in known or known in ("mask", "video")]
            own = f"it takes {', '.join(takes)}" if takes else "it takes none"
            wanted = f" called {shown(name)}" if name else ""
            raise typer.BadParameter(f"{cls.__name__} takes no picture{wanted}; {own}.", param_hint="--image")
    return found


def _check_args(cls: type, accepted: Any, call: CallOptions) -> None:
    found = read_args(call)
    own = [name for name in found if name in OWN or name.startswith("callback")]
    if own:
        option = OPTIONS.get(own[0])
        raise typer.BadParameter(
            f"{own[0]} is set by {option or 'the command itself'}; leave it out.", param_hint="--arg"
        )
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values())
    unknown = [name for name in found if name not in accepted and not takes_all]
    if unknown:
        names = [name for name in accepted if name not in (*OWN, "self") and not name.startswith("callback")]
        close = [close for name in unknown for close in difflib.get_close_matches(name, names, n=2)]
        meant = f" Did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
        raise typer.BadParameter(
            f"{cls.__name__} takes no {', '.join(map(shown, unknown))}.{meant} Its arguments are {', '.join(names)}.",
            param_hint="--arg",
        )


def _warn_of_idle_prompt(call: CallOptions, accepted: Any, arguments: Mapping[str, Any]) -> None:
    """A negative prompt does nothing in a pipeline whose second forward is switched off."""
    if call.negative_prompt is None or "true_cfg_scale" not in accepted:
        return
    scale = arguments.get("true_cfg_scale", accepted["true_cfg_scale"].default)
    if isinstance(scale, (int, float)) and scale <= 1:
        import warnings

        warnings.warn(
            "the negative prompt has no effect on this model unless you add --arg true_cfg_scale=4",
            LayerCacheWarning,
            stacklevel=2,
        )


def quiet_call(pipe: Any, steps: int, call: CallOptions, pictures_follow: bool = False) -> dict[str, Any]:
    """Arguments of many calls under one progress bar, with guidance for the demo model where none was given."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": steps, **call_arguments(pipe, call, pictures_follow)}
    return ({"guidance_scale": DEMO_GUIDANCE} if is_demo(pipe) else {}) | arguments


def figures_of_call(call: Mapping[str, Any], options: CallOptions) -> dict[str, Any]:
    """The arguments of a call as figures: pictures by their files."""
    plain = {name: value for name, value in call.items() if _is_plain(value)}
    return plain | ({"image": list(options.image)} if options.image else {})


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Path, dict))


@contextmanager
def refused_arguments() -> Iterator[None]:
    """Turns the errors with which a pipeline refuses sizes, prompts and pictures into an error for users."""
    try:
        yield
    except LayerCacheError:
        raise
    except NameError as error:  # some pipelines import what cleans a prompt only where it is installed
        name = error.name or ""
        if not name or importlib.util.find_spec(name) is not None:
            raise
        raise MissingExtraError(f"the pipeline needs {name}, which is not installed: pip install {name}") from error
    except (ValueError, TypeError) as error:
        if os.environ.get("LAYERCACHE_DEBUG") == "1":
            raise
        raise LayerCacheError(f"the pipeline refused its arguments: {error}") from error


@contextmanager
def folded(pipe: Any, wanted: bool, call: Mapping[str, Any]) -> Iterator[Any]:
    """Context with timestep tables where they are wanted, found in the first forward of this call; else ``None``."""
    import layercache

    if not wanted:
        yield None
        return
    with refused_arguments():
        tables = layercache.fold_timesteps(pipe, call["num_inference_steps"], **call)
    with tables:
        yield tables


def report_tables(printer: Printer, tables: Any) -> dict[str, Any]:
    """Prints memory before and after timestep tables, if there are any, and gives the figures."""
    if tables is None:
        return {}
    report = tables.report()
    printer.say(str(report))
    return {"timestep_tables": asdict(report) | {"after": report.after}}


def pictures_of(pipe: Any, prompts: Sequence[Any], count: int) -> list[Any]:
    """Prompts of so many pictures, in turn: a call each, or calls of four where the model is small (the demo's).

    How many there are in a call decides about the last bits of the result, so that it is the same for any crew.
    """
    names = [prompts[k % len(prompts)] for k in range(count)]
    if not is_demo(pipe) or any(isinstance(name, Mapping) for name in names):
        return names
    return [names[k : k + BATCH] for k in range(0, count, BATCH)]


def count_calls(model: ModelOptions, pictures: int) -> int:
    """How many calls `pictures_of` makes of so many pictures."""
    return -(-pictures // BATCH) if model.model == "demo" or is_like_demo(model.model) else pictures
