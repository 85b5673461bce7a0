"""Forked processes: OpenMP's threads are not there, and what waits for them waits for ever.

In a child of a process that had threads the ops run on the thread that calls them, with the same results. PyTorch's own
operations are used only where they do so too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layercache.ops import native
from layercache.ops.dispatch import Kernels

# Whether a child may find threads gone; True until it is known, because not every way to fork asks `_before`.
_had_threads = True
_alone = False


def _before() -> None:
    global _had_threads
    try:
        _had_threads = len(list(Path("/proc/self/task").iterdir())) > 1
    except OSError:
        _had_threads = True


def _in_child() -> None:
    global _alone
    if not _had_threads or _alone:
        return
    _alone = True
    native.number_of_threads = _one
    native.SMALL = 0
    for kernels in Kernels.every:
        kernels.reference = _on_one_thread(kernels.reference)


def _one() -> int:
    return 1


def _on_one_thread(reference: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reference)
    def run(*arguments: Any, **options: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return reference(*arguments, **options)
        finally:
            torch.set_num_threads(threads)

    return run


def register() -> None:
    os.register_at_fork(before=_before, after_in_child=_in_child)
