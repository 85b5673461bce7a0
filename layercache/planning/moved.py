"""Full runs of Euler steps as runs between other noise levels (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from layercache._utils.compat import call_parameters
from layercache.errors import MethodError
from layercache.planning.sampler import LinearSampler
from layercache.planning.trace import Trace


def check_moves(
    samplers: Sequence[LinearSampler | None] | None, sigmas: Sequence[float], is_whole: bool = True
) -> None:
    """Raises `MethodError` unless the full runs took Euler steps, between whose levels their latents are known.

    Args:
        samplers: of all samples.
        sigmas: noise levels and the last one, of all of them.
        is_whole: whether they have these levels, and began with the first.
    """
    if not is_whole:
        raise MethodError(
            "noise levels are moved where all samples have the same ones and begin with the first: leave out sizes=, "
            "and strength="
        )
    lengths = np.diff(np.asarray(sigmas, float))
    for sampler in samplers or [None]:
        keeps = sampler is not None and np.allclose(sampler.keep, 1.0, atol=1e-4)
        if sampler is None or not keeps or not np.allclose(sampler.weights, np.diag(lengths), atol=1e-4):
            raise MethodError(
                "noise levels are moved along full runs of Euler steps, and those of this sampler are others; take "
                "FlowMatchEulerDiscreteScheduler, or leave the noise levels as they are"
            )


def given_call(pipe: Any, given: Sequence[float]) -> dict[str, Any]:
    """The arguments of a pipeline's call that give it these noise levels, and their number where it takes one."""
    found: dict[str, Any] = {"sigmas": list(given)}
    if "num_inference_steps" in call_parameters(pipe):
        found["num_inference_steps"] = len(given)
    return found


def polygon(sigmas: Sequence[float], levels: Sequence[float]) -> np.ndarray:
    """``x_ref(level) = x_ref[i] + (level - sigma_i) v_ref[i]`` in terms of x_ref[0] and all v_ref, ``[L, N + 1]``.

    Args:
        sigmas: N + 1 falling noise levels of the full run.
        levels: L others, between its first and its last.
    """
    at, start, end = (np.asarray(values, float) for values in (levels, sigmas[:-1], sigmas[1:]))
    lengths = np.minimum(np.maximum(end, at[:, None]) - start, 0.0)
    return np.concatenate([np.ones((len(at), 1)), lengths], axis=1)


def mean_velocities(sigmas: Sequence[float], levels: Sequence[float]) -> np.ndarray:
    """Of the polygon between other levels, in the same terms, ``[L - 1, N + 1]``."""
    return np.asarray(np.diff(polygon(sigmas, levels), axis=0) / np.diff(np.asarray(levels, float))[:, None])


def moved_trace(trace: Trace, sigmas: Sequence[float], levels: Sequence[float]) -> Trace:
    """The same of a trace, whose latents and velocities are in the host's memory."""
    first, velocities = trace.latents[0], trace.taken
    taken = []
    for row in mean_velocities(sigmas, levels):
        parts = [float(weight) * velocities[k].float() for k, weight in enumerate(row[1:]) if weight]
        taken.append(sum(parts[1:], parts[0]).to(first.dtype))
    latents = [first]
    for velocity, (level, after) in zip(taken[:-1], pairwise(levels), strict=False):
        latents.append((latents[-1].float() + (after - level) * velocity.float()).to(first.dtype))
    return Trace(latents, list(taken), taken)
