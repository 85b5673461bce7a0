"""Launchers of linear maps, statistics per sample, Gram matrices, alignment and compact storage against references."""

from __future__ import annotations

import pytest
import torch
from layercache.kernels import capture, combine, compact, moments, statistics, tiles
from torch import Tensor

from support.guarded_memory import CASES, DTYPES, Case, Memory, assert_sums_close, in_cases, pair_scale, same_bits

pytestmark = pytest.mark.usefixtures("rounding")

MATRIX: list[list[float | None]] = [[1.0, -0.5, 0.25], [None, 2.0, -1.5]]
THREE_DIMS = [case for case in CASES if len(case.shapes[0]) == 3]
DENSE = [case for case in THREE_DIMS if not case.strided]


def inputs_of(case: Case, dtype: torch.dtype, memory: Memory, count: int) -> list[list[Tensor]]:
    return list(map(list, zip(*(memory.streams(case, dtype) for _ in range(count)), strict=True)))


@in_cases()
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_linear_map(case: Case, dtype: torch.dtype, memory: Memory, on_device: bool) -> None:
    inputs = inputs_of(case, dtype, memory, 3)
    found = [[memory.tensor(shape, dtype) for _ in MATRIX] for shape in case.shapes]
    known = [[torch.zeros(shape, dtype=dtype) for _ in MATRIX] for shape in case.shapes]
    matrix = torch.tensor([[c or 0.0 for c in row] for row in MATRIX]) if on_device else MATRIX
    factors = None if on_device else [0.5, -3.0]
    combine.linear_map_triton(inputs, found, matrix, factors, groups=case.groups)
    combine.linear_map_reference(inputs, known, matrix, factors)
    assert all(map(same_bits, found, known))


@in_cases()
def test_outputs_in_place_of_strided_inputs(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    inputs = inputs_of(case, dtype, memory, 2)
    known = [[torch.zeros(shape, dtype=dtype)] for shape in case.shapes]
    combine.linear_map_reference(inputs, known, [[0.5, 0.25]])
    combine.linear_map_triton(inputs, [[stream[0]] for stream in inputs], [[0.5, 0.25]], groups=case.groups)
    assert same_bits([stream[0] for stream in inputs], [y for (y,) in known])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_dtypes(dtype: torch.dtype, other: torch.dtype) -> None:
    x, v = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 24).to(other)
    found, known = ([torch.empty(2, 5, 24, dtype=d) for d in (dtype, other)] for _ in range(2))
    combine.linear_map_triton([[x, v]], [found], [[1.0, -0.5], [0.25, 1.0]], groups=64)
    combine.linear_map_reference([[x, v]], [known], [[1.0, -0.5], [0.25, 1.0]])
    assert same_bits(found, known)


