"""Traces of generations: the latents and velocities of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layercache.runtime.velocity import combine
from layercache.schedule.schedule import Velocity


@dataclass
class Trace:
    """Of one generation of one sample, per step: latents before it, velocity of the model, velocity taken.

    ``raw[i]`` is ``None`` where the model did not run. What a full run had is kept in the host's memory
    (`on_host`); whoever computes with it takes it where it is needed.
    """

    latents: list[torch.Tensor] = field(default_factory=list)
    raw: list[torch.Tensor | None] = field(default_factory=list)
    taken: list[torch.Tensor] = field(default_factory=list)

    def add(self, latents: torch.Tensor, raw: torch.Tensor | None, taken: torch.Tensor | None = None) -> None:
        self.latents.append(latents)
        self.raw.append(raw)
        if taken is not None:
            self.taken.append(taken)

    def combined(self, rule: Velocity | None, step: int) -> torch.Tensor:
        """The velocity by a rule, made as it is made when the schedule runs."""
        own = self.raw[step]
        if rule is None:
            assert own is not None
            return own
        terms = [(self.raw[source], c) for source, c in sorted(rule.terms.items(), reverse=True)]
        terms += [(self.latents[step], rule.latents)] if rule.latents else []
        result: torch.Tensor = combine([t for t, _ in terms], [c for _, c in terms], None)  # type: ignore[misc]
        return result.add_(rule.offset) if rule.offset else result


def together(traces: Sequence[Trace]) -> Trace:
    """The outputs of a sample (video and sound) as one trace, in which each counts the same; one output as it is.

    Tensors are ``[B, elements]``, those of an output scaled so that the mean square over all elements is the mean over
    the outputs of theirs.
    """
    first, *others = traces
    if not others:
        return first
    sizes = [trace.latents[0][0].numel() for trace in traces]
    scales = [math.sqrt(sum(sizes) / (len(sizes) * size)) for size in sizes]

    def joined(tensors: Sequence[torch.Tensor | None]) -> Any:
        if any(tensor is None for tensor in tensors):
            return None
        pairs = zip(tensors, scales, strict=True)
        return torch.cat([tensor.flatten(1).float() * scale for tensor, scale in pairs], dim=1)  # type: ignore[union-attr]

    parts = (zip(*(getattr(trace, name) for trace in traces), strict=True) for name in ("latents", "raw", "taken"))
    return Trace(*([joined(tensors) for tensors in part] for part in parts))


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the host's memory; of a GPU's, a copy that is there once the GPU is synchronised."""
    if not tensor.is_cuda:
        return tensor.cpu()
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return kept.copy_(tensor, non_blocking=True)


def near(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor on the device of another."""
    return tensor.to(other.device, non_blocking=True)
