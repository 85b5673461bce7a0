"""Launchers of the router, of modulation, guidance, row statistics and decisions against their references."""

from __future__ import annotations

import pytest
import torch
from layercache.kernels import compact, decisions, guidance, modulate, router, rows
from torch import Tensor

from support.guarded_memory import CASES, Case, Memory, assert_sums_close, in_cases, same_bits
from support.marks import slow

pytestmark = pytest.mark.usefixtures("rounding")

THREE_DIMS = [case for case in CASES if len(case.shapes[0]) == 3]
cases = in_cases(THREE_DIMS)


def one(case: Case, dtype: torch.dtype, memory: Memory) -> Tensor:
    return memory.streams(case, dtype)[0]


def close(found: Tensor, expected: Tensor, scale: Tensor | float = 1.0) -> None:
    """One step of the storage dtype, and the fp32 rounding of a row's sums."""
    allowed = expected.double().abs() * torch.finfo(found.dtype).eps + 4e-6 * scale
    assert ((found.double() - expected.double()).abs() <= allowed).all()


@cases
@pytest.mark.parametrize("gated", [False, True])
def test_router_lerp(case: Case, dtype: torch.dtype, memory: Memory, gated: bool) -> None:
    f, c, x, grad = (one(case, dtype, memory) for _ in range(4))
    batch, _, channels = f.shape
    gate = memory.random((batch, channels), dtype) if gated else None
    residual = x if gated else None
    for beta in (torch.tensor([0.3]), torch.linspace(0.0, 1.0, batch)):
        found = router.router_lerp_triton(f, c, beta, gate, residual, groups=case.groups)
        assert same_bits([found], [router.router_lerp_reference(f, c, beta, gate, residual)])
        got = router.router_lerp_backward_triton(grad, f, c, beta, gate, groups=case.groups)
        known = router.router_lerp_backward_reference(grad, f, c, beta, gate)
        assert same_bits(got[:1], known[:1])
        inner = grad.float() * (1.0 if gate is None else gate.float()[:, None])
        products = (inner * (f.float() - c.float())).abs()
        scale = products.sum((1, 2)) if beta.numel() > 1 else products.sum().view(1)
        assert_sums_close(got[1], known[1], scale)


@cases
@pytest.mark.parametrize("form", ["plain", "metric", "reuse"])
def test_modulate(case: Case, dtype: torch.dtype, memory: Memory, form: str) -> None:
    x = one(case, dtype, memory)
    batch, _, channels = x.shape
    scale, shift = memory.random((batch, channels), dtype), memory.random((1, 1, channels), dtype)
    previous = memory.random(x.shape, dtype) if form == "metric" else None
    segments = [channels // 2] if form == "metric" and channels > 1 else []
    residuals = [memory.random(x.shape, dtype) for _ in range(2)] if form == "reuse" else []
    coefficients = [1.5, -0.5] if form == "reuse" else []
    streams = [memory.tensor(x.shape, dtype) for _ in range(2)]
    arguments = (x, scale, shift, residuals, coefficients, previous, segments, 1e-5, None, None)
    found, sums = modulate.modulate_triton(*arguments, None, streams[0])
    known, expected = modulate.modulate_reference(*arguments, None, streams[1])
    assert same_bits(streams[:1], streams[1:])
    normal = torch.nn.functional.layer_norm(streams[1].float(), (channels,), None, None, 1e-5)
    # where outliers cancel, only rounding is left to normalise
    blow_up = (
        streams[1].float().abs().amax(-1, keepdim=True)
        / streams[1].float().var(-1, correction=0, keepdim=True).add(1e-5).sqrt()
    )
    sizes = (1 + normal.abs() + blow_up) * (1 + scale.float().abs()[:, None]) + shift.float().abs()
    close(found, known, sizes)
    if previous is not None:
        assert sums is not None and expected is not None
        bounds = [0, *segments, channels]
        for row, lo, hi in zip(sums, bounds, bounds[1:], strict=False):
            # of what was stored here, which may differ from the reference by one step
            part = modulate.pair_sums(found[..., lo:hi], previous[..., lo:hi]).float()
            squares = (part[4] * part[5]).sqrt()
            limit = torch.cat([part[:6], squares[None], part[7:]])
            assert ((row - part).abs() <= 1e-5 * limit + 1e-30).all()
        again, same = modulate.modulate_triton(*arguments, previous)
        assert again is previous and same is not None and torch.equal(same, sums) and same_bits([again], [found])


def test_modulation_of_codes() -> None:
    x, scale = torch.randn(2, 5, 32).bfloat16(), torch.randn(2, 32).bfloat16()
    codes, scales = torch.empty(2, 5, 32, dtype=torch.uint8), torch.empty(2, 5)
    compact.capture_compact_reference([x], [torch.zeros_like(x)], [codes], [scales])
    streams = [torch.zeros(2, 5, 32).bfloat16() for _ in range(2)]
    for run, stream in zip((modulate.modulate_triton, modulate.modulate_reference), streams, strict=True):
        run(x, scale, scale, [codes], [0.5], stream=stream, scales=[scales])
    assert same_bits(streams[:1], streams[1:])


@pytest.mark.parametrize(("spare", "first"), [(1, 1), (8, 3), (64, 1), (8, 8)])
def test_modulation_by_slices(spare: int, first: int) -> None:
    """Whose strides or addresses are no multiples of a group, or are."""
    x, vectors = torch.randn(2, 4, 64).bfloat16(), torch.randn(2, 64 + spare).bfloat16()
    scale = vectors[:, first : first + 64]
    found, known = (run(x, scale, scale)[0] for run in (modulate.modulate_triton, modulate.modulate_reference))
    close(found, known, 20.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16, torch.float32)])
