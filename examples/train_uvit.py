"""Trains a small U-ViT on the photographs of `train_demo.py`, and a Learning-to-Cache router: minutes on a CPU.

    python examples/train_uvit.py --out uvit

A run that is stopped continues from its last checkpoint when the same command is given again, the router's training
too. It prints, for shares of the modules' time, the PSNR of pictures drawn with the router's schedule.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverSinglestepScheduler
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from train_demo import draw_batch, learning_rate_factor, load_crops, write_atomically
from uvit import UViT, UViTPipeline

import layercache
from layercache.methods import LearningToCache

CALL = {"num_inference_steps": 20, "guidance_scale": 2.0}
BUDGETS = (0.9, 0.75, 0.6)
PICTURES = 6


def flow_matching_loss(model: UViT, pictures: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Mean squared error of ``noise - clean`` at logit-normal times."""
    noise = torch.randn_like(pictures)
    t = torch.sigmoid(torch.randn(len(pictures)))
    noisy = torch.lerp(pictures, noise, t[:, None, None, None])
    return nn.functional.mse_loss(model(noisy, t, classes), noise - pictures)


def trained(args: argparse.Namespace) -> UViT:
    """The averaged weights behind the last step."""
    torch.manual_seed(args.seed)
    model, checkpoint = UViT(), args.out / "checkpoint.pt"
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, args.steps))
    parts: dict[str, Any] = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    pyramid = load_crops()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="U-ViT", mininterval=5)
    for step in bar:
        # seeded by the step, so that a resumed run sees what an uninterrupted one would have seen
        torch.manual_seed(args.seed * 1_000_003 + step)
        loss = flow_matching_loss(model, *draw_batch(pyramid, args.batch, np.random.default_rng([args.seed, step])))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            write_atomically(checkpoint, lambda path, s=state: torch.save(s, path))
    return ema.module.eval()


def drawn(pipe: UViTPipeline, plan: Any = None) -> np.ndarray:
    classes = [k % pipe.transformer.config.num_classes for k in range(PICTURES)]
    call = {**CALL, "prompt": classes, "generator": [torch.Generator().manual_seed(1000 + k) for k in range(PICTURES)]}
    if plan is None:
        return pipe(**call).images
    with layercache.enabled(pipe, plan):
        return pipe(**call).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("uvit"), help="folder for weights, checkpoints and schedules")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=12, help="generations that the router learns from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    model = trained(args)
    model.save_pretrained(args.out / "transformer")
    # single-step DPM-Solver-2 as in the paper: cache steps are the outer points, behind a midpoint each
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "lower_order_final": True}
    sampler = DPMSolverSinglestepScheduler(solver_order=2, **flow)
    pipe = UViTPipeline(model, sampler)
    pipe.set_progress_bar_config(disable=True)
    classes = [[k, k + 1, k + 2, k + 3] for k in range(0, model.config.num_classes, 4)]
    method = LearningToCache(rounds=args.rounds, shifted=True)
    router = method.train(pipe, classes, args.out / "router.pt", output_type="latent", **CALL)
    full = drawn(pipe)
    for budget in BUDGETS:
        schedule = router.schedule(budget=budget)
        schedule.save(args.out / f"router-{budget:g}.json")
        error = np.square(drawn(pipe, schedule) - full).mean(axis=(1, 2, 3))
        print(f"budget {budget:g}: {schedule.used:.2f} of the modules' time, {-10 * np.log10(error).mean():.1f} dB")
    print(f"written to {args.out} in {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
