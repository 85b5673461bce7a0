"""Every launcher against its eager reference: bits of what is elementwise, sums to 1e-5, and nothing out of bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layercache.kernels import capture, combine, statistics, tiles

from support.guarded_memory import CASES, DTYPES, Case, Memory, assert_sums_close, in_cases, pair_scale, same_bits
from support.marks import slow

pytestmark = pytest.mark.usefixtures("rounding")


@in_cases()
def test_capture(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    outputs, inputs = memory.streams(case, dtype), memory.streams(case, dtype)
    residuals, expected = memory.outputs(case, dtype), memory.outputs(case, dtype)
    assert capture.capture_triton(outputs, inputs, residuals, groups=case.groups) is None
    capture.capture_reference(outputs, inputs, expected)
    assert same_bits(residuals, expected)


@in_cases()
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


@in_cases()
def test_pair_statistics(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    a, b = memory.streams(case, dtype), memory.streams(case, dtype)
    found = statistics.pair_statistics_triton(a, b, groups=case.groups)
    known = statistics.pair_statistics_reference(a, b)
    assert_sums_close(found, known, pair_scale(known, absolute_product=6))
    assert torch.equal(found[:, 7], known[:, 7])


@in_cases()
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
@in_cases([case for case in CASES if not case.strided and len(case.shapes[0]) == 3])
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


@pytest.mark.parametrize("bad", [float("nan"), *slow(float("inf"), float("-inf"))])
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
