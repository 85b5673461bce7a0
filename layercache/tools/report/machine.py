"""The machine that figures come from, and JSON files of figures."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercache._utils.files import write_atomically
from layercache._utils.processes import cpu_model
from layercache._version import __version__

PACKAGES = ("torch", "diffusers", "triton", "numpy", "scikit-image")


def json_text(data: Any) -> str:
    """Strict JSON: infinities and NaN, which JSON lacks, become the strings ``"inf"``, ``"-inf"``, ``"nan"``."""
    return json.dumps(_json_ready(data), indent=2, allow_nan=False) + "\n"


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Writes `json_text` to a file, whole or not at all."""
    text = json_text(data)
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Path):
        return str(value)
    return value


def package_version(name: str) -> str | None:
    """Version of an installed distribution, ``None`` when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_info(ask_torch: bool = True) -> dict[str, Any]:
    """The machine and the versions that figures were measured with; threads and GPU only where torch is asked."""
    return {
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        **(_torch_devices() if ask_torch else {"threads": None, "gpu": None}),
        "versions": {
            "layercache": __version__,
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
        },
    }


def _torch_devices() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"threads": None, "gpu": None}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "gpu": gpu}


def machine_line(info: Mapping[str, Any]) -> str:
    """One line for below a table."""
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)
    threads = f", {info['threads']} CPU threads" if info["threads"] else ""
    return f"{info['gpu'] or info['cpu']}{threads}; {versions}"


def print_json(data: Any) -> None:
    """Writes `json_text` to standard output and nothing else."""
    sys.stdout.write(json_text(data))
