"""The compiled CPU path: every bit pattern, every instruction set, any number of threads, and life without it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from layercache.kernels import combine, statistics
from torch import Tensor

from layercache import ops
from layercache.errors import OpInputError
from layercache.ops import native
from layercache.tools.bench.case import Case, Inputs
from support.op_cases import LAYOUTS, OP_CASES, UNMEASURED, assert_alike, by, copied, inputs_of, results_of
from support.tensors import DTYPES, outlier_tensor

pytestmark = pytest.mark.skipif(native._cpu is None, reason="the extension is not built")

SETS = ["base", "avx2", "avx512"]
BEST = native._cpu.instruction_set() if native._cpu is not None else ""
LARGE = (1, 400, 700)  # more than a chunk, more than one thread's worth, and no multiple of a vector


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that the processor has."""
    assert native._cpu is not None
    if not native._cpu.use_instruction_set(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native._cpu.use_instruction_set(BEST)


def agreements() -> list[Any]:
    """Instruction set, case, dtype, layout, streamed: all of them on the best set of this processor for cases that
    take every argument, each dtype in one layout for the others; on other sets dense ones.

    Every 16-bit number is read and written on each set by `TestConversions`.
    """
    full = [(BEST, dtype, layout, False) for dtype in DTYPES for layout in LAYOUTS]
    pairs = [(BEST, dtype, layout, True) for dtype, layout in zip(DTYPES, LAYOUTS, strict=True)]
    sets = SETS[: SETS.index(BEST)] if BEST in SETS else []
    others = [(name, dtype, "dense", name == "base") for name in sets for dtype in DTYPES[:2]]
    found = []
    for case in OP_CASES:
        for name, dtype, layout, streamed in pairs + others + (full if case in UNMEASURED else []):
            label = "-".join([case.name, name, str(dtype), layout, "streamed" * streamed]).rstrip("-")
            found.append(pytest.param(name, case, dtype, layout, streamed, id=label))
    return found


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same_numbers(found: Tensor, expected: Tensor) -> bool:
    """Equal bits, where any NaN equals any other."""
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


class TestTensors:
    def test_a_torch_without_the_exchange_interface_is_asked_instead(self) -> None:
        tensors = [torch.randn(2, 5, 16).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        tensors += [torch.randn(3, 7, 32)[:, 1:5], torch.randn(6, 24)[::2], torch.randn(9), torch.randn(2, 3, 4, 8)]
        found = [native.pair_statistics([t], [t.clone() + 1]) for t in tensors]
        native._cpu.know_torch(native._DTYPES, object, ValueError)
        try:
            asked = [native.pair_statistics([t], [t.clone() + 1]) for t in tensors]
            with pytest.raises(TypeError):
                native._cpu.gram([torch.ones(3, dtype=torch.int32)], 1, torch.empty(1, 1))
        finally:
            native._cpu.know_torch(native._DTYPES, Tensor, OpInputError)
        assert all(torch.equal(a, b) for a, b in zip(found, asked, strict=True))

    def test_what_is_no_tensor_of_numbers_is_refused(self) -> None:
        for wrong in ("no tensor", None, torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.float64)):
            with pytest.raises(TypeError):
                native._cpu.gram([wrong], 1, torch.empty(1, 1))

    def test_statistics_are_fp32_on_the_cpu_whatever_the_defaults(self) -> None:
        a, b = torch.randn(1, 8, 16), torch.randn(1, 8, 16)
        expected = ops.pair_statistics([a], [b])
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        try:
            found = ops.pair_statistics([a], [b]), ops.row_statistics(a, b)
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)
        assert torch.equal(found[0], expected)
        assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in found)


