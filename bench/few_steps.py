"""What caching still gives in few steps, beside fewer steps without a cache, on pictures that nothing was fitted to.

    python bench/few_steps.py --steps 4 8 --out bench/results/few-steps-demo
    python bench/few_steps.py --searches --steps 30 --budgets 0.5 0.33 0.2 --out bench/results/free-levels-demo
    python bench/few_steps.py --baselines --steps 30 --budgets 0.7 0.6 0.5 0.33 0.2 --out bench/results/fewer-steps-demo

For every number of steps and every budget: the searched schedule, the same with its noise levels free, and as many full
steps without a cache, at the sampler's own noise levels and at those found on the search's pictures
(`layercache.tools.compare.fewer`). Writes OUT.json (figures, settings, machine).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from pareto import add_options, load, samples, write_figures
from rich.console import Console

import layercache
from layercache.planning.front import Front
from layercache.planning.rollout import Rollouts, psnr_of
from layercache.planning.search import PICTURES
from layercache.tools.compare.entries import CalibratedModel, CallArguments
from layercache.tools.report.front import FrontRow, front_table

EFFORT = "normal"
BASELINES = {"fewer steps": "fewer-steps", "fewer steps, free noise levels": "fewer-steps-sigmas"}


def fronts(model: CalibratedModel) -> Iterator[tuple[str, Front]]:
    """The search with the noise levels as they are, and free; what both run is run once."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"seeds": model.seeds, "budgets": model.budgets, "effort": EFFORT, "resume": folder, **model.call}
        for name, sigmas in (("layercache", None), ("layercache, free noise levels", "free")):
            yield name, layercache.search(model.pipeline, model.prompts, sigmas=sigmas, progress=False, **settings)


def psnr_with(judge: Rollouts, arguments: CallArguments) -> tuple[float, ...]:
    """Of calls with other arguments against the full pictures."""
    found: list[float] = []
    for full, prompts, seeds in zip(judge.pictures, judge.prompts, judge.seeds, strict=True):
        other = Rollouts(judge.pipeline, [prompts], seeds, **{**judge.call, **arguments.arguments})
        found += [value for pictures in other.pictures for value in psnr_of(full, np.asarray(pictures))]
    return tuple(found)


def rows_of_steps(args: argparse.Namespace, pipe: object, steps: int) -> Iterator[FrontRow]:
    """All methods in a run of so many steps, at every budget that is a step at least."""
    call = {"num_inference_steps": steps, "guidance_scale": args.guidance}
    fitted, held = range(1000, 1000 + PICTURES[EFFORT]), range(args.seeds)
    budgets = [budget for budget in args.budgets if budget * steps >= 1]
    model = CalibratedModel(pipe, samples(fitted), list(fitted), call, budgets, EFFORT)
    judge = Rollouts(pipe, samples(held), list(held), **call)
    for name, front in () if args.baselines else fronts(model):
        for budget in budgets:
            point = front.choose(budget)
            psnr = judge.run(point.schedule).psnr
            yield FrontRow(name, budget, point.used, point.origin, point.psnr, psnr, None, point.expected)
    for name, method in () if args.searches else BASELINES.items():
        for budget in budgets:
            plan, setting = model.made(method, budget)
            count = int(budget * steps + 1e-9)
            yield FrontRow(name, budget, count / steps, setting, (), psnr_with(judge, plan))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    add_options(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--searches", action="store_true", help="the searches alone")
    parser.add_argument("--baselines", action="store_true", help="fewer steps alone, without the searches")
    parser.set_defaults(budgets=[0.75, 0.5, 0.25])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pipe = load(args.model, args.device)
    pipe.set_progress_bar_config(disable=True)
    start, found = time.perf_counter(), []
    for steps in args.steps:
        rows = list(rows_of_steps(args, pipe, steps))
        Console().print(front_table(rows, f"{args.model}, {steps} steps, guidance {args.guidance:g}"))
        found += [{"steps": steps, **row.to_json()} for row in rows]
    write_figures(args, found, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
