"""The ops on the CPU: values, bits, bad input, and what compilers and dispatch modes see of them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from layercache.kernels import statistics as statistics_kernels
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from layercache import ops
from layercache.errors import MissingExtraError, OpInputError
from layercache.ops import dispatch
from support.marks import slow
from support.operators import Operators
from support.tensors import DTYPES, assert_close, assert_sums_close, exact, outlier_tensor, pair_oracle, streams

# Streams of one call: tiny, odd, batched, text that is empty, more than two, and more than one chunk of a sum.
SHAPES = [
    [(1, 1, 8)],
    [(5,)],
    [(7, 63)],
    [(2, 9, 40), (2, 5, 40)],
    [(1, 7, 64), (1, 0, 64)],
    [(3, 33, 72), (3, 1, 72), (3, 2, 72)],
    [(1, 300, 260), (1, 77, 260)],
]
# Every shape in every dtype, and strided in one.
CASES = [(dtype, shapes, False) for dtype in DTYPES for shapes in SHAPES]
CASES += [(DTYPES[k % 3], shapes, True) for k, shapes in enumerate(SHAPES) if len(shapes[0]) == 3]


def case_id(case: tuple[torch.dtype, list[tuple[int, ...]], bool]) -> str:
    dtype, shapes, strided = case
    sizes = "+".join("x".join(map(str, shape)) for shape in shapes)
    return f"{str(dtype).removeprefix('torch.')}-{sizes}{'-strided' if strided else ''}"


@pytest.fixture(params=CASES, ids=case_id)
def case(request: pytest.FixtureRequest) -> tuple[torch.dtype, list[tuple[int, ...]], bool]:
    return request.param


def residual_buffers(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.full(tuple(shape), float("nan"), dtype=dtype) for shape in shapes]


@pytest.mark.usefixtures("poisoned_memory")
class TestCapture:
    def test_residual_is_the_rounded_difference(self, case) -> None:
        dtype, shapes, strided = case
        outputs, inputs = streams(shapes, dtype, strided), streams(shapes, dtype, strided)
        residuals = residual_buffers(shapes, dtype)
        assert ops.capture(outputs, inputs, residuals) is None
        for output, before, residual in zip(outputs, inputs, residuals, strict=True):
            assert torch.equal(residual, output - before)
            assert_close(residual, exact(output) - exact(before))

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_residual_may_have_a_dtype_of_its_own(self, dtype: torch.dtype, stored: torch.dtype) -> None:
        outputs, inputs = streams([(2, 5, 24)], dtype, False), streams([(2, 5, 24)], dtype, False)
        residuals = residual_buffers([(2, 5, 24)], stored)
        ops.capture(outputs, inputs, residuals)
        assert torch.equal(residuals[0], (outputs[0].float() - inputs[0].float()).to(stored))

    def test_statistics_are_those_of_the_stored_residual(self, case) -> None:
        dtype, shapes, strided = case
        outputs, inputs = streams(shapes, dtype, strided), streams(shapes, dtype, strided)
        previous, residuals = streams(shapes, dtype, False), residual_buffers(shapes, dtype)
        found = ops.capture(outputs, inputs, residuals, None, previous)
        assert found is not None and found.shape == (len(shapes), 7)
        for row, residual, older in zip(found, residuals, previous, strict=True):
            values, scales = pair_oracle(exact(residual), exact(older))
            order = [1, 4, 0, 3, 2, 5, 6]
            assert_sums_close(row, values[order], scales[order])
        again = residual_buffers(shapes, dtype)
        assert torch.equal(found, ops.capture(outputs, inputs, again, None, previous))

    def test_previous_may_be_the_residual_itself(self) -> None:
        outputs, inputs = streams([(2, 5, 24)], torch.bfloat16, False), streams([(2, 5, 24)], torch.bfloat16, False)
        slot = streams([(2, 5, 24)], torch.bfloat16, False)
        older, fresh = [slot[0].clone()], residual_buffers([(2, 5, 24)], torch.bfloat16)
        expected = ops.capture(outputs, inputs, fresh, None, older)
        assert torch.equal(ops.capture(outputs, inputs, slot, None, slot), expected)
        assert torch.equal(slot[0], fresh[0])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("stream", [0, 1])
    def test_flag_is_set_by_a_bad_residual(self, bad: float, dtype: torch.dtype, stream: int) -> None:
        shapes = [(1, 9, 40), (1, 3, 40)]
        outputs, inputs = streams(shapes, dtype, False), streams(shapes, dtype, False)
        flag = torch.zeros(1, dtype=torch.int32)
        ops.capture(outputs, inputs, residual_buffers(shapes, dtype), flag)
        assert flag.tolist() == [0]
        outputs[stream][0, -1, -1] = bad
        ops.capture(outputs, inputs, residual_buffers(shapes, dtype), flag)
        assert flag.tolist() == [1]

    def test_flag_is_set_when_only_the_rounded_residual_overflows(self) -> None:
        outputs, inputs = [torch.full((1, 2, 8), 6e4, dtype=torch.float16)], [torch.full((1, 2, 8), -6e4).half()]
        flag = torch.zeros(1, dtype=torch.int32)
        ops.capture(outputs, inputs, residual_buffers([(1, 2, 8)], torch.float16), flag)
        assert flag.tolist() == [1]

    def test_flag_is_not_set_by_large_numbers_and_never_cleared(self) -> None:
        outputs, inputs = [torch.full((1, 64, 8), 3e38)], [torch.zeros(1, 64, 8)]
        flag = torch.zeros(1, dtype=torch.int32)
        ops.capture(outputs, inputs, residual_buffers([(1, 64, 8)], torch.float32), flag)
        assert flag.tolist() == [0]
        flag.fill_(1)
        ops.capture(outputs, inputs, residual_buffers([(1, 64, 8)], torch.float32), flag)
        assert flag.tolist() == [1]

    def test_only_empty_streams(self) -> None:
        empty = [torch.empty(2, 0, 8)]
        assert ops.capture(empty, empty, [torch.empty(2, 0, 8)]) is None
        assert ops.capture(empty, empty, [torch.empty(2, 0, 8)], None, empty).tolist() == [[0.0] * 7]


@pytest.mark.usefixtures("poisoned_memory")
class TestPairStatistics:
    def test_against_oracle(self, case) -> None:
        dtype, shapes, strided = case
        a, b = streams(shapes, dtype, strided), streams(shapes, dtype, strided)
        found = ops.pair_statistics(a, b)
        assert found.shape == (len(shapes), 8)
        for row, x, y in zip(found, a, b, strict=True):
            assert_sums_close(row, *pair_oracle(exact(x), exact(y)))
        assert torch.equal(found, ops.pair_statistics(a, b))

    def test_one_thread_adds_up_as_exactly(self, case) -> None:
        dtype, shapes, strided = case
        a, b = streams(shapes, dtype, strided), streams(shapes, dtype, strided)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = ops.pair_statistics(a, b)
        finally:
            torch.set_num_threads(threads)
        for row, x, y in zip(found, a, b, strict=True):
            assert_sums_close(row, *pair_oracle(exact(x), exact(y)))

    def test_nan_reaches_every_difference(self) -> None:
        a, b = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)
        a[1, 2, 7] = float("nan")
        found = ops.pair_statistics([a], [b])[0]
        assert found[[0, 1, 3, 4, 6, 7]].isnan().all()

    def test_any_number_of_pairs(self) -> None:
        tensors = [torch.full((2, 4), float(k)) for k in range(6)]
        assert ops.pair_statistics(tensors, tensors[::-1])[:, 7].tolist() == [5.0, 3.0, 1.0, 1.0, 3.0, 5.0]

    def test_float64_stays_float64(self) -> None:
        a, b = torch.randn(3, 50, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
        found = ops.pair_statistics([a], [b])
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found[0].numpy(), pair_oracle(a.numpy(), b.numpy())[0], rtol=1e-12)


def calibration_sets(distances: int, spans: int, terms: int) -> np.ndarray:
    """The sets calibration asks for: one anchor, alone and with each older one."""
    rows = []
    for anchor, span in itertools.product(range(distances), range(spans)):
        row = np.zeros(terms)
        row[anchor] = 1 + 0.3 * span
        row[min(anchor + span, terms - 1)] -= 0.3 * span
        rows.append(row)
    return np.array(rows)


SETS = {
    "reuse": np.array([[1.0, 0.0, 0.0]]),
    "calibration": calibration_sets(3, 5, 3),
    "dense": np.linspace(-2, 2, 21).reshape(7, 3),
    "zeros": np.zeros((2, 3)),
    "mixed": np.array([[1.0, 0, 0], [1.5, 0, -0.5], [0.3, 0.3, 0.4], [0, 0, 0], [0, 1, 0], [0, 2, -1], [1, 0, 0]]),
}


@pytest.mark.usefixtures("poisoned_memory")
class TestCombinationError:
    @pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
    @pytest.mark.parametrize("shape", [(5,), (1, 7, 63), (2, 9, 40), (1, 40, 2048)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_oracle(self, dtype: torch.dtype, shape: tuple[int, ...], sets: np.ndarray) -> None:
        target, *terms = (outlier_tensor(shape, dtype) for _ in range(4))
        found = ops.combination_error(target, terms, sets)
        assert found.shape == (len(sets), 4) and found.dtype == torch.float32
        t, p = exact(target), np.stack([exact(term) for term in terms])
        for row, coefficients in zip(found, sets, strict=True):
            error = np.tensordot(coefficients, p, 1) - t
            size = np.tensordot(np.abs(coefficients), np.abs(p), 1) + np.abs(t)
            values = [np.abs(error).sum(), (error**2).sum(), np.abs(t).sum(), (t**2).sum()]
            scales = [size.sum(), (size**2).sum(), values[2], values[3]]
            assert_sums_close(row, np.array(values), np.array(scales))
        assert torch.equal(found, ops.combination_error(target, terms, sets))

    def test_a_term_equal_to_the_target_has_no_error(self) -> None:
        target, other = torch.randn(3, 1000), torch.randn(3, 1000)
        found = ops.combination_error(target, [other, target], [[0.0, 1.0], [1.0, 0.0]])
        assert found[0, :2].tolist() == [0.0, 0.0] and found[1, 0] > 0

    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
    def test_forms_of_the_coefficients(self, kind: Callable) -> None:
        target, terms = torch.randn(2, 30), [torch.randn(2, 30), torch.randn(2, 30)]
        sets = [[1.25, -0.25], [0.5, 0.5]]
        assert torch.equal(
            ops.combination_error(target, terms, kind(sets)),
            ops.combination_error(target, terms, tuple(map(tuple, sets))),
        )

    def test_empty_target(self) -> None:
        empty = torch.empty(2, 0, 8)
        assert ops.combination_error(empty, [empty], [[1.0], [2.0]]).tolist() == [[0.0] * 4] * 2

    def test_launches_of_a_calibration_read_each_tensor_of_an_anchor_once(self) -> None:
        sets = calibration_sets(4, 10, 14).tolist()
        launches = statistics_kernels.plan_error_launches(sets)
        assert [launch.common for launch in launches] == [0, 1, 2, 3]
        # the target, the anchor, and nine older ones
        assert [launch.passes for launch in launches] == [11] * 4
        target = torch.zeros(100)
        assert statistics_kernels.combination_launch_bytes(target, sets) == 44 * 400

    def test_launches_keep_the_order_of_the_sets(self) -> None:
        launches = statistics_kernels.plan_error_launches(SETS["mixed"].tolist())
        assert [len(launch.others) for launch in launches] == [2, 1, 1, 2, 1]
        assert [launch.common for launch in launches] == [0, 0, -1, 1, 0]


@pytest.mark.usefixtures("poisoned_memory")
class TestLinearCombination:
    def test_against_oracle(self, case) -> None:
        dtype, shapes, strided = case
        for terms in (1, 2, 5, 8):
            bases = streams(shapes, dtype, strided)
            residuals = [[outlier_tensor(shape, dtype) for _ in range(terms)] for shape in shapes]
            coefficients = [(-1.0) ** k * (1.3 - 0.1 * k) for k in range(terms)]
            found = ops.linear_combination(bases, residuals, coefficients)
            for y, x, stream in zip(found, bases, residuals, strict=True):
                assert y.is_contiguous() and y.dtype == dtype
                products = [c * exact(r) for c, r in zip(coefficients, stream, strict=True)]
                assert_close(y, exact(x) + sum(products), np.abs(exact(x)) + sum(map(np.abs, products)))

    def test_bits_are_those_of_separate_fp32_products_and_sums(self, case) -> None:
        """Not of fused multiply-adds: so that CPU, GPU and interpreter agree."""
        dtype, shapes, strided = case
        bases = streams(shapes, dtype, strided)
        residuals = [[outlier_tensor(shape, dtype) for _ in range(3)] for shape in shapes]
        coefficients = [1.3, -0.7, 0.1]
        for y, x, stream in zip(ops.linear_combination(bases, residuals, coefficients), bases, residuals, strict=True):
            total = x.float().numpy()
            for c, r in zip(coefficients, stream, strict=True):
                total = total + np.float32(c) * r.float().numpy()
            assert torch.equal(y, torch.from_numpy(np.ascontiguousarray(total)).to(dtype))

    def test_one_term_with_coefficient_one_is_an_addition(self, case) -> None:
        dtype, shapes, strided = case
        bases, residuals = streams(shapes, dtype, strided), streams(shapes, dtype, False)
        found = ops.linear_combination(bases, [[r] for r in residuals], [1.0])
        for y, x, r in zip(found, bases, residuals, strict=True):
            assert torch.equal(y, torch.add(x, r))

    def test_a_second_term_with_coefficient_zero_changes_nothing(self, case) -> None:
        dtype, shapes, strided = case
        bases, residuals = streams(shapes, dtype, strided), streams(shapes, dtype, False)
        alone = ops.linear_combination(bases, [[r] for r in residuals], [1.0])
        second = streams(shapes, dtype, False)
        both = ops.linear_combination(bases, [[r, s] for r, s in zip(residuals, second, strict=True)], [1.0, 0.0])
        assert all(map(torch.equal, alone, both))

    def test_coefficients_on_the_device_give_the_same_bits(self, case) -> None:
        dtype, shapes, strided = case
        bases = streams(shapes, dtype, strided)
        residuals = [[outlier_tensor(shape, dtype) for _ in range(2)] for shape in shapes]
        for coefficients in ([1.3, -0.3], [1.0, 0.0], [1.0 + 2.0**-30, 1.0]):
            device = torch.tensor(coefficients, dtype=torch.float32)
            host = ops.linear_combination(bases, residuals, coefficients)
            assert all(map(torch.equal, host, ops.linear_combination(bases, residuals, device)))

    def test_secant_is_exact_for_residuals_linear_in_sigma(self) -> None:
        start, slope, x = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        newer, older = start + 0.75 * slope, start + slope
        (y,) = ops.linear_combination([x], [[newer, older]], [2.0, -1.0])
        torch.testing.assert_close(y, x + start + 0.5 * slope)

    def test_residuals_of_another_dtype(self) -> None:
        x, r = torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 5, 8)
        (y,) = ops.linear_combination([x], [[r]], [1.0])
        assert torch.equal(y, (x.float() + r).bfloat16())

    def test_results_share_no_memory(self) -> None:
        x, r = torch.randn(1, 3, 8), torch.zeros(1, 3, 8)
        (y,) = ops.linear_combination([x], [[r]], [1.0])
        y.zero_()
        assert x.any()


def good_capture() -> dict[str, Any]:
    return {
        "outputs": [torch.randn(2, 3, 8), torch.randn(2, 5, 8)],
        "inputs": [torch.randn(2, 3, 8), torch.randn(2, 5, 8)],
        "residuals": [torch.randn(2, 3, 8), torch.randn(2, 5, 8)],
        "flag": torch.zeros(1, dtype=torch.int32),
        "previous": [torch.randn(2, 3, 8), torch.randn(2, 5, 8)],
    }


def good_combination() -> dict[str, Any]:
    return {
        "bases": [torch.randn(2, 3, 8), torch.randn(2, 5, 8)],
        "residuals": [[torch.randn(2, 3, 8)] * 2, [torch.randn(2, 5, 8)] * 2],
        "coefficients": [1.0, 2.0],
    }


def with_item(values: list, index: int, value: Any) -> list:
    return [*values[:index], value, *values[index + 1 :]]


BAD_CAPTURES: dict[str, tuple[Callable[[dict], dict], str]] = {
    "outputs-not-a-list": (lambda g: {"outputs": g["outputs"][0]}, "outputs is a Tensor; expected a list of 1 to 8"),
    "no-streams": (lambda g: {"outputs": []}, "outputs is a list of 0"),
    "nine-streams": (lambda g: {"outputs": [torch.ones(2)] * 9}, "outputs is a list of 9"),
    "outputs-integers": (lambda g: {"outputs": [torch.ones(2, 3, 8, dtype=torch.int32)]}, r"outputs\[0\] is torch.int"),
    "outputs-mixed": (lambda g: {"outputs": with_item(g["outputs"], 1, torch.randn(2, 5, 8).half())}, r"outputs\[1\]"),
    "outputs-none": (lambda g: {"outputs": with_item(g["outputs"], 1, None)}, r"outputs\[1\] is a NoneType"),
    "inputs-missing": (lambda g: {"inputs": g["inputs"][:1]}, "inputs is a list of 1; expected a list of 2"),
    "inputs-shape": (
        lambda g: {"inputs": with_item(g["inputs"], 0, torch.randn(2, 4, 8))},
        r"inputs\[0\] is of shape \(2, 4, 8\); expected \(2, 3, 8\) as outputs",
    ),
    "inputs-dtype": (lambda g: {"inputs": [t.half() for t in g["inputs"]]}, r"inputs\[0\] is torch.float16"),
    "inputs-device": (
        lambda g: {"inputs": with_item(g["inputs"], 0, torch.empty(2, 3, 8, device="meta"))},
        r"inputs\[0\] is on meta; expected on cpu",
    ),
    "inputs-last-dim": (
        lambda g: {"inputs": with_item(g["inputs"], 0, torch.randn(2, 8, 3).transpose(1, 2))},
        r"inputs\[0\] is of shape \(2, 3, 8\) and strides \(24, 1, 3\)",
    ),
    "residuals-strided": (
        lambda g: {"residuals": with_item(g["residuals"], 0, torch.randn(2, 6, 8)[:, :3])},
        r"residuals\[0\] .* expected a contiguous tensor",
    ),
    "residuals-mixed": (
        lambda g: {"residuals": with_item(g["residuals"], 1, torch.randn(2, 5, 8).half())},
        r"residuals\[1\] is torch.float16; expected torch.float32, one dtype for all",
    ),
    "residual-is-an-output": (
        lambda g: {"residuals": with_item(g["residuals"], 0, g["outputs"][0])},
        r"residuals\[0\] is in the same memory as outputs\[0\]",
    ),
    "residual-is-an-input": (
        lambda g: {"residuals": with_item(g["residuals"], 1, g["inputs"][1])},
        r"residuals\[1\] is in the same memory as inputs\[1\]",
    ),
    "residual-of-another-stream-is-previous": (
        lambda g: {"outputs": g["outputs"][:1] * 2, "inputs": g["inputs"][:1] * 2, "residuals": (r := [
            torch.randn(2, 3, 8), torch.randn(2, 3, 8)]), "previous": r[::-1]},
        r"residuals\[0\] is in the same memory as previous\[1\]",
    ),
    "previous-dtype": (lambda g: {"previous": [t.half() for t in g["previous"]]}, r"previous\[0\] is torch.float16"),
    "flag-dtype": (lambda g: {"flag": torch.zeros(1)}, "flag is torch.float32"),
    "flag-size": (lambda g: {"flag": torch.zeros(2, dtype=torch.int32)}, r"flag is torch.int32 of shape \(2,\)"),
    "flag-device": (lambda g: {"flag": torch.zeros(1, dtype=torch.int32, device="meta")}, "flag is on meta"),
    "flag-kind": (lambda g: {"flag": 0}, "flag is a int"),
    "grad": (lambda g: {"inputs": [t.requires_grad_() for t in g["inputs"]]}, "requires grad"),
}  # fmt: skip

BAD_COMBINATIONS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "too-many-terms": (
        lambda g: {"residuals": [[b] * 9 for b in g["bases"]], "coefficients": [1.0] * 9},
        "a list of 9; expected a list of at least 1 and at most 8 terms",
    ),
    "no-terms": (lambda g: {"residuals": [[], []], "coefficients": []}, r"residuals\[0\] is a list of 0"),
    "a-stream-missing": (lambda g: {"residuals": g["residuals"][:1]}, "residuals is a list of 1; expected a list of 2"),
    "flat-residuals": (lambda g: {"residuals": [r[0] for r in g["residuals"]]}, r"residuals\[0\] is a Tensor"),
    "unequal": (lambda g: {"residuals": [g["residuals"][0], g["residuals"][1][:1]]}, r"2 terms as residuals\[0\]"),
    "shape": (lambda g: {"residuals": g["residuals"][::-1]}, r"residuals\[0\]\[0\] is of shape \(2, 5, 8\)"),
    "strided": (
        lambda g: {"bases": g["bases"][:1], "residuals": [[torch.randn(2, 6, 8)[:, ::2]] * 2]},
        r"residuals\[0\]\[0\] .* expected a contiguous tensor",
    ),
    "coefficient-count": (lambda g: {"coefficients": [1.0]}, "coefficients is 1 numbers; expected 2"),
    "coefficient-nan": (lambda g: {"coefficients": [1.0, float("nan")]}, "expected finite numbers"),
    "coefficient-inf": (lambda g: {"coefficients": [1.0, float("inf")]}, "expected finite numbers"),
    "coefficient-kind": (lambda g: {"coefficients": ["a", "b"]}, "expected 2 numbers"),
    "coefficient-scalar": (lambda g: {"coefficients": 1.0}, "expected 2 numbers"),
    "device-dtype": (lambda g: {"coefficients": torch.ones(2).double()}, "coefficients is torch.float64"),
    "device-count": (lambda g: {"coefficients": torch.ones(3)}, "coefficients is 3 numbers; expected 2"),
    "device-elsewhere": (lambda g: {"coefficients": torch.ones(2, device="meta")}, "coefficients is on meta"),
    "float64-residuals": (
        lambda g: {"residuals": [[r.double() for r in stream] for stream in g["residuals"]]},
        "float64 only with float64 bases",
    ),
    "nine-streams": (lambda g: {"bases": g["bases"][:1] * 9}, "bases is a list of 9; expected a list of 1 to 8"),
    "grad": (lambda g: {"bases": [t.requires_grad_() for t in g["bases"]]}, "requires grad"),
}

BAD_ERRORS: dict[str, tuple[tuple, str]] = {
    "no-terms": ((torch.ones(8), [], [[]]), "terms is a list of 0"),
    "no-sets": ((torch.ones(8), [torch.ones(8)], []), "coefficients is a list of 0"),
    "flat": ((torch.ones(8), [torch.ones(8)], [1.0]), r"coefficients\[0\] is 1.0"),
    "count": ((torch.ones(8), [torch.ones(8)], [[1.0, 2.0]]), r"coefficients\[0\] is 2 numbers; expected 1"),
    "nan": ((torch.ones(8), [torch.ones(8)], [[1.0], [float("nan")]]), r"coefficients\[1\] .* finite"),
    "shape": ((torch.ones(8), [torch.ones(9)], [[1.0]]), r"terms\[0\] is of shape \(9,\); expected \(8,\) as target"),
    "strided": ((torch.ones(4, 8)[:, :4], [torch.ones(4, 4)], [[1.0]]), "target .* expected a contiguous tensor"),
    "too-many": ((torch.ones(8), [torch.ones(8)] * 25, [[1.0] * 25]), "25 numbers that are not zero; expected at most"),
    "device": ((torch.ones(8), [torch.ones(8)], torch.ones(1, 1, device="meta")), "coefficients is on meta"),
    "none": ((None, [torch.ones(8)], [[1.0]]), "target is a NoneType"),
}


class TestBadInput:
    @pytest.mark.parametrize("name", BAD_CAPTURES)
    def test_capture(self, name: str) -> None:
        change, message = BAD_CAPTURES[name]
        good = good_capture()
        ops.capture(**good)
        with pytest.raises(OpInputError, match=message):
            ops.capture(**{**good, **change(good)})

    @pytest.mark.parametrize("name", BAD_COMBINATIONS)
    def test_linear_combination(self, name: str) -> None:
        change, message = BAD_COMBINATIONS[name]
        good = good_combination()
        ops.linear_combination(**good)
        with pytest.raises(OpInputError, match=message):
            ops.linear_combination(**{**good, **change(good)})

    @pytest.mark.parametrize("name", BAD_ERRORS)
    def test_combination_error(self, name: str) -> None:
        arguments, message = BAD_ERRORS[name]
        with pytest.raises(OpInputError, match=message):
            ops.combination_error(*arguments)

    def test_pair_statistics(self) -> None:
        with pytest.raises(OpInputError, match=r"b\[1\] is of shape \(3,\); expected \(2,\) as a"):
            ops.pair_statistics([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.ones(3)])
        with pytest.raises(OpInputError, match="a is a list of 0"):
            ops.pair_statistics([], [])

    def test_four_dims_must_be_contiguous(self) -> None:
        strided = torch.randn(2, 2, 6, 8)[:, :, :3]
        with pytest.raises(OpInputError, match="2 or 3 dims"):
            ops.pair_statistics([strided], [strided])

    def test_parameters_are_fine_without_grad(self) -> None:
        x = nn.Parameter(torch.randn(1, 2, 8))
        with torch.no_grad():
            assert torch.equal(ops.linear_combination([x], [[x]], [1.0])[0], 2 * x)

    def test_a_buffer_next_to_an_output_is_not_an_alias(self) -> None:
        memory = torch.randn(3, 1, 4, 8)
        ops.capture([memory[0]], [memory[1]], [memory[2]])
        assert torch.equal(memory[2], memory[0] - memory[1])


def calls() -> dict[str, Callable[[], Any]]:
    """One call of everything that is registered."""
    o, i, r, p = (torch.randn(2, 3, 8) for _ in range(4))
    flag, coefficients = torch.zeros(1, dtype=torch.int32), torch.tensor([0.5, 0.25])
    return {
        "capture": lambda: ops.capture([o], [i], [r], flag),
        "capture_statistics": lambda: ops.capture([o], [i], [r], flag, [p]),
        "pair_statistics": lambda: ops.pair_statistics([o, i], [i, p]),
        "combination_error": lambda: ops.combination_error(o, [i, p], [[1.0, 0.5], [2.0, -1.0]]),
        "linear_combination": lambda: ops.linear_combination([o, i], [[p, i], [p, o]], coefficients),
        "linear_combination(host)": lambda: ops.linear_combination([o], [[p, i]], [0.5, 0.25]),
    }


class TestRegistration:
    @pytest.mark.parametrize("name", calls())
    def test_a_dispatch_mode_sees_one_op_and_the_same_bits(self, name: str) -> None:
        call = calls()[name]
        direct = call()
        with Operators() as operators:
            seen = call()
        assert [o.name for o in operators.seen] == [f"layercache::{name.partition('(')[0]}"]
        torch.testing.assert_close(seen, direct, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("dtype", "with_flag", "strided"),
        [
            (torch.bfloat16, True, True),
            *slow((torch.float32, False, False), (torch.float16, True, False), (torch.float32, False, True)),
        ],
        ids=str,
    )
    def test_opcheck(self, dtype: torch.dtype, with_flag: bool, strided: bool) -> None:
        shapes = [(2, 3, 8), (2, 1, 8)]
        outputs, inputs = streams(shapes, dtype, strided), streams(shapes, dtype, strided)
        residuals, previous = streams(shapes, dtype, False), streams(shapes, dtype, False)
        flag = torch.zeros(1, dtype=torch.int32) if with_flag else None
        ours = torch.ops.layercache
        torch.library.opcheck(ours.capture.default, (outputs, inputs, residuals, flag))
        torch.library.opcheck(ours.capture_statistics.default, (outputs, inputs, residuals, flag, previous, with_flag))
        torch.library.opcheck(ours.pair_statistics.default, (outputs, inputs, with_flag))
        torch.library.opcheck(ours.combination_error.default, (residuals[0], previous[:1] * 2, [1.0, 0.5, 2.0, -1.0]))
        host, device = ([0.5], None), ([], torch.tensor([0.5]))
        coefficients = host if with_flag else device
        torch.library.opcheck(ours.linear_combination.default, (outputs, residuals, *coefficients, [], []))

    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_fakes(self, device: str) -> None:
        with FakeTensorMode():
            image, text = (torch.empty(2, rows, 16, device=device, dtype=torch.bfloat16) for rows in (9, 4))
            residuals = [torch.empty_like(image), torch.empty_like(text)]
            flag = torch.zeros(1, dtype=torch.int32, device=device)
            assert ops.capture([image, text], [image, text], residuals, flag) is None
            results = {
                (2, 7): ops.capture([image, text], [image, text], residuals, flag, residuals),
                (2, 8): ops.pair_statistics([image, text], residuals),
                (3, 4): ops.combination_error(image, residuals[:1] * 2, [[1.0, 2.0]] * 3),
            }
            for shape, statistics in results.items():
                assert statistics.shape == shape and statistics.dtype == torch.float32
                assert statistics.device.type == device
            strides = (13 * 16, 16, 1)
            bases = [torch.empty_strided(t.shape, strides, device=device, dtype=t.dtype) for t in (image, text)]
            for coefficients in ([1.0], torch.ones(1, device=device)):
                found = ops.linear_combination(bases, [[r] for r in residuals], coefficients)
                assert [y.shape for y in found] == [image.shape, text.shape]
                assert all(y.is_contiguous() and y.dtype == torch.bfloat16 for y in found)
                assert all(y.device.type == device for y in found)

    def test_fake_tensors_outside_their_mode(self) -> None:
        mode = FakeTensorMode()
        image = mode.from_tensor(torch.randn(1, 3, 8))
        assert ops.pair_statistics([image], [image]).shape == (1, 8)

    def test_meta_tensors(self) -> None:
        image = torch.empty(1, 3, 8, device="meta")
        assert ops.linear_combination([image], [[image]], [1.0])[0].device.type == "meta"

    def test_bad_input_is_found_under_a_fake_mode(self) -> None:
        with FakeTensorMode(), pytest.raises(OpInputError, match="shape"):
            ops.pair_statistics([torch.empty(2, 8)], [torch.empty(3, 8)])


class Cached(nn.Module):
    """Captures into a buffer and reuses it, as a cached model does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("slot", torch.zeros(2, 7, 16, dtype=dtype))
        self.register_buffer("flag", torch.zeros(1, dtype=torch.int32))

    def forward(self, joined: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        text, image = joined[:, :5], joined[:, 5:]
        statistics = ops.capture([image * 1.7], [image], [self.slot], self.flag, [self.slot])
        (image,) = ops.linear_combination([image], [[self.slot, self.slot]], coefficients)
        return torch.cat([text, image], dim=1), statistics


class TestCompile:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32)], ids=str)
    def test_bits_and_one_graph(self, dtype: torch.dtype) -> None:
        torch._dynamo.reset()
        eager, traced = Cached(dtype), Cached(dtype)
        graphs = CompileCounterWithBackend("inductor")
        compiled = torch.compile(traced, fullgraph=True, backend=graphs)
        with torch.no_grad():
            for coefficients in ([1.0, 0.0], [1.3, -0.3], [2.0, -1.0]):
                joined = torch.randn(2, 12, 16).to(dtype)
                expected = eager(joined, torch.tensor(coefficients))
                found = compiled(joined, torch.tensor(coefficients))
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
                assert torch.equal(eager.slot, traced.slot)
        assert graphs.frame_count == 1
        assert traced.flag.item() == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32, torch.float16)], ids=str)
    def test_ops_alone_have_the_bits_of_eager(self, dtype: torch.dtype) -> None:
        torch._dynamo.reset()

        def step(outputs, inputs, slots, flag, coefficients):
            statistics = ops.capture(outputs, inputs, slots, flag, slots)
            pairs = ops.pair_statistics(outputs, inputs)
            errors = ops.combination_error(slots[0], [inputs[0].contiguous(), slots[0]], [[1.0, 0.5], [0.0, 1.0]])
            reused = ops.linear_combination(inputs, [[slot, slot] for slot in slots], coefficients)
            fixed = ops.linear_combination(inputs, [[slot] for slot in slots], [0.75])
            return statistics, pairs, errors, reused, fixed

        compiled = torch.compile(step, fullgraph=True)
        shapes = [(2, 9, 16), (2, 3, 16)]
        for coefficients in ([1.0, 0.0], [1.3, -0.3]):
            outputs, inputs = streams(shapes, dtype, True), streams(shapes, dtype, True)
            slots = streams(shapes, dtype, False)
            flag, device = torch.zeros(1, dtype=torch.int32), torch.tensor(coefficients)
            eager_slots = [slot.clone() for slot in slots]
            expected = step(outputs, inputs, eager_slots, flag, device)
            found = compiled(outputs, inputs, slots, flag, device)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            assert all(map(torch.equal, slots, eager_slots))


