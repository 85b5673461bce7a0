"""Memory of stored residuals: in the streams' own dtype, wider, or as one byte per number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from layercache import ops
from layercache._utils.compat import keep_address
from layercache._utils.tensors import empty_for_any_mode
from layercache.errors import CacheStateError, NonFiniteResidualError
from layercache.runtime.offload import Transfers
from layercache.runtime.samples import bad_samples

STORAGES = ("same", "float32", "compact")
_LARGEST_SCALE = 2.0**119  # of a row of codes that holds infinity


class Buffer:
    """A place for one tensor that stays the same object while its tensor is allocated anew.

    Attributes:
        tensor: the residual, or its codes.
        scales: of the codes, one per row.
        leaves_as: dtype of the stream behind the group, where it is another than in front of it (`torch.autocast`).
    """

    def __init__(self) -> None:
        self.tensor: torch.Tensor | None = None
        self.scales: torch.Tensor | None = None
        self.leaves_as: torch.dtype | None = None

    def free(self) -> None:
        self.tensor = self.scales = None

    @property
    def like(self) -> Any:
        """Something of the shape, dtype and device of what there is room for; ``None`` without any."""
        return self.tensor

    def settled(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Residual or codes, and scales, to be looked at."""
        return self.tensor, self.scales

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.tensor, self.scales) if t is not None)

    @property
    def host_bytes(self) -> int:
        """Of these, what is kept in host memory for another device."""
        return 0

    def bad_samples(self) -> set[int]:
        """Samples of the batch whose stored numbers are not all finite; asks the device. Codes do not show NaN."""
        residual, scales = self.settled()
        if residual is None:
            return set()
        if scales is None:
            return bad_samples(residual)
        return bad_samples(torch.where(scales < _LARGEST_SCALE, 0.0, float("nan")))


