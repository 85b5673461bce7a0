"""Linear maps and the forecasts made of them, statistics per sample, Gram matrices, alignment, compact storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layercache import ops
from layercache.errors import OpInputError
from layercache.ops import checks
from support.tensors import DTYPES, assert_close, exact, outlier_tensor, pair_oracle, streams

SHAPES = [[(2, 9, 40), (2, 5, 40)], [(1, 7, 63)], [(3, 33, 72), (3, 0, 72)], [(1, 300, 260), (1, 77, 260)]]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SHAPES, ids=lambda shapes: "+".join("x".join(map(str, shape)) for shape in shapes))
def shapes(request: pytest.FixtureRequest) -> list[tuple[int, ...]]:
    return request.param


def like(shapes: list[tuple[int, ...]], dtype: torch.dtype, count: int) -> list[list[Tensor]]:
    return [[torch.full(shape, float("nan"), dtype=dtype) for _ in range(count)] for shape in shapes]


MATRIX: list[list[float | None]] = [[1.0, -0.5, 0.25], [None, 2.0, -1.5], [0.0, None, 1.0]]


class TestLinearMap:
    @pytest.mark.parametrize("strided", [False, True])
    def test_against_oracle(self, dtype: torch.dtype, shapes: list, strided: bool) -> None:
        inputs = list(map(list, zip(*(streams(shapes, dtype, strided) for _ in range(3)), strict=True)))
        outputs = like(shapes, dtype, 3)
        ops.linear_map(inputs, outputs, MATRIX, [1.0, 0.5, -3.0])
        for stream, written in zip(inputs, outputs, strict=True):
            for row, factor, y in zip(MATRIX, [1.0, 0.5, -3.0], written, strict=True):
                products = [factor * (c or 0.0) * exact(x) for c, x in zip(row, stream, strict=True)]
                assert_close(y, sum(products), sum(map(np.abs, products)))

    def test_a_matrix_on_the_device_gives_the_same_bits(self, dtype: torch.dtype, shapes: list) -> None:
        inputs = list(map(list, zip(*(streams(shapes, dtype, False) for _ in range(3)), strict=True)))
        matrix = [[1.3, -0.7, 0.1], [0.2, 2.0, -1.5]]
        host, device = like(shapes, dtype, 2), like(shapes, dtype, 2)
        ops.linear_map(inputs, host, matrix)
        ops.linear_map(inputs, device, torch.tensor(matrix))
        for stream, other in zip(host, device, strict=True):
            assert all(map(torch.equal, stream, other))

    def test_every_dtype_beside_every_other(self) -> None:
        x, v = torch.randn(2, 5, 24), torch.randn(2, 5, 24).bfloat16()
        for output in DTYPES:
            y = torch.empty(2, 5, 24, dtype=output)
            ops.linear_map([[x, v]], [[y]], [[1.0, -0.25]])
            assert torch.equal(y, (x + -0.25 * v.float()).to(output))

    def test_outputs_may_be_inputs(self, dtype: torch.dtype) -> None:
        a, b = (outlier_tensor((2, 5, 24), dtype) for _ in range(2))
        apart = like([(2, 5, 24)], dtype, 2)
        ops.linear_map([[a, b]], apart, [[0.5, 0.5], [1.0, -1.0]])
        ops.linear_map([[a, b]], [[b, a]], [[0.5, 0.5], [1.0, -1.0]])
        assert torch.equal(b, apart[0][0]) and torch.equal(a, apart[0][1])

    def test_outputs_may_be_slices(self) -> None:
        joined = torch.randn(2, 9, 24)
        text, image = joined.split([4, 5], dim=1)
        r = torch.randn(2, 5, 24)
        expected = torch.cat([text, image + 2 * r], dim=1)
        ops.linear_map([[image, r]], [[image]], [[1.0, 2.0]])
        assert torch.equal(joined, expected)

    def test_an_input_that_is_not_used_may_hold_anything(self) -> None:
        x, y = torch.randn(2, 8), torch.empty(2, 8)
        ops.linear_map([[x, torch.full((2, 8), torch.nan)]], [[y]], [[2.0, None]])
        assert torch.equal(y, 2 * x)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"matrix": [[1.0, 2.0]] * 2}, "matrix is a list of 2; expected 1 rows"),
            ({"matrix": [[1.0]]}, r"matrix\[0\] is 1 numbers; expected 2"),
            ({"matrix": [[1.0, float("nan")]]}, r"matrix\[0\] .* expected finite numbers"),
            ({"matrix": torch.ones(2, 1)}, "matrix is 2 x 1 numbers; expected 1 x 2"),
            ({"matrix": torch.ones(1, 2), "factors": [1.0]}, "factors is given with a matrix on the device"),
            ({"factors": [1.0, 2.0]}, "factors is 2 numbers; expected 1"),
            ({"inputs": []}, "inputs is a list of 0"),
            ({"inputs": [[torch.ones(2, 8)] * 10]}, r"inputs\[0\] is a list of 10; expected a list of 1 to 9"),
            ({"outputs": [[torch.ones(2, 9)]]}, r"outputs\[0\]\[0\] is of shape \(2, 9\); expected \(2, 8\)"),
            ({"outputs": [[torch.ones(2, 8).double()]]}, "float64 for all or for none"),
            ({"inputs": [[torch.ones(2, 8), None]]}, r"inputs\[0\]\[1\] is a NoneType"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], message: str) -> None:
        good: dict[str, Any] = {
            "inputs": [[torch.ones(2, 8), torch.ones(2, 8)]],
            "outputs": [[torch.empty(2, 8)]],
            "matrix": [[1.0, 1.0]],
        }
        ops.linear_map(**good)
        with pytest.raises(OpInputError, match=message):
            ops.linear_map(**{**good, **change})

    def test_overlapping_outputs_are_refused(self) -> None:
        memory = torch.randn(3, 8)
        for output in (memory[1:], memory[:2].flatten()[4:].view(1, 12)[:, :8]):
            x = memory[:2] if output.shape == (2, 8) else memory[:1]
            with pytest.raises(OpInputError, match=r"outputs\[0\] is in the same memory"):
                ops.linear_map([[x]], [[output]], [[2.0]])


def test_overlap_of_slices() -> None:
    """Never missed; never suspected of slices of one tensor along one dim."""
    random = np.random.default_rng(0)
    base = torch.arange(4 * 7 * 12).view(4, 7, 12)

    def piece() -> Tensor:
        slices = []
        for size in base.shape:
            first = int(random.integers(0, size - 1))
            slices.append(slice(first, int(random.integers(first + 1, size))))
        return base[tuple(slices)]

    for _ in range(1000):
        a, b = piece(), piece()
        if set(a.flatten().tolist()) & set(b.flatten().tolist()):
            assert checks.overlap(a, b)
    for cut in range(1, 7):
        assert not checks.overlap(base[:, :cut], base[:, cut:])
        assert not checks.overlap(base[..., cut:], base[..., :cut])
    assert not checks.overlap(base[:2], base[2:])


class TestCombinationForms:
    def test_gate(self, dtype: torch.dtype) -> None:
        shapes = [(2, 9, 40), (2, 5, 40)]
        bases, terms = streams(shapes, dtype, True), [streams(shapes, dtype, False) for _ in range(2)]
        gates = [torch.randn(2, 1, 40).to(dtype), torch.randn(2, 40).to(dtype)]
        found = ops.linear_combination(bases, list(map(list, zip(*terms, strict=True))), [0.5, 2.0], gates=gates)
        for s, y in enumerate(found):
            inner = 0.5 * exact(terms[0][s]) + 2.0 * exact(terms[1][s])
            gate = exact(gates[s]).reshape(2, 1, 40)
            size = np.abs(exact(bases[s])) + np.abs(gate) * (
                0.5 * np.abs(exact(terms[0][s])) + 2 * np.abs(exact(terms[1][s]))
            )
            assert_close(y, exact(bases[s]) + gate * inner, size)

    def test_results_may_be_the_bases(self, dtype: torch.dtype) -> None:
        joined = outlier_tensor((2, 14, 40), dtype)
        bases = list(joined.split([9, 5], dim=1))
        terms = [[outlier_tensor((2, 9, 40), dtype)], [outlier_tensor((2, 5, 40), dtype)]]
        expected = ops.linear_combination(bases, terms, [0.75])
        assert ops.linear_combination(bases, terms, [0.75], results=bases)[0] is bases[0]
        assert torch.equal(joined, torch.cat(expected, dim=1))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gates": [torch.ones(2, 8)]}, r"gates\[0\] is of shape \(2, 8\); expected \(2, 1, 16\) or \(2, 16\)"),
            ({"gates": [torch.ones(2, 3, 16)]}, r"gates\[0\] is of shape"),
            ({"gates": []}, "gates is a list of 0"),
            ({"gates": [torch.ones(2, 16, device="meta")]}, r"gates\[0\] is on meta"),
            ({"results": [torch.ones(2, 3, 16).half()]}, r"results\[0\] is torch.float16"),
            ({"results": [torch.ones(2, 4, 16)]}, r"results\[0\] is of shape"),
            ({"scales": [[torch.ones(6)]]}, r"residuals\[0\]\[0\] is torch.float32; expected torch.uint8"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], message: str) -> None:
        good = {"bases": [torch.ones(2, 3, 16)], "residuals": [[torch.ones(2, 3, 16)]], "coefficients": [1.0]}
        with pytest.raises(OpInputError, match=message):
            ops.linear_combination(**{**good, **change})

    def test_a_result_that_is_a_residual_is_refused(self) -> None:
        x, r = torch.ones(2, 3, 16), torch.ones(2, 3, 16)
        with pytest.raises(OpInputError, match=r"results\[0\] is in the same memory as one of residuals"):
            ops.linear_combination([x], [[r]], [1.0], results=[r])


class TestForecasts:
    def test_finite_difference(self, dtype: torch.dtype) -> None:
        newer, older = outlier_tensor((2, 9, 40), dtype), outlier_tensor((2, 9, 40), dtype)
        found = ops.finite_difference(newer, older, -12.5)
        assert_close(found, (exact(newer) - exact(older)) * -12.5, np.abs(exact(newer) - exact(older)) * 12.5)

    def test_capture_slope_in_place(self, dtype: torch.dtype) -> None:
        output, before, older = (outlier_tensor((2, 9, 40), dtype) for _ in range(3))
        residual = torch.empty_like(output)
        r = exact(output) - exact(before)
        slope, size = (r - exact(older)) * 4.0, (np.abs(r) + np.abs(exact(older))) * 4.0
        ops.capture_slope(output, before, older, residual, older, 4.0)
        assert torch.equal(residual, output - before)
        assert_close(older, slope, size)

    @pytest.mark.parametrize("order", [0, 1, 2, 4])
    def test_taylor_follows_the_recursion(self, order: int) -> None:
        """TaylorSeer's: every order from the difference of the one below, over the steps since the last update."""
        features = [torch.randn(2, 5, 24, dtype=torch.float64) for _ in range(7)]
        derivatives = [torch.zeros(2, 5, 24, dtype=torch.float64) for _ in range(order + 1)]
        expected = [np.zeros((2, 5, 24)) for _ in range(order + 1)]
        for feature, interval in zip(features, [1, 3, 2, 4, 1, 2, 3], strict=True):
            new = [exact(feature)]
            for q in range(order):
                new.append((new[q] - expected[q]) / interval)
            expected = new
            ops.taylor_update(feature, derivatives, [1 / interval] * order)
            for found, value in zip(derivatives, expected, strict=True):
                np.testing.assert_allclose(found.numpy(), value, rtol=1e-12, atol=1e-12)
        forecast = ops.taylor_forecast(derivatives, ops.taylor_coefficients(order, 2.0))
        factorials = [1, 1, 2, 6, 24]
        value = sum(f * 2.0**q / factorials[q] for q, f in enumerate(expected))
        np.testing.assert_allclose(forecast.numpy(), value, rtol=1e-12, atol=1e-12)

    def test_order_zero_copies(self, dtype: torch.dtype) -> None:
        feature, slot = outlier_tensor((2, 9, 40), dtype), torch.empty(2, 9, 40, dtype=dtype)
        ops.taylor_update(feature, [slot], [])
        assert torch.equal(slot, feature)
        assert torch.equal(ops.taylor_forecast([slot], ops.taylor_coefficients(0, 3.0)), feature)

    def test_newton_is_exact_for_a_parabola(self) -> None:
        start, slope, bend = (torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(3))

        def feature(t: float) -> Tensor:
            return start + slope * t + bend * t * t

        derivatives = [torch.zeros(2, 3, 8, dtype=torch.float64) for _ in range(3)]
        times = [0.0, 1.0, 3.0]
        for k, t in enumerate(times):
            # divided differences: order q is divided by the distance to the q-th older node
            distances = [t - times[k - q] if k >= q else 1.0 for q in (1, 2)]
            ops.taylor_update(feature(t), derivatives, [1 / d for d in distances])
        forecast = ops.taylor_forecast(derivatives, ops.newton_coefficients(2, 1.5, [2.0]))
        torch.testing.assert_close(forecast, feature(4.5), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("latent_dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_mean_velocity(self, latent_dtype: torch.dtype) -> None:
        """``v + (s-t)/(t-r) ((x_t - x_r)/(t-r) - v_r)`` and the Euler step with it (docs/methods.md, MeanCache)."""
        v, v_r = (torch.randn(2, 16, 24).bfloat16() for _ in range(2))
        x, x_r = (torch.randn(2, 16, 24).to(latent_dtype) for _ in range(2))
        t, r, s = 0.6, 0.7, 0.5
        weight = (s - t) / (t - r)
        jvp = (exact(x) - exact(x_r)) / (t - r) - exact(v_r)
        u = exact(v) + weight * jvp
        size = np.abs(exact(v)) + abs(weight / (t - r)) * (np.abs(exact(x)) + np.abs(exact(x_r))) + np.abs(exact(v_r))
        found, following = ops.mean_velocity(v, x, x_r, v_r, 1 / (t - r), weight, s - t)
        assert found.dtype == torch.bfloat16 and following.dtype == latent_dtype
        assert_close(found, u, size)
        assert_close(following, exact(x) + (s - t) * u, size)
        alone, nothing = ops.mean_velocity(v, x, x_r, v_r, 1 / (t - r), weight)
        assert torch.equal(alone, found) and nothing is None

    def test_accumulate_and_euler_step(self) -> None:
        total, r = torch.randn(2, 5, 24), torch.randn(2, 5, 24).bfloat16()
        expected = total + -0.125 * r.float()
        ops.accumulate(total, r, -0.125)
        assert torch.equal(total, expected)
        moved, for_model = ops.euler_step(total, r, -0.03125, torch.bfloat16)
        assert torch.equal(moved, total + -0.03125 * r.float()) and torch.equal(for_model, moved.bfloat16())

    def test_add_forecast(self) -> None:
        x, gate = torch.randn(2, 5, 24), torch.randn(2, 1, 24)
        derivatives = [torch.randn(2, 5, 24) for _ in range(2)]
        found = ops.add_forecast(x, derivatives, [1.0, 0.5], gate)
        torch.testing.assert_close(found, x + gate * (derivatives[0] + 0.5 * derivatives[1]))

    def test_wrong_number_of_steps(self) -> None:
        with pytest.raises(OpInputError, match="inverse_steps is 2 numbers; expected 1"):
            ops.taylor_update(torch.ones(2, 8), [torch.ones(2, 8)] * 2, [1.0, 1.0])


class TestPerSample:
    @pytest.mark.parametrize("strided", [False, True])
    def test_capture(self, dtype: torch.dtype, shapes: list, strided: bool) -> None:
        outputs, inputs = streams(shapes, dtype, strided), streams(shapes, dtype, strided)
        previous, residuals = streams(shapes, dtype, False), [t[0] for t in like(shapes, dtype, 1)]
        found = ops.capture(outputs, inputs, residuals, None, previous, per_sample=True)
        batch = shapes[0][0]
        assert found is not None and found.shape == (len(shapes) * batch, 7)
        for s, (residual, older) in enumerate(zip(residuals, previous, strict=True)):
            for b in range(batch):
                values, scales = pair_oracle(exact(residual[b]), exact(older[b]))
                order = [1, 4, 0, 3, 2, 5, 6]
                difference = np.abs(exact(found[s * batch + b]) - values[order])
                np.testing.assert_array_less(difference, 1e-5 * scales[order] + 1e-30)

    @pytest.mark.parametrize("per_sample", [False, True])
    def test_statistics_of_the_input(self, dtype: torch.dtype, shapes: list, per_sample: bool) -> None:
        outputs, inputs = streams(shapes, dtype, True), streams(shapes, dtype, True)
        residuals = [t[0] for t in like(shapes, dtype, 1)]
        found = ops.capture(outputs, inputs, residuals, statistics=True, per_sample=per_sample)
        parts = [
            (r, i)
            for residual, before in zip(residuals, inputs, strict=True)
            for r, i in (zip(residual, before, strict=True) if per_sample else [(residual, before)])
        ]
        assert found is not None and found.shape == (len(parts), 4)
        for row, (r, i) in zip(found, parts, strict=True):
            values = np.array(
                [np.abs(exact(r)).sum(), (exact(r) ** 2).sum(), np.abs(exact(i)).sum(), (exact(i) ** 2).sum()]
            )
            np.testing.assert_array_less(np.abs(exact(row) - values), 1e-5 * values + 1e-30)

    @pytest.mark.parametrize("strided", [False, True])
    def test_pairs(self, dtype: torch.dtype, shapes: list, strided: bool) -> None:
        a, b = streams(shapes, dtype, strided), streams(shapes, dtype, strided)
        found = ops.pair_statistics(a, b, per_sample=True)
        rows = [(x, y) for s in range(len(a)) for x, y in zip(a[s], b[s], strict=True)]
        for row, (x, y) in zip(found, rows, strict=True):
            values, scales = pair_oracle(exact(x), exact(y))
            np.testing.assert_array_less(np.abs(exact(row) - values), 1e-5 * scales + 1e-30)

    def test_segments_are_slices(self) -> None:
        a, b = torch.randn(2, 9, 48), torch.randn(2, 9, 48)
        parts = [slice(0, 16), slice(16, 48)]
        found = ops.pair_statistics([a[..., p] for p in parts], [b[..., p] for p in parts])
        whole = ops.pair_statistics([a], [b])
        torch.testing.assert_close(found[:, :7].sum(0), whole[0, :7])
        assert found[:, 7].max() == whole[0, 7]

    def test_streams_of_other_batches_are_refused(self) -> None:
        a = [torch.ones(2, 3, 8), torch.ones(3, 3, 8)]
        with pytest.raises(OpInputError, match=r"a\[1\] is of shape \(3, 3, 8\); expected samples first"):
            ops.pair_statistics(a, a, per_sample=True)


class TestGramAndAlign:
    @pytest.mark.parametrize("count", [1, 4, 11])
    def test_gram(self, dtype: torch.dtype, count: int) -> None:
        tensors = [outlier_tensor((2, 33, 72), dtype) for _ in range(count)]
        found = ops.gram(tensors)
        flat = np.stack([exact(t).ravel() for t in tensors])
        scale = np.abs(flat) @ np.abs(flat).T
        assert found.shape == (count, count) and torch.equal(found, found.T)
        np.testing.assert_array_less(np.abs(exact(found) - flat @ flat.T), 1e-5 * scale)
        assert torch.equal(found, ops.gram(tensors))

    def test_gram_of_nothing(self) -> None:
        assert ops.gram([torch.empty(0, 8)] * 2).tolist() == [[0.0, 0.0], [0.0, 0.0]]

    @pytest.mark.parametrize("size", [0.5, 1.2, 9.0])
    def test_align(self, dtype: torch.dtype, size: float) -> None:
        """The clipped ratio of DiCache, below, inside and above its bounds."""
        x, p_a, p_b, r_a, r_b, noise = (outlier_tensor((2, 33, 72), dtype) for _ in range(6))
        y = (x.float() + p_b.float() + size * (p_a.float() - p_b.float())).to(dtype)
        numerator = np.abs(exact(y) - exact(x) - exact(p_b)).sum()
        gamma = np.clip(numerator / np.abs(exact(p_a) - exact(p_b)).sum(), 1, 1.5)
        expected = exact(x) + exact(r_b) + gamma * (exact(r_a) - exact(r_b))
        sizes = np.abs(exact(x)) + 0.5 * np.abs(exact(r_b)) + 1.5 * np.abs(exact(r_a))
        found = ops.align(x, y, [p_a, p_b], [r_a, r_b])
        # the ratio of two sums is good to 1e-5
        allowed = np.abs(exact(r_a) - exact(r_b)) * 2e-5
        difference = np.abs(exact(found) - expected)
        rounding = np.abs(expected) * torch.finfo(dtype).eps + sizes * 2.0**-21
        assert (difference <= rounding + allowed).all()

    def test_align_of_equal_probes_reuses_the_newest(self) -> None:
        x, p, r_a, r_b = (torch.randn(1, 5, 8) for _ in range(4))
        assert torch.equal(ops.align(x, x, [p, p], [r_a, r_b]), x + r_a)

    def test_bad_input(self) -> None:
        x = torch.ones(1, 2, 8)
        with pytest.raises(OpInputError, match="probes is a list of 1; expected a list of 2"):
            ops.align(x, x, [x], [x, x])
        with pytest.raises(OpInputError, match=r"tensors\[1\] is of shape"):
            ops.gram([x, x[:, :1]])


class TestCompactStorage:
    def new(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return torch.full(shape, 255, dtype=torch.uint8), torch.full(shape[:-1], float("nan"))

    @pytest.mark.parametrize("strided", [False, True])
    def test_error_is_bounded(self, dtype: torch.dtype, shapes: list, strided: bool) -> None:
        outputs, inputs = streams(shapes, dtype, strided), streams(shapes, dtype, strided)
        codes, scales = map(list, zip(*map(self.new, shapes), strict=True))
        flag = torch.zeros(1, dtype=torch.int32)
        ops.capture_compact(outputs, inputs, codes, scales, flag)
        zeros = [torch.zeros(shape) for shape in shapes]
        found = ops.linear_combination(zeros, [[c] for c in codes], [1.0], scales=[[s] for s in scales])
        for output, before, decoded, scale in zip(outputs, inputs, found, scales, strict=True):
            r = exact(output) - exact(before)
            bound = np.maximum(np.abs(r) / 16, exact(scale)[..., None] / 1024) * (1 + 1e-6)
            assert (np.abs(exact(decoded) - r) <= bound).all()
        assert flag.item() == 0

    def test_scale_is_the_least_power_of_two(self) -> None:
        rows = torch.tensor([[448.0, 1.0], [448.1, 1.0], [1e-3, 0.0], [0.0, 0.0], [-1000.0, 3.0]])
        codes, scales = self.new((5, 2))
        ops.capture_compact([rows], [torch.zeros(5, 2)], [codes], [scales])
        assert scales.tolist()[:3] == [1.0, 2.0, 2.0**-18] and scales.tolist()[4] == 4.0
        assert codes[3].tolist() == [0, 0]

    def test_codes_are_those_of_torch(self) -> None:
        """At scale 1 every number rounds as torch rounds it to float8_e4m3fn."""
        values = torch.cat([torch.linspace(-448, 448, 4001), torch.linspace(-0.04, 0.04, 4000), torch.tensor([448.0])])
        codes, scales = self.new((1, len(values)))
        ops.capture_compact([values[None]], [torch.zeros(1, len(values))], [codes], [scales])
        assert scales.item() == 1.0
        assert torch.equal(codes[0].view(torch.float8_e4m3fn).float(), values.to(torch.float8_e4m3fn).float())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_flag(self, bad: float) -> None:
        output, (codes, scales) = torch.randn(2, 3, 16), self.new((2, 3, 16))
        output[1, 2, 3] = bad
        flag = torch.zeros(1, dtype=torch.int32)
        ops.capture_compact([output], [torch.zeros(2, 3, 16)], [codes], [scales], flag)
        assert flag.item() == 1

    def test_several_terms_on_bf16_bases(self) -> None:
        base, before = torch.randn(2, 5, 32).bfloat16(), torch.zeros(2, 5, 32).bfloat16()
        terms = [torch.randn(2, 5, 32).bfloat16() for _ in range(2)]
        stored = [self.new((2, 5, 32)) for _ in terms]
        for term, (codes, scales) in zip(terms, stored, strict=True):
            ops.capture_compact([term], [before], [codes], [scales])
        (found,) = ops.linear_combination(
            [base], [[c for c, _ in stored]], [1.5, -0.5], scales=[[s for _, s in stored]]
        )
        decoded = [c.view(torch.float8_e4m3fn).double() * s.double()[..., None] for c, s in stored]
        expected = exact(base) + 1.5 * decoded[0].numpy() - 0.5 * decoded[1].numpy()
        assert_close(found, expected, np.abs(exact(base)) + 1.5 * np.abs(decoded[0].numpy()))

    def test_taylor_of_stored_codes(self) -> None:
        """Any input of a linear map may be codes."""
        tensors = [torch.randn(2, 5, 32).bfloat16() for _ in range(3)]
        codes, scales = self.new((2, 5, 32))
        ops.capture_compact([tensors[1]], [torch.zeros_like(tensors[1])], [codes], [scales])
        found, other = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
        inputs = [[tensors[0], codes, tensors[2]]]
        matrix = [[1.0, 2.0, None], [None, 0.5, -1.0]]
        ops.linear_map(inputs, [[found, other]], matrix, [1.0, 4.0], [[None, scales, None]])
        decoded = codes.view(torch.float8_e4m3fn).float() * scales[..., None]
        assert torch.equal(found, (tensors[0].float() + 2.0 * decoded).bfloat16())
        assert torch.equal(other, ((0.5 * decoded - tensors[2].float()) * 4.0).bfloat16())
        with pytest.raises(OpInputError, match=r"inputs\[0\]\[1\] is torch.uint8"):
            ops.linear_map(inputs, [[found, other]], matrix)
        with pytest.raises(OpInputError, match=r"scales\[0\] is a list of 2; expected 3 entries"):
            ops.linear_map(inputs, [[found, other]], matrix, None, [[None, scales]])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda g: {"codes": [torch.ones(2, 3, 16)]}, r"codes\[0\] is torch.float32; expected torch.uint8"),
            (lambda g: {"scales": [torch.ones(5)]}, r"scales\[0\] is 5 numbers; expected 6, one per row"),
            (lambda g: {"scales": [torch.ones(6).half()]}, r"scales\[0\] is torch.float16"),
            (
                lambda g: {"outputs": [torch.ones(2, 3, 16).double()], "inputs": [torch.ones(2, 3, 16).double()]},
                "float64",
            ),
        ],
    )
    def test_bad_input(self, change: Callable, message: str) -> None:
        codes, scales = self.new((2, 3, 16))
        good = {
            "outputs": [torch.ones(2, 3, 16)],
            "inputs": [torch.ones(2, 3, 16)],
            "codes": [codes],
            "scales": [scales],
        }
        ops.capture_compact(**good)
        with pytest.raises(OpInputError, match=message):
            ops.capture_compact(**{**good, **change(good)})