class TestConversions:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_every_16_bit_number_is_read_and_written_back(self, instruction_set: str, dtype: torch.dtype) -> None:
        x = every_pattern(dtype).view(1, 256, 256)
        wide, back = torch.empty(1, 256, 256), torch.empty_like(x)
        native.linear_map([[x]], [[wide]], [[1.0]])
        assert same_numbers(wide, x.float())
        native.linear_map([[wide]], [[back]], [[1.0]])
        assert same_numbers(back, x)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_rounding(self, instruction_set: str, dtype: torch.dtype) -> None:
        """Ties, neighbours of ties, overflow, subnormal numbers and random ones, as torch rounds them."""
        exact = every_pattern(dtype).float()
        exact = exact[exact.isfinite()].unique()
        ties = (exact[1:].double() + exact[:-1].double()) / 2
        near = torch.stack([ties, ties * (1 + 2**-20), ties * (1 - 2**-20)]).float().flatten()
        bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).to(torch.int32)
        edges = torch.tensor([65504.0, 65519.9, 65520.0, 3.4e38, torch.inf, -torch.inf, torch.nan, 1e-45, -0.0])
        values = torch.cat([exact, near, bits.view(torch.float32), edges])[None]
        found = torch.empty(values.shape, dtype=dtype)
        native.linear_map([[values]], [[found]], [[1.0]])
        assert same_numbers(found, values.to(dtype))

    def test_every_code(self, instruction_set: str) -> None:
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)[(torch.arange(256) & 127) != 127][None]
        (found,) = native.linear_combination([torch.zeros(1, 254)], [[codes]], [1.0], scales=[[torch.ones(1)]])
        assert torch.equal(found, codes.view(torch.float8_e4m3fn).float())


