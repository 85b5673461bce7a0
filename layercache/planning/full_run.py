"""The router of a full run on calibration pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from layercache._utils.timer import Timer
from layercache.models.spec import ModelSpec
from layercache.planning.sampler import LinearSampler
from layercache.planning.trace import Trace
from layercache.runtime.blocks import BlockPass
from layercache.runtime.forward import Forward
from layercache.runtime.recording import RecordingRouter


@dataclass(frozen=True)
class FullSample:
    """A sample's full run.

    Attributes:
        trace: in the host's memory.
        pictures: ``[B, ...]`` in 0..1.
        branches: bytes of the streams, image and text, by guidance branch.
        seconds: of a step: in the blocks, and in the rest of the model.
        sigmas: N + 1 noise levels.
        sampler: its steps; ``None`` where they are not linear in the velocities.
    """

    trace: Trace
    pictures: np.ndarray
    branches: Mapping[str, tuple[int, int]]
    seconds: tuple[float, float]
    sigmas: tuple[float, ...]
    sampler: LinearSampler | None


class _TimedPass(BlockPass):
    """Marks where the blocks begin and end in time."""

    router: FullRun
    watches = True

    def opened(self, group: int) -> None:
        self.router.clock.mark(("blocks", self.router.step_index))

    def computed(self, group: int) -> None:
        self.router.clock.mark(("rest", self.router.step_index))


class FullRun(RecordingRouter):
    """Notes the branches of a full run, the bytes of their streams, image and text, and the seconds of its forwards."""

    def __init__(self, transformer: Any, spec: ModelSpec, scheduler: Any):
        super().__init__(transformer, spec, scheduler)
        self.branches: dict[str, tuple[int, int]] = {}
        self.clock = Timer(next(self.transformer.parameters()).device)

    def new_pass(self) -> BlockPass:
        return _TimedPass(self)

    def begin(self, forward: Forward) -> None:
        super().begin(forward)
        self.clock.mark(("rest", self.step_index))

    def after(self, output: Any, rerun: Callable[[], Any]) -> None:
        self.clock.mark("outside")

    def seconds(self, num_steps: int) -> tuple[float, float]:
        """Median seconds of a step, in the blocks and in the rest of the model; waits for the device."""
        totals = self.clock.totals()
        blocks, rest = ([totals.get((part, step), 0.0) for step in range(num_steps)] for part in ("blocks", "rest"))
        return median(blocks), median(rest)

    def look(self, group: int, before: Any, after: Any) -> None:
        image, text = after
        self.branches[self.branch] = (image.nbytes, 0 if text is None else text.nbytes)
