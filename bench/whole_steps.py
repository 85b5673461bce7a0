"""Quality per compute of `layercache.search` without profiles, against methods of the field, on held-out pictures.

    python bench/whole_steps.py --steps 30 --guidance 4 --out bench/results/whole-steps-demo-30-cfg4

Rivals are tuned on the calibration pictures for every budget: MeanCache (both forms, three gammas), TaylorSeer (orders
1 and 2, every interval, six lengths of warm-up), evenly spaced steps that hold the velocity, and as many full steps
without a cache. Writes OUT.json (figures, seeds, settings, machine) and OUT.front.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pareto import load, meancache_points, parser_of, samples
from rich.console import Console
from rich.table import Table

import layercache
from layercache._utils.metrics import summarise
from layercache.methods import TaylorSeer
from layercache.planning.fit import HOLD
from layercache.planning.front import Point, quality
from layercache.planning.rollout import Rollouts, psnr_of, skipping
from layercache.planning.whole_steps import EFFORTS, PICTURES, TAIL
from layercache.tools.report import machine

WARMUPS = (1, 3, 5, 7, 9, 12)


def taylorseer_point(calibration: Rollouts, budget: float, order: int) -> Point | None:
    """The interval and warm-up that are best on the calibration pictures within a budget."""
    tried = []
    for warmup in WARMUPS:
        for interval in range(2, calibration.num_steps):
            schedule = TaylorSeer(interval=interval, order=order, warmup=warmup).schedule(calibration.fingerprint)
            if schedule.used <= budget + 1e-9:
                psnr = calibration.run(schedule).psnr
                tried.append(Point(schedule, f"interval {interval}, warm-up {warmup}", psnr))
                break  # longer intervals compute less
    return max(tried, key=lambda point: quality(point.psnr, TAIL), default=None)


def rivals(calibration: Rollouts, budget: float, count: int) -> Iterator[tuple[str, Point]]:
    """Tuned methods of the field at a budget."""
    yield from meancache_points(calibration, budget)
    for order in (1, 2):
        point = taylorseer_point(calibration, budget, order)
        if point is not None:
            yield f"TaylorSeer, order {order}", point
    last = calibration.num_steps - 1
    computed = sorted({round(k * last / max(1, count - 1)) for k in range(count)})
    rollout = calibration.run(skipping(calibration.fingerprint, computed), HOLD)
    yield "evenly spaced", Point(rollout.schedule, "holding the velocity", rollout.psnr)


def row(name: str, budget: float, used: float, origin: str, psnr: list[float]) -> dict[str, object]:
    summary = summarise(psnr)
    figures = {"mean": summary.mean, "quantile10": summary.quantile10, "worst": min(psnr)}
    return {"name": name, "budget": budget, "used": used, "origin": origin, **figures, "psnr": psnr}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.6, 0.5, 0.33, 0.2])
    parser.add_argument("--effort", choices=list(EFFORTS), default="normal")
    parser.add_argument("--seeds", type=int, default=24, help="held-out pictures, seeds from 0 on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pipe = load(args.model, args.device)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    fitted, held = range(1000, 1000 + PICTURES[args.effort]), range(args.seeds)
    start = time.perf_counter()
    front = layercache.search(
        pipe, samples(fitted), seeds=list(fitted), budgets=args.budgets, effort=args.effort, **call
    )
    seconds = time.perf_counter() - start
    calibration = Rollouts(pipe, samples(fitted), list(fitted), **call)
    judge = Rollouts(pipe, samples(held), list(held), **call)
    rows = []
    for budget in sorted(args.budgets, reverse=True):
        count = int(budget * args.steps + 1e-9)
        for name, point in [("layercache", front.choose(budget)), *rivals(calibration, budget, count)]:
            psnr = list(judge.run(point.schedule).psnr)
            rows.append(row(name, budget, point.used, point.origin, psnr))
        fewer = Rollouts(pipe, samples(held), list(held), **{**call, "num_inference_steps": count})
        pairs = zip(judge.pictures, fewer.pictures, strict=True)
        psnr = [value for full, other in pairs for value in psnr_of(full, other)]
        rows.append(row("fewer steps", budget, count / args.steps, "no cache", psnr))
    figures = {
        "command": "python bench/whole_steps.py " + " ".join(sys.argv[1:]),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "calibration_seeds": list(fitted),
        "held_out_seeds": list(held),
        "machine": machine.machine_info(),
        "notes": list(front.notes),
        "search_seconds": seconds,
        "rows": rows,
    }
    front.save(args.out.with_suffix(".front.json"))
    machine.write_json(args.out.with_suffix(".json"), figures)
    table = Table(
        title=f"{args.model}, {args.steps} steps, guidance {args.guidance:g}: PSNR in dB of {len(held)} pictures"
    )
    for heading in ("budget", "", "used", "mean", "10 %", "worst", "setting"):
        table.add_column(heading)
    for one in rows:
        numbers = [f"{one[key]:.1f}" for key in ("mean", "quantile10", "worst")]
        table.add_row(f"{one['budget']:g}", str(one["name"]), f"{one['used']:.2f}", *numbers, str(one["origin"]))
    Console(width=140).print(table)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
