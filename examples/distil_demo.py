"""Distils the bundled model into one for few steps without guidance: 25 minutes on one CPU core, and nothing else.

    python examples/distil_demo.py --out few-step-model

Reflow: noise and the picture that the bundled model draws of it in 30 steps with guidance 4 are joined by a straight
line, ``x = (1-t)*picture + t*noise``, and a copy of the model learns ``noise - picture`` at the noise levels of a run
of 8 steps, those of 4 among them. Guidance is in the pictures, so the copy runs with one branch (``guidance_scale=1``).
A run that is stopped continues from its last checkpoint when the same command is given again.

Prints how near pictures of 4 and 8 steps come to the 30 steps with guidance, of seeds that nothing was fitted to, and
writes the weights and ``distilled.json``. The folder is one for ``python bench/pareto.py --guidance 1 --model FOLDER``
and for ``layercache compare --guidance 1 --model FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from layercache._utils.files import write_atomically
from layercache.demo.model import CHANNELS, CLASS_NAMES, IMAGE_SIZE, PATCH_SIZE, pack_patches
from layercache.demo.pipeline import DemoPipeline, load_demo_pipeline

TEACHER = {"num_inference_steps": 30, "guidance_scale": 4.0}
LEVELS = 8
DRAWN_AT_ONCE = 48
FIRST_SEED = 1_000_000  # far from those that comparisons draw
HELD_OUT = 24
SIDE = IMAGE_SIZE // PATCH_SIZE


def noise_of(seeds: range) -> torch.Tensor:
    """What the pipeline draws of generators with these seeds, as tokens ``[B, 64, 48]``."""
    shape = (CHANNELS, IMAGE_SIZE, IMAGE_SIZE)
    return pack_patches(torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]))


def drawn(pipe: DemoPipeline, seeds: range, **call: object) -> torch.Tensor:
    """Last latents ``[B, 64, 48]`` of these seeds; picture k is of class k modulo their number."""
    prompts = [seed % len(CLASS_NAMES) for seed in seeds]
    return pipe(prompts, latents=noise_of(seeds), output_type="latent", **call).images


def pairs(teacher: DemoPipeline, count: int, path: Path) -> torch.Tensor:
    """Pictures of the teacher, as latents ``[count, 64, 48]``; those that an earlier run has drawn are kept."""
    pictures = torch.empty(0, SIDE**2, CHANNELS * PATCH_SIZE**2)
    if path.exists():
        pictures = torch.load(path, weights_only=True)
    bar = tqdm(total=count, initial=len(pictures), desc="pairs")
    while len(pictures) < count:
        lo = FIRST_SEED + len(pictures)
        hi = min(lo + DRAWN_AT_ONCE, FIRST_SEED + count)
        pictures = torch.cat([pictures, drawn(teacher, range(lo, hi), **TEACHER)])
        write_atomically(path, lambda p, kept=pictures: torch.save(kept, p))
        bar.update(hi - lo)
    return pictures[:count]


def levels(pipe: DemoPipeline) -> torch.Tensor:
    """Noise levels ``[LEVELS]`` at which a run of so many steps asks the model."""
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / LEVELS, LEVELS).tolist())
    return pipe.scheduler.sigmas[:-1].clone()


def train(teacher: DemoPipeline, pictures: torch.Tensor, args: argparse.Namespace) -> nn.ModuleDict:
    """The averaged weights behind the last step."""
    copy = load_demo_pipeline("cpu")
    model = nn.ModuleDict({"transformer": copy.transformer, "class_encoder": copy.class_encoder})
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 50) * (1 - s / args.steps))
    parts, start, path = (
        {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule},
        0,
        args.out / "checkpoint.pt",
    )
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    times = levels(teacher)
    noises = noise_of(range(FIRST_SEED, FIRST_SEED + len(pictures)))
    classes = (torch.arange(len(pictures)) + FIRST_SEED) % len(CLASS_NAMES)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="distilling", mininterval=5)
    window: list[float] = []
    for step in bar:
        # seeded by the step, so that a resumed run sees what an uninterrupted one would have seen
        rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(pictures), (args.batch,), generator=rng)
        t = times[torch.randint(len(times), (args.batch,), generator=rng)]
        clean, noise = pictures[chosen], noises[chosen]
        velocity = model["transformer"](
            hidden_states=torch.lerp(clean, noise, t[:, None, None]),
            encoder_hidden_states=model["class_encoder"](classes[chosen]),
            timestep=t,
            img_shapes=[(1, SIDE, SIDE)] * args.batch,
            return_dict=False,
        )[0]
        loss = nn.functional.mse_loss(velocity, noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        window.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            tqdm.write(f"step {step + 1}: loss {np.mean(window):.4f}")
            window.clear()
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            write_atomically(path, lambda p, s=state: torch.save(s, p))
    return ema.module.eval()


def psnr(found: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """Per picture, in dB; latents are pixels in -1..1."""
    error = ((found.clamp(-1, 1) - wanted.clamp(-1, 1)) / 2).square().mean(dim=(1, 2))
    return (-10 * torch.log10(error)).tolist()


def judged(teacher: DemoPipeline, student: DemoPipeline) -> dict[str, list[float]]:
    """How near few steps come to the 30 steps with guidance, of both models, in dB per picture."""
    seeds = range(HELD_OUT)
    wanted = drawn(teacher, seeds, **TEACHER)
    found = {}
    for steps in (4, 8):
        found[f"bundled model, {steps} steps"] = psnr(
            drawn(teacher, seeds, **{**TEACHER, "num_inference_steps": steps}), wanted
        )
        found[f"distilled, {steps} steps"] = psnr(
            drawn(student, seeds, num_inference_steps=steps, guidance_scale=1.0), wanted
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("few-step-model"), help="folder for weights and checkpoint")
    parser.add_argument("--pairs", type=int, default=720, help="pictures of the bundled model")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    teacher = load_demo_pipeline("cpu")
    teacher.set_progress_bar_config(disable=True)
    model = train(teacher, pairs(teacher, args.pairs, args.out / "pairs.pt"), args)
    student = DemoPipeline(model["transformer"], model["class_encoder"], teacher.scheduler)
    student.set_progress_bar_config(disable=True)
    found = judged(teacher, student)
    for name, values in found.items():
        print(f"{name}: {np.mean(values):.1f} dB ({np.quantile(values, 0.1):.1f})")
    for name, part in model.items():
        part.to(torch.bfloat16).save_pretrained(args.out / name)
    recipe = {"pairs": args.pairs, "steps": args.steps, "batch": args.batch, "lr": args.lr, "seed": args.seed}
    text = json.dumps({"recipe": recipe, "psnr_against_30_steps": found}, indent=1)
    write_atomically(args.out / "distilled.json", lambda p: p.write_text(text + "\n"))
    print(f"written to {args.out} in {(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
