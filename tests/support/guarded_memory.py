"""Streams for Triton's interpreter, in memory that shows every write out of bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from layercache.kernels import tiles
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SENTINEL = 77.0
GUARD = 64  # elements, a multiple of 16 bytes in every dtype


@dataclass(frozen=True)
class Case:
    """Streams of one call.

    Attributes:
        shapes: of the streams.
        groups: per tile; the interpreter pays per tile, so large ones unless the loop itself is to be tested.
        strided: ``"joined"``: streams are slices along the rows of one [text; image] tensor; ``"mixed"``: the same,
            but every other one is contiguous; ``"apart"``: slices of tensors of their own, with different strides.
        shift: elements by which every tensor misses 16-byte alignment.
        programs: at most so many, because the loop over tiles runs only where there are fewer than tiles.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    groups: int = 4096
    strided: str = ""
    shift: int = 0
    programs: int = tiles.MAX_PROGRAMS


CASES = [
    Case("one-group", ((1, 1, 8),)),
    Case("odd-slow", ((1, 7, 63),), groups=512),
    Case("two-streams", ((2, 77, 320), (2, 13, 320))),
    Case("empty-text", ((1, 9, 64), (1, 0, 64))),
    Case("three-streams", ((3, 5, 72), (3, 1, 72), (3, 2, 72))),
    Case("programs-and-tail", ((1, 9, 136), (1, 3, 136)), groups=16),
    Case("loop-and-tail", ((1, 9, 136), (1, 5, 136)), groups=16, programs=2),
    Case("slow-loop-and-tail", ((1, 5, 31),), groups=32, programs=2),
    Case("strided", ((3, 9, 40), (3, 4, 40)), strided="joined"),
    Case("strided-loop", ((2, 9, 72), (2, 2, 72)), groups=16, strided="apart", programs=2),
    Case("strided-slow", ((2, 5, 33), (2, 3, 33)), groups=64, strided="apart"),
    Case("strided-empty-text", ((2, 5, 16), (2, 0, 16)), strided="joined"),
    Case("strided-mixed", ((2, 5, 24), (2, 2, 24), (2, 3, 24)), strided="mixed"),
    Case("misaligned", ((2, 5, 24), (2, 2, 24)), groups=256, shift=1),
    Case("two-dims", ((6, 40), (3, 40))),
]


# Every case in bf16, which rounds most; the other two where cases differ in what they do to single elements.
PAIRS = [(case, torch.bfloat16) for case in CASES]
PAIRS += [(c, torch.float32) for c in CASES if c.name in ("odd-slow", "loop-and-tail", "strided-slow", "strided-mixed")]
PAIRS += [(c, torch.float16) for c in CASES if c.name in ("odd-slow", "loop-and-tail", "misaligned", "strided-mixed")]
DAILY = (("slow-loop-and-tail", torch.bfloat16), ("strided-slow", torch.float32), ("misaligned", torch.float16))


def in_cases(cases: Sequence[Case] = CASES) -> pytest.MarkDecorator:
    """Gives a test its ``case`` and ``dtype``; three of the pairs daily, the others where slow tests run."""
    pairs = [
        pytest.param(
            *(case, dtype),
            id=f"{case.name}-{str(dtype).removeprefix('torch.')}",
            marks=() if (case.name, dtype) in DAILY else pytest.mark.slow,
        )
        for case, dtype in PAIRS
        if case in cases
    ]
    return pytest.mark.parametrize(("case", "dtype"), pairs)


class Memory:
    """Contiguous tensors between bands of a sentinel, which no kernel may touch."""

    def __init__(self, shift: int) -> None:
        self.shift = shift
        self.calls = 0
        self.buffers: list[tuple[Tensor, int, int]] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
        size, start = torch.Size(shape).numel(), GUARD + self.shift
        buffer = torch.full((start + size + GUARD,), SENTINEL, dtype=dtype)
        self.buffers.append((buffer, start, start + size))
        inside = buffer[start : start + size].view(tuple(shape))
        inside.copy_(torch.full(tuple(shape), float("nan")) if values is None else values)
        return inside

    def random(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        values = torch.randn(tuple(shape))
        values[..., :1] *= 1e3
        return self.tensor(shape, dtype, values)

    def streams(self, case: Case, dtype: torch.dtype) -> list[Tensor]:
        self.calls += 1
        if not case.strided:
            return [self.random(shape, dtype) for shape in case.shapes]
        if case.strided == "apart":
            wide = [self.random((b, rows + self.calls + s, d), dtype) for s, (b, rows, d) in enumerate(case.shapes)]
            return [t[:, 1 : 1 + shape[1]] for t, shape in zip(wide, case.shapes, strict=True)]
        rows = [shape[1] for shape in case.shapes]
        joined = self.random((case.shapes[0][0], sum(rows), case.shapes[0][2]), dtype)
        slices = list(joined.split(rows, dim=1))
        if case.strided == "mixed":
            for s in range(self.calls % 2, len(slices), 2):
                slices[s] = self.tensor(slices[s].shape, dtype, slices[s])
        return slices

    def outputs(self, case: Case, dtype: torch.dtype) -> list[Tensor]:
        return [self.tensor(shape, dtype) for shape in case.shapes]

    def check(self) -> None:
        for buffer, first, last in self.buffers:
            assert (buffer[:first] == SENTINEL).all() and (buffer[last:] == SENTINEL).all()


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def assert_sums_close(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """To 1e-5 of the size of what was summed; ``scale`` is a bound of that."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert ((found - expected).abs() <= 1e-5 * scale + 1e-30).all()


def pair_scale(found: Tensor, absolute_product: int) -> Tensor:
    """Sums of sizes are their own scale; the signed product is bounded by the two sums of squares."""
    scale = found.abs().clone()
    squares = {6: (1, 5), 7: (4, 5)}
    first, second = squares[7 if found.shape[1] == 8 else 6]
    scale[:, absolute_product] = (found[:, first] * found[:, second]).sqrt()
    return scale
