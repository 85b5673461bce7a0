"""Time that importing our modules takes beyond torch's own import.

    python bench/import_time.py --json bench/results/import-time.json

Every import is in a fresh process, with and without compiled files of Python; medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from layercache.tools.report.machine import machine_info, write_json

MODULES = ("layercache", "layercache.ops", "layercache.backend")


def milliseconds(module: str, folder: str, keeps: bool) -> float:
    code = f"import time, torch; t = time.perf_counter(); import {module}; print(1e3 * (time.perf_counter() - t))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "PYTHONPYCACHEPREFIX": folder
    }
    options = () if keeps else ("-B",)
    done = subprocess.run([sys.executable, *options, "-c", code], env=environment, capture_output=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    rows = []
    for module in MODULES:
        with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as cold:
            milliseconds(module, warm, keeps=True)
            kept = median(milliseconds(module, warm, keeps=True) for _ in range(args.rounds))
            first = median(milliseconds(module, cold, keeps=False) for _ in range(args.rounds))
        rows.append({"module": module, "ms": kept, "ms_without_compiled_files": first})
        print(f"{module}: {kept:.1f} ms, without compiled files {first:.1f} ms")
    if args.json:
        command = f"python bench/import_time.py --rounds {args.rounds} --json {args.json}"
        write_json(args.json, {"command": command, "machine": machine_info(), "rows": rows})


if __name__ == "__main__":
    main()
