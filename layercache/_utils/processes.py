"""What the environment says of this process, where several run the same command."""

from __future__ import annotations

import os
import platform
from pathlib import Path

HOSTED = "LAYERCACHE_HOSTED"
"""Environment variable of processes that a command started to share its samples."""

THREADS = "OMP_NUM_THREADS"

AGAIN = 75
"""Exit code of a command that failed because another process died: the same command may succeed (EX_TEMPFAIL)."""


def leads() -> bool:
    """Whether this process writes files and shows progress: the first of those that run a command, or the only one."""
    return is_alone() or os.environ.get("RANK", "0") == "0"


def is_alone() -> bool:
    """Whether no other process runs the same command."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def cpu_model() -> str:
    """Name of the processor as its maker calls it, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
