"""Results as tables and files, and whether a file still belongs to the kernels that are installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import layercache
from layercache.errors import FileFormatError
from layercache.tools.bench.measure import Row
from layercache.tools.report.fitting import Column, FittingTable
from layercache.tools.report.machine import machine_info, write_json

# What a measurement depends on; the C++ sources are there in a checkout only.
SOURCES = ("kernels/*.py", "layercache/ops/*.py", "csrc/cpu/*")


def kernel_hash() -> str:
    """Twelve hex digits that change when a kernel, an op, or the C++ that runs it does.

    Raises:
        FileFormatError: this is not a checkout.
    """
    root = Path(layercache.__file__).parents[1]
    files = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    # an installed layercache has its kernels elsewhere, and another package may have their name
    if not {"kernels", "cpu"} <= {path.parent.name for path in files}:
        raise FileFormatError(
            f"results are compared with the sources of the kernels, which {root} does not hold; use the layercache of "
            "a checkout (pip install -e . in one)"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def hash_or_none() -> str | None:
    """`kernel_hash`, where there is one."""
    try:
        return kernel_hash()
    except FileFormatError:
        return None


def table(rows: Sequence[Row]) -> FittingTable:
    """One line per case, all of one shape; what the columns mean is in docs/benchmarks.md."""
    first = rows[0]
    on_gpu = any(row.host_seconds for row in rows)
    columns = [Column("case", numeric=False), Column("MB", 6), Column("ms"), Column("GB/s", 4), Column("copy", 2)]
    columns += [Column("eager"), Column("compile", 1), Column("calls", 3), *[Column("host us", 5)] * on_gpu]
    out = FittingTable(columns, title=f"{'x'.join(map(str, first.shape))} {first.dtype} on {first.device}", gap=1)
    for row in rows:
        out.add_row(
            row.case,
            f"{row.bytes / 1e6:.0f}",
            f"{row.seconds['ours'].median * 1e3:.3f}",
            f"{row.gigabytes_per_second:.0f}",
            f"{row.share_of_limit:.0%}",
            _ratio(row, "eager"),
            _ratio(row, "compiled"),
            "{ours} : {eager}".format(**(row.launches or row.operators)),
            *([_host(row)] if on_gpu else []),
            style="" if row.right else "red",
        )
    return out


def _host(row: Row) -> str:
    """Microseconds to issue a call of ours and of eager."""
    return " : ".join(f"{1e6 * row.host_seconds[name]:.1f}" for name in ("ours", "eager"))


def _ratio(row: Row, over: str) -> str:
    if not row.right:
        return "WRONG"
    speedup = row.speedup(over)
    return "-" if speedup is None else f"{speedup:.2f}x"


def figures(rows: Sequence[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """What a result file holds."""
    return {
        "kind": "kernels",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel_hash": hash_or_none(),
        "machine": machine_info(),
        "settings": settings,
        "rows": [row.to_json() for row in rows],
    }


def read_result(path: Path) -> dict[str, Any] | None:
    """What a result file holds; ``None`` of a file that is none."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def stale_files(folder: Path) -> list[Path]:
    """Results that were measured with other kernels and do not say so themselves (``"stale": true``)."""
    current = kernel_hash()
    found = []
    for path in sorted(folder.glob("*.json")):
        data = read_result(path) or {}
        if data.get("kernel_hash") not in (None, current) and not data.get("stale"):
            found.append(path)
    return found


def mark_stale(folder: Path) -> list[Path]:
    """Makes the files of `stale_files` say so; returns them."""
    paths = stale_files(folder)
    for path in paths:
        write_json(path, {"stale": True} | (read_result(path) or {}))
    return paths