class Storage:
    """How residuals are written and read.

    A residual is kept in the dtype of its streams, and in the wider one where a group gives another than it takes.

    Args:
        name: ``"same"``: in the dtype of the streams. ``"float32"``: unrounded, for half-precision models.
            ``"compact"``: fp8 codes with a scale per row, half the memory of 16-bit streams; a number's error is at
            most 2^-4 of it, or 2^-10 of its row's scale (`layercache.ops.capture_compact`).
        may_wait: whether the host may wait for a GPU.

    Attributes:
        offloads: whether residuals are kept in host memory (`layercache.runtime.host_storage`).
        is_mixed: whether some streams or residuals have another dtype than the others; then each stream is a launch.
        is_widened: residuals of 16-bit streams are stored in float32, because one was larger than float16 holds, or
            because a graph, whose slots are allocated ahead, is compiled under `torch.autocast`.
        bad_samples: of the batch, those that were NaN when they were stored as codes.
        may_overflow: whether float16 residuals were stored without a look at them, on a GPU or in a compiled graph.

    Raises:
        CacheStateError: another name.
    """

    offloads = False
    transfers: Transfers | None = None

    def __init__(self, name: str = "same", may_wait: bool = False):
        if name not in STORAGES:
            raise CacheStateError(f"unknown storage {name!r}; choose {', '.join(STORAGES)}")
        self.name, self.may_wait = name, may_wait
        self.is_compact = name == "compact"
        self.is_mixed = self.is_widened = self.may_overflow = False
        self.bad_samples: set[int] = set()
        self._dtype = {"compact": torch.uint8, "float32": torch.float32}.get(name)

    def dtype_of(self, before: torch.dtype, after: torch.dtype) -> torch.dtype:
        """The dtype in which a residual between two streams is stored."""
        if self._dtype is not None:
            return self._dtype
        wider = before if before == after else torch.promote_types(before, after)
        return torch.float32 if self.is_widened and wider.itemsize < 4 else wider

    def new_buffer(self) -> Buffer:
        """A place for one residual; it takes no memory yet."""
        return Buffer()

    def make_room(self, buffer: Buffer, stream: torch.Tensor) -> None:
        """Memory for a residual of this stream."""
        self.allocate(buffer, stream)

    def fits(self, buffer: Buffer, stream: torch.Tensor) -> bool:
        stored = buffer.like
        return (
            stored is not None
            and stored.shape == stream.shape
            and stored.dtype == self.dtype_of(stream.dtype, stream.dtype)
            and stored.device == stream.device
        )

    def has_shape(self, buffer: Buffer, stream: torch.Tensor) -> bool:
        """Whether the buffer is of the stream's shape and where the stream is, in whatever dtype."""
        stored = buffer.like
        return stored is not None and stored.shape == stream.shape and stored.device == stream.device

    def allocate(self, buffer: Buffer, stream: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        dtype = self.dtype_of(stream.dtype, stream.dtype) if dtype is None else dtype
        buffer.tensor = keep_address(empty_for_any_mode(stream.shape, dtype, stream.device))
        if self.is_compact:
            scales = empty_for_any_mode(stream.shape[:-1], torch.float32, stream.device)
            buffer.scales = keep_address(scales)

    def release(self) -> None:
        """Nothing is on its way any more; the buffers are about to be freed."""

    @property
    def staged_bytes(self) -> int:
        """The most that was on the device at a time of what is kept in host memory."""
        return 0 if self.transfers is None else self.transfers.peak

    def expect(self, launches: Sequence[Sequence[Sequence[Buffer]]]) -> None:
        """A forward begins that reads these residuals."""

    def is_finite(self, buffer: Buffer) -> bool:
        """Whether what is stored on the CPU is; codes, and what a GPU stores, raise a flag on their way instead."""
        stored = buffer.tensor
        return stored is None or stored.is_cuda or self.is_compact or bool(torch.isfinite(stored).all())

    def widen(self) -> None:
        """From now on residuals of 16-bit streams are stored in float32."""
        self.is_widened = self.is_mixed = True
        self.may_overflow = False

    def prepare_graph(self, stream: torch.Tensor) -> None:
        """Slots are about to be allocated for a graph, which cannot do it itself: no dtype may turn out otherwise."""
        if self._dtype is None and torch.is_autocast_enabled(stream.device.type):
            self.widen()

    def store(
        self,
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        buffers: Sequence[Buffer],
        flag: torch.Tensor | None,
    ) -> None:
        """Residuals of all streams in one launch; ``flag`` is raised where one is not finite."""
        if not self.is_mixed:
            dtype = outputs[0].dtype
            for stream in (*outputs, *inputs):  # at every stored group; a generator would cost more than the rest
                if stream.dtype != dtype:
                    self.is_mixed = True
        if self.is_mixed:
            for output, before, buffer in zip(outputs, inputs, buffers, strict=True):
                self._store_apart(output, before, buffer, flag)
            return
        self._launch_store(outputs, inputs, buffers, flag)
        if outputs[0].dtype == torch.float16 and self._dtype is None:
            self._look_for_overflow(outputs, inputs, buffers, flag)

    def _launch_store(
        self,
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        buffers: Sequence[Buffer],
        flag: torch.Tensor | None,
    ) -> None:
        stored: list[Any] = [buffer.tensor for buffer in buffers]
        if self.is_compact:
            scales: list[Any] = [buffer.scales for buffer in buffers]
            ops.capture_compact(outputs, inputs, stored, scales, flag)
            if flag is not None and not (flag.is_cuda or torch.compiler.is_dynamo_compiling()) and flag.item():
                for output, before in zip(outputs, inputs, strict=True):
                    self.bad_samples |= bad_samples(output - before)
        else:
            ops.store(outputs, inputs, stored, flag)

    def _store_apart(
        self, output: torch.Tensor, before: torch.Tensor, buffer: Buffer, flag: torch.Tensor | None
    ) -> None:
        """One stream's residual; its buffer is allocated anew where it is of another dtype."""
        dtype = self.dtype_of(before.dtype, output.dtype)
        if not self.has_shape(buffer, output) or buffer.tensor.dtype != dtype:  # type: ignore[union-attr]
            self.allocate(buffer, output, dtype)
        buffer.leaves_as = None if output.dtype == before.dtype else output.dtype
        wider = torch.promote_types(before.dtype, output.dtype)
        wide, wide_before = output.to(wider), before.to(wider)
        self._launch_store([wide], [wide_before], [buffer], flag)
        if dtype == torch.float16:
            self._look_for_overflow([wide], [wide_before], [buffer], flag)

    def _look_for_overflow(
        self,
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        buffers: Sequence[Buffer],
        flag: torch.Tensor | None,
    ) -> None:
        """Where looking makes nobody wait: stores again, wider, what is larger than float16 holds."""
        if torch.compiler.is_dynamo_compiling() or (outputs[0].is_cuda and not self.may_wait):
            self.may_overflow = True
            return
        for output, before, buffer in zip(outputs, inputs, buffers, strict=True):
            stored: Any = buffer.tensor
            if bool(torch.isfinite(stored).all()):
                continue
            if bool(((output.float() - before.float()).isfinite() & ~torch.isfinite(stored)).any()):
                self.widen()
                if flag is not None:
                    flag.zero_()
                self._store_apart(output, before, buffer, flag)

    def bad_among(self, buffers: Iterable[Buffer]) -> set[int]:
        """Samples of the batch that are not finite in one of these, or were not when it was stored; asks the device."""
        found, self.bad_samples = self.bad_samples, set()
        return found.union(*(buffer.bad_samples() for buffer in buffers))

    def find_fault(self, buffers: Sequence[Buffer], flag: torch.Tensor | None) -> NonFiniteResidualError | None:
        """Looks at stored residuals: by the device's flag, or without a GPU at themselves; widens what overflowed."""
        bad = flag is not None and bool(flag.item())
        if not bad and all(self.is_finite(buffer) for buffer in buffers):
            return None
        samples, overflow = self.bad_among(buffers), self.may_overflow
        if overflow:
            self.widen()
        return NonFiniteResidualError.of("a stored residual", samples, overflow)

    def flag_for(self, stream: torch.Tensor, flag: torch.Tensor | None) -> torch.Tensor | None:
        """Raised on the way where numbers cannot be looked at in their place at the end; the one there is, or a new."""
        if not (stream.is_cuda or self.is_compact):
            return None
        if flag is None or flag.device != stream.device:
            return torch.zeros(1, dtype=torch.int32, device=stream.device)
        return flag

    def leaves_as(self, base: torch.Tensor, buffers: Sequence[Buffer]) -> torch.dtype:
        """The dtype of a stream behind reused groups, whose residuals are given in the groups' order."""
        changes = [buffer.leaves_as for buffer in buffers if buffer.leaves_as is not None]
        return changes[-1] if changes else base.dtype

    def restore(
        self,
        bases: list[torch.Tensor],
        buffers: Sequence[Sequence[Buffer]],
        coefficients: Sequence[float] | torch.Tensor,
        results: list[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """Every stream with its stored residuals, times their coefficients, added; in one launch.

        Where dtypes are mixed a result may be of another dtype than ``results``, and is then a tensor of its own.
        """
        if self.is_mixed:
            into: list[Any] = list(results) if results else [None] * len(bases)
            return [self._restore_apart(*stream, coefficients) for stream in zip(bases, buffers, into, strict=True)]
        stored: list[list[Any]] = [[buffer.tensor for buffer in own] for own in buffers]
        if self.is_compact:
            scales: list[list[Any]] = [[buffer.scales for buffer in own] for own in buffers]
            return ops.linear_combination(bases, stored, coefficients, results, scales=scales)
        for stream, base in enumerate(bases):
            own = stored[stream][0]
            if own is None or own.dtype != base.dtype or own.shape != base.shape or own.device != base.device:
                if not self.fits(buffers[stream][0], base):
                    raise _misfit(base, buffers[stream][0])
        return ops.restore(bases, stored, coefficients, results)

    def _restore_apart(
        self, base: torch.Tensor, buffers: Sequence[Buffer], result: torch.Tensor | None, coefficients: Any
    ) -> torch.Tensor:
        """One stream: summed in the wider dtype of its two ends, and given in that of the stream behind the groups."""
        for buffer in buffers:
            if not self.has_shape(buffer, base):
                raise _misfit(base, buffer)
        leaves = self.leaves_as(base, buffers)
        wide = base.to(torch.promote_types(base.dtype, leaves))
        stored: list[Any] = [buffer.tensor for buffer in buffers]
        scales: list[Any] | None = [[buffer.scales for buffer in buffers]] if self.is_compact else None
        if len({t.dtype for t in stored}) > 1:
            stored = [t.float() if t.element_size() < 4 else t for t in stored]
        (found,) = ops.linear_combination([wide], [stored], coefficients, None, scales=scales)
        found = found.to(leaves)
        return result.copy_(found) if result is not None and result.dtype == leaves else found


def _misfit(stream: torch.Tensor, buffer: Buffer) -> CacheStateError:
    return CacheStateError(
        f"a stream is {describe(stream)} where the stored residual is {describe(buffer.like)}; "
        "reset the cache before calling the transformer with other dtypes"
    )


def check_alike(before: torch.Tensor | None, after: torch.Tensor | None) -> None:
    """Raises `CacheStateError` for blocks that give another shape than they take: there is no residual."""
    if before is None or after is None or before.shape != after.shape:
        raise CacheStateError(
            f"a group of blocks takes a stream that is {describe(before)} and gives one that is {describe(after)}; "
            "such a group has no residual, cut the blocks into other groups"
        )


def describe(stream: Any) -> str:
    return "not there" if stream is None else f"of shape {tuple(stream.shape)} and {stream.dtype}"
