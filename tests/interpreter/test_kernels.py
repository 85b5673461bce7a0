"""Every launcher against its eager reference: bits of what is elementwise, sums to 1e-5, and nothing out of bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from layercache.kernels import capture, combine, statistics, tiles
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SENTINEL = 77.0
GUARD = 64  # elements, a multiple of 16 bytes in every dtype

pytestmark = pytest.mark.usefixtures("rounding")


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


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


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


@pytest.fixture
def memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Guarded memory, also for what the launchers allocate themselves."""
    memory = Memory(case.shift)

    def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return memory.tensor(shape, dtype)

    def program_count(groups: int, tile: int) -> int:
        return min(-(-groups // tile), case.programs)

    with monkeypatch.context() as patched:
        patched.setattr(tiles.torch, "empty", empty)
        patched.setattr(tiles, "program_count", program_count)
        patched.setattr(statistics, "program_count", program_count)
        yield memory
    memory.check()


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


def test_capture(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    outputs, inputs = memory.streams(case, dtype), memory.streams(case, dtype)
    residuals, expected = memory.outputs(case, dtype), memory.outputs(case, dtype)
    assert capture.capture_triton(outputs, inputs, residuals, groups=case.groups) is None
    capture.capture_reference(outputs, inputs, expected)
    assert same_bits(residuals, expected)


def test_capture_statistics(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    outputs, inputs = memory.streams(case, dtype), memory.streams(case, dtype)
    previous = [memory.random(shape, dtype) for shape in case.shapes]
    residuals, expected = memory.outputs(case, dtype), memory.outputs(case, dtype)
    flag = torch.zeros(1, dtype=torch.int32)
    found = capture.capture_triton(outputs, inputs, residuals, flag, previous, groups=case.groups)
    known = capture.capture_reference(outputs, inputs, expected, flag, previous)
    assert found is not None and known is not None
    assert same_bits(residuals, expected)
    assert_sums_close(found, known, pair_scale(known, absolute_product=6))
    assert flag.tolist() == [0]
    # in place of the previous residual, with the same bits
    again = capture.capture_triton(outputs, inputs, previous, flag, previous, groups=case.groups)
    assert again is not None and torch.equal(again, found)
    assert same_bits(previous, expected)


def test_pair_statistics(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    a, b = memory.streams(case, dtype), memory.streams(case, dtype)
    found = statistics.pair_statistics_triton(a, b, groups=case.groups)
    known = statistics.pair_statistics_reference(a, b)
    assert_sums_close(found, known, pair_scale(known, absolute_product=6))
    assert torch.equal(found[:, 7], known[:, 7])


@pytest.mark.parametrize("terms", [1, 2, 8])
def test_linear_combination(case: Case, dtype: torch.dtype, memory: Memory, terms: int) -> None:
    bases = memory.streams(case, dtype)
    residuals = [[memory.random(shape, dtype) for _ in range(terms)] for shape in case.shapes]
    host = [1.0] if terms == 1 else [(-1.0) ** k * (1.3 - 0.1 * k) for k in range(terms)]
    known = combine.linear_combination_reference(bases, residuals, host)
    for coefficients in (host, torch.tensor([0.0, *host], dtype=torch.float32)[1:]):
        found = combine.linear_combination_triton(bases, residuals, coefficients, groups=case.groups)
        assert same_bits(found, known)
        assert all(y.is_contiguous() and y.dtype == dtype for y in found)
    if terms == 1:
        assert same_bits(known, [x + stream[0] for x, stream in zip(bases, residuals, strict=True)])


SETS = {
    "spans-of-one-anchor": [[1.0, 0.0, 0.0], [1.5, -0.5, 0.0], [1.25, 0.0, -0.25]],
    "more-than-one-launch": [[1.0 + 0.1 * k, -0.1 * k, 0.0] for k in range(12)],
    "any": [[0.0, 1.0, 0.0], [0.3, 0.3, 0.4], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [1.0, -1.0, 0.5]],
}


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case.strided and len(case.shapes[0]) == 3],
    ids=lambda c: c.name,
    indirect=True,
)
def test_combination_error(case: Case, dtype: torch.dtype, memory: Memory, sets: list[list[float]]) -> None:
    target, *terms = (memory.random(case.shapes[0], dtype) for _ in range(4))
    found = statistics.combination_error_triton(target, terms, sets, groups=case.groups)
    known = statistics.combination_error_reference(target, terms, sets)
    sizes = [sum(abs(c) * p.double().abs() for c, p in zip(row, terms, strict=True)) for row in sets]
    scale = known.clone()
    for row, size in zip(scale, sizes, strict=True):
        total = size + target.double().abs()
        row[0], row[1] = total.sum(), total.square().sum()
    assert_sums_close(found, known, scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("groups", [16, 4096])
@pytest.mark.parametrize("where", [(0, 0, 0), (0, -1, -1)], ids=["first", "last"])
@pytest.mark.parametrize("stream", [0, 1])
def test_flag(bad: float, groups: int, where: tuple[int, int, int], stream: int) -> None:
    outputs = [torch.randn(1, 9, 40).bfloat16(), torch.randn(1, 3, 40).bfloat16()]
    inputs, residuals = [torch.randn_like(o) for o in outputs], [torch.empty_like(o) for o in outputs]
    flag = torch.zeros(1, dtype=torch.int32)
    capture.capture_triton(outputs, inputs, residuals, flag, groups=groups)
    assert flag.tolist() == [0]
    outputs[stream][where] = bad
    capture.capture_triton(outputs, inputs, residuals, flag, groups=groups)
    assert flag.tolist() == [1]
    outputs[stream][where] = 0
    capture.capture_triton(outputs, inputs, residuals, flag, groups=groups)
    assert flag.tolist() == [1], "the flag is never cleared"


def test_flag_is_set_by_overflow_and_not_by_large_numbers() -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    large = [torch.full((1, 4, 8), 3e38)]
    capture.capture_triton(large, [torch.zeros(1, 4, 8)], [torch.empty(1, 4, 8)], flag)
    assert flag.tolist() == [0]
    with pytest.warns(RuntimeWarning, match="overflow"):
        outputs, inputs = [torch.full((1, 4, 8), 6e4).half()], [torch.full((1, 4, 8), -6e4).half()]
        capture.capture_triton(outputs, inputs, [torch.empty(1, 4, 8).half()], flag)
    assert flag.tolist() == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_reach_the_statistics(bad: float) -> None:
    a, b = torch.zeros(1, 9, 40), torch.zeros(1, 9, 40)
    a[0, 8, 39] = bad
    found = statistics.pair_statistics_triton([a], [b], groups=16)
    known = statistics.pair_statistics_reference([a], [b])
    assert torch.equal(found.isnan(), known.isnan())
    assert torch.equal(found.isinf(), known.isinf())


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_of_another_dtype(dtype: torch.dtype, stored: torch.dtype) -> None:
    outputs, inputs = [torch.randn(2, 5, 24).to(dtype)], [torch.randn(2, 5, 24).to(dtype)]
    residuals, expected = [torch.empty(2, 5, 24, dtype=stored)], [torch.empty(2, 5, 24, dtype=stored)]
    capture.capture_triton(outputs, inputs, residuals, groups=64)
    capture.capture_reference(outputs, inputs, expected)
    assert same_bits(residuals, expected)
    found = combine.linear_combination_triton(inputs, [residuals], [0.7], groups=64)
    assert same_bits(found, combine.linear_combination_reference(inputs, [residuals], [0.7]))


def test_launches_take_the_path_meant_for_them() -> None:
    """Groups of 16 bytes wherever sizes and addresses allow it, single elements elsewhere."""
    whole, text = torch.zeros(2, 9, 40).bfloat16(), torch.zeros(2, 9, 33).bfloat16()
    assert tiles.vector_width([whole], []) == 8
    assert tiles.vector_width([whole.float()], []) == 4
    assert tiles.vector_width([whole], [whole.float()]) == 8
    assert tiles.vector_width([whole[:, 3:], whole[:, :6]], []) == 8
    assert tiles.vector_width([whole.flatten()[1:]], []) == 1
    assert tiles.vector_width([text[:, 1:]], []) == 1
    assert tiles.vector_width([torch.zeros(1, 7, 63)], []) == 1


def misrounded(convert: Callable) -> int:
    """How many of some numbers the interpreter's own cast to bf16 does not round to nearest."""
    import numpy as np
    import triton.language as tl

    values = torch.linspace(1, 2, 1000)
    bits = convert(values.numpy(), tl.float32, tl.bfloat16, None).astype(np.uint16)
    return int((bits != values.bfloat16().view(torch.uint16).numpy()).sum())


class TestRounding:
    def test_is_right_with_the_fixture(self) -> None:
        from triton.runtime import interpreter

        assert misrounded(interpreter._convert_float) == 0

    def test_fixture_is_still_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """When this fails, the interpreter rounds by itself: remove the fixture."""
        from triton.runtime import interpreter

        monkeypatch.undo()
        assert misrounded(interpreter._convert_float) > 100
