"""Reading steps: a sampler's from its calls, a loop's from the values of its timesteps."""

from __future__ import annotations

from asyncio import _get_running_loop, current_task
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch


class StepTally:
    """The step of a sampler that keeps no counter (DDIM, CogVideoX's): its calls of ``step`` in the present run.

    Where a run begins (img2img starts in the middle) its first timestep says, which is read once per run.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self._run: Any = None
        self._begin = self._taken = 0

    def count(self) -> None:
        self._taken += 1

    def step(self, timestep: Any) -> int | None:
        """The step about to be taken; ``None`` before the sampler's timesteps are set."""
        run: Any = getattr(self.scheduler, "timesteps", None)
        if run is None or len(run) == 0:
            return None
        if run is not self._run or self._begin + self._taken >= len(run):
            self._run, self._taken = run, 0
            self._begin = _position(run, timestep)
        return self._begin + self._taken


def _position(timesteps: Any, timestep: Any) -> int:
    """Index of a timestep among a run's; 0 where the model was given something else (sigma, say)."""
    if timestep is None:
        return 0
    first = float(torch.as_tensor(timestep).reshape(-1)[0])
    found = [k for k, t in enumerate(torch.as_tensor(timesteps).tolist()) if t == first]
    return found[0] if found else 0


def time_of(timestep: Any, warn: Callable[[str], None]) -> float | None:
    """A timestep's value as one number, the mean where samples or tokens have their own; ``None`` where it has none.

    On an accelerator reading it waits for the device, of which ``warn`` is called.
    """
    if isinstance(timestep, int | float):
        return float(timestep)
    if not isinstance(timestep, torch.Tensor) or timestep.numel() == 0 or timestep.is_meta:
        return None
    if timestep.device.type != "cpu":
        warn(
            "every call of the transformer waits for the device to read its timestep; enable the cache on the "
            "pipeline, name the scheduler of your loop (layercache.enable(transformer, plan, scheduler)), or the step: "
            "`with cache.step(i):`"
        )
    values = timestep.detach().flatten().tolist()
    first = float(values[0])
    return first if len(values) == 1 or values.count(values[0]) == len(values) else float(sum(values)) / len(values)


def caller_thread() -> tuple[int, object]:
    """The thread and, in an event loop, the task that is running."""
    return get_ident(), None if _get_running_loop() is None else id(current_task())
