"""Memory of stored residuals: in the streams' own dtype, wider, or as one byte per number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layercache import ops
from layercache._utils.compat import keep_address
from layercache._utils.tensors import empty_for_any_mode
from layercache.errors import CacheStateError

STORAGES = ("same", "float32", "compact")


class Buffer:
    """A place for one tensor that stays the same object while its tensor is allocated anew.

    Attributes:
        tensor: the residual, or its codes.
        scales: of the codes, one per row.
    """

    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None
        self.scales: torch.Tensor | None = None

    def free(self) -> None:
        self.tensor = self.scales = None

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.tensor, self.scales) if t is not None)


class Storage:
    """How residuals are written and read.

    Args:
        name: ``"same"``: in the dtype of the streams. ``"float32"``: unrounded, for half-precision models.
            ``"compact"``: fp8 codes with a scale per row, half the memory of 16-bit streams; a number's error is at
            most 2^-4 of it, or 2^-10 of its row's scale (`layercache.ops.capture_compact`).

    Raises:
        CacheStateError: another name.
    """

    def __init__(self, name: str = "same"):
        if name not in STORAGES:
            raise CacheStateError(f"unknown storage {name!r}; choose {', '.join(STORAGES)}")
        self.name = name
        self.is_compact = name == "compact"
        self._dtype = {"compact": torch.uint8, "float32": torch.float32}.get(name)

    def fits(self, buffer: Buffer, stream: torch.Tensor) -> bool:
        stored = buffer.tensor
        return (
            stored is not None
            and stored.shape == stream.shape
            and stored.dtype == (self._dtype or stream.dtype)
            and stored.device == stream.device
        )

    def allocate(self, buffer: Buffer, stream: torch.Tensor) -> None:
        dtype = self._dtype or stream.dtype
        buffer.tensor = keep_address(empty_for_any_mode(stream.shape, dtype, stream.device))
        if self.is_compact:
            scales = empty_for_any_mode(stream.shape[:-1], torch.float32, stream.device)
            buffer.scales = keep_address(scales)

    def is_finite(self, buffer: Buffer) -> bool:
        """Whether what is stored on the CPU is; codes, and what a GPU stores, raise a flag on their way instead."""
        stored = buffer.tensor
        return stored is None or stored.is_cuda or self.is_compact or bool(torch.isfinite(stored).all())

    def store(
        self,
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        buffers: Sequence[Buffer],
        flag: torch.Tensor | None,
    ) -> None:
        """Residuals of all streams in one launch; ``flag`` is raised where one is not finite."""
        stored: list[Any] = [buffer.tensor for buffer in buffers]
        if self.is_compact:
            scales: list[Any] = [buffer.scales for buffer in buffers]
            ops.capture_compact(outputs, inputs, stored, scales, flag)
        else:
            ops.store(outputs, inputs, stored, flag)

    def restore(
        self,
        bases: list[torch.Tensor],
        buffers: Sequence[Sequence[Buffer]],
        coefficients: Sequence[float] | torch.Tensor,
        results: list[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """Every stream with its stored residuals, times their coefficients, added; in one launch."""
        stored: list[list[Any]] = [[buffer.tensor for buffer in own] for own in buffers]
        if self.is_compact:
            scales: list[list[Any]] = [[buffer.scales for buffer in own] for own in buffers]
            return ops.linear_combination(bases, stored, coefficients, results, scales=scales)
        for stream, own in enumerate(buffers):
            if not self.fits(own[0], bases[stream]):
                raise CacheStateError(
                    f"a stream is {describe(bases[stream])} where the stored residual is {describe(own[0].tensor)}; "
                    "reset the cache before calling the transformer with other dtypes"
                )
        return ops.restore(bases, stored, coefficients, results)


def check_alike(before: torch.Tensor | None, after: torch.Tensor | None) -> None:
    """Raises `CacheStateError` for blocks that give another shape or dtype than they take: there is no residual."""
    if before is None or after is None or before.shape != after.shape or before.dtype != after.dtype:
        raise CacheStateError(
            f"a group of blocks takes a stream that is {describe(before)} and gives one that is {describe(after)}; "
            "such a group has no residual, cut the blocks into other groups"
        )


def describe(stream: torch.Tensor | None) -> str:
    return "not there" if stream is None else f"of shape {tuple(stream.shape)} and {stream.dtype}"
