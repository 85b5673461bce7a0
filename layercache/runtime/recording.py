"""A router that computes everything and looks at the streams of every group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layercache.models.registry import count_blocks
from layercache.models.spec import ModelSpec
from layercache.runtime.forward import Forward
from layercache.runtime.identity import Identity
from layercache.runtime.router import Router
from layercache.schedule.memory_plan import CAPTURE, GroupAction


class RecordingRouter(Router):
    """Runs the model in full and hands every group's streams to `look`.

    Args:
        groups: block ranges; all blocks as one group by default.

    Attributes:
        branch, step_index: of the present forward.
        forwards: how many there were.
    """

    def __init__(
        self, transformer: nn.Module, spec: ModelSpec, scheduler: Any, groups: Sequence[tuple[int, int]] | None = None
    ):
        groups = [(0, count_blocks(transformer))] if groups is None else groups
        super().__init__(transformer, spec, groups)
        self.identity = Identity(spec, scheduler)
        self.branch, self.step_index, self.forwards = "", 0, 0
        self._recorded = (GroupAction(CAPTURE, text=True),) * len(groups)

    def begin(self, forward: Forward) -> None:
        place = self.place_of(forward)
        self.branch, self.step_index = place.key, place.step
        self.forwards += 1
        self.open(self._recorded)

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        self.look(group, (image_in, text_in), (image_out, text_out))

    def look(
        self,
        group: int,
        before: tuple[torch.Tensor, torch.Tensor | None],
        after: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        """Image and text stream in front of a group and behind it."""
        raise NotImplementedError
