"""Routing a transformer's forward through blocks, capturing callables and skipping callables.

The forward of the model keeps iterating over its own ``ModuleList``; for as long as a router is
attached, that list yields for each block of the current row either the block itself or a small
callable of the same signature. Whatever the forward adds between blocks (ControlNet residuals) is
counted once: inside a group it is part of the residual, behind a group it is added live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from layercache.layout import CAPTURE, COMPUTE, GroupAction
from layercache.models import ModelSpec

_CLOSED = -1


class Place(NamedTuple):
    """Where a block stands: its group, its number over all lists, whether it is the group's first, and its last."""

    group: int
    block: int
    opens: bool
    closes: bool


class Trip:
    """One passage of the streams through the blocks; remembers the input of the group that is open."""

    def __init__(self, router: Router):
        self.router = router
        self.image: torch.Tensor | None = None
        self.text: torch.Tensor | None = None

    def open(self, group: int, image: torch.Tensor, text: torch.Tensor | None) -> None:
        self.image, self.text = image, text

    def close(self, group: int, image: torch.Tensor, text: torch.Tensor | None) -> None:
        """The open group was computed: hand its input and output to the router."""
        image_in, text_in = self.image, self.text
        self.image = self.text = None
        self.router.capture(group, image_in, text_in, image, text)

    def skip(self, group: int, action: GroupAction) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The open group was skipped: its output is its input, or the end of the whole run."""
        image, text = self.image, self.text
        self.image = self.text = None
        if not action.ends_run:
            return image, text  # type: ignore[return-value]
        return self.router.reuse(group, image, text)


class CapturedBlock:
    """The first or last block of a computed group whose residual is stored."""

    def __init__(self, trip: Trip, block: nn.Module, place: Place):
        self.trip, self.block, self.place = trip, block, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spec = self.trip.router.spec
        if self.place.opens:
            self.trip.open(self.place.group, *spec.inputs(args, kwargs))
        output = self.block(*args, **kwargs)
        if self.place.closes:
            self.trip.close(self.place.group, *spec.unpack(output))
        return output


class SkippedBlock:
    """A block of a reused group: passes the streams on, and at the group's end replaces them."""

    def __init__(self, trip: Trip, action: GroupAction, place: Place):
        self.trip, self.action, self.place = trip, action, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spec = self.trip.router.spec
        image, text = spec.inputs(args, kwargs)
        if self.place.opens:
            self.trip.open(self.place.group, image, text)
        if self.place.closes:
            image, text = self.trip.skip(self.place.group, self.action)
        return spec.pack(image, text)


class Router:
    """Decides what the routed block lists yield. Subclasses say what happens at the end of a group.

    Attributes:
        actions: what each group does in the forward that is about to run, one `GroupAction` per group.
    """

    def __init__(self, transformer: nn.Module, spec: ModelSpec, groups: Sequence[tuple[int, int]]):
        self.transformer = transformer
        self.spec = spec
        self.actions: tuple[GroupAction, ...] = ()
        self._next_list = _CLOSED
        self._trip: Trip | None = None
        position = [
            Place(group, block, block == lo, block == hi - 1)
            for group, (lo, hi) in enumerate(groups)
            for block in range(lo, hi)
        ]
        self._positions: list[list[Place]] = []
        for blocks in spec.block_modules(transformer):
            self._positions.append(position[: len(blocks)])
            position = position[len(blocks) :]

    def open(self, actions: tuple[GroupAction, ...]) -> None:
        """Announces a forward: the routed lists follow ``actions`` once, each in its turn."""
        self.actions = actions
        self._next_list = 0
        self._trip = None

    def shut(self) -> None:
        """No forward is running: the lists yield their blocks, as for anybody who looks at the model."""
        self._next_list = _CLOSED
        self._trip = None

    def new_trip(self) -> Trip:
        return Trip(self)

    def follows(self, index: int) -> bool:
        return self._next_list == index

    def route(self, index: int, blocks: Iterator[nn.Module]) -> Iterator[Any]:
        """What block list ``index`` yields in the announced forward."""
        trip = self.new_trip() if self._trip is None else self._trip
        last = index == len(self._positions) - 1
        self._next_list = _CLOSED if last else index + 1
        self._trip = None if last else trip
        placed = zip(blocks, self._positions[index], strict=True)
        return iter([self.item(trip, block, place) for block, place in placed])

    def item(self, trip: Trip, block: nn.Module, place: Place) -> Any:
        """What stands for a block in the announced forward."""
        action = self.actions[place.group]
        if action.kind == COMPUTE:
            return block
        if action.kind == CAPTURE:
            return CapturedBlock(trip, block, place) if place.opens or place.closes else block
        return SkippedBlock(trip, action, place)

    @property
    def graphs(self) -> int:
        """How many graphs a compiled transformer needs under this router."""
        return 1

    def shadows(self) -> Iterable[tuple[Any, str, Any]]:
        """``(owner, name, replacement)`` of further methods that are hidden while the router is attached."""
        return ()

    def begin(
        self,
        branch: str | None,
        step: int | None,
        arguments: Mapping[str, Any],
        dry_run: Callable[[], Any] | None = None,
    ) -> None:
        """A forward with these keyword arguments is about to start; implementations call `open`.

        ``dry_run`` runs the same forward once outside the compiled graph; there is none where nothing is compiled.
        """
        raise NotImplementedError

    def after(self, output: Any, rerun: Callable[[], Any]) -> None:
        """The announced forward gave ``output``; ``rerun`` runs the same one again."""

    @property
    def steers(self) -> bool:
        """Whether the velocity passes through `pass_on` on its way to the sampler."""
        return False

    def pass_on(self, step: int, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return velocity

    def finish(self) -> None:
        """The pipeline has ended a generation."""

    def capture(self, group, image_in, text_in, image_out, text_out) -> None:
        raise NotImplementedError

    def reuse(self, group, image, text) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError


class RoutedModuleList(nn.ModuleList):
    """A transformer's own block list while a router is attached to it."""

    _layercache_router: Router
    _layercache_index: int

    def __iter__(self) -> Iterator[Any]:
        router = self._layercache_router
        blocks = iter(self._modules.values())
        if router.follows(self._layercache_index):
            return router.route(self._layercache_index, blocks)  # type: ignore[arg-type]
        return blocks
