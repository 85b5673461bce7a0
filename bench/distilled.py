"""What caching still gives of models that were distilled for few steps, on pictures that nothing was fitted to.

    python examples/distil_demo.py --out few-step-models
    python bench/distilled.py --models few-step-models --out bench/results/few-step-distilled

Each model at the steps it was made for, without guidance, every method tuned to each budget as by `layercache compare`.
Writes OUT-4.json and OUT-8.json: the comparison, with its settings and the machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pareto import load

import layercache

METHODS = ("layercache", "meancache", "taylorseer", "uniform", "fewer-steps")
CALIBRATION = 8


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder that examples/distil_demo.py wrote")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=24, help="held-out pictures, seeds from 0 on")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, required=True, help="results, without steps and suffix")
    args = parser.parse_args(argv)
    for steps in args.steps:
        pipe = load(str(args.models / f"{steps}-steps"), args.device)
        table = layercache.compare(
            pipe,
            args.methods,
            budgets=args.budgets,
            seeds=args.seeds,
            calibration=CALIBRATION,
            effort=args.effort,
            batch=args.seeds,
            repeats=1,  # of quality alone
            num_inference_steps=steps,
            guidance_scale=1.0,
        )
        print(table)
        table.save(args.out.with_name(f"{args.out.name}-{steps}.json"))


if __name__ == "__main__":
    main()
