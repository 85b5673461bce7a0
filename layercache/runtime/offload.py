"""Stored tensors in host memory, and their transfers to a device and back on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from layercache._utils.tensors import empty_for_any_mode
from layercache.errors import CacheStateError
from layercache.schedule.staging_plan import Rows


def check_offload(offload: bool | int) -> int:
    """In how many slices an offloaded residual comes back; 0 where nothing is offloaded.

    Raises:
        CacheStateError: neither a truth value nor a whole number from 1 on.
    """
    if offload is False:
        return 0
    if not isinstance(offload, int) or offload < 1:
        raise CacheStateError(
            f"offload is True, False, or in how many slices a residual comes back (from 1 on), got {offload!r}",
            argument="offload",
        )
    return int(offload)


def refuse_graph() -> None:
    """Raises `CacheStateError`: a graph stores into slots on its device, which offloading takes away."""
    raise CacheStateError(
        "offload=True is not for a transformer that is compiled whole, whose graphs store into slots on the device: "
        "compile its blocks instead (transformer.compile_repeated_blocks()), or leave offload out",
        argument="offload",
    )


class Lane:
    """A stream of a GPU on which copies run beside its own work, each behind what was queued before it.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def queue(self, copy: Callable[[], Any]) -> Any:
        """Queues a copy behind the device's work until now; the event that it is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy()
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def join(self, done: Any) -> None:
        """What the device does from now on comes behind that copy; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(done)

    def wait(self) -> None:
        """The host waits for all copies."""
        self._stream.synchronize()


class Transfers:
    """Copies between a device and host memory, one behind the other, beside the device's own work.

    On CUDA they run on a stream of their own from and to pinned memory, and the host never waits for them. What passes
    through the device is allocated there in the order of the device's work, so that a host far ahead of it takes no
    more memory. Elsewhere they are plain copies.

    Attributes:
        staged: bytes that are on the device now, on their way in either direction.
        peak: the most that there were.
    """

    def __init__(self) -> None:
        self.staged = self.peak = 0
        self._lanes: dict[torch.device, Any] = {}
        self._leaving: list[tuple[torch.Tensor, Any]] = []

    def lane(self, device: torch.device) -> Any:
        """Where copies from and to a device run; ``None`` where the host makes them."""
        if device.type == "cuda" and device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes.get(device)

    def stage(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor on the device, for a while."""
        made = empty_for_any_mode(shape, dtype, device)
        self.staged += made.nbytes
        self.peak = max(self.peak, self.staged)
        return made

    def unstage(self, tensor: torch.Tensor) -> None:
        """It is of no further use; the caller drops it."""
        self.staged -= tensor.nbytes

    def leave(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        """Copies a staged tensor to the host, behind the work that writes it; it is kept until `settle`."""
        lane, done = self.lane(tensor.device), None
        if lane is None:
            host.copy_(tensor)
        else:
            done = lane.queue(lambda: host.copy_(tensor, non_blocking=True))
        self._leaving.append((tensor, done))

    def settle(self) -> None:
        """What has left before is freed: the device's further work comes behind those copies."""
        for tensor, done in self._leaving:
            self.join(tensor, done)
            self.unstage(tensor)
        self._leaving.clear()

    def enter(self, host: torch.Tensor, device: torch.device, rows: Rows | None) -> tuple[torch.Tensor, Any]:
        """Begins to copy to the device, all or some tokens; with what `join` takes before it is read."""
        shape = host.shape if rows is None else (host.shape[0], rows[1] - rows[0], *host.shape[2:])
        staged = self.stage(shape, host.dtype, device)
        lane = self.lane(device)
        if lane is None:
            _copy(staged, host, rows)
            return staged, None
        return staged, lane.queue(lambda: _copy(staged, host, rows))

    def join(self, tensor: torch.Tensor, done: Any) -> None:
        """The device's further work comes behind the copy of this tensor."""
        if done is not None:
            self.lane(tensor.device).join(done)

    def wait(self) -> None:
        """The host waits until everything that left has arrived."""
        for lane in self._lanes.values():
            lane.wait()


def _copy(staged: torch.Tensor, host: torch.Tensor, rows: Rows | None) -> None:
    """Sample by sample where they are slices: only what is contiguous is copied without a detour."""
    if rows is None:
        staged.copy_(host, non_blocking=True)
        return
    for into, one in zip(staged.unbind(), host.unbind(), strict=True):
        into.copy_(one[rows[0] : rows[1]], non_blocking=True)


class HostTensor:
    """A tensor in host memory, pinned for a GPU, that belongs to a device.

    Attributes:
        host: the numbers; ``None`` until there are some.
        device: where they are used.
    """

    def __init__(self, transfers: Transfers):
        self.transfers = transfers
        self.host: torch.Tensor | None = None
        self.device = torch.device("cpu")
        self._ahead: dict[Rows | None, tuple[torch.Tensor, Any]] = {}

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Room in host memory, unless it has just that."""
        self.drop()
        host = self.host
        if host is not None and host.shape == torch.Size(shape) and host.dtype == dtype and self.device == device:
            return
        with torch.inference_mode(False):
            self.host = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.device = device

    def put(self, staged: torch.Tensor) -> None:
        """Takes over the numbers of a staged tensor, behind the work that writes it."""
        self.allocate(staged.shape, staged.dtype, staged.device)
        assert self.host is not None
        self.transfers.leave(staged, self.host)

    def put_copy(self, tensor: torch.Tensor) -> None:
        """The same of a tensor that somebody else owns, and may write into."""
        staged = self.transfers.stage(tensor.shape, tensor.dtype, tensor.device)
        self.put(staged.copy_(tensor))

    def prefetch(self, rows: Rows | None = None) -> None:
        """Begins to bring it to its device, all or some tokens of it."""
        if self.host is not None and rows not in self._ahead:
            self._ahead[rows] = self.transfers.enter(self.host, self.device, rows)

    def fetch(self, rows: Rows | None = None) -> torch.Tensor:
        """On its device; what the device does next comes behind the copy. Ends with `Transfers.unstage`."""
        self.prefetch(rows)
        staged, done = self._ahead.pop(rows)
        self.transfers.join(staged, done)
        return staged

    def drop(self) -> None:
        """What was brought ahead is not used."""
        while self._ahead:
            staged, done = self._ahead.popitem()[1]
            self.transfers.join(staged, done)
            self.transfers.unstage(staged)

    def settled(self) -> torch.Tensor:
        """The numbers as they are on the host; waits until they are there."""
        self.transfers.wait()
        assert self.host is not None
        return self.host

    @property
    def nbytes(self) -> int:
        return 0 if self.host is None else self.host.nbytes


def prefetch(stored: Iterable[Any]) -> None:
    """Begins to bring those of some stored tensors to their device that are in host memory."""
    for one in stored:
        if isinstance(one, HostTensor):
            one.prefetch()


def host_bytes(stored: Iterable[Any]) -> int:
    """Of some stored tensors those in host memory."""
    return sum(one.nbytes for one in stored if isinstance(one, HostTensor))