@in_cases(THREE_DIMS)
def test_gate(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    bases = memory.streams(case, dtype)
    terms = [[memory.random(shape, dtype) for _ in range(2)] for shape in case.shapes]
    gates = [memory.random((shape[0], 1, shape[2]), dtype) for shape in case.shapes]
    gates[-1] = gates[-1][:, 0]
    known = combine.linear_combination_reference(bases, terms, [1.5, -0.5], None, gates)
    found = combine.linear_combination_triton(bases, terms, [1.5, -0.5], None, gates, groups=case.groups)
    assert same_bits(found, known)
    combine.linear_combination_triton(bases, terms, [1.5, -0.5], bases, gates, groups=case.groups)
    assert same_bits(bases, known)


def test_many_streams() -> None:
    """More than one launch holds."""
    bases = [torch.randn(1, 3 + s, 16) for s in range(tiles.MAX_ENTRIES + 3)]
    terms = [[torch.randn_like(x)] for x in bases]
    found = combine.linear_combination_triton(bases, terms, [0.5], groups=16)
    assert same_bits(found, [x + 0.5 * r for x, (r,) in zip(bases, terms, strict=True)])
    pairs = statistics.pair_statistics_triton(bases, [r for (r,) in terms], groups=16)
    torch.testing.assert_close(pairs, statistics.pair_statistics_reference(bases, [r for (r,) in terms]))


@in_cases(THREE_DIMS)
def test_statistics_per_sample(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    outputs, inputs = memory.streams(case, dtype), memory.streams(case, dtype)
    previous = [memory.random(shape, dtype) for shape in case.shapes]
    residuals, expected = memory.outputs(case, dtype), memory.outputs(case, dtype)
    arguments = (None, previous, False, True)
    found = capture.capture_triton(outputs, inputs, residuals, *arguments, groups=case.groups)
    known = capture.capture_reference(outputs, inputs, expected, *arguments)
    assert found is not None and known is not None and same_bits(residuals, expected)
    assert_sums_close(found, known, pair_scale(known, absolute_product=6))
    found = statistics.pair_statistics_triton(outputs, inputs, True, groups=case.groups)
    known = statistics.pair_statistics_reference(outputs, inputs, True)
    assert_sums_close(found, known, pair_scale(known, absolute_product=6))


@pytest.mark.parametrize("per_sample", [False, True])
@in_cases(THREE_DIMS)
def test_statistics_of_the_input(
    case: Case,
    dtype: torch.dtype,
    memory: Memory,
    per_sample: bool,
) -> None:
    outputs, inputs = memory.streams(case, dtype), memory.streams(case, dtype)
    residuals, expected = memory.outputs(case, dtype), memory.outputs(case, dtype)
    found = capture.capture_triton(outputs, inputs, residuals, None, None, True, per_sample, groups=case.groups)
    known = capture.capture_reference(outputs, inputs, expected, None, None, True, per_sample)
    assert found is not None and known is not None and same_bits(residuals, expected)
    assert_sums_close(found, known, known)


@pytest.mark.parametrize("count", [1, 2, 8, 11])
@in_cases(DENSE)
def test_gram(case: Case, dtype: torch.dtype, memory: Memory, count: int) -> None:
    tensors = [memory.random(case.shapes[0], dtype) for _ in range(count)]
    found, known = moments.gram_triton(tensors, groups=case.groups), moments.gram_reference(tensors)
    norms = known.diagonal().sqrt()
    assert_sums_close(found, known, norms[:, None] * norms[None, :])
    assert torch.equal(found, found.T)


@in_cases(DENSE)
def test_linear_sums(case: Case, dtype: torch.dtype, memory: Memory) -> None:
    tensors = [memory.random(case.shapes[0], dtype) for _ in range(3)]
    found = moments.plan_linear_sums(tensors, MATRIX, groups=case.groups)(tensors)
    known = moments.linear_sums_reference(tensors, MATRIX)
    sizes = [sum(abs(c or 0.0) * t.double().abs() for c, t in zip(row, tensors, strict=True)) for row in MATRIX]
    assert_sums_close(found, known, torch.tensor([[s.sum(), s.square().sum()] for s in sizes]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 0.5, 1.2, 9.0])
def test_align(dtype: torch.dtype, size: float) -> None:
    x, p_a, p_b, r_a, r_b = (torch.randn(2, 9, 40).to(dtype) for _ in range(5))
    y = (x.float() + p_b.float() + size * (p_a.float() - p_b.float())).to(dtype)
    found = moments.align_triton(x, y, [p_a, p_b], [r_a, r_b], groups=256)
    known = moments.align_reference(x, y, [p_a, p_b], [r_a, r_b])
    torch.testing.assert_close(found, known, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


def test_align_of_equal_probes() -> None:
    x, p, r_a, r_b = (torch.randn(1, 5, 8) for _ in range(4))
    assert torch.equal(moments.align_triton(x, x, [p, p], [r_a, r_b], groups=16), x + 0.0 * r_b + r_a)


class TestCompactStorage:
    @in_cases(THREE_DIMS)
    def test_codes_and_their_use(self, case: Case, dtype: torch.dtype, memory: Memory) -> None:
        outputs, inputs = memory.streams(case, dtype), memory.streams(case, dtype)
        codes = [memory.tensor(shape, torch.uint8, torch.zeros(shape)) for shape in case.shapes]
        scales = [memory.tensor(shape[:-1], torch.float32) for shape in case.shapes]
        flag = torch.zeros(1, dtype=torch.int32)
        compact.capture_compact_triton(outputs, inputs, codes, scales, flag)
        known = [torch.empty_like(c) for c in codes], [torch.empty_like(s) for s in scales]
        compact.capture_compact_reference(outputs, inputs, *known)
        assert same_bits(scales, known[1])
        zero = torch.zeros(())
        for code, expected in zip(codes, known[0], strict=True):
            # -0.0 and 0.0 are two codes
            decoded = [torch.where(c == 128, 0, c).view(torch.uint8) for c in (code, expected)]
            assert torch.equal(*decoded)
        assert flag.item() == 0 and zero == 0
        bases = memory.streams(case, dtype)
        nested = [[c, c] for c in codes], [[s, s] for s in scales]
        found = combine.linear_combination_triton(
            bases, nested[0], [1.5, -0.25], None, None, nested[1], groups=case.groups
        )
        expected = combine.linear_combination_reference(bases, nested[0], [1.5, -0.25], None, None, nested[1])
        assert same_bits(found, expected)

    def test_every_code_is_read_as_torch_reads_it(self) -> None:
        codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8).view(1, 1, -1)
        zero = torch.zeros(1, 1, 254)
        found = combine.linear_combination_triton([zero], [[codes]], [1.0], None, None, [[torch.ones(1, 1)]])
        assert torch.equal(found[0], codes.view(torch.float8_e4m3fn).float())

    def test_every_tie_is_rounded_as_torch_rounds_it(self) -> None:
        codes = torch.tensor(list(range(127)), dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        between = (codes[1:] + codes[:-1]) / 2
        values = torch.cat([codes, between, between * (1 + 1e-6), between * (1 - 1e-6)])
        values = torch.cat([values, -values[1:]]).view(1, 1, -1)
        found, scales = torch.empty_like(values, dtype=torch.uint8), torch.empty(1, 1)
        compact.capture_compact_triton([values], [torch.zeros_like(values)], [found], [scales])
        assert scales.item() == 1.0
        assert torch.equal(found.view(torch.float8_e4m3fn).float(), values.to(torch.float8_e4m3fn).float())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_flag(self, bad: float) -> None:
        output = torch.randn(1, 3, 16)
        output[0, 2, 3] = bad
        flag = torch.zeros(1, dtype=torch.int32)
        codes, scales = torch.empty(1, 3, 16, dtype=torch.uint8), torch.empty(1, 3)
        compact.capture_compact_triton([output], [torch.zeros(1, 3, 16)], [codes], [scales], flag)
        assert flag.item() == 1
