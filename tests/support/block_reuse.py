"""Reuse of groups by hand on any transformer: forwards of its blocks replaced, residuals in a dictionary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layercache.models.registry import spec_for

Cells = Sequence[Mapping[int, float] | None]


class BlockReuse:
    """Runs single forwards by rows of cells, for a ``with`` block; groups may not reach over the end of a block list.

    What a group adds is kept unrounded, and its stream leaves in the dtype that it had when the group was computed.
    Streams that a list joins are one stream here.

    Attributes:
        given: dtypes that each block was given, in the order of the calls.
    """

    def __init__(self, model: nn.Module, groups: Sequence[tuple[int, int]], wide: torch.dtype = torch.float32):
        self.spec, self.groups, self.wide = spec_for(model), groups, wide
        self.blocks: list[tuple[nn.Module, bool]] = []
        for name in self.spec.block_lists:
            single = len(self.spec.streams) == 1 or name in self.spec.joint
            self.blocks += [(block, single) for block in getattr(model, name)]
        self.given: list[list[torch.dtype]] = [[] for _ in self.blocks]
        self._kept: dict[tuple[int, int], list[Any]] = {}
        self._form: dict[int, bool] = {}
        self._row: Cells = ()
        self._step = -1

    def __enter__(self) -> BlockReuse:
        for number, (block, single) in enumerate(self.blocks):
            block.forward = functools.partial(self._block, number, single, block.forward)  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        for block, _ in self.blocks:
            del block.forward

    def row(self, row: Cells) -> None:
        """The next forward is a step with these cells."""
        self._row, self._step = row, self._step + 1

    def _streams(self, single: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        names = self.spec.arguments[: 1 if single else 2]
        return [kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names)]

    def _taken_apart(self, single: bool, output: Any) -> list[Any]:
        if single:
            return [output[0] if isinstance(output, tuple) else output]
        image = self.spec.streams.index("image")
        return [output[image], output[1 - image]]

    def _put_together(self, number: int, streams: list[Any]) -> Any:
        if len(streams) == 1:
            return (streams[0],) if self._form.get(number) else streams[0]
        return tuple(streams) if self.spec.streams[0] == "image" else tuple(reversed(streams))

    def _block(self, number: int, single: bool, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        group = next(g for g, (lo, hi) in enumerate(self.groups) if lo <= number < hi)
        streams = self._streams(single, args, kwargs)
        self.given[number].append(streams[0].dtype)
        if number == self.groups[group][0]:
            self._start = [None if s is None else s.clone() for s in streams]
        cell, closes = self._row[group], number == self.groups[group][1] - 1
        if cell is None:
            output = original(*args, **kwargs)
            self._form[number] = single and isinstance(output, tuple)
            if closes:
                self._keep(group, self._taken_apart(single, output))
            return output
        if closes:
            streams = [self._reused(group, cell, place, start) for place, start in enumerate(self._start)]
        return self._put_together(number, streams)

    def _keep(self, group: int, after: list[Any]) -> None:
        pairs = zip(after, self._start, strict=True)
        self._kept[self._step, group] = [
            None if new is None else (new.to(self.wide) - old.to(self.wide), new.dtype) for new, old in pairs
        ]

    def _reused(self, group: int, cell: Mapping[int, float], place: int, start: Tensor) -> Tensor | None:
        total, dtype = start.to(self.wide), start.dtype
        for anchor, coefficient in cell.items():
            kept = self._kept[anchor, group][place]
            if kept is None:
                return None
            total, dtype = total + coefficient * kept[0], kept[1]
        return total.to(dtype)
