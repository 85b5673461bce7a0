"""What each stage of the search brings: the search with one of them left out, on pictures that nothing was fitted to.

    python bench/ablation.py --steps 30 --guidance 4 --out bench/results/ablation-demo-30-cfg4

All variants have the same eight pictures' full runs. Writes OUT.json (figures, settings, machine) and OUT.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
from pareto import add_options, load, samples, write_figures
from rich.console import Console
from tqdm import tqdm

from layercache._utils.metrics import summarise
from layercache.planning import whole_steps
from layercache.planning.front import Front
from layercache.planning.rollout import Rollouts
from layercache.planning.search import EFFORTS
from layercache.planning.surrogate import FullRuns
from layercache.planning.universal import Universal
from layercache.planning.whole_steps import WholeStepSearch, cost_of, runs_per_budget
from layercache.schedule.schedule import Schedule
from layercache.tools.report.fitting import Column, FittingTable

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "normal": ("normal", {}),
    "quick": ("quick", {}),
    "pictures all weigh the same": ("normal", {"WEIGHTINGS": (0.0, 0.0)}),
    "only the answers measured, no larger ones": ("normal", {"STRESS": (1.0,), "STRESS_LOW": (1.0,)}),
    "first steps not computed densely": (
        "normal",
        {"dense_starts": lambda count, share: [1], "safe_start": lambda count, share: 1},
    ),
}
ALONE = "simulation alone, no cached run"
"""As universal schedules are made, from the pictures' own full runs and other models' answers to drift."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    return parser.parse_args(argv)


def searched(rollouts: Rollouts, counts: list[int], effort: str) -> tuple[list[Schedule], float]:
    """The front's schedules, and their cost in full generations."""
    runs = runs_per_budget(counts, rollouts.num_steps, rollouts.num_pictures, EFFORTS[effort])
    search = WholeStepSearch(rollouts, rollouts.seconds[0])
    points = [tried.point for tried in search.run(counts, runs)]
    front = Front.of(points, (*rollouts.seconds, 0.0), rollouts.runs, [], search.tail)
    cost = cost_of(counts, runs, rollouts.num_steps, rollouts.num_pictures)
    return [front.choose((count + 1e-6) / rollouts.num_steps).schedule for count in counts], cost


def simulated(rollouts: Rollouts, counts: list[int]) -> list[Schedule]:
    """Schedules that the simulation of the full runs gives without a cached run."""
    assert rollouts.samplers is not None
    runs, steps = FullRuns.of(rollouts), rollouts.num_steps
    methods = [Universal(budget=(count + 1e-6) / steps) for count in counts]
    return [method.planned(rollouts.fingerprint, runs) for method in methods]


def rows_of(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    pipe = load(args.model, args.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    held, fitted = range(args.seeds), range(1000, 1008)
    judge, rollouts = (Rollouts(pipe, samples(seeds), list(seeds), **call) for seeds in (held, fitted))
    counts = sorted({int(budget * args.steps + 1e-9) for budget in args.budgets}, reverse=True)
    alone = simulated(rollouts, counts), float(rollouts.num_pictures)
    for name in tqdm([ALONE, *VARIANTS], desc="variants"):
        effort, changes = VARIANTS.get(name, ("", {}))
        with ExitStack() as stack:
            for attribute, value in changes.items():
                stack.enter_context(patch.object(whole_steps, attribute, value))
            schedules, cost = searched(rollouts, counts, effort) if effort else alone
        for count, schedule in zip(counts, schedules, strict=True):
            row = {"variant": name, "generations": cost, "computed": count, "used": schedule.used}
            yield row | {"psnr": judge.run(schedule).psnr}


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Mean and 10 % quantile of every variant over the share computed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        label = f"{name} ({own[0]['generations']:.0f} generations)"
        for axis, measure in zip(axes, ("mean", "quantile10"), strict=True):
            values = [getattr(summarise(row["psnr"]), measure) for row in own]
            axis.plot([row["used"] for row in own], values, "o-", label=label, markersize=4)
    for axis, heading in zip(axes, ("mean", "10 % quantile"), strict=True):
        axis.set(xlabel="share of the steps computed", ylabel="PSNR in dB", title=heading)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = list(rows_of(args))
    title = f"{args.model}, {args.steps} steps, guidance {args.guidance:g}, {args.seeds} other pictures"
    write_figures(args, rows)
    plot(rows, args.out.with_suffix(".png"), title)
    counts = list(dict.fromkeys(row["computed"] for row in rows))
    columns = [Column("variant", numeric=False), *map(Column, ("generations", *map(str, counts)))]
    table = FittingTable(columns, title=f"{title}: PSNR, mean / 10 %", keys=1)
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        cells = [f"{found.mean:.1f} / {found.quantile10:.1f}" for found in (summarise(row["psnr"]) for row in own)]
        table.add_row(name, f"{own[0]['generations']:.1f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
