"""Pictures of the bundled model for the documentation site: full, cached and their differences, drawn at build time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import layercache
from layercache._utils.metrics import psnr
from layercache.demo.model import CLASS_NAMES
from layercache.demo.pipeline import DemoPipeline, load_demo_pipeline
from layercache.methods import FBCache, TaylorSeer, Uniform
from layercache.planning.front import Front
from layercache.tools.report.plots import PictureRow, difference, save_pictures

FRONT = Path(__file__).resolve().parents[1] / "bench" / "results" / "pareto-demo-30-cfg4.front.json"
BUDGETS = (0.6, 0.5, 0.33, 0.2)
STEPS = 30
SHOWN = 6  # pictures, each of a class of its own
METHODS = {
    "TaylorSeer, every second step": TaylorSeer(interval=2),
    "every second step repeats the last": Uniform(interval=2),
    "FBCache": FBCache(threshold=0.1),
}

PAGE = """# Gallery

Drawn when this site was built: {shown} pictures of the bundled model (32 x 32 pixels, {steps} steps, guidance 4), each
with a seed that no schedule was fitted to. Every plan draws the same seeds; "difference" is the absolute one from
the full run, four times as strong as it is. The numbers are the PSNR in dB; above about 55 dB pictures of 8 bit hardly
differ. *Used* is the share of the blocks' time that was computed.

## Searched schedules

The schedules are those of
[one search]({host}/blob/main/bench/results/pareto-demo-30-cfg4.front.json), see [planning](planning.md).

{budgets}

## Other methods

Untuned, as their settings stand in the headings; [comparing](guides/comparing.md) tunes each to a budget.

{methods}
"""


def draw(pipe: DemoPipeline) -> np.ndarray:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(SHOWN)]
    names = list(CLASS_NAMES[:SHOWN])
    return pipe(names, STEPS, 4.0, generator=generators, output_type="np").images


def drawn(pipe: DemoPipeline, title: str, plan: object, full: np.ndarray, path: Path) -> str:
    """Draws the pictures by a plan; a part of the page."""
    with layercache.enabled(pipe, plan) as cache:
        cached = draw(pipe)
    used = cache.report().used
    captions = [f"{value:.1f}" for value in psnr(full, cached)]
    rows = [
        PictureRow("full", full),
        PictureRow("cached", cached, captions),
        PictureRow("difference", difference(full, cached, gain=4.0)),
    ]
    save_pictures(path, rows, CLASS_NAMES[:SHOWN])
    return f"### {title}\n\n*used {used:.2f}*\n\n![full, cached and their difference: {title}](gallery/{path.name})\n"


def write_page(pages: Path, host: str) -> None:
    """Writes gallery.md and its pictures into the folder of pages."""
    folder = pages / "gallery"
    folder.mkdir()
    pipe = load_demo_pipeline("cpu")
    pipe.set_progress_bar_config(disable=True)
    full = draw(pipe)
    front = Front.load(FRONT)
    schedules = {budget: layercache.plan(front, budget=budget) for budget in BUDGETS}
    budgets = [
        drawn(pipe, f"Budget {budget:g}", schedule, full, folder / f"budget-{budget:g}.png")
        for budget, schedule in schedules.items()
    ]
    methods = [
        drawn(pipe, f"{name}: `{plan!r}`", plan, full, folder / f"method-{number}.png")
        for number, (name, plan) in enumerate(METHODS.items())
    ]
    text = PAGE.format(shown=SHOWN, steps=STEPS, host=host, budgets="\n".join(budgets), methods="\n".join(methods))
    (pages / "gallery.md").write_text(text)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]), sys.argv[2])
