"""What a search costs on a transformer of real size, beside the generations that it is counted in.

    python bench/search_cost.py --model qwen --json bench/results/search-cost.json
    python bench/search_cost.py --tiny --device cpu          # the same code on a CPU, in a few seconds

The model of `bench/real_size.py` has random weights, so its schedules say nothing of quality: what is measured is the
time of `layercache.search`, in full generations of the same pipeline measured before and after it, and the memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from real_size import REAL, TINY, Loop, build
from torch import Tensor

import layercache
from layercache.planning.search import EFFORTS
from layercache.tools.report.machine import machine_info, write_json


class Pictures(Loop):
    """The loop with latents drawn by seed; a picture is the latents, in 0..1."""

    @torch.no_grad()
    def __call__(
        self, prompt: str = "", num_inference_steps: int = 20, generator: torch.Generator | None = None, **_: Any
    ) -> tuple[Tensor]:
        generator = generator or torch.Generator("cpu").manual_seed(0)
        like, inputs = self.latents, self.latents
        self.latents = torch.randn(like.shape, generator=generator).to(like)
        try:
            latents = super().__call__(num_inference_steps)
        finally:
            self.latents = inputs
        return (latents.float().clamp(-4, 4) / 8 + 0.5,)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a full generation, and of a search."""
    device = torch.device(args.device)
    loop = build(args.model, (TINY if args.tiny else REAL)[args.model], device)
    pipe = Pictures(loop.transformer, loop.scheduler)
    pipe.latents, pipe.arguments = loop.latents, loop.arguments
    settings = {"num_inference_steps": args.steps}

    def generate() -> object:
        return pipe("", **settings)

    generate()
    before = [seconds_of(generate, device) for _ in range(2)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    fronts: list[layercache.Front] = []

    def search() -> None:
        prompts = [f"picture {k}" for k in range(args.pictures)]
        fronts.append(
            layercache.search(
                pipe, prompts, budgets=args.budgets, effort=args.effort, time_limit=args.seconds, **settings
            )
        )

    seconds = seconds_of(search, device)
    memory = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else None
    after = [seconds_of(generate, device) for _ in range(2)]
    generation = mean(before + after)
    counted = float(fronts[0].notes[0].split(", ")[1].split()[0])
    return {
        "full_generation_seconds": {"before": before, "after": after},
        "search_seconds": seconds,
        "full_generations_counted": counted,
        "full_generations_taken": seconds / generation,
        "share_beside_the_generations": seconds / (counted * generation) - 1,
        "memory_bytes_above_the_model": memory,
        "notes": list(fronts[0].notes),
        "points": [{"used": point.used, "psnr": point.psnr} for point in fronts[0].points],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(REAL), default="qwen")
    parser.add_argument("--tiny", action="store_true", help="a few narrow blocks, to try it out")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.6, 0.5, 0.33, 0.2])
    parser.add_argument("--effort", choices=list(EFFORTS), default="quick")
    parser.add_argument("--seconds", type=float, help="time limit of the search")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    found = measure(args)
    settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
    if args.json is not None:
        write_json(args.json, {"kind": "search cost", "machine": machine_info(), "settings": settings, **found})
    print(
        f"{found['full_generations_counted']:.1f} generations counted, {found['full_generations_taken']:.1f} taken: "
        f"{100 * found['share_beside_the_generations']:.1f} % beside them"
    )


if __name__ == "__main__":
    main()
