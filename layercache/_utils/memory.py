"""Memory of the host: how much is free, and models that may not take more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as hooks

from layercache.errors import FileFormatError

MOST_MODULES = 100_000


def free_memory() -> int:
    """Bytes that this process could still take without others being moved out, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def limited_weights(limit: int) -> Iterator[None]:
    """Context in which modules are made, as long as their weights and buffers together take no more bytes.

    Raises:
        FileFormatError: from the constructor of the module that would be too much.
    """
    taken = modules = 0

    def count(_module: Any, _name: str, value: torch.Tensor | None) -> None:
        nonlocal taken
        taken += 0 if value is None else value.nbytes
        if taken > limit:
            raise FileFormatError(
                f"the model that is described takes more than {limit / 1e9:.3g} GB, which is free or allowed at most; "
                "describe a smaller one, or give load_random_pipeline(..., max_bytes=...) where there is more memory"
            )

    def count_module(_module: Any, _name: str, _child: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise FileFormatError(f"the model that is described has more than {MOST_MODULES} modules")

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
