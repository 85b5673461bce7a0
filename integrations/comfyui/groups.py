"""Reusing groups of layers: what stands in for a network's blocks in the forwards of one sampling.

A part's residual is what its blocks added to their input, all that the network adds between them (ControlNet) included.
Where a part is reused, its blocks are not run, and behind its last one stands the input of the first one plus a
combination of residuals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layercache import ops
from layercache.schedule import Schedule

from . import engine
from .families import Part

Streams = dict[str, torch.Tensor]
Key = tuple[int, int]
"""A step of the schedule, and a part."""

BRANCHES = {0: "cond", 1: "uncond"}
"""Of ``cond_or_uncond``, the branches that a schedule made with diffusers may have cells of their own for."""


class Chunk:
    """What one conditioning has stored in a sampling.

    Attributes:
        stored: residuals ``[b, tokens, channels]`` of the streams that are read later.
        step: of its newest forward.
        place: shape, number format and device of its latents.
    """

    def __init__(self) -> None:
        self.stored: dict[Key, Streams] = {}
        self.step: int | None = None
        self.place: Any = None


@dataclass
class ChunkRow:
    """One conditioning in one forward: what its row of the schedule says of every part."""

    chunk: Chunk
    cells: Sequence[Mapping[int, float] | None]
    keeps: frozenset[int]
    last_read: Mapping[Key, int]

    def terms(self, index: int, name: str) -> list[tuple[torch.Tensor | None, float]]:
        """What a part's row adds to one of its streams."""
        return [
            (self.chunk.stored[anchor, index].get(name), factor) for anchor, factor in (self.cells[index] or {}).items()
        ]

    def forget(self, step: int) -> None:
        """Frees what no step behind this one reads."""
        stored = self.chunk.stored
        self.chunk.stored = {key: streams for key, streams in stored.items() if self.last_read.get(key, -1) > step}


