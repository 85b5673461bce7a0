"""Launchers of modulation and of decisions against their references: slices, rows in pairs, chunks, bad numbers."""

from __future__ import annotations

import pytest
import torch
from layercache.kernels import decisions, modulate, rows
from torch import Tensor

from support.marks import slow

pytestmark = pytest.mark.usefixtures("rounding")


def close(found: Tensor, expected: Tensor, scale: Tensor | float = 1.0) -> None:
    """One step of the storage dtype, and the fp32 rounding of a row's sums."""
    allowed = expected.double().abs() * torch.finfo(found.dtype).eps + 4e-6 * scale
    assert ((found.double() - expected.double()).abs() <= allowed).all()


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("change", [0.1, 0.3, float("nan"), float("inf")])
def test_decide(change: float) -> None:
    states = [(torch.tensor([0.2]), torch.full((1,), 7, dtype=torch.int32)) for _ in range(2)]
    numerator, denominator = torch.tensor(2 * change), torch.tensor([2.0])
    decisions.decide_triton(numerator, denominator, *states[0], [2.0, -1.0, 0.1], 0.25)
    decisions.decide_reference(numerator, denominator, *states[1], [2.0, -1.0, 0.1], 0.25)
    assert all(map(torch.equal, *states))
