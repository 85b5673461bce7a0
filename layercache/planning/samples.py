"""Samples of a calibration: prompt, seed, sigmas."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from layercache._utils.compat import call_parameters, guidance_of
from layercache.errors import ArgumentError, CalibrationError
from layercache.schedule.fingerprint import GUIDANCE, SCALES, SIZES, call_settings

OUTPUTS = ("images", "frames", "videos", "latents")
"""What a pipeline's output may hold its pictures in, by name; latents where it decodes none."""

PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")

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
            one = call_of(prompt, [seed], arguments)
            # a list of prompts is a batch that shares one generator
            pipe(**{**one, "generator": one["generator"][0]} if isinstance(one["generator"], list) else one)

        text = ", ".join(prompt) if isinstance(prompt, Mapping) and "prompt" not in prompt else prompt
        return f"seed {seed}: {text['prompt'] if isinstance(text, Mapping) else text}", generate

    return [sample(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def arguments_of(prompt: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call for one sample: those it names, or its prompt."""
    return dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}


def measured_settings(pipe: Any, *calls: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance and size of calls (`call_settings`); what a call does not give has the pipeline's default."""
    accepted = call_parameters(pipe)
    names = [name for name in (*GUIDANCE, *SIZES) if name in accepted]
    defaults = {name: accepted[name].default for name in names}
    return call_settings(*({**defaults, **call, **guidance_of(pipe)} for call in calls))


def count_of(prompt: Any, call: Mapping[str, Any]) -> int:
    """How many pictures one sample gives.

    Args:
        prompt: text, a list of texts, or a mapping of arguments (`arguments_of`).
        call: further arguments of the call.
    """
    arguments = {**call, **arguments_of(prompt)}
    per_prompt = next((arguments[name] for name in PER_PROMPT if arguments.get(name) is not None), 1)
    for name in ("prompt", "prompt_embeds", "class_labels"):
        given = arguments.get(name)
        if isinstance(given, (list, tuple, torch.Tensor)):
            return len(given) * int(per_prompt)
    return int(per_prompt)


def call_of(prompt: Any, seeds: Sequence[int], call: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a pipeline's call for one sample.

    Args:
        prompt: text, a list of texts (one call with that batch), or a mapping of arguments, such as an image to begin
            with beside the prompt; of a generator among them a copy is given.
        seeds: one per picture.
        call: arguments of every call; those of the sample go before them.
    """
    arguments = {**call, **arguments_of(prompt)}
    if arguments.get("generator") is not None:
        return {**arguments, "generator": copied(arguments["generator"])}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    is_batch = isinstance(prompt, (list, tuple)) or len(seeds) > 1
    return {**arguments, "generator": generators if is_batch else generators[0]}


def seeds_of(prompts: Sequence[Any], seeds: Sequence[int] | None, call: Mapping[str, Any]) -> list[list[int]]:
    """Seeds of every sample's pictures; 0, 1, ... over all pictures where none are given.

    Raises:
        CalibrationError: there are more or fewer than pictures.
    """
    counts = [count_of(prompt, call) for prompt in prompts]
    given = list(range(sum(counts))) if seeds is None else list(seeds)
    if len(given) != sum(counts):
        raise CalibrationError(
            f"give one seed per picture: {sum(counts)} pictures, {len(given)} seeds", argument="seeds"
        )
    edges = np.cumsum([0, *counts]).tolist()
    return [given[lo:hi] for lo, hi in pairwise(edges)]


def with_settings(
    pipe: Any,
    prompts: Sequence[Any],
    seeds: Sequence[int] | None,
    guidance: Sequence[float],
    sizes: Sequence[Sequence[int]],
    call: Mapping[str, Any],
) -> tuple[list[Any], list[int] | None]:
    """Samples for every prompt with every setting, and their seeds; the first of them take all settings in turns.

    Args:
        pipe: the pipeline; which of its arguments is the guidance scale is what ``call`` names, or what it has by
            default.
        prompts, seeds: as for `seeds_of`.
        guidance: guidance scales; none: as the calls have it.
        sizes: ``(height, width)`` or ``(height, width, frames)`` in pixels; none: as the calls have them.
        call: arguments of every call.

    Raises:
        ArgumentError: a guidance scale or size is none, or the pipeline takes no such argument.
    """
    accepted = call_parameters(pipe)
    given: list[list[dict[str, Any]]] = [[], []]
    for scale in guidance:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise ArgumentError(f"guidance takes numbers, got {scale!r}", argument="guidance")
        given[0].append({_guidance_name(accepted, call): float(scale)})
    for size in sizes:
        if len(size) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in size):
            raise ArgumentError(
                f"a size is (height, width), or (height, width, frames), got {size!r}", argument="sizes"
            )
        given[1].append(dict(zip(SIZES, size, strict=False)))
    settings = [{**one, **other} for one in given[0] or [{}] for other in given[1] or [{}]]
    unknown = sorted({name for one in settings for name in one} - set(accepted))
    if unknown:
        raise ArgumentError(f"{type(pipe).__name__} takes no {', '.join(unknown)}, which was to be varied")
    if settings == [{}]:
        return list(prompts), seeds if seeds is None else list(seeds)
    if not prompts:
        return [], None
    own = None if seeds is None else seeds_of(prompts, seeds, call)
    count, turn = len(settings), math.lcm(len(prompts), len(settings))
    pairs = [
        (k % len(prompts), (k + k // turn) % count) for k in range(len(prompts) * count)
    ]  # every pair once, all settings soon
    expanded = [{**arguments_of(prompts[k]), **settings[setting]} for k, setting in pairs]
    return expanded, None if own is None else [seed for k, _ in pairs for seed in own[k]]


def _guidance_name(accepted: Mapping[str, Any], call: Mapping[str, Any]) -> str:
    """Which argument of a pipeline's call is the guidance scale: where it has two, one of them is 1, for none."""
    named = [name for name in SCALES if call.get(name) is not None]
    if len(named) == 1:
        return named[0]
    true = accepted.get("true_cfg_scale")
    return "true_cfg_scale" if true is not None and true.default not in (None, 1.0) else "guidance_scale"


def copied(generator: Any) -> Any:
    """A generator, or a list of them, that draws from its present state on and leaves the original as it is."""
    if isinstance(generator, (list, tuple)):
        return [copied(one) for one in generator]
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy


def pictures_in(result: Any, count: int | None = None) -> np.ndarray:
    """Pictures of a pipeline's result, ``[B, ...]``; of a video all frames are one picture.

    Args:
        result: of the pipeline's call: an output class, a state, a tuple, or the pictures themselves: an array
            or tensor, or lists of arrays, tensors or PIL pictures, of videos lists of such lists.
        count: B, where it is known: what has another length is cut into as many, so that the frames of one video, in
            an array ``[frames, H, W, C]``, are one picture.

    Returns:
        float32, or float64 where the result is; 8-bit values (PIL) as they are, `psnr_of` knows their scale. Of videos
            with sound, ``[B, numbers]``: frames and sound, each of which counts half in a mean square.

    Raises:
        CalibrationError: the result does not divide into so many.
    """
    named = [found for name in OUTPUTS if (found := _named(result, name)) is not None]
    sound = _named(result, "audio")
    if sound is not None:
        return _with_sound(pictures_in(named[0], count), _numbers(sound))
    if named:
        result = named[0]
    elif isinstance(result, tuple):
        result = result[0]
    numbers = _numbers(result)
    if count is None or (numbers.ndim and len(numbers) == count):
        return numbers
    if count == 0 or not numbers.ndim or len(numbers) % count:
        raise CalibrationError(f"the pipeline gave {len(numbers) if numbers.ndim else 0} pictures for {count} prompts")
    return numbers[None] if count == 1 else numbers.reshape(count, -1, *numbers.shape[1:])


def _named(result: Any, name: str) -> Any:
    """One of the values that a pipeline gives by name: in a mapping, in the state of a modular one, or an attribute."""
    values = result if isinstance(result, Mapping) else getattr(result, "values", None)
    return values.get(name) if isinstance(values, Mapping) else getattr(result, name, None)


def _with_sound(frames: np.ndarray, sound: np.ndarray) -> np.ndarray:
    """Both in one row per video; the range of a waveform is 2, that of frames 1."""
    frames = frames / np.float32(255) if frames.dtype == np.uint8 else frames
    parts = [frames.reshape(len(frames), -1), 0.5 * sound.reshape(len(frames), -1)]
    total = sum(part.shape[1] for part in parts)
    return np.concatenate([part * np.float32(np.sqrt(total / (2 * part.shape[1]))) for part in parts], axis=1)


def _numbers(pictures: Any) -> np.ndarray:
    """Numbers in nested lists, as one array."""
    if isinstance(pictures, torch.Tensor):
        wide = pictures.dtype in (torch.float64, torch.uint8)
        pictures = (pictures if wide else pictures.float()).detach().cpu().numpy()
    if isinstance(pictures, (list, tuple)):
        return np.stack([_numbers(picture) for picture in pictures])
    found = np.asarray(pictures)
    return found if found.dtype in (np.uint8, np.float64) else found.astype(np.float32, copy=False)
