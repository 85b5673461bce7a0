"""One form of an op to measure: its inputs, ours, the usual PyTorch, and the bytes it must move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TEXT_ROWS = 512  # of the second stream, at most an eighth of the first


Run = Callable[["Inputs"], Any]


@dataclass
class Inputs:
    """Memory of one call: random tensors of the case's shape, and what its ops write to.

    Attributes:
        x: tensors [batch, rows, channels], similar to a good part, as those of following steps are.
        text: as many of a second, shorter stream.
        gate: [batch, 1, channels].
        out: tensors to write to.
        extra: whatever else a case prepared.
    """

    x: list[Tensor]
    text: list[Tensor]
    gate: Tensor
    out: list[Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)

    def widened(self) -> Inputs:
        """The same numbers in float64, in memory of their own."""
        lists = [[t.double() for t in tensors] for tensors in (self.x, self.text, self.out)]
        fresh = {name: tensor.clone() for name, tensor in self.extra.items()}
        return Inputs(lists[0], lists[1], self.gate.double(), lists[2], fresh)


def _as_it_is(result: Any, inputs: Inputs) -> Any:
    return result


@dataclass(frozen=True)
class Case:
    """One form of an op.

    Attributes:
        name: of the form.
        op: name in ``layercache.ops``.
        tensors: inputs of full size.
        ours, eager: the op, and the usual PyTorch (docs/methods.md, Formulas of the ops).
        passes: full-size tensors that must be moved, in S of docs/methods.md, Formulas of the ops.
        codes: full-size tensors of one byte per number that must be moved besides.
        outputs: full-size tensors written to.
        derive: from the result of ``ours`` what ``eager`` returns; not timed.
        prepare: adds to the inputs.
        text: the second stream takes part.
        gradient: runs with grad mode on.
        compiled: makes the variant for torch.compile, where that is not the compiled ``eager``.
    """

    name: str
    op: str
    tensors: int
    ours: Run
    eager: Run
    passes: float
    codes: int = 0
    outputs: int = 0
    derive: Callable[[Any, Inputs], Any] = _as_it_is
    prepare: Callable[[Inputs], None] | None = None
    text: bool = False
    gradient: bool = False
    compiled: Callable[[], Run] | None = None

    def compile(self) -> Run:
        """The eager spelling under torch.compile."""
        return torch.compile(self.eager, fullgraph=True) if self.compiled is None else self.compiled()

    def inputs(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Random inputs, never zeros; what is written to holds NaN."""
        generator = torch.Generator(device).manual_seed(seed)
        batch, rows, channels = shape

        def new(rows: int, count: int) -> list[Tensor]:
            size = (batch, rows, channels)
            common, *own = (torch.randn(size, generator=generator, device=device) for _ in range(count + 1))
            return [t.mul_(0.8).add_(common, alpha=0.6).to(dtype) for t in own]

        inputs = Inputs(
            x=new(rows, self.tensors),
            text=new(_text_rows(rows), self.tensors) if self.text else [],
            gate=new(1, 1)[0],
            out=[torch.full(tuple(shape), math.nan, dtype=dtype, device=device) for _ in range(self.outputs)],
        )
        if self.prepare is not None:
            self.prepare(inputs)
        return inputs

    def bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes that must be moved."""
        batch, rows, channels = shape
        if self.text:
            rows += _text_rows(rows)
        return round((self.passes * dtype.itemsize + self.codes) * batch * rows * channels)

    def error(self, inputs: Inputs) -> float:
        """How far ``ours`` is from the eager spelling in float64 on the same numbers, see `relative_error`."""
        with torch.set_grad_enabled(self.gradient):
            found = [t.clone() for t in _tensors(self.derive(self.ours(inputs), inputs))]
            return relative_error(found, self.eager(inputs.widened()))


def _text_rows(rows: int) -> int:
    return max(1, min(TEXT_ROWS, rows // 8))


def relative_error(found: Any, expected: Any) -> float:
    """The largest norm of a difference over the norm of what was expected, over all tensors."""
    return max(_difference(a, b) for a, b in zip(_tensors(found), _tensors(expected), strict=True))


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    a, b = found.double(), expected.double()
    error = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(error) else error


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
