"""Universal schedules: the full runs that are shipped, and how schedules made of them do on a model left out.

    python bench/universal.py --models demo examples/deep_model models/m12 models/m20 \
        --write layercache/planning/universal.safetensors
    python bench/universal.py --models examples/deep_model models/m12 models/m20 --target demo \
        --out bench/results/universal-demo-30-cfg4

The first makes the file: of every model a few pictures with guidance and without, in 100 steps, as factors of the inner
products of their velocities. The second makes schedules for a model of the runs of others alone, and runs them on
pictures, beside MeanCache (both forms, the best of three gammas), which was calibrated on eight pictures of that model.
Writes OUT.json (figures, settings, machine).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from pareto import add_options, load, meancache_points, samples, write_figures
from rich.console import Console

from layercache.models.registry import config_hash
from layercache.planning.rollout import Rollouts
from layercache.planning.surrogate import FullRuns
from layercache.planning.universal import ModelRuns, Universal
from layercache.tools.report.fitting import Column, FittingTable

MEASURES = np.mean, lambda psnr: np.quantile(psnr, 0.1), min
STEPS, RANK, FIRST_SEED = 100, 16, 3000
GUIDANCE = (4.0, 1.0)


def runs_of(models: list[str], pictures: int, device: str | None) -> ModelRuns:
    """Full runs of the models, so many pictures of each with guidance and without."""
    factors, folds, hashes, sigmas = [], list[int](), list[str](), ()
    for number, model in enumerate(models):
        pipe = load(model, device)
        pipe.set_progress_bar_config(disable=True)
        hashes.append(str(config_hash(pipe.transformer)))
        for k, guidance in enumerate(GUIDANCE):
            seeds = list(range(FIRST_SEED + k * pictures, FIRST_SEED + (k + 1) * pictures))
            call = {"num_inference_steps": STEPS, "guidance_scale": guidance}
            runs = FullRuns.of(Rollouts(pipe, samples(seeds), seeds, **call))
            factors.append(runs.vectors[..., -RANK:])
            folds += [number] * pictures
            sigmas = runs.sigmas
    return ModelRuns(np.array(sigmas), np.concatenate(factors), tuple(hashes), tuple(folds))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="that the full runs are of")
    parser.add_argument("--pictures", type=int, default=6, help="of each, with guidance and without")
    parser.add_argument("--write", type=Path, default=None, help="the file of the full runs")
    parser.add_argument("--target", default=None, help="a model that schedules are run on")
    add_options(parser, needs_out=False)
    return parser.parse_args(argv)


def judged(args: argparse.Namespace, runs: ModelRuns) -> list[dict]:
    """What universal schedules give on the target's pictures, per budget."""
    pipe = load(args.target, args.device)
    pipe.set_progress_bar_config(disable=True)
    held, fitted = range(args.seeds), range(1000, 1008)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    judge, calibration = (Rollouts(pipe, samples(seeds), list(seeds), **call) for seeds in (held, fitted))
    assert judge.samplers is not None
    rows = []
    for budget in sorted(args.budgets, reverse=True):
        start = time.perf_counter()
        schedule = Universal(budget=budget).schedule_for(judge.fingerprint, judge.samplers[0], runs)
        row = {"budget": budget, "used": schedule.used, "seconds": time.perf_counter() - start}
        row |= {"psnr": judge.run(schedule).psnr}
        row |= {name: judge.run(point.schedule).psnr for name, point in meancache_points(calibration, budget)}
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    runs = runs_of(args.models, args.pictures, args.device)
    if args.write:
        runs.save(args.write)
    if not args.target:
        return
    rows = judged(args, runs)
    if args.out:
        write_figures(args, rows)
    title = f"{args.target}, {args.steps} steps, guidance {args.guidance:g}: PSNR, mean / 10 % / worst"
    headings = ("budget", "universal", "MeanCache, calibrated", "margin")
    table = FittingTable([Column(heading) for heading in headings], title=title, keys=1)
    for row in rows:
        rivals = [psnr for name, psnr in row.items() if name.startswith("MeanCache")]
        best = [max(map(f, rivals)) for f in MEASURES]
        own = [f(row["psnr"]) for f in MEASURES]
        told = [" / ".join(f"{v:.1f}" for v in values) for values in (own, best)]
        margin = " / ".join(f"{a - b:+.1f}" for a, b in zip(own, best, strict=True))
        table.add_row(f"{row['budget']:.2f}", *told, margin)
    Console().print(table)


if __name__ == "__main__":
    main()
