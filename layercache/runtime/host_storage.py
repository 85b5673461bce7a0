"""Residuals in host memory: written back behind what stores them, brought ahead of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layercache.runtime.offload import HostTensor, Transfers
from layercache.runtime.storage import Buffer, Storage
from layercache.schedule.staging_plan import Rows, slices_of

Streams = Sequence[Sequence[Buffer]]
"""The residuals of one launch, by stream."""


class HostBuffer(Buffer):
    """A place for one residual in host memory; ``tensor`` and ``scales`` are on the device while they are used."""

    def __init__(self, transfers: Transfers) -> None:
        super().__init__()
        self._transfers = transfers
        self._parts = [HostTensor(transfers), HostTensor(transfers)]  # residual or codes, and scales
        self._shape: Any = None  # of what there is room for

    @property
    def like(self) -> Any:
        if self.tensor is not None:
            return self.tensor
        return self if self._shape is not None else None

    @property
    def shape(self) -> Any:
        return self._shape

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self._parts[0].host is None else self._parts[0].host.dtype

    @property
    def device(self) -> torch.device:
        return self._parts[0].device

    def make_room(self, shape: Any, dtype: torch.dtype, device: torch.device, has_scales: bool) -> None:
        self._shape = torch.Size(shape)
        self._parts[0].allocate(shape, dtype, device)
        if has_scales:
            self._parts[1].allocate(shape[:-1], torch.float32, device)

    def stage(self, shape: Any, dtype: torch.dtype, device: torch.device, has_scales: bool) -> None:
        """Gives it tensors on the device to be written into."""
        self.unstage()
        self.tensor = self._transfers.stage(shape, dtype, device)
        if has_scales:
            self.scales = self._transfers.stage(shape[:-1], torch.float32, device)

    def write_back(self) -> None:
        for part, staged in zip(self._parts, (self.tensor, self.scales), strict=True):
            if staged is not None:
                part.put(staged)
        assert self.tensor is not None
        self._shape = self.tensor.shape
        self.tensor = self.scales = None

    def prefetch(self, rows: Rows | None) -> None:
        for part in self._parts:
            part.prefetch(rows)

    def fetch(self, rows: Rows | None) -> None:
        self.unstage()  # of a forward that was interrupted
        self.tensor, self.scales = (None if part.host is None else part.fetch(rows) for part in self._parts)

    def unstage(self) -> None:
        """What is on the device is dropped; what was stored is on the host."""
        for staged in (self.tensor, self.scales):
            if staged is not None:
                self._transfers.unstage(staged)
        self.tensor = self.scales = None

    def drop(self) -> None:
        for part in self._parts:
            part.drop()

    def free(self) -> None:
        self.unstage()
        self.drop()
        self._parts = [HostTensor(self._transfers), HostTensor(self._transfers)]
        self._shape = None

    @property
    def nbytes(self) -> int:
        return self.host_bytes

    @property
    def host_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def settled(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        residual, scales = (None if part.host is None else part.settled() for part in self._parts)
        return residual, scales


class HostStorage(Storage):
    """Storage in host memory, in any of the kinds of numbers.

    A residual leaves the device behind its group, and is brought back before it is read: the first ones of a forward
    when it begins, each further one while the one before is added. The bits are those of `Storage`.

    Args:
        name, may_wait: as of `Storage`.
        slices: in how many slices of the tokens a residual comes back; two of them are on the device at a time. Where
            dtypes are mixed it comes back as a whole.
    """

    offloads = True
    transfers: Transfers

    def __init__(self, name: str = "same", may_wait: bool = False, slices: int = 1):
        super().__init__(name, may_wait)
        self.transfers, self.slices = Transfers(), slices
        self._expected: Sequence[Streams] = ()
        self._next = 0

    def new_buffer(self) -> Buffer:
        return HostBuffer(self.transfers)

    def make_room(self, buffer: Buffer, stream: torch.Tensor) -> None:
        assert isinstance(buffer, HostBuffer)
        dtype = self.dtype_of(stream.dtype, stream.dtype)
        buffer.make_room(stream.shape, dtype, stream.device, self.is_compact)

    def allocate(self, buffer: Buffer, stream: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        assert isinstance(buffer, HostBuffer)
        dtype = self.dtype_of(stream.dtype, stream.dtype) if dtype is None else dtype
        buffer.stage(stream.shape, dtype, stream.device, self.is_compact)

    def store(
        self,
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        buffers: Sequence[Buffer],
        flag: torch.Tensor | None,
    ) -> None:
        self.transfers.settle()
        for output, before, buffer in zip(outputs, inputs, buffers, strict=True):
            self.allocate(buffer, output, self.dtype_of(before.dtype, output.dtype))
        super().store(outputs, inputs, buffers, flag)
        for buffer in buffers:
            buffer.write_back()  # type: ignore[attr-defined]

    def expect(self, launches: Sequence[Streams]) -> None:
        """A forward begins that reads these residuals, each launch's by stream; the first are on their way."""
        self.transfers.settle()
        for buffers in self._expected:
            for own in buffers:
                for buffer in own:
                    buffer.drop()  # type: ignore[attr-defined]
        self._expected, self._next = launches, 0
        self._prefetch_next()

    def _prefetch_next(self) -> None:
        if self._next < len(self._expected):
            buffers = self._expected[self._next]
            self._prefetch(buffers, self._parts([own[0].like.shape for own in buffers])[0])

    def _prefetch(self, buffers: Streams, rows: Sequence[Rows | None]) -> None:
        for own, part in zip(buffers, rows, strict=True):
            for buffer in own:
                buffer.prefetch(part)  # type: ignore[attr-defined]

    def _parts(self, shapes: Sequence[Any]) -> list[list[Rows | None]]:
        """The slices, each with its tokens of every stream."""
        count = min([self.slices, *(shape[1] if len(shape) > 2 else 1 for shape in shapes)])
        if count == 1 or self.is_mixed:
            return [[None] * len(shapes)]
        return [list(rows) for rows in zip(*(slices_of(shape[1], count) for shape in shapes), strict=True)]

    def restore(
        self,
        bases: list[torch.Tensor],
        buffers: Streams,
        coefficients: Sequence[float] | torch.Tensor,
        results: list[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        self.transfers.settle()
        was_expected = self._next < len(self._expected) and self._expected[self._next] is buffers
        self._next += was_expected
        parts = self._parts([base.shape for base in bases])
        if len(parts) == 1 or not all(self.has_shape(own[0], base) for own, base in zip(buffers, bases, strict=True)):
            parts = [[None] * len(bases)]
            return self._restore_part(bases, buffers, coefficients, results, parts, was_expected)
        into = results or [torch.empty_like(base) for base in bases]
        for number, rows in enumerate(parts):
            some, targets = _narrow(bases, rows), _narrow(into, rows)
            self._restore_part(some, buffers, coefficients, targets, parts[number:], was_expected)
        return list(into)

    def _restore_part(
        self,
        bases: list[torch.Tensor],
        buffers: Streams,
        coefficients: Sequence[float] | torch.Tensor,
        results: list[torch.Tensor] | None,
        parts: Sequence[Sequence[Rows | None]],
        was_expected: bool,
    ) -> list[torch.Tensor]:
        """The first of some slices, while the next one is brought: of these, or of the next launch."""
        for own, rows in zip(buffers, parts[0], strict=True):
            for buffer in own:
                buffer.fetch(rows)  # type: ignore[attr-defined]
        if len(parts) > 1:
            self._prefetch(buffers, parts[1])
        elif was_expected:
            self._prefetch_next()
        found = super().restore(bases, buffers, coefficients, results)
        for own in buffers:
            for buffer in own:
                buffer.unstage()  # type: ignore[attr-defined]
        return found

    def is_finite(self, buffer: Buffer) -> bool:
        assert isinstance(buffer, HostBuffer)
        if buffer.like is None or buffer.device.type == "cuda" or self.is_compact:
            return True
        residual, _ = buffer.settled()
        return residual is None or bool(torch.isfinite(residual).all())

    def release(self) -> None:
        self.expect(())


def make_storage(name: str, may_wait: bool = False, offload: int = 0) -> Storage:
    """The storage of this name; in host memory where ``offload`` says in how many slices residuals come back."""
    return HostStorage(name, may_wait, offload) if offload else Storage(name, may_wait)


def _narrow(streams: Sequence[torch.Tensor], rows: Sequence[Rows | None]) -> list[torch.Tensor]:
    return [stream[:, part[0] : part[1]] for stream, part in zip(streams, rows, strict=True) if part is not None]
