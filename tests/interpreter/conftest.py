"""Triton kernels on CPU tensors, run by Triton's interpreter; needs a process of its own with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layercache.kernels import moments, statistics, tiles
from torch import Tensor

from support.guarded_memory import Case, Memory

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    try:
        import triton  # noqa: F401
    except ImportError:
        reason = "triton is not installed"
    else:
        if os.environ.get("TRITON_INTERPRET") == "1":
            return
        reason = "run these apart: TRITON_INTERPRET=1 pytest tests/interpreter (Triton reads it when it is imported)"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, to nearest with ties to even; every NaN is the quiet one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, rounded).astype(np.uint16)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts fp32 down to bf16 where GPUs and PyTorch round to nearest; here it rounds too."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounded(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return bf16_bits(values).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return values.view(np.uint16).astype(np.uint32) << 16
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert_rounded)


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
        patched.setattr(moments, "program_count", program_count)
        yield memory
    memory.check()
