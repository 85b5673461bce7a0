"""Running a schedule of whole steps in an engine's own loop, at the velocity behind guidance."""

from __future__ import annotations

from typing import Any

import torch

from layercache.errors import CacheStateError
from layercache.runtime.velocity import VelocityTrack
from layercache.schedule.schedule import Schedule


class WholeStepRun:
    """One generation by a schedule of whole steps.

    The velocity behind guidance needs neither branches nor blocks: a skipped step runs no transformer at all, whichever
    engine it is in, however it is compiled, sharded or offloaded. Every rank of a parallel run skips the same steps.

    Attributes:
        step: the newest, -1 before the first.
        placeholder: what the model gave last, for whoever must be given something at a skipped step.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.step = -1
        self.placeholder: torch.Tensor | None = None
        self._is_skipped = False
        self._track = VelocityTrack.of(schedule, 1)

    def skips(self, step: int, shape: Any) -> bool:
        """Begins a step; whether its velocity comes from earlier ones alone, which are there.

        Args:
            step: of the schedule.
            shape: of the latents, or anything that differs where they do.
        """
        self.step, self._is_skipped = step, False
        if self._track.layouts:  # else all are computed
            self._track.begin(step, shape)
            ready = self.placeholder is not None and self._track.is_complete
            self._is_skipped = ready and self.schedule.is_skipped(step)
        return self._is_skipped

    def replaced(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What the sampler gets at the present step.

        Args:
            velocity: the model's own, behind guidance; of a skipped step a tensor of its dtype.
            latents: that the step starts from.

        Raises:
            CacheStateError: the velocity is not of their shape.
        """
        if not self._is_skipped and velocity.shape != latents.shape:
            raise CacheStateError(f"velocities {tuple(velocity.shape)} for latents {tuple(latents.shape)}")
        return self._track.replace_velocity(velocity, latents) if self._track.layouts else velocity

    @property
    def is_over(self) -> bool:
        """Whether the newest step is the last one."""
        return self.step >= self.schedule.num_steps - 1
