"""Time the host spends on a call that goes to a GPU: checked and laid out anew, and as planned.

    python bench/launch_plans.py --json bench/results/launch-plans.json

Needs no GPU: kernels are compiled for one, but a stub of the driver launches nothing, and tensors of the CPU stand for
those of a GPU. So the figures are all that Python does for a call, without Triton's launcher in C and the driver. The
eager operator is `torch.add(x, y, out=z)` of two numbers. Variants are measured in turn on one thread; figures are
medians over the rounds, in microseconds per call.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from layercache import ops
from layercache.ops.dispatch import Kernels
from layercache.ops.plans import ignored
from layercache.tools.bench.cases import CASES
from layercache.tools.bench.results import hash_or_none
from layercache.tools.report.machine import machine_info, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.launches import StubDriver

SHAPE, CALLS = (1, 64, 128), 50


def seconds(call: Callable[[], Any], context: AbstractContextManager) -> float:
    with context:
        call()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) / CALLS


def calls() -> dict[str, tuple[Callable[[], Any], bool]]:
    """Per name a call, and whether it needs gradients; last what the runtime calls for two streams."""

    def of(case: Any) -> tuple[Callable[[], Any], bool]:
        inputs = case.inputs(SHAPE, torch.bfloat16, torch.device("cpu"))
        return lambda: case.ours(inputs), case.gradient

    a, b, c = ([torch.zeros(1, rows, 128, dtype=torch.bfloat16) for rows in (64, 8)] for _ in range(3))
    flag, numbers = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    found = {case.name: of(case) for case in CASES}
    found["the runtime's capture, two streams"] = (lambda: ops.store(a, b, c, flag)), False
    found["the runtime's reuse, two streams"] = (lambda: ops.restore(a, [[r] for r in c], numbers, None)), False
    return found


def measure(rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(StubDriver("90"))
    Kernels.choose = lambda self, tensor: self.launch  # type: ignore[method-assign]
    for kernels in Kernels.every:
        kernels.plans_on_cpu = True
    x, y, z = torch.zeros(3, 2).unbind()
    rows = []
    for name, (call, gradient) in calls().items():
        found: dict[str, list[float]] = {"unplanned_us": [], "planned_us": [], "eager_us": []}
        with torch.set_grad_enabled(gradient):
            for _ in range(rounds + 1):  # the first compiles and plans
                found["unplanned_us"].append(seconds(call, ignored()))
                found["planned_us"].append(seconds(call, nullcontext()))
                found["eager_us"].append(seconds(lambda: torch.add(x, y, out=z), nullcontext()))
        rows.append({"case": name, **{key: 1e6 * median(values[1:]) for key, values in found.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    rows = measure(args.rounds)
    table = Table(title="microseconds of Python per call", title_justify="left")
    for heading in ("case", "unplanned", "planned", "one eager operator"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        table.add_row(row["case"], *(f"{row[key]:.1f}" for key in ("unplanned_us", "planned_us", "eager_us")))
    Console().print(table)
    if args.json:
        head = {"command": " ".join(["python", "bench/launch_plans.py", *sys.argv[1:]])}
        date = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "kernel_hash": hash_or_none()}
        write_json(args.json, {**head, **date, "machine": machine_info(), "shape": SHAPE, "rows": rows})


if __name__ == "__main__":
    main()