@pytest.fixture(params=[False, True], ids=["cached", "streamed"])
def streamed(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether results are written past the caches, as large ones are."""
    before = native._cpu.stream_from(1 if request.param else 2**62)
    yield request.param
    native._cpu.stream_from(before)


@pytest.mark.parametrize(
    ("instruction_set", "case", "dtype", "layout", "streamed"), agreements(), indirect=["instruction_set", "streamed"]
)
def test_agrees_with_the_reference(
    instruction_set: str, case: Case, dtype: torch.dtype, layout: str, streamed: bool
) -> None:
    inputs = inputs_of(case, (2, 37, 211), dtype, layout)
    with by("reference"):
        expected = results_of(case, copied(inputs))
    assert_alike(case, results_of(case, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_together_are_what_each_is_alone(instruction_set: str, dtype: torch.dtype, streamed: bool) -> None:
    """Pairs that share their inputs, copies, outputs in the place of inputs; bad numbers stay where they are."""
    rng = random.Random(0)
    for _ in range(60):
        inputs = [outlier_tensor((1, 3, 1100), dtype) for _ in range(rng.randint(1, 6))]
        for tensor in inputs:
            tensor.view(-1)[rng.randrange(tensor.numel())] = float("nan")
        shared = rng.sample(range(len(inputs)), rng.randint(1, len(inputs)))
        matrix, factors = [], []
        for _ in range(rng.randint(2, 4)):
            used = sorted(shared[: max(1, len(shared) - rng.randint(0, 2))])
            matrix.append([rng.choice([1.0, -1.0, 0.3]) if k in used else None for k in range(len(inputs))])
            factors.append(rng.choice([1.0, 1 / 3]))
        expected = [torch.empty_like(inputs[0]) for _ in matrix]
        for row, factor, alone in zip(matrix, factors, expected, strict=True):
            combine.linear_map_reference([inputs], [[alone]], [row], [factor])
        places = [*rng.sample(inputs, rng.randint(0, len(inputs))), *(torch.empty_like(inputs[0]) for _ in matrix)]
        native.linear_map([inputs], [places[: len(matrix)]], matrix, factors)
        for found, wanted in zip(places, expected, strict=False):
            assert same_numbers(found, wanted)


@pytest.fixture(scope="module")
def large() -> list[Inputs]:
    return [inputs_of(case, LARGE, torch.bfloat16) for case in UNMEASURED]


def test_bits_do_not_depend_on_the_threads(large: list[Inputs], threads: int) -> None:
    found = [results_of(case, copied(inputs)) for case, inputs in zip(UNMEASURED, large, strict=True)]
    torch.set_num_threads(3)
    for case, inputs, one in zip(UNMEASURED, large, found, strict=True):
        for a, b in zip(one, results_of(case, copied(inputs)), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), case.name


def test_the_size_of_a_real_stream() -> None:
    """4096 x 3072, against NumPy."""
    x, r, j = (torch.randn(1, 4096, 3072).bfloat16() for _ in range(3))
    (y,) = ops.linear_combination([x], [[r, j]], [1.0, -0.03])
    expected = x.float() + r.float() + np.float32(-0.03) * j.float()
    assert torch.equal(y, expected.bfloat16())
    found = ops.pair_statistics([x], [r])[0].double().numpy()
    a, b = x.double().numpy(), r.double().numpy()
    d = a - b
    sums = [np.abs(d).sum(), np.abs(a).sum(), np.abs(b).sum(), (d * d).sum(), (a * a).sum(), (b * b).sum()]
    np.testing.assert_allclose(found[:6], sums, rtol=1e-6)
    assert found[7] == np.abs(d).max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_numbers_are_not_lost(instruction_set: str, dtype: torch.dtype, bad: float) -> None:
    a, b = torch.randn(LARGE).to(dtype), torch.randn(LARGE).to(dtype)
    a[0, 333, 555] = bad
    found, known = native.pair_statistics([a], [b]), statistics.pair_statistics_reference([a], [b])
    assert torch.equal(found.isnan(), known.isnan()) and torch.equal(found.isinf(), known.isinf())
    flag = torch.zeros(1, dtype=torch.int32)
    native.capture([a], [b], [torch.empty_like(a)], flag)
    assert flag.item() == 1


def test_no_nan_becomes_a_number(instruction_set: str) -> None:
    """Of any payload, in tensors and in coefficients; rounding must not carry one over into zero."""
    x = every_pattern(torch.bfloat16)
    y = x[torch.randperm(len(x))]
    outputs = [torch.empty_like(x) for _ in range(2)]
    native.linear_map([[x, y]], [outputs], [[0.5, None], [0.5, -0.25]])
    assert same_numbers(outputs[0], (0.5 * x.float()).bfloat16())
    assert same_numbers(outputs[1], (0.5 * x.float() - 0.25 * y.float()).bfloat16())
    native._cpu.capture([x], [y], [outputs[0]], (), 0, 1, False, 1, None)  # type: ignore[union-attr]
    assert same_numbers(outputs[0], x - y)
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFBF8000 + 0x7FFF]).to(torch.uint32)
    ones = torch.ones(70, dtype=torch.bfloat16)
    for bad in payloads.view(torch.float32).tolist():
        native.linear_map([[ones, ones]], [[o[:70] for o in outputs]], [[bad, 1.0], [1.0, bad]], [1.0, 2.0])
        assert outputs[0][:70].isnan().all() and outputs[1][:70].isnan().all()
        native.linear_map([[ones]], [[outputs[0][:70]]], [[1.0]], [bad])
        assert outputs[0][:70].isnan().all()


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestLoading:
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    def test_threads_are_those_of_torch(self) -> None:
        """One OpenMP runtime: two would fight for the cores."""
        code = (
            "import torch; from layercache import ops\n"
            "x = torch.randn(1, 4096, 512); ops.pair_statistics([x], [x])\n"
            "print({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l or 'libiomp' in l})"
        )
        assert len(eval(run(code))) == 1

    @pytest.mark.slow
    def test_it_can_be_turned_off(self) -> None:
        code = (
            "import torch; from layercache import ops\n"
            "x = torch.ones(1, 2, 8); found = ops.pair_statistics([x], [x])[0, 1].item()\n"
            "print(found, *ops.backend_for('gram', 'cpu'))"
        )
        assert run(code, LAYERCACHE_CPU="reference").startswith("16.0 reference LAYERCACHE_CPU=reference is set")

    def test_without_the_extension_the_references_run(self) -> None:
        code = (
            "import sys; sys.modules['layercache._cpu'] = None\n"
            "import torch; from layercache import ops\n"
            "x = torch.ones(1, 2, 8); print(ops.linear_combination([x], [[x]], [2.0])[0].sum().item())\n"
            "print(*ops.backend_for('gram', 'cpu'))"
        )
        result, backend = run(code).splitlines()
        assert result == "48.0" and "reference the compiled CPU kernels do not load" in backend
