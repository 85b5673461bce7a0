"""Outputs of one guidance branch made from those of another: their difference in two bands of frequency, stored."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch

from layercache.runtime.frequency import Grid, grid_of, low_band
from layercache.runtime.identity import Place
from layercache.runtime.offload import Transfers
from layercache.runtime.outputs import Output, Stored, copy_of, fetched, leaves, parked
from layercache.runtime.velocity import combine

Weights = tuple[float, float]
"""Of the low and of the high band of the stored difference."""


class DerivedBranches:
    """The branches of a run behind the first of every step, which may be derived from that.

    The first branch of a step, whatever its name, is computed; one that is named as unconditional is no source. At a
    step that computes both, their difference is stored in two bands; at others a branch is the first one's output of
    the same step, plus the bands times their weights.
    """

    def __init__(self, transfers: Transfers | None = None) -> None:
        self._transfers = transfers
        self._sources: dict[Hashable, tuple[int, str]] = {}  # by part: step and branch
        self._outputs: dict[Hashable, torch.Tensor] = {}  # theirs
        self._bands: dict[str, Output] = {}  # low and high, by branch and part
        self._valid: dict[str, str] = {}  # by branch and part: the branch that the bands differ from
        self._grids: dict[Any, Grid | None] = {}

    def start(self) -> None:
        """A generation begins: nothing is stored."""
        self._valid.clear()
        self._sources.clear()

    def forget(self, key: str) -> None:
        """The forwards of a branch have other shapes than before."""
        self._valid.pop(key, None)

    def is_derived(self, place: Place) -> bool:
        """Whether the forward at this place can be derived: the bands are there, and the branch they differ from."""
        source = self._sources.get(place.part)
        return source is not None and source == (place.step, self._valid.get(place.key))

    def is_first(self, place: Place) -> bool:
        """Whether no other branch was computed before at the step of this place."""
        source = self._sources.get(place.part)
        return source is None or source[0] != place.step

    def record(self, place: Place, output: Any, arguments: Mapping[str, Any]) -> None:
        """A branch was computed: it is the source of its step, or its difference from that is stored."""
        found = output if isinstance(output, torch.Tensor) else output[0]
        if not isinstance(found, torch.Tensor):
            return
        source = self._sources.get(place.part)
        if source is None or source[0] != place.step:
            if not place.branch.startswith("uncond"):
                self._sources[place.part] = place.step, place.branch
                self._outputs[place.part] = copy_of(found, self._outputs.get(place.part))
            return
        grid = self._grid(found, arguments) if found.dim() == 3 else None
        first = self._outputs[place.part]
        if found.shape != first.shape or (found.dim() == 3 and grid is None) or found.dim() < 3:
            return
        difference = found - first
        low = low_band(difference, grid)
        bands = low, difference - low
        before = self._bands.get(place.key)
        if self._transfers is None:
            self._bands[place.key] = copy_of(bands, before)
        else:
            self._transfers.settle()
            self._bands[place.key] = parked(bands, before, self._transfers)
        self._valid[place.key] = source[1]

    def derived(self, place: Place, output: Any, weights: Weights) -> Any:
        """The output of a branch that did not run, in the form of what its empty forward gave."""
        bands = self._bands[place.key]
        low, high = bands if self._transfers is None else fetched(bands, self._transfers)
        return with_first(output, combine([self._outputs[place.part], low, high], [1.0, *weights], None))

    def _grid(self, found: torch.Tensor, arguments: Mapping[str, Any]) -> Grid | None:
        key = found.shape[1], str(arguments.get("img_shapes"))
        if key not in self._grids:
            self._grids[key] = grid_of(arguments, found.shape[1])
        return self._grids[key]

    @property
    def stored(self) -> list[Stored]:
        bands = [one for output in list(self._bands.values()) for one in leaves(output)]
        return [*bands, *list(self._outputs.values())]

    @property
    def valid(self) -> list[Stored]:
        """The bands that later steps may read."""
        return [one for key in self._valid for one in leaves(self._bands[key])]


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    """A transformer's output, a tensor, tuple or dataclass, with another first tensor."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    name = next(iter(output.keys()))
    return replace(output, **{name: tensor})
