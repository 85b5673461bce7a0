"""Quality per compute: searched schedules against tuned methods of the field, on pictures that nothing was fitted to.

    python bench/pareto.py --steps 30 --guidance 4 --out bench/results/pareto-demo-30-cfg4

Every rival is tuned for every budget on the pictures that the search is fitted to: MeanCache (both forms, three
gammas), TaylorSeer (orders 1 and 2, every interval, six lengths of warm-up, four of full steps at the end), FBCache and
DBCache (thresholds), evenly spaced steps that hold the velocity, and as many full steps without a cache. Writes
OUT.json (figures, seeds, settings, machine), OUT.png and OUT.html, and the front OUT.front.json. The rivals do not
depend on the search: with --rivals their rows are taken from the results of an earlier run with the same model, steps,
guidance and pictures, but for those of --again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from rich.console import Console

import layercache
from layercache.demo.model import CLASS_NAMES, ClassEncoder
from layercache.demo.pipeline import DemoPipeline, load_demo_pipeline
from layercache.errors import BudgetError
from layercache.methods import TaylorSeer, meancache
from layercache.planning.fit import HOLD
from layercache.planning.front import Point, quality
from layercache.planning.rollout import Rollouts, psnr_of, skipping
from layercache.planning.search import EFFORTS, PICTURES
from layercache.planning.whole_steps import TAIL
from layercache.tools.compare.entries import CalibratedModel
from layercache.tools.report import machine
from layercache.tools.report.front import FrontRow, front_table, save_front_page, save_front_plot

BATCH = 24
GAMMAS = (1.0, 2.0, 5.0)
WARMUPS = (1, 3, 5, 7, 9, 12)
LAST_STEPS = (0, 1, 3, 5)
RIVALS = ("MeanCache", "TaylorSeer", "evenly spaced", "FBCache", "DBCache", "fewer steps")
DYNAMIC = {"fbcache": "FBCache", "dbcache": "DBCache"}


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


# --- rivals ----------------------------------------------------------------------------------------------------


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
            tried.append((rollout.quality, gamma, Point(schedule, f"gamma {gamma:g}", rollout.psnr)))
        if tried:
            found.append((f"MeanCache, {form}", max(tried, key=lambda t: t[:2])[2]))
    return found


def taylorseer_points(calibration: Rollouts, budget: float) -> Iterator[tuple[str, Point]]:
    """Both orders at a budget, with the interval, warm-up and full steps at the end that are best for order 2."""
    steps, fingerprint = calibration.num_steps, calibration.fingerprint
    tried = []
    for warmup, last in product(WARMUPS, LAST_STEPS):
        for interval in range(2, steps):
            method = TaylorSeer(interval=interval, order=2, warmup=warmup, stop=steps - last)
            if method.schedule(fingerprint).used <= budget + 1e-9:
                tried.append((_quality(calibration, method), method))
                break  # longer intervals compute less
    tried.sort(key=lambda pair: pair[0], reverse=True)
    lower = [replace(method, order=1) for _, method in tried[:3]]
    for order, methods in ((1, lower), (2, [method for _, method in tried[:1]])):
        if methods:
            best = max(methods, key=lambda method: _quality(calibration, method))
            origin = f"interval {best.interval}, warm-up {best.warmup}, last {steps - (best.stop or steps)}"
            schedule = best.schedule(fingerprint)
            yield f"TaylorSeer, order {order}", Point(schedule, origin, calibration.run(schedule).psnr)


def _quality(calibration: Rollouts, method: TaylorSeer) -> float:
    return quality(calibration.run(method.schedule(calibration.fingerprint)).psnr, TAIL)


def planned_rivals(
    calibration: Rollouts, budget: float, count: int, wanted: Sequence[str]
) -> Iterator[tuple[str, Point]]:
    """Tuned methods that plan ahead, at a budget."""
    if "MeanCache" in wanted:
        yield from meancache_points(calibration, budget)
    if "TaylorSeer" in wanted:
        yield from taylorseer_points(calibration, budget)
    if "evenly spaced" in wanted:
        last = calibration.num_steps - 1
        computed = sorted({round(k * last / max(1, count - 1)) for k in range(count)})
        rollout = calibration.run(skipping(calibration.fingerprint, computed), HOLD)
        yield "evenly spaced", Point(rollout.schedule, "holding the velocity", rollout.psnr)


def dynamic_rivals(model: CalibratedModel, judge: Rollouts, budget: float, wanted: Sequence[str]) -> Iterator[FrontRow]:
    """Tuned methods that decide as they run, at a budget; a picture a call, since a batch would decide together."""
    seeds = [seed for batch in judge.seeds for seed in batch]
    for name, title in DYNAMIC.items():
        if title not in wanted:
            continue
        try:
            plan, setting = model.made(name, budget)
        except BudgetError:
            continue
        psnr, used = [], []
        full = np.concatenate(judge.pictures)
        for number, seed in enumerate(seeds):
            with layercache.enabled(model.pipeline, plan) as cache:
                generator = torch.Generator("cpu").manual_seed(seed)
                prompt = CLASS_NAMES[seed % len(CLASS_NAMES)]
                images = model.pipeline(prompt, generator=generator, **{**model.call, "output_type": "np"}).images
                used.append(cache.report().used)
            psnr += psnr_of(full[number : number + 1], np.asarray(images, dtype=np.float64))
        yield FrontRow(title, budget, float(np.mean(used)), setting, (), tuple(psnr))


def earlier_rivals(path: Path, args: argparse.Namespace) -> list[FrontRow]:
    """The rivals' rows of an earlier run, which must have had the same model and pictures."""
    found = json.loads(path.read_text())
    for name in ("model", "steps", "guidance", "seeds"):
        if found["settings"][name] != getattr(args, name):
            raise SystemExit(f"{path} is of {name} {found['settings'][name]}, not {getattr(args, name)}")
    return [
        FrontRow(row["name"], row["budget"], row["used"], row["origin"], (), tuple(row["held_out_psnr"]))
        for row in found["rows"]
        if not row["name"].startswith(("layercache", *args.again))
    ]


