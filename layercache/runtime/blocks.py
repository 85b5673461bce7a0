"""What stands for a block in a forward: the block itself, or a small callable of its signature."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from layercache._utils.compat import stream_splits
from layercache.models.spec import Streams, Tokens
from layercache.schedule.memory_plan import GroupAction

if TYPE_CHECKING:
    from layercache.runtime.router import Router


class Place(NamedTuple):
    """Where a block stands: group, number over all lists, whether it is the group's first, and its last; its list."""

    group: int
    block: int
    opens: bool
    closes: bool
    list: int = 0


class BlockPass:
    """One passage of the streams through the blocks; remembers the input of the group that is open.

    Attributes:
        watches: whether `opened`, `computed` and `captured` do anything.
    """

    watches = False

    def __init__(self, router: Router):
        self.router = router
        self.tokens = Tokens()
        self.image: torch.Tensor | None = None
        self.text: torch.Tensor | None = None

    def clear(self) -> None:
        """The forward is over, or another begins: no stream of it is kept."""
        self.image = self.text = None

    def opened(self, group: int) -> None:
        """The streams are in front of a group's first block."""

    def computed(self, group: int) -> None:
        """The streams are behind a group's last block; the router gets its input and output now."""

    def captured(self, group: int) -> None:
        """The router has had them."""

    def skip(self, group: int, action: GroupAction, results: Streams | None = None) -> Streams:
        """The open group was skipped: its output is its input, or the end of the whole run."""
        image, text = self.image, self.text
        self.image = self.text = None
        if not action.ends_run:
            return image, text  # type: ignore[return-value]
        return self.router.reuse(group, image, text, results)


class BlockProxy:
    """Called where the forward calls a block; has the block's attributes, should the forward look at them.

    Attributes:
        splits: under context parallelism the first block of some models is given whole streams and takes its shard of
            them; everything that follows, and so a residual, is of the shard alone.
    """

    def __init__(self, block_pass: BlockPass, block: nn.Module, place: Place):
        self.block_pass, self.block, self.place = block_pass, block, place
        self.calls = block_pass.router.calls[place.list]
        self.splits: tuple[Any, ...] = ()
        if isinstance(block, BlockProxy):
            self.splits = block.splits
        elif place.block == 0:
            self.splits = stream_splits(block, block_pass.router.spec.arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def sharded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the block itself sees them; views, no communication."""
        for split in self.splits:
            args, kwargs = split.pre_forward(self.block, *args, **kwargs)
        return args, kwargs

    def streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Streams:
        """The streams of a call as the block itself sees them."""
        if self.splits:
            args, kwargs = self.sharded(args, kwargs)
        return self.calls.inputs(args, kwargs, self.block_pass.tokens)

    def packed(self, args: Sequence[Any], kwargs: Mapping[str, Any], here: Streams, new: Streams) -> Any:
        """What the block gives without running; of joined streams, what is new replaces its part in place."""
        if self.calls.order is None:
            return self.calls.pack(*new)
        if new[0].dtype != here[0].dtype:
            return self.calls.joined(*new)
        for old, other in zip(here, new, strict=True):
            if other is not None and other is not old:
                old.copy_(other)  # type: ignore[union-attr]
        return self.calls.given(args, kwargs)


class CapturedBlock(BlockProxy):
    """The first or last block of a computed group whose residual is stored.

    Attributes:
        hands_on: what leaves the group is the input of the next one, which is stored too.
    """

    hands_on = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block_pass = self.block_pass
        group, _, opens, closes, _ = self.place
        if opens:
            block_pass.image, block_pass.text = self.streams(args, kwargs)
            if block_pass.watches:
                block_pass.opened(group)
        output = self.block(*args, **kwargs)
        if closes:
            image, text = self.calls.unpack(output, block_pass.tokens)
            if block_pass.watches:
                block_pass.computed(group)
            image_in, text_in = block_pass.image, block_pass.text
            block_pass.image, block_pass.text = (image, text) if self.hands_on else (None, None)
            block_pass.router.capture(group, image_in, text_in, image, text)
            if block_pass.watches:
                block_pass.captured(group)
        return output


class SkippedBlock(BlockProxy):
    """The first or last block of a reused group: passes the streams on, and at the group's end replaces them."""

    def __init__(self, block_pass: BlockPass, block: nn.Module, place: Place, action: GroupAction):
        super().__init__(block_pass, block, place)
        self.action = action

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block_pass, place = self.block_pass, self.place
        if self.splits:
            args, kwargs = self.sharded(args, kwargs)
        here = new = self.calls.inputs(args, kwargs, block_pass.tokens)
        if place.opens:
            block_pass.image, block_pass.text = here
            if block_pass.watches:
                block_pass.opened(place.group)
            if not place.closes and place.list in block_pass.router.rewritten:
                return self.calls.copied(args, kwargs)
        if place.closes:
            new = block_pass.skip(place.group, self.action, here if self.calls.order is not None else None)
        return self.packed(args, kwargs, here, new)


class IdentityBlock(BlockProxy):
    """A block inside a reused group: passes on what it was given."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.calls.passed(args, kwargs)


class MeasuredBlock(BlockProxy):
    """The very first block of a model that joins its streams later: notes how many tokens each has."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.block_pass.tokens.note(*self.streams(args, kwargs))
        return self.block(*args, **kwargs)


def shortened(items: list[Any]) -> list[Any]:
    """With the reused groups at the end of a list as one call each: nothing there asks for a block's number."""
    needed = (k for k, item in enumerate(items) if not isinstance(item, (SkippedBlock, IdentityBlock)) or item.splits)
    last = max(needed, default=-1)
    kept, opened = items[: last + 1], None
    for item in items[last + 1 :]:
        if isinstance(item, IdentityBlock):
            continue
        if item.place.opens and not item.place.closes:
            opened = item
        elif opened is None:  # a group of one block, or one that was opened in the list before
            kept.append(item)
        else:
            opened = None
            if item.action.ends_run:
                kept.append(SkippedBlock(item.block_pass, item.block, item.place._replace(opens=True), item.action))
    return kept if opened is None else [*kept, opened]


def joined(items: list[Any]) -> list[Any]:
    """With the end of one stored group as the beginning of the next: nothing is added between them."""
    joined = list(items)
    for number, (before, after) in enumerate(itertools.pairwise(items), 1):
        if not (isinstance(before, CapturedBlock) and isinstance(after, CapturedBlock)):
            continue
        if before.place.closes and after.place.opens and not before.block_pass.watches:
            before.hands_on = True
            after.place = after.place._replace(opens=False)
            if not after.place.closes:
                joined[number] = after.block
    return joined