def test_two_rows_per_thread(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_PROGRAMS", 1)
    x, r = (torch.randn(2, 4, 3072).to(dtype) for _ in range(2))
    scale, shift = torch.randn(2, 3072).to(dtype), torch.randn(1, 1, 3072).to(dtype)
    shape = rows.share_out([x]).in_pairs()
    assert (shape.each, shape.rows % shape.per_program) == (2, 0)
    found, _ = modulate.modulate_triton(x, scale, shift, [r], [0.5])
    close(found, modulate.modulate_reference(x, scale, shift, [r], [0.5])[0], 20.0)
    # rows of two batch entries have no scale in common
    assert rows.share_out([x[:, :3]]).in_pairs().each == 1


@pytest.mark.parametrize("channels", [8, 3072, 16384, *slow(1152, 1536, 2048, 2304, 3840, 4096, 5120, 6144)])
@pytest.mark.parametrize("held", [rows.HELD, rows.PAIRED, rows.SUMMED])
def test_chunks_hold_a_row(channels: int, held: int) -> None:
    shape = rows.share_out([torch.empty(1, 4, channels, dtype=torch.bfloat16)], held=held)
    assert shape.chunks * shape.groups >= shape.row_groups > (shape.chunks - 1) * shape.groups
    assert shape.chunks * shape.width <= held and shape.chunks <= rows.MAX_CHUNKS
    # every thread has work in every chunk
    assert shape.per_program * shape.groups >= 32 * shape.constants["num_warps"]


def test_affine_modulation() -> None:
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(24), torch.randn(24)
    zero = torch.zeros(2, 24)
    found, _ = modulate.modulate_triton(x, zero, zero, weight=weight, bias=bias)
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-6))


@cases
@pytest.mark.parametrize("rescale", [False, True])
def test_guidance(case: Case, dtype: torch.dtype, memory: Memory, rescale: bool) -> None:
    cond, uncond = one(case, dtype, memory), one(case, dtype, memory)
    found = guidance.guidance_triton(cond, uncond, 4.0, rescale)
    known = guidance.guidance_reference(cond, uncond, 4.0, rescale)
    if rescale:
        close(found, known, known.float().abs())
    else:
        assert same_bits([found], [known])


@cases
@pytest.mark.parametrize("per_sample", [False, True])
def test_row_statistics(case: Case, dtype: torch.dtype, memory: Memory, per_sample: bool) -> None:
    a, b = one(case, dtype, memory), one(case, dtype, memory)
    found = decisions.row_statistics_triton(a, b, per_sample)
    known = decisions.row_statistics_reference(a, b, per_sample)
    torch.testing.assert_close(found, known, rtol=2e-4, atol=2e-6, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("change", [0.1, 0.3, float("nan"), float("inf")])
def test_decide(change: float) -> None:
    states = [(torch.tensor([0.2]), torch.full((1,), 7, dtype=torch.int32)) for _ in range(2)]
    numerator, denominator = torch.tensor(2 * change), torch.tensor([2.0])
    decisions.decide_triton(numerator, denominator, *states[0], [2.0, -1.0, 0.1], 0.25)
    decisions.decide_reference(numerator, denominator, *states[1], [2.0, -1.0, 0.1], 0.25)
    assert all(map(torch.equal, *states))