class Groups:
    """The blocks of one sampling.

    Forwards of several chunks may run at once, each in a thread of its own.

    Args:
        schedule: with cells that reuse groups.
        parts: `families.parts_of`.

    Attributes:
        step: of the schedule, that the sampler is in; ``None``: unknown, everything is computed and nothing stored.
        computed, reused: blocks, one for every chunk.
        fallbacks: forwards of a chunk in full, because something that their row reads was not stored.
        forwards: all of them.
        foreign: of these, those whose blocks somebody else replaces (skip-layer guidance), which ran in full.
        largest: bytes that were stored at once.
        is_lost: whether the blocks were not passed, or conditionings not named, as they are known.
        comes_again: whether a conditioning had two forwards in a step (context windows): nobody says which residual is
            whose, and none is used.
    """

    def __init__(self, schedule: Schedule, parts: Sequence[Part]):
        self.parts = parts
        self.blocks = [
            (k, part.kind, number) for k, part in enumerate(parts) for number in range(part.first, part.last + 1)
        ]
        self.patches: dict[tuple[str, int], Any] = {}
        self.step: int | None = None
        self.computed = self.reused = self.fallbacks = self.forwards = self.foreign = self.largest = 0
        self.is_lost = self.comes_again = False
        self.chunks: dict[Any, Chunk] = {}
        self._rows = {branch: _Rows(schedule, branch, parts) for branch in ("", *schedule.branch_cells)}
        self.lock = threading.Lock()

    def drop(self) -> None:
        """The sampling is over: nothing is stored any more."""
        with self.lock:
            self.chunks, self.step = {}, None

    def install(self, options: dict[str, Any], patch: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """``model_options`` with a replacement for every block, in front of those that are there.

        Args:
            options: stay as they are.
            patch: ComfyUI's ``set_model_options_patch_replace``.
        """
        dit = options.get("transformer_options", {}).get("patches_replace", {}).get("dit", {})
        options = {**options, "transformer_options": dict(options.get("transformer_options", {}))}
        for index, kind, number in self.blocks:
            place = kind, number
            if place not in self.patches or dit.get(place) is not self.patches[place]:
                self.patches[place] = self._replacement(index, number, dit.get(place))
            options = patch(options, self.patches[place], "dit", kind, number)
        return options

    def _replacement(self, index: int, number: int, before: Any) -> Callable[..., Streams]:
        def replaced(args: dict[str, Any], extra: Mapping[str, Any]) -> Any:
            def compute() -> Any:
                return extra["original_block"](args) if before is None else before(args, extra)

            forward = (args.get("transformer_options") or {}).get(engine.FORWARD)
            if not isinstance(forward, GroupForward) or forward.groups is not self:
                return compute()
            return forward.block(index, number, args, compute)

        return replaced

    def begin(self, options: Mapping[str, Any], latents: torch.Tensor) -> GroupForward | None:
        """A forward of ``[n * b, ...]`` latents, of one chunk of b for every conditioning of the ``uuids``.

        ``None`` where it is to run in full, and nothing of it is stored.
        """
        uuids, kinds = options.get("uuids"), options.get("cond_or_uncond")
        with self.lock:
            self.forwards += 1
            if not uuids or not kinds or len(uuids) != len(kinds) or len(latents) % len(uuids):
                engine.changed_seam("another way to say which conditionings a forward is of")
                self.is_lost = True
            if self.is_lost or self.step is None:
                return None
            dit = options.get("patches_replace", {}).get("dit", {})
            if any(dit.get(place) is not patch for place, patch in self.patches.items()):
                self.foreign += 1
                return None
            assert uuids is not None and kinds is not None
            place = (latents.shape[0] // len(uuids), *latents.shape[1:], latents.dtype, latents.device)
            rows = [self._row(uuid, kind, place, self.step) for uuid, kind in zip(uuids, kinds, strict=True)]
        return GroupForward(self, self.step, rows)

    def _row(self, uuid: Any, kind: Any, place: Any, step: int) -> ChunkRow:
        chunk = self.chunks.setdefault(uuid, Chunk())
        self.comes_again = self.comes_again or chunk.step == step
        if chunk.place != place or self.comes_again:
            chunk.stored = {}
        chunk.step, chunk.place = step, place
        rows = self._rows.get(BRANCHES.get(kind, ""), self._rows[""])
        cells = rows.cells[step]
        if any((anchor, index) not in chunk.stored for index, cell in enumerate(cells) for anchor in cell or ()):
            self.fallbacks += 1
            cells = (None,) * len(cells)
        return ChunkRow(chunk, cells, frozenset() if self.comes_again else rows.keeps[step], rows.last_read)

    def end(self, forward: GroupForward, is_whole: bool) -> None:
        """A forward is over; whole, where no exception ended it."""
        expected = len(self.blocks)
        if is_whole and (forward.is_lost or forward.position != expected):
            engine.changed_seam(f"another way through its blocks ({forward.position} of {expected} were replaced)")
            self.is_lost = True
        with self.lock:
            self.computed += forward.computed
            self.reused += forward.reused
            self.largest = max(self.largest, self.nbytes)
            for row in forward.rows:
                row.forget(forward.step)
            if self.is_lost:
                self.chunks = {}

    @property
    def nbytes(self) -> int:
        """Of what is stored now."""
        every = (t for chunk in self.chunks.values() for streams in chunk.stored.values() for t in streams.values())
        return sum(tensor.nbytes for tensor in every)


class _Rows:
    """The rows of a branch, by parts: cells, what is stored for later, and the last step that reads it."""

    def __init__(self, schedule: Schedule, branch: str, parts: Sequence[Part]):
        # a step that is skipped as a whole has empty cells; where it cannot be, it is computed
        self.cells = [tuple(row[part.group] or None for part in parts) for row in schedule.cells_of(branch)]
        self.last_read: dict[Key, int] = {}
        for step, row in enumerate(self.cells):
            for index, cell in enumerate(row):
                self.last_read |= {(anchor, index): step for anchor in cell or ()}
        self.keeps = [
            frozenset(index for index in range(len(parts)) if (step, index) in self.last_read)
            for step in range(len(self.cells))
        ]


class GroupForward:
    """One forward: a batch of one chunk or more on its way through the blocks.

    Attributes:
        position: blocks it has passed.
        is_lost: whether they came in another order.
    """

    def __init__(self, groups: Groups, step: int, rows: Sequence[ChunkRow]):
        self.groups, self.step, self.rows = groups, step, rows
        self.position = self.computed = self.reused = 0
        self.is_lost = False
        self._before: Streams = {}
        self._results: Streams = {}

    def block(self, index: int, number: int, args: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """What a block gives: that of the block itself, its input, or at a reused part's end the forecast.

        What is given is never a stored tensor: the network adds to it in place.
        """
        blocks, part = self.groups.blocks, self.groups.parts[index]
        expected = blocks[self.position][0::2] if self.position < len(blocks) else None
        self.position += 1
        if expected != (index, number):
            self.is_lost = True
        if self.is_lost:
            return compute()
        if number == part.first:
            self._open(index, args)
        if self._results:
            self.reused += len(self.rows)
            return self._passed(part, number, args)
        self.computed += len(self.rows)
        output = compute()
        return self._closed(index, output) if number == part.last and self._before else output

    def _open(self, index: int, args: Mapping[str, Any]) -> None:
        self._before, self._results = {}, {}
        inputs = _streams(args)
        if "img" not in inputs or any(len(stream) % len(self.rows) for stream in inputs.values()):
            self.is_lost = True
            return
        reusing = [row for row in self.rows if row.cells[index]]
        with engine.own_memory():
            if len(reusing) == len(self.rows):
                self._results = self._forecast(index, inputs, {})
            if not self._results and (reusing or any(index in row.keeps for row in self.rows)):
                # blocks write into what they are given
                self._before = {name: _copy(stream) for name, stream in inputs.items()}

    def _forecast(self, index: int, inputs: Streams, computed: Streams) -> Streams:
        """The streams behind a part: those of computed chunks as they are, of others input plus combination.

        Empty where something stored is not of the input's shape, or there is no input.
        """
        reusing = next(row for row in self.rows if row.cells[index])
        names = list(reusing.chunk.stored[next(iter(reusing.cells[index] or ())), index])
        results: Streams = {}
        for name in names:
            if name not in inputs or (computed and name not in computed):
                return {}
            results[name] = _copy(computed.get(name, inputs[name]))
            pieces = zip(self.rows, self._chunks(results[name]), self._chunks(inputs[name]), strict=True)
            for row, piece, base in pieces:
                terms = row.terms(index, name)
                if any(t is None or t.shape != base.shape or t.device != base.device for t, _ in terms):
                    return {}
                if terms:
                    piece.copy_(base)
                    _add(piece, terms)
        return results

    def _chunks(self, stream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return stream.split(max(1, len(stream) // len(self.rows)))

    def _passed(self, part: Part, number: int, args: Mapping[str, Any]) -> Streams:
        """Of a block that is not run."""
        given = _streams(args)
        if number == part.last:
            given |= self._results
            self._results = {}
        elif number == part.first:  # the network may write into it, or read its own later
            given["img"] = _copy(given["img"])
        return given

    def _closed(self, index: int, output: Any) -> Any:
        """Of a computed part's last block; keeps its residual."""
        before, self._before = self._before, {}
        after = _streams(output)
        if self.groups.parts[index].is_end:
            after.pop("txt", None)  # the head reads none
        shapes = {name: stream.shape for name, stream in before.items()}
        if "img" not in after or any(stream.shape != shapes.get(name) for name, stream in after.items()):
            self.is_lost = True
            return output
        with engine.own_memory():
            if any(row.cells[index] for row in self.rows):
                output = {**output, **self._forecast(index, before, after)}  # as if they had a batch of their own
            keeping = [(k, row) for k, row in enumerate(self.rows) if index in row.keeps]
            for name, stream in after.items() if keeping else ():
                residuals = self._chunks(_difference(stream, before[name]))
                with self.groups.lock:
                    for k, row in keeping:
                        own = residuals[k] if len(keeping) == len(self.rows) else residuals[k].clone()
                        row.chunk.stored.setdefault((self.step, index), {})[name] = own
        return output


def _streams(args: Any) -> Streams:
    """Image and text among a block's arguments, or results; none where they are something else."""
    if not isinstance(args, Mapping):
        return {}
    return {name: args[name] for name in ("img", "txt") if isinstance(args.get(name), torch.Tensor)}


def _copy(stream: torch.Tensor) -> torch.Tensor:
    return stream.clone(memory_format=torch.contiguous_format)


def _difference(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """A part's residual, in the memory of its input's copy where it can be; that of float16 may need a wider range."""
    if after.dtype != before.dtype or after.dtype == torch.float16:
        return (after.float() - before.float()).contiguous()
    return torch.sub(after, before, out=before)


def _add(stream: torch.Tensor, terms: Sequence[tuple[Any, float]]) -> None:
    """Adds a combination of residuals to a stream, in place."""
    rows = stream.view(1, -1, stream.shape[-1])
    for first in range(0, len(terms), ops.MAX_TERMS):
        some = terms[first : first + ops.MAX_TERMS]
        residuals = [residual.view(rows.shape) for residual, _ in some]
        ops.linear_combination([rows], [residuals], [factor for _, factor in some], results=[rows])
