"""Samples of a batch that are NaN, and decisions about the others without them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch

from layercache.runtime.policy import Observation


def bad_samples(tensor: torch.Tensor) -> set[int]:
    """Samples of a batch that hold NaN or infinity; asks the device."""
    if not tensor.numel() or not tensor.dim():
        return set()
    rows = torch.isfinite(tensor).reshape(tensor.shape[0], -1).all(dim=1)
    return {sample for sample, good in enumerate(rows.tolist()) if not good}


class Excluded:
    """Samples of a batch that a method decides without: one NaN would keep all others from being reused.

    They are 0 in what is observed, which adds nothing to a sum. Where all are NaN none is left out: everything is
    computed then.

    Attributes:
        samples: which, of a batch of ``size``.
        is_due: whether `look` is to be called for the next output that is computed.
    """

    def __init__(self) -> None:
        self.samples: set[int] = set()
        self.size = 0
        self.is_due = True

    def look(self, output: torch.Tensor) -> bool:
        """Looks at what a step computed; whether further samples are left out. Asks the device."""
        self.is_due = False
        found = bad_samples(output)
        if len(found) == output.shape[0] or found <= self.samples:
            return False
        self.samples, self.size = found | self.samples, output.shape[0]
        return True

    def note(self, numbers: Iterable[float] | None) -> None:
        """Statistics that are not finite ask for another look."""
        if numbers is not None and not all(map(math.isfinite, numbers)):
            self.is_due = True

    def without(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in which these samples are 0; of a batch that repeats the samples (guidance), all of them."""
        if not self.samples or not tensor.dim() or tensor.shape[0] % self.size:
            return tensor
        return tensor.index_fill(0, self._places(tensor), 0)

    def clear(self, tensors: Collection[torch.Tensor]) -> None:
        """Makes these samples 0 where they are stored."""
        for tensor in tensors:
            if tensor.dim() and tensor.shape[0] % self.size == 0:
                tensor.index_fill_(0, self._places(tensor), 0)

    def observed(self, observation: Observation) -> Observation:
        """What is observed without these samples."""
        if not self.samples:
            return observation

        def modulation() -> tuple[torch.Tensor, torch.Tensor, float]:
            scale, shift, eps = observation.modulation()
            return self.without(scale), self.without(shift), eps

        start, probe, latents = observation.start, observation.probe, observation.latents
        return replace(
            observation,
            start=self.without(start),
            probe=self.without(probe),
            modulation=modulation,
            latents=None if latents is None else lambda: self.without(latents()),
        )

    def _places(self, tensor: torch.Tensor) -> torch.Tensor:
        found = [place for place in range(tensor.shape[0]) if place % self.size in self.samples]
        return torch.tensor(found, device=tensor.device)