class TestBytesAndBackends:
    def test_minimum_bytes(self) -> None:
        image, text = torch.zeros(1, 10, 8).bfloat16(), torch.zeros(1, 5, 8).bfloat16()
        both, size = [image, text], 15 * 8 * 2
        assert ops.minimum_bytes("capture", both, both, both) == 3 * size
        assert ops.minimum_bytes("capture", both, both, both, None, both) == 4 * size
        assert ops.minimum_bytes("pair_statistics", both, both) == 2 * size
        assert ops.minimum_bytes("combination_error", image, [image] * 3, [[1.0] * 3]) == 4 * 160
        assert ops.minimum_bytes("linear_combination", both, [[image] * 2, [text] * 2], [1.0, 2.0]) == 4 * size

    @pytest.mark.parametrize("name", ops.OP_NAMES)
    def test_backends(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert ops.backend_for(name, "cpu")[0] == "native"
        monkeypatch.setattr(dispatch, "trouble_with_triton", lambda: dispatch.NO_TRITON)
        backend, reason = ops.backend_for(name, torch.device("cuda", 0))
        assert backend == "unavailable" and "pip install" in reason
        assert ops.backend_for(name, "mps")[0] == "unavailable"

    def test_triton_backend(self) -> None:
        pytest.importorskip("triton")
        assert ops.backend_for("capture", "cuda")[0] == "triton"

    def test_unknown_op(self) -> None:
        for ask in (lambda: ops.backend_for("nothing", "cpu"), lambda: ops.minimum_bytes("nothing")):
            with pytest.raises(OpInputError, match="there is no op 'nothing'"):
                ask()

    def test_the_cpu_needs_no_triton(self) -> None:
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "import torch; from layercache import backend, ops\n"
            "x = torch.ones(1, 2, 8); r = torch.empty(1, 2, 8)\n"
            "ops.capture([2 * x], [x], [r]); (y,) = ops.linear_combination([x], [[r]], [1.0])\n"
            "assert torch.equal(y, 2 * x) and ops.backend_for('capture', 'cuda')[0] == 'unavailable'"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

    def test_a_gpu_without_triton_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class OnGpu:
            device = torch.device("cuda", 0)
            is_cuda = True

        def broken() -> None:
            raise ImportError("libcuda.so.1: no such file")

        dispatch.trouble_with_triton.cache_clear()
        monkeypatch.setattr(dispatch, "use_triton", broken)
        monkeypatch.setattr(dispatch, "has_triton", lambda: True)
        with pytest.raises(MissingExtraError, match=r"importing it fails \(libcuda"):
            dispatch.Kernels(print, print, print).choose(OnGpu())
        dispatch.trouble_with_triton.cache_clear()
        monkeypatch.setattr(dispatch, "has_triton", lambda: False)
        with pytest.raises(MissingExtraError, match="pip install"):
            dispatch.Kernels(print, print, print).choose(OnGpu())
        dispatch.trouble_with_triton.cache_clear()
