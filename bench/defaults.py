"""Methods that need no calibration, at the speedup that `layercache.enable(pipe)` aims at: which one is the default.

    python bench/defaults.py --models demo models/m12 models/m20 --out bench/results/defaults-30-cfg4

Every method computes at most the budget's share of the steps, by settings that follow from the budget alone, and makes
the same pictures as the full run's seeds. Universal schedules leave out the runs of a model of the same architecture.
Writes OUT.json (figures, seeds, settings, machine).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pareto import load, samples, write_figures
from rich.console import Console

import layercache
from layercache._utils import metrics
from layercache.methods import FBCache, Uniform, Universal
from layercache.methods.automatic import THRESHOLDS, taylorseer_for
from layercache.models.registry import count_blocks
from layercache.runtime.target import SPEEDUP
from layercache.tools.report.fitting import Column, FittingTable


def methods(num_steps: int, num_blocks: int, budget: float) -> Iterator[tuple[str, Any]]:
    """Every candidate, by name."""
    yield "Universal", Universal(budget=budget)
    for order in (1, 2):
        yield f"TaylorSeer {order}, velocities", taylorseer_for(num_steps, budget, order=order)
        yield f"TaylorSeer {order}, residuals", taylorseer_for(num_steps, budget, ((0, num_blocks),), order)
    yield "FBCache", FBCache(threshold=float(np.interp(budget, list(THRESHOLDS), list(THRESHOLDS.values()))))
    skipped = num_steps - int(budget * num_steps + 1e-9)
    yield "every second step, velocity held", Uniform(interval=2, warmup=num_steps - 2 * skipped + 1)


def drawn(pipe: Any, seeds: int, call: dict[str, Any]) -> np.ndarray:
    """The pictures of the first seeds."""
    found = []
    for batch in samples(range(seeds)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(batch))]
        found.append(metrics.as_pictures(pipe(batch, generator=generators, output_type="np", **call).images))
    return np.concatenate(found)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo"], help="'demo', or folders of examples/train_demo.py")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--budget", type=float, default=1 / SPEEDUP, help="share of the steps that is computed at most")
    parser.add_argument("--seeds", type=int, default=24, help="pictures, seeds from 0 on; at most 24")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, required=True, help="results without suffix")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = []
    for model in args.models:
        pipe = load(model, args.device)
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
        full = drawn(pipe, args.seeds, call)
        for name, method in methods(args.steps, count_blocks(pipe.transformer), args.budget):
            with layercache.enabled(pipe, method) as cache:
                psnr = metrics.psnr(full, drawn(pipe, args.seeds, call))
            rows.append({"model": model, "method": name, "setting": repr(method), "used": cache.report().used})
            rows[-1]["psnr"] = list(psnr)
    write_figures(args, rows)
    table = FittingTable(
        [Column("model", numeric=False), Column("method", numeric=False), Column("used"), Column("PSNR")]
    )
    for row in rows:
        psnr = f"{np.mean(row['psnr']):.1f} ({np.quantile(row['psnr'], 0.1):.1f})"
        table.add_row(row["model"], row["method"], f"{row['used']:.3f}", psnr)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
