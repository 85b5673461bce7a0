"""Wall clock of the cached demo pipeline against what its schedule allows.

    python bench/end_to_end.py --json bench/results/end-to-end-cpu.json

The share of time outside the blocks is measured in the same run, so the speedup that a used share
``u`` allows is ``total / (total - blocks * (1 - u))``. Full and cached generations alternate; the
figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import layercache
from layercache._utils.files import write_atomically
from layercache.demo.model import CLASS_NAMES
from layercache.demo.pipeline import DemoPipeline, load_demo_pipeline
from layercache.tools.report.machine import machine_info


def generate(pipe: DemoPipeline, prompts: list[str], steps: int, seed: int) -> float:
    """Seconds of one generation."""
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    pipe(prompts, num_inference_steps=steps, generator=generator, output_type="latent")
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.6, 0.5, 0.4])
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    pipe = load_demo_pipeline()
    if torch.cuda.is_available():
        pipe.to("cuda")
    pipe.set_progress_bar_config(disable=True)
    prompts = [CLASS_NAMES[k % len(CLASS_NAMES)] for k in range(args.batch)]
    generate(pipe, prompts, args.steps, 0)
    calibration = [prompts, prompts[::-1]]
    profile = layercache.calibrate(pipe, calibration, num_inference_steps=args.steps)
    blocks = args.steps * sum(profile.group_seconds)
    share = blocks / (blocks + args.steps * profile.fixed_seconds)
    rows = []
    for budget in args.budgets:
        schedule = layercache.plan(profile, budget)
        full, cached = [], []
        for round_ in tqdm(range(args.rounds), desc=f"budget {budget:g}"):
            full.append(generate(pipe, prompts, args.steps, round_))
            with layercache.enabled(pipe, schedule):
                cached.append(generate(pipe, prompts, args.steps, round_))
        allowed = 1 / (1 - share * (1 - schedule.used))
        speedup = median(full) / median(cached)
        rows.append(
            {
                "budget": budget,
                "used": schedule.used,
                "seconds_full": median(full),
                "seconds_cached": median(cached),
                "speedup": speedup,
                "speedup_allowed": allowed,
                "share_of_allowed": speedup / allowed,
            }
        )
        print(f"used {schedule.used:.3f}: {speedup:.2f}x of {allowed:.2f}x allowed = {speedup / allowed:.1%}")
    result = {
        "settings": {"batch": args.batch, "steps": args.steps, "rounds": args.rounds, "guidance_scale": 4.0},
        "machine": machine_info(),
        "block_share": share,
        "rows": rows,
    }
    if args.json is not None:
        text = json.dumps(result, indent=1, default=str) + "\n"
        write_atomically(args.json, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
