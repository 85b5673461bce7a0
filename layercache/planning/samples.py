"""Samples of a calibration: prompt, seed, sigmas."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from layercache.errors import CalibrationError

GUIDANCE, SIZES = ("guidance_scale", "true_cfg_scale"), ("height", "width", "num_frames")

Sample = tuple[str, Callable[[], object]]


def samples_of(
    pipe: Any,
    prompts: Any,
    run: Callable[..., object] | None,
    samples: int | None,
    sigmas: Any,
    seeds: Any,
    num_inference_steps: int | None,
    call: dict[str, Any],
) -> list[Sample]:
    """The calls to make, each with a line that describes it."""
    if isinstance(pipe, nn.Module):
        if run is None or sigmas is None or not samples:
            raise CalibrationError(
                "to calibrate a bare transformer give run=, a function that does one full generation, samples=, how "
                "many, and sigmas=, the noise levels it runs through; or pass the pipeline"
            )
        return [(f"run {k}", functools.partial(run, k)) for k in range(samples)]
    if isinstance(prompts, str):
        prompts = [prompts]
    if not prompts:
        raise CalibrationError(
            "calibration needs at least one prompt (3 to 16 give a stable profile)", argument="prompts"
        )
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise CalibrationError(
            f"give one seed per prompt: {len(prompts)} prompts, {len(seeds)} seeds", argument="seeds"
        )
    arguments = dict(call)
    accepted = inspect.signature(type(pipe).__call__).parameters
    if "output_type" in accepted:
        arguments.setdefault("output_type", "latent")
    if num_inference_steps is not None:
        arguments["num_inference_steps"] = num_inference_steps

    def sample(prompt: Any, seed: int) -> Sample:
        def generate() -> None:
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(**{**arguments, **arguments_of(prompt), "generator": generator})

        text = ", ".join(prompt) if isinstance(prompt, Mapping) and "prompt" not in prompt else prompt
        return f"seed {seed}: {text['prompt'] if isinstance(text, Mapping) else text}", generate

    return [sample(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def arguments_of(prompt: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call for one sample: those it names, or its prompt."""
    return dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}


def call_settings(call: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance and size among the arguments of a pipeline's call, as `Fingerprint.settings` holds them."""
    guidance = {name: float(call[name]) for name in GUIDANCE if isinstance(call.get(name), (int, float))}
    size = [f"{name} {call[name]}" for name in SIZES if isinstance(call.get(name), int)]
    return ({"guidance": [f"{name} {value:g}" for name, value in guidance.items()]} if guidance else {}) | (
        {"size": size} if size else {}
    )


def copied(generator: Any) -> Any:
    """A generator, or a list of them, that draws from its present state on and leaves the original as it is."""
    if isinstance(generator, (list, tuple)):
        return [copied(one) for one in generator]
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy


def pictures_in(result: Any) -> np.ndarray:
    """Pictures or frames of a pipeline's result, ``[B, ...]``, in 0..1 (latents as they are)."""
    for name in ("images", "frames"):
        if hasattr(result, name):
            result = getattr(result, name)
            break
    else:
        result = result[0] if isinstance(result, tuple) else result
    if isinstance(result, torch.Tensor):
        result = result.float().cpu().numpy()
    return np.stack([_numbers(picture) for picture in result])


def _numbers(picture: Any) -> np.ndarray:
    """A picture, or the list of a video's frames, as float64; 8-bit values as shares of 255."""
    values = np.asarray(picture)
    return values / 255.0 if values.dtype == np.uint8 else values.astype(np.float64)
