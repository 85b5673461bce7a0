"""Loads the written repository as its users do, and compares its ops, run by Triton's interpreter, with torch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch


def check(tree: Path) -> None:
    from kernels._rust import Digest, DigestAlgorithm

    from kernels import get_local_kernel

    ops = get_local_kernel(tree, backend="cpu")
    assert "triton" not in sys.modules, "triton is imported before the first launch"
    compare(ops)
    for variant in sorted((tree / "build").iterdir()):
        described = (variant / "metadata.json").read_text()
        for name, found in Digest.hash_variant(DigestAlgorithm.SHA256, variant).files.items():
            assert found in described or name == "metadata.json", f"{variant.name}: the digest of {name} is wrong"
    print(f"{tree}: loaded by kernels; {', '.join(ops.__all__)} agree with torch")


def compare(ops: ModuleType, compiled: bool = True) -> None:
    """Every op of `__all__` against its formula: eagerly and, if wanted, in a graph without breaks."""
    torch.manual_seed(0)
    x, y, r, q = (torch.randn(2, 5, 16) for _ in range(4))
    wide = torch.randn(2, 9, 16)
    text = wide[:, 2:6]  # rows of a longer sequence

    def all_ops(x: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        combined = ops.linear_combination([x, text], [[r, q], [text, text]], [2.0, -0.5])
        statistics = ops.pair_statistics([x], [y])
        return [*combined, *ops.capture([x, text], [y, text]), statistics, ops.gram([x, y]), ops.guidance(x, y, 4.0)]

    statistics = [(x - y).abs().sum(), x.abs().sum(), y.abs().sum(), (x - y).square().sum()]
    statistics += [x.square().sum(), y.square().sum(), (x * y).sum(), (x - y).abs().max()]
    pair = torch.stack([x.flatten(), y.flatten()])
    expected = [x + 2 * r - 0.5 * q, 2.5 * text, x - y, torch.zeros_like(text), torch.stack(statistics)[None]]
    expected += [pair @ pair.T, y + 4 * (x - y)]
    graph = [torch.compile(all_ops, backend="eager", fullgraph=True)] if compiled else []
    for run in (all_ops, *graph):
        for found, wanted in zip(run(x, text), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    rescaled = ops.guidance(x, y, 4.0, rescale=True)
    torch.testing.assert_close(rescaled.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