def fewer_steps(judge: Rollouts, budget: float, count: int) -> FrontRow:
    """As many full steps as the budget allows, without a cache."""
    batches, seeds = judge.prompts, [seed for batch in judge.seeds for seed in batch]
    fewer = Rollouts(judge.pipeline, batches, seeds, **{**judge.call, "num_inference_steps": count})
    pairs = zip(judge.pictures, fewer.pictures, strict=True)
    psnr = tuple(value for full, other in pairs for value in psnr_of(full, other))
    return FrontRow("fewer steps", budget, count / judge.num_steps, "no cache", (), psnr)


# --- the comparison ------------------------------------------------------------------------------------------------


def command() -> str:
    """What this process was started with."""
    return f"python bench/{Path(sys.argv[0]).name} " + " ".join(sys.argv[1:])


def write_figures(args: argparse.Namespace, rows: list[dict], **more: object) -> None:
    """OUT.json, with what it takes to get the same again."""
    figures = {
        "command": command(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": machine.machine_info(),
        **more,
        "rows": rows,
    }
    machine.write_json(args.out.with_suffix(".json"), figures)


def add_options(parser: argparse.ArgumentParser, needs_out: bool = True) -> None:
    """Options of every comparison of this kind."""
    parser.add_argument("--model", default="demo", help="'demo', or a folder that examples/train_demo.py wrote")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0, help="1 for none")
    parser.add_argument("--device", default=None)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.6, 0.5, 0.33, 0.2])
    parser.add_argument("--seeds", type=int, default=24, help="held-out pictures, seeds from 0 on")
    parser.add_argument("--out", type=Path, required=needs_out, help="results without suffix")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--effort", choices=list(EFFORTS), default="normal")
    rivals = parser.add_mutually_exclusive_group()
    rivals.add_argument("--ours", action="store_true", help="leave out the rivals")
    rivals.add_argument("--rivals", type=Path, default=None, help="results whose rivals are shown")
    parser.add_argument("--again", nargs="+", choices=RIVALS, default=[], help="of --rivals, those to tune anew")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pipe = load(args.model, args.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    fitted, held = range(1000, 1000 + PICTURES[args.effort]), range(args.seeds)
    start = time.perf_counter()
    front = layercache.search(
        pipe, samples(fitted), seeds=list(fitted), budgets=args.budgets, effort=args.effort, **call
    )
    seconds = time.perf_counter() - start
    calibration = Rollouts(pipe, samples(fitted), list(fitted), **call)
    judge = Rollouts(pipe, samples(held), list(held), **call)
    model = CalibratedModel(pipe, samples(fitted), list(fitted), call, args.budgets)
    wanted = args.again if args.ours or args.rivals else RIVALS
    rows: list[FrontRow] = earlier_rivals(args.rivals, args) if args.rivals else []
    for budget in sorted(args.budgets, reverse=True):
        count = int(budget * args.steps + 1e-9)
        points = [("layercache", front.choose(budget))]
        points += planned_rivals(calibration, budget, count, wanted)
        for name, point in points:
            psnr = judge.run(point.schedule).psnr
            speedup = front.speedup(point)
            rows.append(FrontRow(name, budget, point.used, point.origin, point.psnr, psnr, speedup, point.expected))
        rows += dynamic_rivals(model, judge, budget, wanted)
        if "fewer steps" in wanted:
            rows.append(fewer_steps(judge, budget, count))
    write_figures(
        args,
        [row.to_json() for row in rows],
        calibration_seeds=list(fitted),
        held_out_seeds=list(held),
        notes=list(front.notes),
        search_seconds=seconds,
        seconds=time.perf_counter() - start,
    )
    front.save(args.out.with_suffix(".front.json"))
    title = f"{args.model}, {args.steps} steps, guidance {args.guidance:g}, {len(held)} held-out pictures"
    save_front_plot(args.out.with_suffix(".png"), rows, title)
    settings = {"front": front, "notes": front.notes, "commands": [command()]}
    save_front_page(args.out.with_suffix(".html"), rows, title, **settings)
    Console().print(front_table(rows, title))


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
