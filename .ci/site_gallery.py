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
    "Every second step repeats the last": Uniform(interval=2),
    "FBCache": FBCache(threshold=0.1),
}

PAGE = """# Gallery

Drawn when this site was built: {shown} pictures of the bundled model (32 x 32 pixels, {steps} steps, guidance 4), each
with a seed that no schedule was fitted to and that every plan draws again. In each block the first row are full runs,
the second cached ones with their PSNR in dB, the third their absolute difference, four times as strong as it is. Above
about 55 dB pictures of 8 bit hardly differ. *Used* is the share of the blocks' time that was computed.

## Searched schedules

The schedules are those of
[one search]({host}/blob/main/bench/results/pareto-demo-30-cfg4.front.json), see [planning](planning.md).

{budgets}

## Other methods

Untuned, with the settings below their names; [comparing](guides/comparing.md) tunes each to a budget.

{methods}
"""


def draw(pipe: DemoPipeline) -> np.ndarray:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(SHOWN)]
    names = list(CLASS_NAMES[:SHOWN])
    return pipe(names, STEPS, 4.0, generator=generators, output_type="np").images


def drawn(pipe: DemoPipeline, title: str, plan: object, full: np.ndarray, path: Path, about: str = "") -> str:
    """Draws the pictures by a plan; a part of the page, about: what is said of the plan."""
    with layercache.enabled(pipe, plan) as cache:
        cached = draw(pipe)
    used = cache.report().used
    captions = [f"{value:.1f}" for value in psnr(full, cached)]
    rows = [
        PictureRow("", full),
        PictureRow("", cached, captions),
        PictureRow("", difference(full, cached, gain=4.0)),
    ]
    save_pictures(path, rows, CLASS_NAMES[:SHOWN])
    picture = f"![full, cached and their difference: {title}](gallery/{path.name})"
    return f"### {title}\n\n{about}*used {used:.2f}*\n\n{picture}\n"


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
        drawn(pipe, name, plan, full, folder / f"method-{number}.png", f"`{plan!r}`, ")
        for number, (name, plan) in enumerate(METHODS.items())
    ]
    text = PAGE.format(shown=SHOWN, steps=STEPS, host=host, budgets="\n".join(budgets), methods="\n".join(methods))
    (pages / "gallery.md").write_text(text)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]), sys.argv[2])
