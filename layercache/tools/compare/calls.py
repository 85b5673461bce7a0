"""Calls of a pipeline for the pictures and videos that are compared."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layercache._utils import metrics
from layercache._utils.compat import progress_bar_settings
from layercache._utils.timer import synchronise
from layercache.errors import ArgumentError, CacheStateError, LayerCacheError, UnsupportedModelError
from layercache.models.registry import find_transformer, spec_for
from layercache.planning.samples import call_of, pictures_in
from layercache.runtime.attachment import attachment_of

Pictures = NDArray[np.float32]

FIXED = ("generator", "latents", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")
"""Arguments of a call that the comparison gives itself."""


class PictureCalls:
    """Calls of a pipeline, each for a batch of prompts with a seed per picture.

    Args:
        pipeline: a diffusers pipeline.
        prompts: a call per entry: a prompt, a list of prompts (one call for all of them), or a mapping of arguments of
            the call, such as ``{"prompt": ..., "image": ...}``, which are taken before those of ``call``.
        seeds: one per picture.
        call: further arguments of every call.

    Raises:
        LayerCacheError: there is not one seed per picture.
    """

    def __init__(self, pipeline: Any, prompts: Sequence[Any], seeds: Sequence[int], call: Mapping[str, Any]):
        self.pipeline, self.prompts, self.seeds = pipeline, batches_of(prompts), list(seeds)
        edges = np.cumsum([0, *map(len, self.prompts)]).tolist()
        if edges[-1] != len(self.seeds):
            raise LayerCacheError(f"give one seed per picture: {edges[-1]} pictures, {len(self.seeds)} seeds")
        self.batches = list(pairwise(edges))
        self.call = {name: value for name, value in call.items() if name not in FIXED}
        if "output_type" in inspect.signature(type(pipeline).__call__).parameters:
            self.call["output_type"] = "np"

    def run(self, batch: int, changed: Mapping[str, Any] | None = None) -> tuple[Pictures, float]:
        """The pictures of a batch, ``[n, H, W, C]`` or ``[n, frames, H, W, C]`` in 0..1, and the seconds it took.

        Args:
            batch: its number.
            changed: arguments of this call that take the place of the others.
        """
        prompts, (lo, hi) = self.prompts[batch], self.batches[batch]
        call = call_of(prompts[0] if len(prompts) == 1 else prompts, self.seeds[lo:hi], self.call) | dict(changed or {})
        device = torch.device(getattr(self.pipeline, "device", "cpu"))
        synchronise(device)
        start = time.perf_counter()
        result = self.pipeline(**call)
        synchronise(device)
        seconds = time.perf_counter() - start
        has_sound = getattr(result, "audio", None) is not None  # what is compared are the frames
        return checked(pictures_in(result.frames if has_sound else result), hi - lo), seconds

    def run_all(self) -> tuple[Pictures, list[float]]:
        """The pictures of all batches, and the seconds of each."""
        found = [self.run(batch) for batch in range(len(self.batches))]
        return np.concatenate([pictures for pictures, _ in found]), [seconds for _, seconds in found]


def batches_of(prompts: Sequence[Any]) -> list[list[Any]]:
    """Prompts by call; a mapping of arguments is a call of its own."""
    batches: list[list[Any]] = []
    for entry in prompts:
        together = list(entry) if isinstance(entry, (list, tuple)) else [entry]
        is_apart = any(isinstance(prompt, Mapping) for prompt in together)
        batches += [[prompt] for prompt in together] if is_apart else [together]
    return batches


def checked(pictures: np.ndarray, count: int) -> Pictures:
    """Pictures or videos as float32; frames of one video, where one was asked for, are that video.

    Raises:
        LayerCacheError: they are neither, there is another number of them, or their values are not in 0..1.
    """
    pictures = (pictures / 255.0 if pictures.dtype == np.uint8 else pictures).astype(np.float32)
    if count == 1 and pictures.ndim == 4 and len(pictures) > 1:
        pictures = pictures[None]
    if pictures.ndim not in (4, 5) or pictures.shape[-1] not in (1, 3, 4):
        raise LayerCacheError(
            "only pictures [n, height, width, channels] and videos [n, frames, height, width, channels] can be "
            f"compared, the pipeline gave {list(pictures.shape)}"
        )
    if len(pictures) != count:
        raise LayerCacheError(f"the pipeline gave {len(pictures)} pictures for {count} prompts")
    low, high = float(pictures.min()), float(pictures.max())
    if low < -metrics.RANGE_TOLERANCE or high > 1 + metrics.RANGE_TOLERANCE:
        raise LayerCacheError(f"pictures must lie in 0..1, the pipeline's go from {low:.4g} to {high:.4g}")
    return pictures


def samples_of(prompts: Any, seeds: Sequence[int] | int | None, batch: int = 1) -> tuple[list[list[Any]], list[int]]:
    """Prompts by call, and a seed per picture.

    Args:
        prompts: one, or several; a list among them is a call of its own, whatever ``batch`` is.
        seeds: one per picture; more of them than prompts take the prompts in turn. A number: so many, from 0 on.
            ``None``: a picture per prompt, with the seeds 0, 1, ...
        batch: prompts per call.

    Raises:
        ArgumentError: no prompts, fewer seeds than prompts, or what is no seed.
    """
    if isinstance(prompts, (str, Mapping)):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise ArgumentError("give prompts: a list of texts, or of mappings of the call's arguments", argument="prompts")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ArgumentError(f"batch is a number of pictures per call, at least 1, got {batch!r}", argument="batch")
    calls = batches_of(prompts)
    is_grouped = any(isinstance(entry, (list, tuple)) for entry in prompts)
    count = sum(map(len, calls))
    numbers = list(range(count)) if seeds is None else list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in numbers):
        raise ArgumentError("seeds are whole numbers of at least 0", argument="seeds")
    if len(numbers) < count or (is_grouped and len(numbers) != count):
        raise ArgumentError(f"give one seed per picture: {count} pictures, {len(numbers)} seeds", argument="seeds")
    if is_grouped:
        return calls, numbers
    flat = [prompt for one in calls for prompt in one]
    return batched(flat, 0, len(numbers), batch), numbers


def batched(prompts: Sequence[Any], first: int, count: int, batch: int) -> list[list[Any]]:
    """Prompts ``first`` to ``first + count``, in turn, so many per call."""
    chosen = [prompts[k % len(prompts)] for k in range(first, first + count)]
    return batches_of([chosen[lo : lo + batch] for lo in range(0, count, batch)])


def check_pipeline(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuses what cannot be compared on, before anything runs.

    Raises:
        UnsupportedModelError: no pipeline with a known transformer.
        CacheStateError: a cache is enabled on it.
        ArgumentError: the pipeline takes no argument of this name, or the comparison gives it itself.
    """
    transformer = find_transformer(pipe)
    spec_for(transformer)
    if pipe is transformer or isinstance(pipe, torch.nn.Module):
        raise UnsupportedModelError(
            f"whole pictures are compared: give the pipeline, not its bare {type(transformer).__name__}"
        )
    if attachment_of(transformer) is not None:
        raise CacheStateError("a layercache cache is enabled on this pipeline; call layercache.disable first")
    check_call(pipe, call)


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuses arguments of a call before anything runs.

    Raises:
        ArgumentError: the pipeline takes no argument of this name, or the comparison gives it itself.
    """
    own = sorted(set(call) & set(FIXED) - {"output_type", "return_dict"})
    if own:
        raise ArgumentError(
            f"{own[0]} is given by the comparison, picture by picture; leave it out (seeds=... chooses the noise)",
            argument=own[0],
        )
    accepted = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(call) - set(accepted))
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in accepted.values()):
        raise ArgumentError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(list(accepted)[1:])}",
            argument=unknown[0],
        )


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Context without the pipeline's own progress bars."""
    before = progress_bar_settings(pipe)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(**{"disable": False, **before})
