"""Schedules learnt from four generations, compared with searched ones, on pictures that nothing was fitted to.

    python bench/learn.py --front bench/results/pareto-demo-30-cfg4.front.json --out bench/results/learn-demo-30-cfg4

For every budget the pipeline is used as its users do: `layercache.enable(pipe, budget=..., learn=4)`, four
generations, and the fifth, before which the fit runs. The schedule that the fifth ran by is then run on other
pictures, as is the front's best at that budget. Writes OUT.json (figures, costs, seeds, settings, machine).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pareto import add_options, load, samples, write_figures
from rich.console import Console

import layercache
from layercache.demo.model import CLASS_NAMES
from layercache.planning.learnt_files import HOME
from layercache.planning.rollout import Rollouts
from layercache.tools.report.fitting import Column, FittingTable


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--front", type=Path, default=None, help="of layercache.search, to compare with")
    parser.add_argument("--first", type=int, default=1000, help="seed of the first generation that is learnt from")
    return parser.parse_args(argv)


def learnt(pipe, budget: float, first: int, call: dict):  # type: ignore[no-untyped-def]
    """The point that is learnt from four generations, and the seconds of the fit."""
    with layercache.enabled(pipe, budget=budget, learn=4) as cache:
        for seed in range(first, first + 5):
            start = time.perf_counter()
            pipe(CLASS_NAMES[seed % len(CLASS_NAMES)], generator=torch.Generator("cpu").manual_seed(seed), **call)
            seconds = time.perf_counter() - start
        (found,) = cache.known.values()  # type: ignore[attr-defined]
    return found.point, seconds


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pipe = load(args.model, args.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    held = range(args.seeds)
    judge = Rollouts(pipe, samples(held), list(held), **call)
    front = None if args.front is None else layercache.Front.load(args.front)
    rows = []
    for budget in sorted(args.budgets, reverse=True):
        point, seconds = learnt(pipe, budget, args.first, call)
        row = {"budget": budget, "used": point.used, "origin": point.origin, "fifth_seconds": seconds}
        row |= {"expected": point.expected, "psnr": judge.run(point.schedule).psnr}
        if front is not None:
            row["searched"] = judge.run(front.choose(budget).schedule).psnr
        rows.append(row)
    write_figures(args, rows)
    title = f"{args.model}, {args.steps} steps, guidance {args.guidance:g}: PSNR, mean / 10 % / worst"
    table = FittingTable([Column(heading) for heading in ("budget", "learnt from 4", "searched")], title=title, keys=1)
    for row in rows:
        found = [row["psnr"], row.get("searched", ())]
        told = [f"{np.mean(v):.1f} / {np.quantile(v, 0.1):.1f} / {min(v):.1f}" if len(v) else "" for v in found]
        table.add_row(f"{row['budget']:.2f}", *told)
    Console().print(table)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:  # nothing is known from before
        os.environ[HOME] = home
        main()
