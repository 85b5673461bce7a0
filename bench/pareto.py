"""Quality per compute: searched schedules against MeanCache and plain reuse, on seeds that nothing was fitted to.

    python bench/pareto.py --steps 30 --guidance 4 --out bench/results/pareto-demo-30-cfg4

Writes OUT.json (figures, seeds, settings, machine), OUT.png and OUT.html, the front OUT.front.json, and OUT.map.png,
how much each block changes from step to step. A search that is stopped goes on where it was when the same command is
given again (OUT.journal.json).
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from rich.console import Console

import layercache
from layercache.demo.model import CLASS_NAMES, ClassEncoder
from layercache.demo.pipeline import DemoPipeline, load_demo_pipeline
from layercache.errors import BudgetError
from layercache.methods import meancache
from layercache.planning.fit import HOLD
from layercache.planning.front import Point
from layercache.planning.refit import refit
from layercache.planning.rollout import Rollouts, skipping
from layercache.planning.search import REFIT_TERMS, RESIDUAL_FORECASTS, STEERED
from layercache.tools.report import machine
from layercache.tools.report.front import FrontRow, front_table, save_front_page, save_front_plot
from layercache.tools.report.plots import MapPanel, save_maps

BATCH = 24
GAMMAS = (1.0, 2.0, 5.0)


def load(model: str, device: str | None) -> DemoPipeline:
    """The bundled pipeline, or one that examples/train_demo.py wrote."""
    if model == "demo":
        return load_demo_pipeline(device)
    pipe = DemoPipeline(
        transformer=QwenImageTransformer2DModel.from_pretrained(Path(model) / "transformer", torch_dtype=torch.float32),
        class_encoder=ClassEncoder.from_pretrained(Path(model) / "class_encoder", torch_dtype=torch.float32),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def samples(seeds: range) -> list[list[str]]:
    """Classes of the pictures, a batch a call."""
    names = [CLASS_NAMES[seed % len(CLASS_NAMES)] for seed in seeds]
    return [names[lo : lo + BATCH] for lo in range(0, len(names), BATCH)]


def meancache_points(calibration: Rollouts, budget: float, max_length: int = 9) -> list[tuple[str, Point]]:
    """Both forms of MeanCache at a budget, each with the gamma that is best on the calibration samples."""
    steps = calibration.num_steps
    deviation = meancache.stability_deviation([t.taken for t in calibration.full], calibration.sigmas, max_length)
    found = []
    for form in meancache.FORMS:
        tried = []
        for gamma in GAMMAS:
            try:
                computed, spans = meancache.plan_steps(deviation, int(budget * steps + 1e-9), gamma=gamma)
            except BudgetError:
                continue
            schedule = meancache.MeanCache(tuple(computed), tuple(spans), form).schedule(calibration.fingerprint)
            rollout = calibration.run(schedule)
            tried.append((rollout.quality, gamma, Point(schedule, f"MeanCache {form}, gamma {gamma:g}", rollout.psnr)))
        if tried:
            found.append((f"MeanCache, {form}", max(tried, key=lambda t: t[:2])[2]))
    return found


def group_points(calibration: Rollouts, profiles: dict[str, Any], budget: float) -> list[tuple[str, Point]]:
    """Schedules per group of layers at a budget: as planned, with the forecasts that suit each best, and refitted."""
    found = []
    for name, profile in profiles.items():
        if len(profile.groups) < 2:
            continue
        try:
            planned = [layercache.plan(profile, budget, forecast=residuals) for residuals in RESIDUAL_FORECASTS]
        except BudgetError:
            continue
        rollout = calibration.run(planned[0])
        found.append((name, Point(rollout.schedule, "planned", rollout.psnr)))
        rollouts_made = [
            (calibration.run(schedule, velocities), schedule, velocities)
            for schedule, velocities in product(planned, STEERED)
        ]
        best, schedule, velocities = max(rollouts_made, key=lambda entry: entry[0].quality)
        origin = f"planned, {schedule.made_by['forecast']}, {velocities.name}"
        found.append((f"{name}, steered", Point(best.schedule, origin, best.psnr)))
        refitted = refit(calibration, schedule, "teacher", REFIT_TERMS, velocities)
        found.append((f"{name}, steered, refitted", Point(refitted.schedule, f"{origin}, refitted", refitted.psnr)))
    return found


def held_point(calibration: Rollouts, point: Point) -> Point:
    """The same computed steps, holding the newest velocity in between: what the forecasts are worth."""
    schedule = point.schedule
    computed = [step for step in range(schedule.num_steps) if not schedule.is_skipped(step)]
    rollout = calibration.run(skipping(calibration.fingerprint, computed), HOLD)
    return Point(rollout.schedule, "whole-step reuse", rollout.psnr)


def save_block_map(path: Path, pipe: DemoPipeline, prompts: list[str], seed: int, call: dict) -> None:
    """How similarly the blocks change: relative change of every block's residual from the step before."""
    blocks = [(k, k + 1) for k in range(len(pipe.transformer.transformer_blocks))]
    profile = layercache.calibrate(pipe, [prompts], seeds=[seed], partition=blocks, max_distance=1, max_span=0, **call)
    change = profile.stability()
    spread = np.nanmean(np.nanmax(change, axis=1) / np.nanmin(change, axis=1))
    title = f"relative change per step and block; largest over smallest of a step: {spread:.1f} on average"
    save_maps(path, [MapPanel(title, profile.groups, profile.fingerprint.sigmas, change)])


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Options of what is run: the model, its settings, and where the results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo', or a folder that examples/train_demo.py wrote")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0, help="1 for none")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, required=True, help="results without suffix")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.6, 0.5, 0.4, 0.33, 0.25])
    parser.add_argument("--calibration", type=int, default=24, help="pictures to fit to, seeds from 1000 on")
    parser.add_argument("--seeds", type=int, default=48, help="held-out pictures, seeds from 0 on")
    parser.add_argument("--trials", type=int, default=40, help="exchanges per budget")
    parser.add_argument("--tail", type=float, default=0.5, help="weight of the 10 %% quantile beside the mean")
    parser.add_argument("--partitions", nargs="*", default=["thirds"], help="groups to try besides whole steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pipe = load(args.model, args.device)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    fitted, held = range(1000, 1000 + args.calibration), range(args.seeds)
    profiles = {
        partition: layercache.calibrate(pipe, samples(fitted)[:1], seeds=[fitted[0]], partition=partition, **call)
        for partition in args.partitions or ["whole"]
    }
    front = layercache.search(
        pipe,
        samples(fitted),
        seeds=list(fitted),
        profiles=list(profiles.values()),
        budgets=args.budgets,
        trials=args.trials,
        tail=args.tail,
        resume=args.out.with_suffix(".journal.json"),
        **call,
    )
    calibration = Rollouts(pipe, samples(fitted), list(fitted), **call)
    judge = Rollouts(pipe, samples(held), list(held), **call)
    rows = []
    for budget in sorted(args.budgets, reverse=True):
        try:
            best = front.choose(budget)
        except BudgetError as error:
            print(f"budget {budget}: {error}", file=sys.stderr)
            continue
        entries = [("layercache", best), *meancache_points(calibration, budget)]
        entries += group_points(calibration, profiles, budget)
        if len(best.schedule.groups) == 1:
            entries.append(("same steps, held", held_point(calibration, best)))
        for name, point in entries:
            psnr = judge.run(point.schedule).psnr
            rows.append(FrontRow(name, budget, point.used, point.origin, point.psnr, psnr, front.speedup(point)))
    figures = {
        "command": "python bench/pareto.py " + " ".join(sys.argv[1:]),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "calibration_seeds": list(fitted),
        "held_out_seeds": list(held),
        "machine": machine.machine_info(),
        "runs": front.tried,
        "notes": list(front.notes),
        "rows": [row.to_json() for row in rows],
        "schedules": {
            f"{r.name} {r.budget}": [s for s in range(args.steps) if not p.is_skipped(s)]
            for r, p in ((r, front.choose(r.budget).schedule) for r in rows if r.name == "layercache")
        },
    }
    save_block_map(args.out.with_suffix(".map.png"), pipe, samples(fitted)[0], fitted[0], call)
    front.save(args.out.with_suffix(".front.json"))
    machine.write_json(args.out.with_suffix(".json"), figures)
    title = f"{args.model}, {args.steps} steps, guidance {args.guidance:g}, {len(held)} held-out pictures"
    save_front_plot(args.out.with_suffix(".png"), rows, title)
    save_front_page(args.out.with_suffix(".html"), rows, title)
    Console(width=140).print(front_table(rows, title))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
