"""Trains the model that ships with layercache, on the photographs inside scikit-image and scikit-learn.

    python examples/train_demo.py --out integrations/demo/layercache_demo

Flow matching: ``x = (1-t)*clean + t*noise``, the network learns ``noise - clean``. A run that is
stopped continues from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from skimage.color import gray2rgb
from skimage.transform import resize
from sklearn.datasets import load_sample_image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from layercache.demo.model import (
    CLASS_NAMES,
    IMAGE_SIZE,
    NULL_CLASS,
    PATCH_SIZE,
    new_models,
    pack_patches,
)
from layercache.demo.pipeline import DemoPipeline

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# class name -> (loader, source, licence); every file ships inside the named package
PHOTOGRAPHS = {
    "astronaut": (skimage.data.astronaut, "scikit-image astronaut, NASA", "public domain"),
    "cat": (skimage.data.chelsea, "scikit-image chelsea, Stefan van der Walt", "CC0"),
    "coffee": (skimage.data.coffee, "scikit-image coffee, Rachel Michetti", "CC0"),
    "rocket": (skimage.data.rocket, "scikit-image rocket, SpaceX", "public domain"),
    "galaxies": (skimage.data.hubble_deep_field, "scikit-image hubble_deep_field, NASA", "public domain"),
    "retina": (skimage.data.retina, "scikit-image retina, Mikael Häggström", "CC0"),
    "temple": (lambda: load_sample_image("china.jpg"), "scikit-learn china.jpg, danielbuechele (Flickr)", "CC BY 2.0"),
    "flower": (lambda: load_sample_image("flower.jpg"), "scikit-learn flower.jpg, vultilion (Flickr)", "CC BY 2.0"),
    "photographer": (skimage.data.camera, "scikit-image camera, Lav Varshney", "CC0"),
    "bricks": (skimage.data.brick, "scikit-image brick, CC0Textures", "CC0"),
    "grass": (skimage.data.grass, "scikit-image grass, LinoLafett (DeviantArt)", "CC0"),
    "gravel": (skimage.data.gravel, "scikit-image gravel, CC0Textures", "CC0"),
}
# Shorter sides to which each photograph is scaled before a crop is taken: the smallest shows it whole.
SCALES = (32, 36, 40, 46)
NULL_SHARE = 0.12


def load_crops() -> list[list[torch.Tensor]]:
    """Per class, the photograph at every scale, ``[3, H, W]`` in -1..1."""
    pyramid = []
    for name in CLASS_NAMES:
        picture = PHOTOGRAPHS[name][0]()
        picture = (gray2rgb(picture) if picture.ndim == 2 else picture[..., :3]) / 255.0
        factor = [side / min(picture.shape[:2]) for side in SCALES]
        sizes = [(round(picture.shape[0] * f), round(picture.shape[1] * f)) for f in factor]
        scaled = [resize(picture, size, anti_aliasing=True) for size in sizes]
        pyramid.append([torch.from_numpy(s * 2 - 1).float().permute(2, 0, 1).contiguous() for s in scaled])
    return pyramid


def draw_batch(pyramid, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """``size`` random crops ``[size, 3, 32, 32]`` and their class numbers, some replaced by the null class."""
    classes = rng.integers(len(pyramid), size=size)
    crops = []
    for c in classes:
        picture = pyramid[c][rng.integers(len(SCALES))]
        top = rng.integers(picture.shape[1] - IMAGE_SIZE + 1)
        left = rng.integers(picture.shape[2] - IMAGE_SIZE + 1)
        crops.append(picture[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
    classes[rng.random(size) < NULL_SHARE] = NULL_CLASS
    return torch.stack(crops), torch.from_numpy(classes)


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def flow_matching_loss(models: nn.ModuleDict, pictures, classes, device) -> torch.Tensor:
    """Mean squared error of the velocity at logit-normal times."""
    clean = pack_patches(pictures.to(device))
    noise = torch.randn_like(clean)
    t = torch.sigmoid(torch.randn(len(clean), device=device))
    noisy = torch.lerp(clean, noise, t[:, None, None])
    side = IMAGE_SIZE // PATCH_SIZE
    # on CPUs without bfloat16 units half precision takes eight times as long
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu"):
        velocity = models["transformer"](
            hidden_states=noisy,
            encoder_hidden_states=models["class_encoder"](classes.to(device)),
            timestep=t,
            img_shapes=[(1, side, side)] * len(clean),
            return_dict=False,
        )[0]
    return nn.functional.mse_loss(velocity.float(), noise - clean)


def write_atomically(path: Path, write) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def export(ema: AveragedModel, losses: list[float], args, seconds: float, out: Path) -> None:
    """Writes weights (bf16), loss curve, sample grid and model card into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    models = ema.module.to("cpu", torch.bfloat16)
    models["transformer"].save_pretrained(out / "transformer")
    models["class_encoder"].save_pretrained(out / "class_encoder")
    models.float()
    json_text = json.dumps({"every": args.log_every, "loss": [round(x, 5) for x in losses]})
    write_atomically(out / "loss.json", lambda p: p.write_text(json_text + "\n"))

    figure, axis = plt.subplots(figsize=(6, 3))
    axis.plot(np.arange(1, len(losses) + 1) * args.log_every, losses)
    axis.set(xlabel="step", ylabel="flow-matching loss", ylim=(0, min(0.6, max(losses) * 1.05)))
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=80)

    pipe = DemoPipeline(models["transformer"], models["class_encoder"], FlowMatchEulerDiscreteScheduler(shift=3.0))
    columns = 6
    prompts = [name for name in CLASS_NAMES for _ in range(columns)]
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pictures = pipe(prompts, generator=seeds, output_type="np").images
    figure, axes = plt.subplots(len(CLASS_NAMES), columns, figsize=(columns, len(CLASS_NAMES)))
    for axis, picture, name in zip(axes.flat, pictures, prompts, strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
        if axis in axes[:, 0]:
            axis.set_title(name, fontsize=7, loc="left", pad=1)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.985, 0.03, 0.15)
    figure.savefig(out / "samples.png", dpi=60)

    parameters = sum(p.numel() for p in models.parameters())
    rows = "\n".join(f"| {name} | {PHOTOGRAPHS[name][1]} | {PHOTOGRAPHS[name][2]} |" for name in CLASS_NAMES)
    given = {"steps": args.steps, "batch": args.batch, "seed": args.seed, "layers": args.layers, "heads": args.heads}
    recipe = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
    final = float(np.mean(losses[-max(1, len(losses) // 20) :]))
    card = f"""# The layercache demonstration model

A `QwenImageTransformer2DModel` (diffusers) with {len(models["transformer"].transformer_blocks)} blocks,
{parameters / 1e6:.1f} M parameters stored as bfloat16, in pixel space at {IMAGE_SIZE}x{IMAGE_SIZE}, patch {PATCH_SIZE},
conditioned on one of {len(CLASS_NAMES)} classes (one per photograph) plus a null class for guidance.
It exists to show and test caching on a trained flow-matching transformer without a download; it is not
a general image generator.

## Data

Random {IMAGE_SIZE}x{IMAGE_SIZE} crops of twelve photographs that ship inside scikit-image and scikit-learn, each first
scaled to a shorter side of {", ".join(map(str, SCALES))} pixels.

| class | photograph | licence |
|---|---|---|
{rows}

## Recipe

`python examples/train_demo.py {recipe}`: flow matching
(`x = (1-t) clean + t noise`, target `noise - clean`), logit-normal t, AdamW {args.lr:g} with cosine decay,
weight decay {args.weight_decay:g}, EMA {args.ema:g}, null class on {NULL_SHARE:.0%} of the crops, bf16 autocast on
GPUs, zero-initialised modulation and output layers. Final loss {final:.4f} (mean of the last twentieth,
`loss.json`); {seconds / 60:.0f} minutes on {args.device}.

![loss](loss.png)

## Samples

30 Euler steps, shift 3, guidance 4, six seeds per class, not selected.

![samples](samples.png)
"""
    write_atomically(out / "MODEL_CARD.md", lambda p: p.write_text(card))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-weights"), help="folder for weights, card and pictures")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--layers", type=int, default=None, help="number of blocks (default: the shipped model's)")
    parser.add_argument("--heads", type=int, default=None, help="attention heads, 28 wide each (default: as shipped)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: OUT/checkpoint.pt")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.checkpoint or args.out / "checkpoint.pt"
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    transformer, encoder = new_models(args.layers, args.heads)
    models = nn.ModuleDict({"transformer": transformer, "class_encoder": encoder}).to(device)
    ema = AveragedModel(models, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = torch.optim.AdamW(models.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate_factor(s, args.steps))

    start, losses, seconds = 0, [], 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        start, losses, seconds = saved["step"], saved["losses"], saved["seconds"]
        models.load_state_dict(saved["models"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])

    pyramid, window, began = load_crops(), [], time.perf_counter() - seconds
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="training", mininterval=5):
        # seeded by the step, so that a resumed run sees what an uninterrupted one would have seen
        torch.manual_seed(args.seed * 1_000_003 + step)
        pictures, classes = draw_batch(pyramid, args.batch, np.random.default_rng([args.seed, step]))
        loss = flow_matching_loss(models, pictures, classes, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(models)
        window.append(loss.detach())
        if (step + 1) % args.log_every == 0:
            losses.append(torch.stack(window).mean().item())
            window.clear()
        if (step + 1) % (10 * args.log_every) == 0:
            state = {
                "step": step + 1,
                "losses": losses,
                "seconds": time.perf_counter() - began,
                "models": models.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            write_atomically(checkpoint, lambda p, s=state: torch.save(s, p))
            tqdm.write(f"step {step + 1}: loss {losses[-1]:.4f}")
    if window and not losses:  # fewer steps than are logged at once
        losses.append(torch.stack(window).mean().item())
    export(ema, losses, args, time.perf_counter() - began, args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
