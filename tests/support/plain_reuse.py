"""Reuse of block groups in plain PyTorch, written from what a schedule means: nothing of ours computes here."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
E4M3_LARGEST = 448.0


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The blocks that a schedule counts, in order."""
    return [block for name in LISTS for block in getattr(transformer, name, ())]


def as_fp8(residual: Tensor) -> Tensor:
    """What is left of a residual stored as fp8 codes with a power of two as the scale of each row."""
    mantissa, exponent = torch.frexp(residual.abs().amax(-1, keepdim=True) / E4M3_LARGEST)
    power = exponent - (mantissa == 0.5).int()
    scale = ((power + 127) << 23).view(torch.float32)  # 2^power to the bit, on every device
    return (residual / scale).to(torch.float8_e4m3fn).float() * scale


class PlainReuse:
    """Runs a transformer by a schedule through replaced forwards of its blocks, for a ``with`` block.

    Sums are made in fp32, over consecutive reused groups too, and rounded once.

    Attributes:
        computed: runs of each block.
        residuals: of every computed group by branch, step and group, image first.
    """

    def __init__(
        self,
        pipe: Any,
        groups: Sequence[tuple[int, int]],
        cells: Sequence[Sequence[Mapping[int, float] | None]],
        stored: Callable[[Tensor], Tensor] | None = None,
    ):
        self.pipe, self.groups, self.cells, self.stored = pipe, groups, cells, stored
        self.computed: Counter[int] = Counter()
        self.residuals: dict[tuple[int, int, int], list[Tensor]] = {}
        self._gives_both: dict[int, bool] = {}
        self._start: list[Tensor] = []
        self._step, self._branch = -1, 0

    def __enter__(self) -> PlainReuse:
        self._blocks = blocks_of(self.pipe.transformer)
        for index, block in enumerate(self._blocks):
            block.forward = functools.partial(self._block, index, block.forward)
        self._hook = self.pipe.transformer.register_forward_pre_hook(self._begin)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        for block in self._blocks:
            del block.forward

    def _begin(self, *_: Any) -> None:
        step = self.pipe.scheduler.step_index or 0
        self._branch = self._branch + 1 if step == self._step else 0
        self._step = step

    def _block(self, index: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        group = next(g for g, (lo, hi) in enumerate(self.groups) if lo <= index < hi)
        opens, closes = index == self.groups[group][0], index == self.groups[group][1] - 1
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        streams = [given["hidden_states"] if "hidden_states" in given else given["x"]]
        if given.get("encoder_hidden_states") is not None:
            streams.append(given["encoder_hidden_states"])
        if opens:
            self._start = streams
        cell = self.cells[self._step][group]
        if cell is None:
            self.computed[index] += 1
            output = original(*args, **kwargs)
            self._gives_both[index] = isinstance(output, tuple)
            if closes:
                self._store(group, list(reversed(output)) if isinstance(output, tuple) else [output])
            return output
        if closes:
            streams = self._restored(group, cell)
        return (streams[1], streams[0]) if self._gives_both[index] else streams[0]

    def _store(self, group: int, outputs: list[Tensor]) -> None:
        residuals = []
        for after, before in zip(outputs, self._start, strict=False):
            residuals.append(after.float() - before.float())
        self.residuals[self._branch, self._step, group] = residuals
        self._dtype = outputs[0].dtype

    def _restored(self, group: int, cell: Mapping[int, float]) -> list[Tensor]:
        goes_on = group + 1 < len(self.groups) and self.cells[self._step][group + 1] is not None
        results = []
        for stream, start in enumerate(self._start):
            total = start.float()
            for anchor in sorted(cell, reverse=True):
                stored = self.residuals[self._branch, anchor, group]
                if stream < len(stored):
                    total = total + cell[anchor] * self._as_stored(stored[stream])
            results.append(total if goes_on else total.to(self._dtype))
        return results

    def _as_stored(self, residual: Tensor) -> Tensor:
        return residual.to(self._dtype).float() if self.stored is None else self.stored(residual)
