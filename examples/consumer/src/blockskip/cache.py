"""Runs the first block always; passes by the others while its residual has changed little."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layercache import backend

Block = Callable[[torch.Tensor], torch.Tensor]


class FirstBlockCache:
    """``cache(x)`` is ``blocks`` applied to ``x`` in turn, or its estimate.

    Args:
        blocks: each takes and returns ``[batch, tokens, channels]``.
        threshold: largest relative change of the first block's residual at which the others are passed by.
    """

    def __init__(self, blocks: Sequence[Block], threshold: float = 0.1):
        self.blocks = list(blocks)
        self.threshold = threshold
        self.skipped = 0
        self._probe: torch.Tensor | None = None
        self._rest: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        probe, change = backend.probe(first, x, self._probe)
        if change is not None and self._rest is not None and float(change) <= self.threshold:
            self.skipped += 1
            return backend.apply_residual(first, self._rest)
        self._probe = probe
        result = first
        for block in self.blocks[1:]:
            result = block(result)
        (self._rest,) = backend.capture([result], [first])
        return result


def main() -> None:
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(16, 16) for _ in range(6)]
    cache = FirstBlockCache(blocks, threshold=0.05)
    with torch.no_grad():
        x = torch.randn(1, 8, 16)
        for step in range(10):
            cache(x * (1 - 0.01 * step))
    print(f"{cache.skipped} of 10 calls skipped, backend {backend.API_VERSION}")


if __name__ == "__main__":
    main()
