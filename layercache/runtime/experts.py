"""Routing the further transformers of a pipeline that runs several in turns (Wan 2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from layercache.models.registry import count_blocks, spec_for
from layercache.runtime.forward import Forward
from layercache.runtime.identity import Identity
from layercache.runtime.router import Router
from layercache.schedule.memory_plan import COMPUTE, REUSE, GroupAction

if TYPE_CHECKING:
    from layercache.runtime.attachment import Attachment


class ExpertRouter(Router):
    """Routes a further transformer of a pipeline as the router of its first one says.

    Velocities belong to the sampler and not to a transformer: the first one's router keeps them, and decides about all
    steps. Of this transformer whole steps are computed or skipped, nothing of its blocks is stored.

    Args:
        transformer: the further one.
        leader: the first one's attachment.
    """

    keeps_items = True

    def __init__(self, transformer: nn.Module, leader: Attachment):
        super().__init__(transformer, spec_for(transformer), [(0, count_blocks(transformer))])
        self.leader = leader
        self.identity = Identity(self.spec)  # places are found by the leader's router

    @property
    def graphs(self) -> int:
        return 2

    def begin(self, forward: Forward) -> None:
        actions = self.leader.decide(forward._replace(dry_run=None))  # there is no room to be made for residuals
        if actions:
            skips = all(action.kind == REUSE for action in actions)
            self.open((GroupAction(REUSE if skips else COMPUTE),))

    def end_generation(self, completed: bool = True) -> None:
        if not completed:  # a forward of this transformer failed
            self.leader.router_of_call().end_generation(completed)

    def invalidate(self) -> None:
        self.leader.invalidate()
