"""Numbers read from a device later."""

from __future__ import annotations

import torch
from torch import Tensor


class Pending:
    """Numbers on their way from the device to the host.

    `ready` never waits; `value` waits if it must.
    """

    def __init__(self, tensor: Tensor):
        self._arrived: torch.cuda.Event | None = None
        flat = tensor.detach().flatten()
        if flat.device.type == "cuda":
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = flat.clone()

    def ready(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def value(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


def read_later(tensor: Tensor) -> Pending:
    """Starts to bring a small tensor to the host, without waiting for it."""
    return Pending(tensor)
