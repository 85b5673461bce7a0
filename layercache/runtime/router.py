"""Routing a transformer's forward through blocks, capturing callables and skipping callables.

The forward of the model keeps iterating over its own ``ModuleList``; for as long as a router is
attached, that list yields for each block of the current row either the block itself or a small
callable of the same signature. Whatever the forward adds between blocks (ControlNet residuals) is
counted once: inside a group it is part of the residual, behind a group it is added live.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from layercache._utils.compat import HOOK_REGISTRY, stream_splits
from layercache._utils.summaries import Rows, Summarised
from layercache.errors import CacheStateError, NonFiniteResidualError, NonFiniteWarning
from layercache.models.spec import ModelSpec, Streams
from layercache.runtime.blocks import (
    BlockPass,
    CapturedBlock,
    IdentityBlock,
    MeasuredBlock,
    Place,
    SkippedBlock,
    joined,
    shortened,
)
from layercache.runtime.forward import Forward, Said, Saying
from layercache.runtime.identity import Generation, Identity
from layercache.runtime.identity import Place as ForwardPlace
from layercache.runtime.report import CacheReport
from layercache.runtime.timing import ForwardTimes
from layercache.schedule.memory_plan import CAPTURE, COMPUTE, REUSE, GroupAction
from layercache.schedule.partition import broken_skip
from layercache.schedule.schedule import Schedule

_CLOSED = -1
_CALL_CODE = nn.Module._call_impl.__code__


def _codes_of(transformer: nn.Module) -> frozenset[Any]:
    """Code of the forwards that a model runs: its own, also where one was put in its place, and those of its bases."""
    forwards: list[Any] = [transformer.forward, *(cls.__dict__.get("forward") for cls in type(transformer).__mro__)]
    found = set()
    for forward in forwards:
        while isinstance(forward, functools.partial) or hasattr(forward, "__wrapped__"):
            forward = forward.func if isinstance(forward, functools.partial) else forward.__wrapped__
        found.add(getattr(getattr(forward, "__func__", forward), "__code__", None))
    return frozenset(found - {None})


class Attached(Protocol):
    """What a router may ask of the attachment that it routes through."""

    router: Router
    said: ContextVar[Said]
    pipeline: Any
    times: ForwardTimes

    def follow(self, router: Router, scheduler: Any) -> None: ...

    def share(self, pipeline: Any, scheduler: Any) -> None: ...

    def unfollow(self, scheduler: Any) -> None: ...


class Router(Summarised):
    """Decides what the routed block lists yield. Subclasses say what happens at the end of a group.

    Attributes:
        actions: what each group does in the forward that is about to run, one `GroupAction` per group.
        identity: says where a forward belongs.
        generation: that the stored state is of; ``None`` where there is none.
        attachment: set while the router is attached.
        is_announced: whether a forward is under way that follows the actions.
        rewritten: block lists behind whose blocks the present forward writes into the stream it was given.
        adds: whether the present forward may add something behind single blocks.
        keeps_items: whether what stands for the blocks depends on the actions alone, and may serve again.
        has_post_hook: whether `after` does anything.
        fault: NaN or infinity in what the last generation stored.
        schedule_source: where a schedule that does the same comes from, for messages.
        offload: in how many slices what is stored in host memory comes back; 0 where it stays on the device.
        takes_experts: whether it decides about whole steps, of all transformers that a pipeline runs in turns.
    """

    takes_experts = False
    schedule_source = "layercache.plan, layercache.search or method.schedule(fingerprint) make one"
    adds = True
    offload = 0
    keeps_items = False
    fault: NonFiniteResidualError | None = None
    rewritten: frozenset[int] = frozenset()
    identity: Identity
    attachment: Attached

    def __init__(self, transformer: nn.Module, spec: ModelSpec, groups: Sequence[tuple[int, int]]):
        self.transformer = transformer
        self.spec = spec
        self._note_forwards()
        self.calls = [spec.calls(index) for index in range(len(spec.block_lists))]
        self.groups = tuple(groups)
        self.actions: tuple[GroupAction, ...] = ()
        self.generation: Generation | None = None
        self.is_announced = False
        self.has_post_hook = type(self).after is not Router.after
        self._next_list = _CLOSED
        self._last_list = len(spec.block_lists) - 1
        self._pass: BlockPass | None = None
        self._kept_pass: BlockPass | None = None
        self._kept: list[dict[Any, list[Any]]] = [{} for _ in spec.block_lists]
        self._kept_blocks: list[list[Any]] = [[] for _ in spec.block_lists]
        lengths = [len(blocks) for blocks in spec.block_modules(transformer)]
        lists = [index for index, length in enumerate(lengths) for _ in range(length)]
        position = [
            Place(group, block, block == lo, block == hi - 1, lists[block])
            for group, (lo, hi) in enumerate(groups)
            for block in range(lo, hi)
        ]
        self._positions = [[place for place in position if place.list == index] for index in range(len(lengths))]
        self._skips = spec.skip_pairs(sum(lengths))
        self._whole: set[tuple[GroupAction, ...]] = set()  # actions that break no long skip connection

    def open(self, actions: tuple[GroupAction, ...]) -> None:
        """Announces a forward: the routed lists follow ``actions`` once, each in its turn.

        Raises:
            CacheStateError: a block that is computed would read what a block inside a reused group has not given.
        """
        if self._skips and actions not in self._whole:
            self.check_skips(self.groups, {k for k, action in enumerate(actions) if action.kind == REUSE})
            self._whole.add(actions)
        self.actions = actions
        self.is_announced = True
        self._next_list = 0
        self._pass = None

    def check_skips(self, groups: Sequence[tuple[int, int]], reused: Collection[int]) -> None:
        """Raises `CacheStateError` where groups that are reused break a long skip connection into one that is not."""
        broken = broken_skip(groups, reused, self._skips)
        if broken is not None:
            start, end = broken
            raise CacheStateError(
                f"block {end} of {self.spec.model_class} reads what block {start} gave, which is inside a group that "
                f"is reused where block {end} runs: let a group end with block {start}, or hold both, as the groups of "
                "layercache.calibrate do"
            )

    def shut(self) -> None:
        """No forward is running: the lists yield their blocks, as for anybody who looks at the model."""
        self.is_announced = False
        self._next_list = _CLOSED
        self._pass = None
        if self._kept_pass is not None:
            self._kept_pass.clear()

    def new_pass(self) -> BlockPass:
        return BlockPass(self)

    def route(self, index: int, blocks: Iterable[nn.Module]) -> Iterator[Any]:
        """What block list ``index`` yields: its blocks, or in an announced forward, in its turn, what stands for them.

        Where the actions alone decide on it, that is what was made for an earlier forward with the same actions.
        """
        if self._next_list != index:
            return iter(blocks)
        # of this method, the list's iterator and, nearly always, the forward; else a hook looks at the model
        due = is_dynamo_compiling() or id(sys._getframe(2).f_code) in self._forward_ids or self._is_asked_by_forward()
        return self.routed(index, blocks) if due else iter(blocks)

    def routed(self, index: int, blocks: Iterable[nn.Module]) -> Iterator[Any]:
        """What an announced forward gets of block list ``index`` in its turn."""
        last = index == self._last_list
        self._next_list = _CLOSED if last else index + 1
        if self.keeps_items and not is_dynamo_compiling():
            return iter(self._items_again(index, list(blocks)))
        block_pass = self.new_pass() if self._pass is None else self._pass
        self._pass = None if last else block_pass
        return iter(self._items(block_pass, index, blocks))

    def _note_forwards(self) -> None:
        self._forward_codes = _codes_of(self.transformer)
        self._forward_ids = frozenset(map(id, self._forward_codes))  # hashing code takes longer than the rest

    def _is_asked_by_forward(self) -> bool:
        frame: Any = sys._getframe(1)
        inside = set()
        while frame is not None and frame.f_code is not _CALL_CODE:  # of a module: what is inside is forward or hook
            if frame.f_code in self._forward_codes:
                return True
            inside.add(frame.f_code)
            frame = frame.f_back
        self._note_forwards()  # the model may have been given another forward since
        return not inside.isdisjoint(self._forward_codes)

    def _items(self, block_pass: BlockPass, index: int, blocks: Iterable[nn.Module]) -> list[Any]:
        placed = zip(blocks, self._positions[index], strict=True)
        return [self._measured(block_pass, self.item(block_pass, block, place), place) for block, place in placed]

    def _items_again(self, index: int, blocks: list[nn.Module]) -> list[Any]:
        hooked = index == 0 and blocks and HOOK_REGISTRY in blocks[0].__dict__
        made_of = [*blocks, *stream_splits(blocks[0], self.spec.arguments)] if hooked else blocks
        if made_of != self._kept_blocks[index]:
            self._kept_blocks[index], self._kept[index] = made_of, {}
        key = self.actions, self.adds
        kept = self._kept[index]
        items = kept.get(key)
        if items is None:
            if self._kept_pass is None:
                self._kept_pass = self.new_pass()
            items = self._items(self._kept_pass, index, blocks)
            items = kept[key] = items if self.adds else joined(shortened(items))
        return items

    def _measured(self, block_pass: BlockPass, item: Any, place: Place) -> Any:
        return MeasuredBlock(block_pass, item, place) if self.spec.joint and place.block == 0 else item

    def item(self, block_pass: BlockPass, block: nn.Module, place: Place) -> Any:
        """What stands for a block in the announced forward."""
        action = self.actions[place.group]
        if action.kind == COMPUTE:
            return block
        if action.kind == CAPTURE:
            return CapturedBlock(block_pass, block, place) if place.opens or place.closes else block
        if place.opens or place.closes:
            return SkippedBlock(block_pass, block, place, action)
        return IdentityBlock(block_pass, block, place)

    @property
    def computes_all(self) -> bool:
        """Whether nothing is reused in the present forward, as far as it has come."""
        return all(action.kind != REUSE for action in self.actions)

    @property
    def in_request(self) -> bool:
        """Whether the caller has named the request that its forwards belong to."""
        return False

    @property
    def measured_speedup(self) -> float | None:
        """Of the transformer's newest forwards; waits for the device (`ForwardTimes.speedup`)."""
        attachment = getattr(self, "attachment", None)
        return None if attachment is None else attachment.times.speedup()

    @property
    def storage_name(self) -> str:
        """In which numbers residuals of groups are stored (`layercache.runtime.storage.Storage`)."""
        return "same"

    @property
    def graphs(self) -> int:
        """How many graphs a compiled transformer needs under this router."""
        return 1

    def attached(self) -> None:
        """The model is patched; `free` is called when it no longer is."""

    def locate(self, forward: Forward) -> ForwardPlace | None:
        """Where a forward stands; ``None`` where nothing tells it, and it is computed in full.

        With a place of another generation the state of the one before is dropped.
        """
        place = self.identity.locate(forward)
        if place is not None and place.generation is not self.generation:
            self.end_generation()
            self.finish()
            self.generation = place.generation
            self.begin_generation(place)
        return place

    def place_of(self, forward: Forward) -> ForwardPlace:
        """Where a forward stands that is looked at, which must be known.

        Raises:
            CacheStateError: nothing tells it.
        """
        place = self.locate(forward)
        if place is None:
            raise CacheStateError(f"every forward that is looked at must have a place: {self.identity.reason}")
        return place

    def note_settings(self, settings: Mapping[str, Any]) -> None:
        """A pipeline's call has begun its denoising loop, with this guidance and size (`Fingerprint.settings`)."""

    def begin_generation(self, place: ForwardPlace) -> None:
        """A generation begins: its state is made."""

    def end_generation(self, completed: bool = True) -> None:
        """The present generation is over: its state is dropped.

        Args:
            completed: it ran to its end; what it stored may be looked at once more.
        """
        if self.generation is None:
            return
        self.fault = self.find_fault() if completed else None
        self.drop_generation()
        if self.identity.generation is self.generation:
            self.identity.reset()
        self.generation = None

    def step(
        self, index: int | None = None, *, branch: str | None = None, part: Hashable = None
    ) -> AbstractContextManager[None]:
        """Forwards in this ``with`` block belong to this step, guidance branch and part of the picture.

        For loops of your own, tiles and windows; what is left out is found as without it.

        Args:
            index: of the step, from 0 on.
            branch: name of the guidance branch.
            part: anything that names the window or tile; each part has residuals of its own.

        Raises:
            CacheStateError: the step is no whole number from 0 on, or the branch's name is none.
        """
        if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
            raise CacheStateError(f"a step is a whole number from 0 on, got {index!r}", argument="index")
        if branch is not None and (not isinstance(branch, str) or not branch):
            raise CacheStateError(f"a branch has a name, got {branch!r}", argument="branch")
        return Saying(self.attachment.said, Said(branch, index, part))

    def request(
        self, request_id: str, scheduler: Any = None, schedule: Schedule | None = None
    ) -> AbstractContextManager[None]:
        """Forwards of one of several requests; what serves them is the cache of a schedule (`ScheduleCache`).

        Raises:
            CacheStateError: this is another cache; the message says how to get a schedule.
        """
        raise self._serves_none()

    def batch(self, rows: Mapping[str, int]) -> AbstractContextManager[None]:
        """A batch of several requests, as `request`."""
        raise self._serves_none()

    def forget(self, request_id: str) -> None:
        """A request has ended, as `request`."""
        raise self._serves_none()

    def _serves_none(self) -> CacheStateError:
        return CacheStateError(
            f"a {type(self).__name__} runs one generation at a time; many requests at once are served by the cache of "
            f"a schedule, cache = layercache.enable(pipe, schedule): {self.schedule_source}"
        )

    def for_call(self) -> Router:
        """The router of the forward that is about to start: this one, or that of the request it belongs to."""
        return self

    def for_sampler(self, scheduler: Any) -> Router:
        """The router of the step that a sampler is about to take."""
        return self.for_call()

    def has_request_of(self, scheduler: Any) -> bool:
        """Whether one of several requests is stepped by this scheduler."""
        return False

    def begin(self, forward: Forward) -> None:
        """A forward is about to start; implementations call `open`, or leave the blocks as they are."""
        raise NotImplementedError

    def after(self, output: Any, rerun: Callable[[], Any]) -> Any:
        """The announced forward gave ``output``; ``rerun`` runs the same one again. What is returned replaces it."""

    @property
    def replaces_velocity(self) -> bool:
        """Whether the velocity passes through `replace_velocity` on its way to the sampler."""
        return False

    @property
    def skips_step(self) -> bool:
        """Whether the present step's blocks are passed by: what its forwards give is replaced behind the guidance."""
        return False

    def replace_velocity(
        self, step: int, velocity: torch.Tensor, latents: torch.Tensor, output: int = 0
    ) -> torch.Tensor:
        """What the sampler of an output gets at a step, from what the model gave and the latents before it."""
        return velocity

    def invalidate(self) -> None:
        """The model has changed in the middle of a generation: what is stored may not be used any more."""
        self.end_generation(completed=False)

    def reset(self) -> None:
        """Starts afresh: the next forward begins a new generation."""
        self.end_generation(completed=False)

    def finish(self) -> None:
        """The pipeline has given its pictures: a warning tells which of them are not usable."""
        if self.fault is not None and not self.fault.was_warned_of:
            self.fault.was_warned_of = True
            warnings.warn(str(self.fault), NonFiniteWarning, stacklevel=4)

    def check(self) -> None:
        """Looks for NaN and infinity in what the last generation stored.

        Raises:
            NonFiniteResidualError: there were some, also where a warning has said so. It is raised once.
        """
        if self.generation is not None:
            fault = self.find_fault()
            if fault is not None:
                self.end_generation(completed=False)
            self.fault = fault
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def report(self) -> CacheReport:
        """What the cache did since it was enabled."""
        raise NotImplementedError

    def _summary(self) -> tuple[str, Rows]:
        by = f" by {type(self.method).__name__}" if hasattr(self, "method") else ""
        title = f"{type(self).__name__} on a {type(self.transformer).__name__}{by}"
        if type(self).report is Router.report:  # it is no cache
            return title, []
        counts, rows = self.report()._summary()
        return f"{title}: {counts.partition(': ')[2]}", rows

    def find_fault(self) -> NonFiniteResidualError | None:
        """Looks for NaN and infinity in what the present generation has stored; may ask the device."""
        return None

    def drop_generation(self) -> None:
        """The state of the present generation is dropped."""

    def free(self) -> None:
        """Frees all memory of stored tensors."""
        self.end_generation(completed=False)

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        raise NotImplementedError

    def reuse(self, group: int, image: Any, text: Any, results: Streams | None = None) -> Streams:
        """The streams behind a run of reused groups; may be written into ``results``, parts of a joined tensor."""
        raise NotImplementedError


class RoutedModuleList(nn.ModuleList):
    """A transformer's own block list while a router is attached to it."""

    _layercache_router: Router
    _layercache_index: int

    def __iter__(self) -> Iterator[Any]:
        blocks: Any = self._modules.values()
        return self._layercache_router.route(self._layercache_index, blocks)

    def __getitem__(self, index: Any) -> Any:
        """A slice is a plain list of blocks."""
        if isinstance(index, slice):
            return nn.ModuleList(list(self._modules.values())[index])
        return super().__getitem__(index)

    def __reduce__(self) -> Any:
        """Copies and pickles are plain lists: they belong to another model, which nothing is enabled on."""
        return nn.ModuleList, (list(self._modules.values()),)
