"""Router lerp and its gradient, modulation, guidance, row statistics, decisions: values, bits, bad input, tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from layercache.kernels import decisions
from torch import Tensor

from layercache import ops
from layercache.errors import OpInputError
from layercache.ops import native
from support.marks import slow
from support.tensors import DTYPES, assert_close, exact, outlier_tensor, pair_oracle

SHAPES = [(2, 9, 40), (1, 7, 63), (3, 33, 72), (2, 5, 3072), (1, 1, 8)]


# Every shape in every dtype, dense and strided in turn: each pair of two of the three occurs.
CASES = [(shape, dtype, (a + b) % 2 == 1) for a, shape in enumerate(SHAPES) for b, dtype in enumerate(DTYPES)]


def case_id(case: tuple[tuple[int, int, int], torch.dtype, bool]) -> str:
    shape, dtype, strided = case
    return f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}{'-strided' * strided}"


@pytest.fixture(params=CASES, ids=case_id)
def case(request: pytest.FixtureRequest) -> tuple[tuple[int, int, int], torch.dtype, bool]:
    return request.param


@pytest.fixture
def shape(case: tuple) -> tuple[int, int, int]:
    return case[0]


@pytest.fixture
def dtype(case: tuple) -> torch.dtype:
    return case[1]


@pytest.fixture
def make(case: tuple) -> Callable[[], Tensor]:
    """New tensors of the case, on their own or as the last rows of a longer one."""
    (batch, rows, channels), dtype, strided = case
    extra = 3 if strided else 0
    return lambda: outlier_tensor((batch, rows + extra, channels), dtype)[:, extra:]


class TestRouterLerp:
    def test_against_oracle(self, make: Callable, shape: tuple, dtype: torch.dtype) -> None:
        """With one weight for all samples, at the ends and between, and with one for each."""
        for weight in (torch.rand(shape[0]), *torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0]).split(1)):
            f, c, x = make(), make(), make()
            gate = torch.randn(shape[0], 1, shape[2]).to(dtype)
            b = exact(weight).reshape(-1, 1, 1)
            o = b * exact(f) + (1 - b) * exact(c)
            size = np.abs(exact(f)) + np.abs(exact(c))
            assert_close(ops.router_lerp(f, c, weight), o, size)
            gated = exact(x) + exact(gate) * o
            found = ops.router_lerp(f, c, weight, gate, x)
            assert found.is_contiguous() and found.dtype == dtype
            assert_close(found, gated, np.abs(exact(x)) + np.abs(exact(gate)) * size)

    def test_ends_are_exact(self, make: Callable) -> None:
        f, c = make(), make()
        assert torch.equal(ops.router_lerp(f, c, torch.zeros(1)), c)
        assert torch.equal(ops.router_lerp(f, c, torch.ones(1)), f)

    @pytest.mark.parametrize(("gated", "per_sample"), [(False, True), (True, False), (True, True)])
    def test_backward_against_oracle(
        self, make: Callable, shape: tuple, dtype: torch.dtype, gated: bool, per_sample: bool
    ) -> None:
        f, c, x = make().detach().requires_grad_(), make(), make().detach().requires_grad_()
        beta = torch.rand(shape[0] if per_sample else 1, requires_grad=True)
        gate = torch.randn(shape[0], shape[2]).to(dtype) if gated else None
        grad = make()
        ops.router_lerp(f, c, beta, gate, x).backward(grad)
        inner = exact(grad) * (exact(gate)[:, None] if gate is not None else 1.0)
        assert_close(f.grad, exact(beta.detach()).reshape(-1, 1, 1) * inner, np.abs(inner))
        assert torch.equal(x.grad, grad)
        products = inner * (exact(f.detach()) - exact(c))
        axes = (1, 2) if per_sample else (0, 1, 2)
        scale = np.abs(inner) * (np.abs(exact(f.detach())) + np.abs(exact(c)))
        assert beta.grad is not None and beta.grad.shape == beta.shape
        difference = np.abs(exact(beta.grad) - products.sum(axes))
        np.testing.assert_array_less(difference, 1e-5 * scale.sum(axes) + 1e-30)

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("batched", [False, True])
    def test_gradcheck(self, gated: bool, batched: bool) -> None:
        def double(*size: int) -> Tensor:
            return torch.randn(size, dtype=torch.float64)

        joined = double(2, 8, 7)
        f, c, x = joined[:, 3:].detach().requires_grad_(), double(2, 5, 7), double(2, 5, 7).requires_grad_()
        beta = (torch.rand(2 if batched else 1, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
        gate = double(2, 1, 7) if gated else None
        assert torch.autograd.gradcheck(lambda f, b, x: ops.router_lerp(f, c, b, gate, x), (f, beta, x))

    def test_gradients_under_compile(self) -> None:
        torch._dynamo.reset()
        f, c, x = (torch.randn(2, 5, 16) for _ in range(3))
        gate, grads = torch.randn(2, 1, 16), []
        for run in (ops.router_lerp, torch.compile(ops.router_lerp, fullgraph=True, backend="aot_eager")):
            inputs = [f.clone().requires_grad_(), torch.tensor([0.3], requires_grad=True), x.clone().requires_grad_()]
            run(inputs[0], c, inputs[1], gate, inputs[2]).square().sum().backward()
            grads.append([t.grad for t in inputs])
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)

    def test_expanded_gradient(self) -> None:
        f = torch.randn(2, 5, 16, requires_grad=True)
        ops.router_lerp(f, torch.zeros(2, 5, 16), torch.tensor([0.25])).sum().backward()
        assert torch.equal(f.grad, torch.full((2, 5, 16), 0.25))

    def test_empty(self) -> None:
        f = torch.empty(2, 0, 16, requires_grad=True)
        beta = torch.tensor([0.5], requires_grad=True)
        ops.router_lerp(f, torch.empty(2, 0, 16), beta).sum().backward()
        assert beta.grad.item() == 0.0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"fresh": torch.ones(6, 8)}, r"fresh is of shape \(6, 8\); expected \[batch, rows, channels\]"),
            ({"cached": torch.ones(2, 4, 8)}, r"cached\[0\] is of shape"),
            ({"beta": 0.5}, "beta is a float; expected a torch.float32 tensor"),
            ({"beta": torch.ones(3)}, r"beta is of shape \(3,\); expected one number, or 2"),
            ({"beta": torch.ones(1).double()}, "beta is torch.float64"),
            ({"gate": torch.ones(2, 3, 8)}, "gate is of shape"),
            ({"residual": torch.ones(2, 3, 8).half()}, "residual.* is torch.float16"),
            ({"cached": torch.ones(2, 3, 8, requires_grad=True)}, "cached requires grad"),
            ({"gate": torch.ones(2, 8, requires_grad=True)}, "gate requires grad"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], message: str) -> None:
        good = {"fresh": torch.ones(2, 3, 8), "cached": torch.ones(2, 3, 8), "beta": torch.ones(1)}
        ops.router_lerp(**good)
        with pytest.raises(OpInputError, match=message):
            ops.router_lerp(**{**good, **change})


def layer_norm(y: np.ndarray, eps: float) -> np.ndarray:
    return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps)


class TestModulate:
    def close(self, found: Tensor, expected: np.ndarray, size: np.ndarray) -> None:
        """To the rounding of the storage dtype; the normalised numbers are good to 1e-5."""
        allowed = np.abs(expected) * torch.finfo(found.dtype).eps + 1e-5 * size + 1e-30
        assert (np.abs(exact(found) - expected) <= allowed).all()

    @pytest.mark.parametrize("terms", [0, 2])
    def test_against_oracle(self, make: Callable, shape: tuple, dtype: torch.dtype, terms: int) -> None:
        x, residuals = make(), [outlier_tensor(shape, dtype) for _ in range(terms)]
        scale, shift = torch.randn(shape[0], shape[2]).to(dtype), torch.randn(shape[0], 1, shape[2]).to(dtype)
        coefficients = [1.5, -0.5][:terms]
        stream = torch.empty(shape, dtype=dtype)
        z, statistics = ops.modulate(
            x, scale, shift, residuals=residuals, coefficients=coefficients, stream=stream, eps=1e-5
        )
        y = exact(x) + sum(c * exact(r) for c, r in zip(coefficients, residuals, strict=True))
        normal = layer_norm(y, 1e-5)
        expected = normal * (1 + exact(scale)[:, None]) + exact(shift)
        size = (1 + np.abs(normal)) * (1 + np.abs(exact(scale)[:, None])) + np.abs(exact(shift))
        assert statistics is None and z.dtype == dtype
        # a row of one channel, or of outliers that cancel, leaves only rounding to normalise
        self.close(
            z, expected, size * (1 + np.abs(y).max(-1, keepdims=True) / np.sqrt(y.var(-1, keepdims=True) + 1e-5))
        )
        (known,) = ops.linear_combination([x], [residuals], coefficients) if terms else [x]
        assert torch.equal(stream, known)

    @pytest.mark.parametrize("segments", [(), (8,), (3, 5, 6)], ids=str)
    def test_statistics(self, make: Callable, shape: tuple, dtype: torch.dtype, segments: tuple) -> None:
        x, previous = make(), outlier_tensor(shape, dtype)
        if segments and segments[-1] >= shape[2]:
            pytest.skip("the segments do not fit")
        scale, shift = torch.randn(1, shape[2]).to(dtype), torch.randn(1, shape[2]).to(dtype)
        z, found = ops.modulate(x, scale, shift, previous=previous, segments=segments)
        bounds = [0, *segments, shape[2]]
        assert found is not None and found.shape == (len(bounds) - 1, 8)
        for row, lo, hi in zip(found, bounds, bounds[1:], strict=False):
            values, scales = pair_oracle(exact(z)[..., lo:hi], exact(previous)[..., lo:hi])
            np.testing.assert_array_less(np.abs(exact(row) - values), 1e-5 * scales + 1e-30)
        again = previous.clone()
        in_place, same = ops.modulate(x, scale, shift, previous=again, segments=segments, result=again)
        assert in_place is again and torch.equal(again, z) and torch.equal(found, same)

    def test_affine(self) -> None:
        x, weight, bias = torch.randn(2, 5, 24), torch.randn(24), torch.randn(24)
        zero = torch.zeros(2, 24)
        z, _ = ops.modulate(x, zero, zero, weight=weight, bias=bias)
        torch.testing.assert_close(z, torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-6))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_codes(self, dtype: torch.dtype) -> None:
        x, v, r = outlier_tensor((2, 5, 32), dtype), torch.randn(2, 32).to(dtype), torch.randn(2, 5, 32).to(dtype)
        codes, scales = torch.empty(2, 5, 32, dtype=torch.uint8), torch.empty(2, 5)
        ops.capture_compact([r], [torch.zeros_like(r)], [codes], [scales])
        decoded = (codes.view(torch.float8_e4m3fn).float() * scales[..., None]).to(dtype)
        found, _ = ops.modulate(x, v, v, residuals=[codes], coefficients=[0.5], scales=[scales])
        # decoded numbers have few bits, so that they are exact in every dtype
        assert torch.equal(found, ops.modulate(x, v, v, residuals=[decoded], coefficients=[0.5])[0])
        with pytest.raises(OpInputError, match=r"scales\[0\] is 5 numbers; expected 10"):
            ops.modulate(x, v, v, residuals=[codes], coefficients=[0.5], scales=[scales[:1]])

    def test_coefficients_on_the_device(self) -> None:
        x, r, v = torch.randn(2, 5, 24), [torch.randn(2, 5, 24)], torch.randn(2, 24)
        host, _ = ops.modulate(x, v, v, residuals=r, coefficients=[0.5])
        assert torch.equal(host, ops.modulate(x, v, v, residuals=r, coefficients=torch.tensor([0.5]))[0])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scale": torch.ones(3, 16)}, r"scale is of shape \(3, 16\)"),
            ({"shift": torch.ones(2, 16).half()}, "shift is torch.float16"),
            ({"residuals": [torch.ones(2, 3, 16)]}, "coefficients is 0 numbers; expected 1"),
            ({"previous": torch.ones(2, 4, 16)}, r"previous\[0\] is of shape"),
            ({"segments": [16]}, r"segments is \[16\]"),
            ({"segments": [8, 4]}, r"segments is \[8, 4\]"),
            ({"segments": [1, 2, 3, 4]}, "segments is"),
            ({"eps": 0.0}, "eps is 0.0"),
            ({"weight": torch.ones(8)}, "weight is torch.float32 of shape"),
            ({"x": torch.ones(1, 1, 20000)}, "x is 20000 channels wide"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], message: str) -> None:
        good = {"x": torch.randn(2, 3, 16), "scale": torch.ones(2, 16), "shift": torch.ones(2, 16)}
        ops.modulate(**good)
        with pytest.raises(OpInputError, match=message):
            ops.modulate(**{**good, **change})

    def test_a_result_that_is_the_input_is_refused(self) -> None:
        x, v = torch.randn(2, 3, 16), torch.ones(2, 16)
        with pytest.raises(OpInputError, match="in the same memory as one of x"):
            ops.modulate(x, v, v, result=x)


class TestGuidance:
    @pytest.mark.parametrize("rescale", [False, True])
    def test_against_oracle(self, make: Callable, dtype: torch.dtype, rescale: bool) -> None:
        cond, uncond = make(), make()
        v = exact(uncond) + 4.0 * (exact(cond) - exact(uncond))
        size = 5 * np.abs(exact(uncond)) + 4 * np.abs(exact(cond))
        factor = 1.0
        if rescale:
            norms = [np.linalg.norm(t, axis=-1, keepdims=True) for t in (exact(cond), v)]
            factor = norms[0] / norms[1]
        found = ops.combine_guidance(cond, uncond, 4.0, rescale)
        assert found.is_contiguous()
        assert_close(found, v * factor, (size + 8 * np.abs(v)) * factor)

    def test_is_qwen_images(self) -> None:
        """As QwenImagePipeline spells it."""
        cond, uncond = torch.randn(2, 9, 64), torch.randn(2, 9, 64)
        comb = uncond + 4.0 * (cond - uncond)
        expected = comb * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(comb, dim=-1, keepdim=True))
        torch.testing.assert_close(ops.combine_guidance(cond, uncond, 4.0, True), expected)

    def test_a_row_of_zeros_stays_one(self) -> None:
        zero = torch.zeros(1, 2, 8)
        assert torch.equal(ops.combine_guidance(zero, zero, 4.0, True), zero)

    def test_bad_input(self) -> None:
        x = torch.ones(1, 2, 8)
        for arguments, message in (
            ((x, x[:, :1], 1.0), "uncond.* is of shape"),
            ((x, x, float("nan")), "scale is .* expected finite"),
            ((torch.ones(8), torch.ones(8), 1.0), "cond is of shape"),
        ):
            with pytest.raises(OpInputError, match=message):
                ops.combine_guidance(*arguments)


class TestRowStatistics:
    @pytest.mark.parametrize("per_sample", [False, True])
    def test_against_oracle(self, make: Callable, shape: tuple, per_sample: bool) -> None:
        a, b = make(), make()
        x, y = exact(a), exact(b)
        norms = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
        ratio, angle = norms[0] / norms[1], 1 - (x * y).sum(-1) / (norms[0] * norms[1])
        if not per_sample:
            ratio, angle = ratio.reshape(1, -1), angle.reshape(1, -1)
        found = exact(ops.row_statistics(a, b, per_sample))
        assert found.shape == (len(ratio), 3)
        np.testing.assert_allclose(found[:, 0], ratio.mean(1), rtol=1e-5)
        np.testing.assert_allclose(found[:, 2], angle.mean(1), rtol=1e-5, atol=1e-6)
        if ratio.shape[1] > 1:
            np.testing.assert_allclose(found[:, 1], ratio.std(1, ddof=1), rtol=1e-4, atol=1e-6)
        else:
            assert np.isnan(found[:, 1]).all()

    def test_bad_input(self) -> None:
        x = torch.ones(2, 0, 8)
        with pytest.raises(OpInputError, match="a is of shape .* expected a tensor that is not empty"):
            ops.row_statistics(x, x)
        with pytest.raises(OpInputError, match="a is of shape"):
            ops.row_statistics(torch.ones(2, 8), torch.ones(2, 8), per_sample=True)


class TestDecide:
    def test_teacaches_rule(self) -> None:
        """Accumulates the polynomial of the relative change until the threshold, then starts again."""
        polynomial, threshold = [2.0, -1.0, 0.1], 0.3
        accumulated, flag = torch.zeros(1), torch.full((1,), 7, dtype=torch.int32)
        total = 0.0
        for change in (0.1, 0.02, 0.3, 0.05, 0.6, 0.01):
            total += float(np.polyval(polynomial, change))
            reuse = total < threshold
            total = total if reuse else 0.0
            ops.decide(torch.tensor(2 * change), torch.tensor([2.0]), accumulated, flag, polynomial, threshold)
            assert flag.item() == int(reuse)
            assert accumulated.item() == pytest.approx(total, abs=1e-6)

    @pytest.mark.skipif(native._cpu is None, reason="the extension is not built")
    @pytest.mark.parametrize("terms", [1, 2, 5, 8])
    def test_the_compiled_path_gives_the_references_bits(self, terms: int) -> None:
        for _ in range(200):
            up, down, total = torch.rand(3).split(1)
            arguments = up, down, torch.randn(terms).tolist(), float(torch.rand(()))
            found = []
            for run in (native.decide, decisions.decide_reference):
                accumulated, flag = total.clone(), torch.full((1,), 7, dtype=torch.int32)
                run(*arguments[:2], accumulated, flag, *arguments[2:])
                found.append((accumulated, flag))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    @pytest.mark.parametrize(("up", "down"), [(float("nan"), 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, float("nan"))])
    def test_bad_numbers_never_look_small(self, up: float, down: float) -> None:
        accumulated, flag = torch.zeros(1), torch.ones(1, dtype=torch.int32)
        ops.decide(torch.tensor(up), torch.tensor(down), accumulated, flag, [1.0, 0.0], 0.5)
        assert flag.item() == 0 and accumulated.item() == 0.0

    def test_bad_input(self) -> None:
        good = [torch.ones(1), torch.ones(1), torch.zeros(1), torch.zeros(1, dtype=torch.int32), [1.0], 0.5]
        for at, bad, message in (
            (0, torch.ones(2), "numerator is torch.float32 of shape"),
            (3, torch.zeros(1), "flag is torch.float32"),
            (4, [], "polynomial is 0 numbers"),
            (4, [float("inf")], "polynomial is .* finite"),
            (5, float("nan"), "threshold is .* finite"),
        ):
            with pytest.raises(OpInputError, match=message):
                ops.decide(*[*good[:at], bad, *good[at + 1 :]])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32, torch.float16)], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, v, beta = torch.randn(2, 3, 16).to(dtype), torch.randn(2, 16).to(dtype), torch.tensor([0.3])
    ours = torch.ops.layercache
    fresh = x.clone().requires_grad_()
    torch.library.opcheck(ours.router_lerp.default, (fresh, x, beta.clone().requires_grad_(), v, x))
    torch.library.opcheck(ours.router_lerp_backward.default, (x, x, x, beta, v))
    previous = x.clone()
    arguments = (x.clone(), None, x, v, v, [x], [0.5], None, previous, [8], 1e-6, None, None, [])
    torch.library.opcheck(ours.modulate.default, arguments)
    torch.library.opcheck(ours.combine_guidance.default, (x, x + 1, 4.0, True))
    torch.library.opcheck(ours.row_statistics.default, (x, x + 1, True))
    flag = torch.zeros(1, dtype=torch.int32)
    torch.library.opcheck(ours.decide.default, (beta, beta + 1, torch.zeros(1), flag, [1.0], 0.5))
