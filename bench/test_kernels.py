"""Every op form, by pytest-benchmark: ``pytest bench/ --benchmark-json=FILE``, on the CPU or a GPU.

LAYERCACHE_BENCH_SHAPE (such as 1x4096x3072) and LAYERCACHE_BENCH_DTYPE change what is measured,
LAYERCACHE_BENCH_COMPILE=1 adds torch.compile. Variants are measured
one after the other here; `layercache bench kernels` measures them in turn and is the one to quote.
"""

from __future__ import annotations

import os

import pytest
import torch

from layercache.tools.bench.case import Case
from layercache.tools.bench.cases import CASES
from layercache.tools.bench.measure import TOLERANCE, keep_memory

SHAPE = tuple(int(size) for size in os.environ.get("LAYERCACHE_BENCH_SHAPE", "1x1024x1152").split("x"))
DTYPE = getattr(torch, os.environ.get("LAYERCACHE_BENCH_DTYPE", "bfloat16"))
COMPILE = os.environ.get("LAYERCACHE_BENCH_COMPILE") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", autouse=True)
def kept_memory() -> None:
    keep_memory()


@pytest.mark.parametrize("variant", ["ours", "eager", "compile"] if COMPILE else ["ours", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels(benchmark, case: Case, variant: str) -> None:
    inputs = case.inputs(SHAPE, DTYPE, DEVICE)
    assert case.error(inputs) <= TOLERANCE[DTYPE]
    with torch.set_grad_enabled(case.gradient):
        torch._dynamo.reset()
        run = {"ours": lambda: case.ours, "eager": lambda: case.eager, "compile": case.compile}[variant]()

        def call() -> None:
            run(inputs)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        size = case.bytes(SHAPE, DTYPE)
        benchmark.group = case.name
        benchmark.extra_info |= {"bytes": size, "shape": SHAPE, "dtype": str(DTYPE), "device": DEVICE.type}
        benchmark.pedantic(call, rounds=15, iterations=4, warmup_rounds=2)
        benchmark.extra_info["gigabytes_per_second"] = size / benchmark.stats.stats.median / 1e9
