"""A Learning-to-Cache router trained on the bundled model, against as many modules left out by chance.

    python bench/router.py --out bench/results/router-demo

Writes OUT.json (losses, figures, seeds, settings, machine) and OUT.png (the loss curve).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import layercache
from layercache._utils import metrics
from layercache.demo.model import CLASS_NAMES
from layercache.demo.pipeline import load_demo_pipeline
from layercache.methods import l2c
from layercache.schedule.module_schedule import ModuleSchedule
from layercache.tools.report import machine, plots


def classes(numbers: range) -> list[str]:
    return [CLASS_NAMES[number % len(CLASS_NAMES)] for number in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=24, help="held-out pictures, seeds from 1000 on")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--shuffles", type=int, default=3, help="random plans for each threshold")
    parser.add_argument("--out", type=Path, required=True, help="results without suffix")
    args = parser.parse_args()
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    prompts = [classes(range(lo, lo + args.batch)) for lo in range(0, len(CLASS_NAMES), args.batch)]
    router = l2c.LearningToCache(rounds=args.rounds).train(pipe, prompts, output_type="latent", **call)
    seeds = range(1000, 1000 + args.seeds)

    def draw(schedule: ModuleSchedule | None) -> np.ndarray:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        arguments = {**call, "generator": generators, "output_type": "np"}
        if schedule is None:
            return pipe(classes(seeds), **arguments).images
        with layercache.enabled(pipe, schedule):
            return pipe(classes(seeds), **arguments).images

    full = draw(None)
    rows = []
    for threshold in args.thresholds:
        schedule = router.schedule(threshold)
        learned = metrics.psnr(full, draw(schedule))
        chance = [
            metrics.psnr(full, draw(l2c.random_router(router, seed).schedule(threshold)))
            for seed in range(args.shuffles)
        ]
        row = {
            "threshold": threshold,
            "used": schedule.used,
            "cached_modules": sum(not c for step in schedule.computed for c in step),
            "learned": asdict(metrics.summarise(learned)),
            "random": [asdict(metrics.summarise(values)) for values in chance],
        }
        rows.append(row)
        mean = np.mean([entry["mean"] for entry in row["random"]])
        print(f"{threshold:g}: used {schedule.used:.3f}, learned {row['learned']['mean']:.2f} dB, random {mean:.2f} dB")
    figures = {
        "command": "python bench/router.py " + " ".join(sys.argv[1:]),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": machine.machine_info(),
        "losses": router.losses,
        "modules": len(router.units),
        "rows": rows,
    }
    machine.write_json(args.out.with_suffix(".json"), figures)
    plots.save_losses(args.out.with_suffix(".png"), router.losses, len(router.units))


if __name__ == "__main__":
    main()
