"""Paths a second that the surrogate of cached runs simulates.

    python bench/surrogate.py --json bench/results/surrogate.json

Of the full runs that are shipped with universal schedules, at 30 and 50 steps; as a search counts them, a path being
simulated for eight pictures, with the forecasts fitted to all, and once more with each picture left out.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

from layercache.planning.fit import Forecast
from layercache.planning.sampler import LinearSampler
from layercache.planning.surrogate import Answers, FullRuns, surrogate_of
from layercache.planning.universal import shipped
from layercache.tools.report.machine import machine_info, write_json

PICTURES, PATHS = 8, 400


def runs_with(steps: int) -> FullRuns:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sigmas = tuple(scheduler.sigmas.tolist())
    found = shipped().at(sigmas, LinearSampler.euler(sigmas))
    full = np.concatenate([found.vectors[:PICTURES], np.zeros((PICTURES, steps + 1, steps))], axis=2)
    vectors = full[..., : steps + 1]  # of as high a rank as those of a search are
    return replace(found, vectors=vectors, samplers=found.samplers[:PICTURES], folds=tuple(range(PICTURES)))


def paths_a_second(steps: int, leave_out: bool, threads: int) -> float:
    runs = runs_with(steps)
    answers = Answers.usual(runs.sigmas, PICTURES)
    assert answers is not None
    surrogate = surrogate_of(runs, answers, Forecast("steer", terms=3, weighting=1.0))
    paths = np.random.default_rng(0).random((PATHS, steps)) < 0.5
    paths[:, 0] = True
    surrogate.simulate(paths[:20], leave_out=leave_out)
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(lambda _: surrogate.simulate(paths, leave_out=leave_out), range(threads)))
        return threads * PATHS / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    rows = [
        {"steps": steps, "leave_out": leave_out, "threads": threads, "paths": paths_a_second(steps, leave_out, threads)}
        for steps in (30, 50)
        for leave_out in (False, True)
        for threads in (1, 2)
    ]
    for row in rows:
        kind = "each left out" if row["leave_out"] else "fitted to all"
        print(f"{row['steps']} steps, {kind}, {row['threads']} threads: {row['paths']:.0f} paths a second")
    if args.json:
        write_json(args.json, {"machine": machine_info(), "pictures": PICTURES, "rows": rows})


if __name__ == "__main__":
    main()
