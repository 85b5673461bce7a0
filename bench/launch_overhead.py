"""Time the host spends on putting one call on a GPU: by Triton's launcher, repeated, and one eager operator beside it.

    python bench/launch_overhead.py --json bench/results/launch-host.json

Needs no GPU: a libcuda.so.1 that does nothing stands in (fake_driver.py, a C compiler is needed), so what the real
driver takes for a launch, some two microseconds, is in none of the figures. The eager operator is
`torch.add(x, y, out=z)` of two numbers on the CPU, which costs about what PyTorch does before it launches anything.
Variants are measured in turn on one thread; figures are medians over the rounds, in microseconds per call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import fake_driver

SHAPE = (1, 64, 128)
CALLS = 200


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row per form of an op; in a process that finds the stand-in."""
    import torch

    from layercache.ops.dispatch import Kernels
    from layercache.tools.bench.cases import CASES

    torch.set_num_threads(1)
    driver = fake_driver.stand_in(watch=False)
    x, y, z = torch.zeros(3, 2).unbind()
    rows = []
    for case in CASES:
        inputs = case.inputs(SHAPE, torch.bfloat16, torch.device("cpu"))

        def run(inputs: Any = inputs, case: Any = case) -> None:
            case.ours(inputs)

        variants = {"triton": run, "repeated": run, "eager": lambda: torch.add(x, y, out=z)}
        found: dict[str, list[float]] = {name: [] for name in variants}
        repeatable = {kernels: kernels.repeatable for kernels in Kernels.every}
        with torch.set_grad_enabled(case.gradient):
            for _ in range(rounds + 1):  # the first compiles, and writes down what is repeated
                for name, call in variants.items():
                    for kernels, flag in repeatable.items():
                        kernels.use(name == "repeated" and flag)
                    call()
                    found[name].append(seconds(call))
        for kernels, flag in repeatable.items():
            kernels.use(flag)
        driver.forget()
        run()
        figures = {f"{name}_us": 1e6 * median(values[1:]) for name, values in found.items()}
        rows.append({"case": case.name, "op": case.op, "launches": len(driver.launches()), **figures})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.rounds)))
        return

    from rich.console import Console
    from rich.table import Table

    from layercache.tools.bench.results import hash_or_none
    from layercache.tools.report.machine import machine_info, write_json

    with tempfile.TemporaryDirectory() as folder:
        output = fake_driver.run_child(Path(__file__), Path(folder), "--child", "--rounds", str(args.rounds))
    rows = json.loads(output.splitlines()[-1])
    table = Table(title="microseconds of the host per call, without the driver's", title_justify="left")
    for heading in ("case", "launches", "by Triton", "repeated", "one eager operator"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        figures = [f"{row[name]:.1f}" for name in ("triton_us", "repeated_us", "eager_us")]
        table.add_row(row["case"], str(row["launches"]), *figures)
    Console().print(table)
    if args.json:
        found = {
            "command": " ".join(["python", "bench/launch_overhead.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "kernel_hash": hash_or_none(),
            "machine": machine_info(),
            "shape": SHAPE,
            "rows": rows,
        }
        write_json(args.json, found)


if __name__ == "__main__":
    main()
