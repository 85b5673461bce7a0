"""The ops on a GPU against their references on the CPU; skipped where there is none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layercache import ops
from layercache.ops.plans import ignored
from layercache.tools.bench.case import Case
from layercache.tools.bench.cases import CASES
from support.op_cases import LAYOUTS, OP_CASES, UNMEASURED, assert_alike, copied, inputs_of, results_of

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 8), (2, 77, 320), (3, 33, 72), (1, 7, 63), (2, 0, 64)]
# For cases that take every argument: every shape in every dtype, in the layouts in turn.
FULL = [(s, d, LAYOUTS[(a + b) % 3]) for a, s in enumerate(SHAPES) for b, d in enumerate(DTYPES)]
FEW = [*zip(SHAPES[1:4], DTYPES, LAYOUTS, strict=True), ((1, 4096, 3072), torch.bfloat16, "dense")]
COMPARED = [(case, *given) for case in OP_CASES for given in (FULL if case in UNMEASURED else []) + FEW]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.cpu(), expected)


def sums_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> bool:
    a, b = found.double().cpu(), expected.double()
    return bool(((a - b).abs() <= tolerance * b.abs().max(-1, keepdim=True).values + 1e-30).all())


@pytest.mark.parametrize(
    ("case", "shape", "dtype", "layout"), COMPARED, ids=lambda value: getattr(value, "name", str(value))
)
def test_gives_what_the_cpu_gives(case: Case, shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    """And the same bits again."""
    if not shape[1] and case.op == "row_statistics":
        pytest.skip("no rows")
    inputs = inputs_of(case, shape, dtype, layout)
    on_gpu = [copied(inputs, "cuda") for _ in range(2)]
    found, again = (results_of(case, own) for own in on_gpu)
    assert_alike(case, found, results_of(case, inputs))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, again, strict=True))


def stream_pair(dtype: torch.dtype, joined: bool) -> list[Tensor]:
    """An image of 77 and a text of 33 tokens on the CPU, on their own or as slices of one tensor."""
    image, text = torch.randn(2, 77, 320).to(dtype), torch.randn(2, 33, 320).to(dtype)
    whole = torch.cat([text, image], dim=1)
    return [whole[:, 33:], whole[:, :33]] if joined else [image, text]


def pair_on(device: str, pair: list[Tensor]) -> list[Tensor]:
    """A copy, joined where the pair is."""
    if pair[0].is_contiguous():
        return [t.to(device, copy=True) for t in pair]
    whole = torch.cat(pair[::-1], dim=1).to(device)
    return [whole[:, 33:], whole[:, :33]]


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("stored", ["same", "float32"])
def test_two_streams_in_one_launch(dtype: torch.dtype, stored: str, joined: bool) -> None:
    """Captured with statistics, reused with one term and two, new and in place; stored as they are or unrounded."""
    tensors = [stream_pair(dtype, joined) for _ in range(2)]
    older = [torch.randn(t.shape).to(torch.float32 if stored == "float32" else dtype) for t in tensors[0]]
    results = []
    for device in ("cpu", "cuda"):
        (after, before), previous = (pair_on(device, pair) for pair in tensors), pair_on(device, older)
        residuals, flag = [torch.empty_like(p) for p in previous], torch.zeros(1, dtype=torch.int32, device=device)
        sums = ops.capture(after, before, residuals, flag, previous)
        ops.capture(after, before, residuals, flag)
        one = ops.linear_combination(before, [[r] for r in residuals], [1.0])
        terms = [[r, p] for r, p in zip(residuals, previous, strict=True)]
        ops.linear_combination(before, terms, [1.3, -0.3], results=before)
        results.append((sums, [*residuals, flag, *one, *before]))
    (known_sums, known), (found_sums, found) = results
    assert all(map(same_bits, found, known)) and sums_close(found_sums, known_sums)


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_compact_reuse_in_place(dtype: torch.dtype, joined: bool) -> None:
    """Of two streams in one launch, with two terms."""
    tensors = [stream_pair(dtype, joined) for _ in range(3)]
    results = []
    for device in ("cpu", "cuda"):
        after, before, middle = (pair_on(device, pair) for pair in tensors)
        kept = []
        for outputs in (after, middle):
            codes = [torch.empty(t.shape, dtype=torch.uint8, device=t.device) for t in before]
            scales = [torch.empty(t.shape[:-1], device=t.device) for t in before]
            ops.capture_compact(outputs, before, codes, scales)
            kept.append((codes, scales))
        (codes, scales), (codes_2, scales_2) = kept
        terms, rows = (
            [list(pair) for pair in zip(*both, strict=True)] for both in ((codes, codes_2), (scales, scales_2))
        )
        ops.linear_combination(before, terms, [1.3, -0.3], results=before, scales=rows)
        results.append([*codes, *scales, *before])
    assert all(map(same_bits, results[1], results[0]))


HUGE = (1, 2**31 // 3072 + 64, 3072)
AROUND = [slice(0, 4), slice(2**31 // 3072 - 2, 2**31 // 3072 + 2), slice(HUGE[1] - 4, HUGE[1])]
"""Rows at the beginning, on both sides of element number 2^31, and at the end."""


def huge(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(HUGE, dtype=dtype, device="cuda").normal_()


def rows_on_cpu(*tensors: Tensor) -> list[list[Tensor]]:
    return [[t[:, rows].cpu() for t in tensors] for rows in AROUND]


def test_more_than_two_to_the_31_elements() -> None:
    output, before = huge(), huge()
    residual, flag = torch.empty_like(before), torch.zeros(1, dtype=torch.int32, device="cuda")
    pieces = rows_on_cpu(output, before)
    sums = ops.pair_statistics([output], [before])[0].double()
    for _ in range(2):  # by Triton's JIT function, and as planned
        residual.zero_()
        ops.capture([output], [before], [residual], flag)
    ops.linear_combination([before], [[residual]], [0.5], results=[before])
    for (after, start), (stored, reused) in zip(pieces, rows_on_cpu(residual, before), strict=True):
        expected = torch.empty_like(after)
        ops.capture([after], [start], [expected])
        assert torch.equal(stored, expected)
        assert torch.equal(reused, ops.linear_combination([start], [[expected]], [0.5])[0])
    assert not flag.item()
    known = torch.zeros(2, dtype=torch.float64, device="cuda")
    for part in output.split(2**16, dim=1):
        known += torch.stack([part.abs().sum(dtype=torch.float64), part.float().square().sum(dtype=torch.float64)])
    torch.testing.assert_close(sums[[1, 4]], known, rtol=1e-4, atol=0)


def test_compact_storage_of_more_than_two_to_the_31_elements() -> None:
    output, before = huge(), huge()
    codes = torch.empty(HUGE, dtype=torch.uint8, device="cuda")
    scales = torch.empty(HUGE[:-1], device="cuda")
    pieces = rows_on_cpu(output, before)
    ops.capture_compact([output], [before], [codes], [scales])
    ops.linear_combination([before], [[codes]], [0.5], results=[before], scales=[[scales]])
    for (after, start), (stored, sizes, reused) in zip(pieces, rows_on_cpu(codes, scales, before), strict=True):
        expected, rows = torch.empty_like(stored), torch.empty_like(sizes)
        ops.capture_compact([after], [start], [expected], [rows])
        assert torch.equal(stored, expected) and torch.equal(sizes, rows)
        assert torch.equal(reused, ops.linear_combination([start], [[expected]], [0.5], scales=[[rows]])[0])


def test_decide() -> None:
    accumulated, flag = torch.zeros(1, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    seen = []
    for change in (0.1, 0.1, 0.2, float("nan"), 0.1):
        numbers = torch.tensor([change, 1.0], device="cuda")
        ops.decide(numbers[:1], numbers[1:], accumulated, flag, [2.0, 0.0], 0.7)
        seen.append((flag.item(), round(accumulated.item(), 4)))
    assert seen == [(1, 0.2), (1, 0.4), (0, 0.0), (0, 0.0), (1, 0.2)]


def workload() -> tuple[Callable[[], Any], list[Tensor]]:
    """Ops of a cached step on buffers that stay, and what they write."""
    x, y, p = (torch.randn(1, 512, 1024, device="cuda").bfloat16() for _ in range(3))
    slot, out = torch.empty_like(x), torch.empty_like(x)
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    coefficients = torch.tensor([1.3, -0.3], device="cuda")
    sums = torch.empty(1, 7, device="cuda")

    def step() -> None:
        sums.copy_(ops.capture([y], [x], [slot], flag, [p]))
        ops.linear_combination([x], [[slot, p]], coefficients, results=[out])

    return step, [slot, out, sums, flag]


def test_nothing_waits_for_the_gpu() -> None:
    step, _ = workload()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        x = torch.ones(2, 64, 1024, device="cuda")
        ops.pair_statistics([x], [x], per_sample=True)
        ops.combination_error(x, [x, x], [[1.0, 0.0], [1.5, -0.5]])
        ops.align(x, x, [x, x], [x, x])
        ops.modulate(x, x[:, 0], x[:, 0], previous=x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_the_same_bits() -> None:
    step, written = workload()
    step()
    expected = [t.clone() for t in written]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for t in written:
        t.zero_()
    graph.replay()
    assert all(map(torch.equal, written, expected))


def test_reductions_repeat_bit_by_bit() -> None:
    a, b = (torch.randn(1, 4096, 3072, device="cuda").bfloat16() for _ in range(2))
    first = ops.pair_statistics([a], [b])
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (ops.pair_statistics([a], [b]) != first).sum()
    assert different.item() == 0


def test_another_stream() -> None:
    step, written = workload()
    step()
    expected = [t.clone() for t in written]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for t in written:
            t.zero_()
        step()
    stream.synchronize()
    assert all(map(torch.equal, written, expected))


def test_two_threads_on_two_streams() -> None:
    """Both at once, a hundred times: nothing is shared but the kernels."""
    both = [workload() for _ in range(2)]
    expected = []
    for step, written in both:
        step()
        expected.append([t.clone() for t in written])
        for t in written:
            t.zero_()
    torch.cuda.synchronize()
    together, failed = threading.Barrier(2, timeout=60), []

    def work(step: Callable[[], Any]) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                together.wait()
                for _ in range(100):
                    step()
        except BaseException as error:  # raised again in the main thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step, _ in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failed
    for (_, written), known in zip(both, expected, strict=True):
        assert all(map(torch.equal, written, known))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_planned_calls_give_the_bits_of_triton(case: Case) -> None:
    """The second call launches kept kernels; without plans Triton's JIT function makes all launches."""
    device, found = torch.device("cuda"), []
    for context in (contextlib.nullcontext(), ignored()):
        with context, torch.set_grad_enabled(case.gradient):
            case.ours(case.inputs((2, 77, 320), torch.bfloat16, device, 0))
            inputs = case.inputs((2, 77, 320), torch.bfloat16, device, 1)
            launched, result = triton_launches(case.ours, inputs)
        found.append((launched, [t.clone() for t in flat([result, inputs.x, inputs.text, inputs.out])]))
    (planned, bits), (by_triton, others) = found
    assert by_triton and (not planned or case.op == "combination_error")
    assert len(bits) == len(others)
    assert all(torch.equal(a, b) for a, b in zip(bits, others, strict=True))


def triton_launches(call: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """How many kernels Triton's JIT function puts on the GPU for a call, and what that returns."""
    from triton.runtime.jit import JITFunction

    run, count = JITFunction.run, []
    JITFunction.run = lambda self, *own, **options: count.append(self) or run(self, *own, **options)
    try:
        result = call(*arguments)
    finally:
        JITFunction.run = run
    return len(count), result


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in flat(value)] if isinstance(values, (list, tuple)) else []


def test_planned_calls_follow_the_stream() -> None:
    """And a CUDA graph takes them up."""
    x, r, y = (torch.randn(2, 64, 256, device="cuda") for _ in range(3))
    for _ in range(2):
        ops.linear_combination([x], [[r]], [0.5], [y])
    expected = x + 0.5 * r
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        y.zero_()  # undone if the launch were on another stream
        ops.linear_combination([x], [[r]], [0.5], [y])
    stream.synchronize()
    assert torch.allclose(y, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.linear_combination([x], [[r]], [0.5], [y])
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.allclose(y, expected)
