"""Distils the bundled model into models for 4 and for 8 steps without guidance, on a CPU core in ten minutes.

    python examples/distil_demo.py --out few-step-models

Progressive distillation in one round: the bundled model draws pictures in 30 steps with guidance 4, and a copy of it
learns, at the noise levels of a run of few steps, the straight line from where such a path stands to where it will
stand at the next level. Guidance is in the paths, so the copy runs with one branch (``guidance_scale=1``). A run that
is stopped continues from its last checkpoint when the same command is given again.

Prints how near few steps come to the 30 steps with guidance, for seeds that nothing was fitted to, and writes a folder
for each number of steps, with weights and ``distilled.json``. ``python bench/distilled.py --models FOLDER`` measures
what caching gives of them, and ``layercache compare --guidance 1 --model FOLDER/4-steps`` takes them too.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from layercache._utils.files import write_atomically
from layercache.demo.model import CHANNELS, CLASS_NAMES, IMAGE_SIZE, PATCH_SIZE, pack_patches
from layercache.demo.pipeline import DemoPipeline, load_demo_pipeline

TEACHER = {"num_inference_steps": 30, "guidance_scale": 4.0}
DRAWN_AT_ONCE = 24
FIRST_SEED = 1_000_000  # far from those that comparisons draw
HELD_OUT = 24
SIDE = IMAGE_SIZE // PATCH_SIZE


def noise_of(seeds: range) -> torch.Tensor:
    """What the pipeline draws of generators with these seeds, as tokens ``[B, 64, 48]``."""
    shape = (CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    return pack_patches(torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]))


def drawn(pipe: DemoPipeline, seeds: range, **call: Any) -> torch.Tensor:
    """Last latents ``[B, 64, 48]`` of these seeds; picture k is of class k modulo their number."""
    prompts = [seed % len(CLASS_NAMES) for seed in seeds]
    return pipe(prompts, latents=noise_of(seeds), output_type="latent", **call).images


def levels(pipe: DemoPipeline, steps: int) -> list[float]:
    """Noise levels of a run, ``steps + 1`` values from 1 to 0."""
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    return pipe.scheduler.sigmas.tolist()


def paths(teacher: DemoPipeline, count: int, path: Path) -> torch.Tensor:
    """Latents of the teacher's runs at its noise levels, ``[count, 31, 64, 48]``; an earlier run's are kept."""
    found = torch.load(path, weights_only=True) if path.exists() else None
    bar = tqdm(total=count, initial=0 if found is None else len(found), desc="paths")
    while found is None or len(found) < count:
        done = 0 if found is None else len(found)
        seeds = range(FIRST_SEED + done, FIRST_SEED + min(done + DRAWN_AT_ONCE, count))
        seen = [noise_of(seeds)]

        def note(pipe: DemoPipeline, step: int, time: Any, given: dict, seen: list = seen) -> dict:
            seen.append(given["latents"])
            return given

        drawn(teacher, seeds, callback_on_step_end=note, **TEACHER)
        fresh = torch.stack(seen, dim=1)
        found = fresh if found is None else torch.cat([found, fresh])
        write_atomically(path, lambda p, kept=found: torch.save(kept, p))
        bar.update(len(seeds))
    return found[:count]


def at_levels(teacher: DemoPipeline, runs: torch.Tensor, wanted: list[float]) -> torch.Tensor:
    """The paths at other noise levels, ``[count, len(wanted), 64, 48]``: Euler steps are straight between their own."""
    own = levels(teacher, TEACHER["num_inference_steps"])
    found = []
    for level in wanted:
        k = next(k for k, (_, low) in enumerate(pairwise(own)) if level >= low)
        found.append(torch.lerp(runs[:, k], runs[:, k + 1], (own[k] - level) / (own[k] - own[k + 1])))
    return torch.stack(found, dim=1)


def train(teacher: DemoPipeline, runs: torch.Tensor, count: int, args: argparse.Namespace) -> nn.ModuleDict:
    """The averaged weights of the model for ``count`` steps."""
    copy = load_demo_pipeline("cpu")
    model = nn.ModuleDict({"transformer": copy.transformer, "class_encoder": copy.class_encoder})
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 30) * (1 - s / args.steps))
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    start, path = 0, args.out / f"checkpoint-{count}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    sigmas = torch.tensor(levels(teacher, count))
    states, classes = (
        at_levels(teacher, runs, sigmas.tolist()),
        (torch.arange(len(runs)) + FIRST_SEED) % len(CLASS_NAMES),
    )
    losses: list[float] = []
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc=f"{count} steps", mininterval=5):
        # seeded by the step, so that a resumed run sees what an uninterrupted one would have seen
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(runs), (args.batch,), generator=rng)
        k = torch.randint(count, (args.batch,), generator=rng)
        here, there = states[chosen, k], states[chosen, k + 1]
        velocity = model["transformer"](
            hidden_states=here,
            encoder_hidden_states=model["class_encoder"](classes[chosen]),
            timestep=sigmas[k],
            img_shapes=[(1, SIDE, SIDE)] * args.batch,
            return_dict=False,
        )[0]
        loss = nn.functional.mse_loss(velocity, (there - here) / (sigmas[k + 1] - sigmas[k])[:, None, None])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            tqdm.write(f"step {step + 1}: loss {np.mean(losses[-50:]):.4f}")
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            write_atomically(path, lambda p, s=state: torch.save(s, p))
    return ema.module.eval()


def psnr(found: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """Per picture, in dB; latents are pixels in -1..1."""
    error = ((found.clamp(-1, 1) - wanted.clamp(-1, 1)) / 2).square().mean(dim=(1, 2))
    return (-10 * torch.log10(error)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("few-step-models"), help="folder for models and checkpoints")
    parser.add_argument("--for-steps", type=int, nargs="+", default=[8, 4], help="a model for each of these")
    parser.add_argument("--paths", type=int, default=168, help="pictures of the bundled model")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    teacher = load_demo_pipeline("cpu")
    teacher.set_progress_bar_config(disable=True)
    runs = paths(teacher, args.paths, args.out / "paths.pt")
    wanted = drawn(teacher, range(HELD_OUT), **TEACHER)
    for count in args.for_steps:
        model = train(teacher, runs, count, args)
        student = DemoPipeline(model["transformer"], model["class_encoder"], teacher.scheduler)
        student.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": count}
        found = {
            "bundled": psnr(drawn(teacher, range(HELD_OUT), **TEACHER | call), wanted),
            "distilled": psnr(drawn(student, range(HELD_OUT), **call, guidance_scale=1.0), wanted),
        }
        for name, values in found.items():
            print(f"{count} steps, {name}: {np.mean(values):.1f} dB ({np.quantile(values, 0.1):.1f})", flush=True)
        folder = args.out / f"{count}-steps"
        for name, part in model.items():
            part.to(torch.bfloat16).save_pretrained(folder / name)
        recipe = {name: getattr(args, name) for name in ("paths", "steps", "batch", "lr", "seed")}
        text = json.dumps({"recipe": recipe | {"for_steps": count}, "psnr_against_30_steps": found}, indent=1)
        write_atomically(folder / "distilled.json", lambda p, text=text: p.write_text(text + "\n"))
    print(f"written to {args.out} in {(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
