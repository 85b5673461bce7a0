"""Pipelines of the commands: loading, prompts, arguments of the call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from layercache.errors import LayerCacheError, UnsupportedModelError
from layercache.tools.cli.common import Dtype, read_prompts

DEMO_GUIDANCE = 4.0


def choose_device(name: str | None) -> str:
    """The device that was named, or a GPU if there is one."""
    import torch

    available = torch.cuda.is_available()
    if name is None:
        return "cuda" if available else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is not a device; use cuda, cuda:1 or cpu.", param_hint="--device") from None
    if wanted.type == "cuda" and not available:
        raise typer.BadParameter("torch finds no CUDA GPU here; see layercache doctor.", param_hint="--device")
    return name


def load_pipeline(model: str, device: str | None, dtype: Dtype) -> Any:
    """The pipeline that ``--model`` names, on its device.

    Raises:
        LayerCacheError: it cannot be loaded; the message has the first line of the reason.
    """
    import torch

    device = choose_device(device)
    try:
        if model == "demo":
            from layercache.demo.pipeline import load_demo_pipeline

            return load_demo_pipeline(device)
        if model.endswith(".json"):
            from layercache.models.random_weights import load_random_pipeline

            return load_random_pipeline(model, getattr(torch, dtype.value)).to(device)
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype.value)).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("LAYERCACHE_DEBUG") == "1":
            raise
        raise LayerCacheError(f"cannot load the model {model!r} on {device}: {_reason(model, error)}") from error


def _reason(model: str, error: Exception) -> str:
    """The first line of the error, except where diffusers takes the bundled model for one of the hub's."""
    if model == "demo":
        from layercache.demo.pipeline import WEIGHTS

        if not WEIGHTS.is_dir():
            return f"its weights are not in {WEIGHTS}, reinstall layercache"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_with_prompts(
    model: str, prompts: Sequence[str] | None, prompts_file: Path | None, device: str | None, dtype: Dtype
) -> tuple[Any, list[str]]:
    """A pipeline and the prompts to run it on; without any, the demo model gets the names of all its classes."""
    found = read_prompts(prompts, prompts_file)
    if not found and model != "demo":
        raise typer.BadParameter("give at least one --prompt, or a --prompts-file.", param_hint="--prompt")
    pipe = load_pipeline(model, device, dtype)
    if not found:
        from layercache.demo.model import CLASS_NAMES

        found = list(CLASS_NAMES)
    check_demo_prompts(pipe, found)
    return pipe, found


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


def call_arguments(pipe: Any, guidance: float | None, height: int | None, width: int | None) -> dict[str, Any]:
    """Arguments of the pipeline's call, by the names this pipeline has for them."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    wanted: dict[str, Any] = {"height": height, "width": width}
    if guidance is not None:
        wanted |= _guidance_arguments(pipe, accepted, guidance)
    arguments = {name: value for name, value in wanted.items() if value is not None}
    unknown = sorted(set(arguments) - set(accepted))
    if unknown:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave the option out", argument=unknown[0]
        )
    return arguments


def _guidance_arguments(pipe: Any, accepted: Any, guidance: float) -> dict[str, Any]:
    """Distilled models embed ``guidance_scale``; ``true_cfg_scale`` is a second forward with a negative prompt."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    distilled = bool(getattr(config, "guidance_embeds", False))
    if "true_cfg_scale" not in accepted or distilled:
        return {"guidance_scale": guidance}
    arguments: dict[str, Any] = {"true_cfg_scale": guidance}
    if guidance > 1 and "negative_prompt" in accepted:
        arguments["negative_prompt"] = " "  # without one the second forward is silently left out
    return arguments


def quiet_call(pipe: Any, steps: int, guidance: float | None, height: int | None, width: int | None) -> dict[str, Any]:
    """Arguments of many calls under one progress bar, with guidance for the demo model where none was given."""
    pipe.set_progress_bar_config(disable=True)
    guidance = DEMO_GUIDANCE if guidance is None and is_demo(pipe) else guidance
    return {"num_inference_steps": steps, **call_arguments(pipe, guidance, height, width)}


@contextmanager
def refused_arguments() -> Iterator[None]:
    """Turns the `ValueError` with which a pipeline refuses sizes and prompts into an error for users."""
    try:
        yield
    except LayerCacheError:
        raise
    except ValueError as error:
        if os.environ.get("LAYERCACHE_DEBUG") == "1":
            raise
        raise LayerCacheError(f"the pipeline refused its arguments: {error}") from error


def pictures_of(pipe: Any, prompts: Sequence[str], count: int) -> list[Any]:
    """Prompts of so many pictures, in turn: a call each, or one call where the model is small (the demo's)."""
    names = [prompts[k % len(prompts)] for k in range(count)]
    return [names] if is_demo(pipe) else names
