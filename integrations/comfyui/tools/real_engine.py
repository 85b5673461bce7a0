"""The nodes in ComfyUI's own code, on small models and a CPU, beside its EasyCache and LazyCache at equal compute.

    python integrations/comfyui/tools/real_engine.py CHECKOUT --out bench/results/comfyui.json

CHECKOUT is a folder with ComfyUI's sources. Of its requirements, einops, torchsde, psutil and aiohttp are needed in
this Python (``pip install --no-deps --target FOLDER einops torchsde trampoline spandrel`` and PYTHONPATH=FOLDER will
do); empty modules serve for torchvision, torchaudio, av and whatever else is not there and not called. Models are added
to those that the file has.

Models: the bundled demo model, whose trained weights fit ComfyUI's Qwen-Image class; small Flux and Wan networks with
random weights, which only tell whether something runs, not how good a cache is on a trained one.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import layercache
from layercache.schedule import Schedule
from layercache.tools.report.machine import machine_info, write_json

PACK = Path(__file__).parents[1]
MAY_BE_MISSING = ("av", "spandrel", "torchvision", "torchaudio", "kornia", "comfy_kitchen", "comfy_aimdo")
RECORDED, TESTED = range(4), range(1000, 1006)
"""Seeds of recorded samplings, and of the figures."""

TUNED = 3
"""Of the figures' samplings, those on which EasyCache and LazyCache are brought to the same share of block calls."""


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for packages that are not installed."""

    def __init__(self) -> None:
        self.names = [name for name in MAY_BE_MISSING if importlib.util.find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _anything  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def load_engine(checkout: Path, models: Path) -> tuple[Any, StandIns]:
    """ComfyUI's modules and the node pack, as its server would import it."""
    from layercache.demo.pipeline import load_demo_pipeline

    load_demo_pipeline()  # diffusers looks at torchvision where there is one
    stand_ins = StandIns()
    sys.meta_path.append(stand_ins)
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing(True)
    import comfy.model_management
    import comfy.sample
    import comfy.samplers
    import folder_paths

    folder_paths.models_dir = str(models)
    comfy.samplers.model_management = FreeMemory(comfy.model_management)
    spec = importlib.util.spec_from_file_location("layercache_nodes", PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pack
    spec.loader.exec_module(pack)
    return pack, stand_ins


class FreeMemory:
    """ComfyUI's ``model_management`` as its sampling sees it, with as much free memory as it is said to have.

    With none, one conditioning runs after the other: version 0.3.64's EasyCache adds the differences of all of a batch
    to each of them.
    """

    def __init__(self, own: Any, free: int = 0):
        self.own, self.free = own, free

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def get_free_memory(self, *_: Any, **__: Any) -> int:
        return self.free


@dataclass
class Subject:
    """A model and how it is sampled.

    Attributes:
        latent: of zeros, ``[1, ...]``.
        conds: of a seed, positive and negative conditioning.
        blocks: that are counted.
        tested: seeds of the figures.
        prepare: makes further checks and schedules.
    """

    name: str
    weights: str
    model: Any
    latent: torch.Tensor
    sigmas: torch.Tensor
    cfg: float
    conds: Callable[[int], tuple[Any, Any]]
    blocks: list[torch.nn.Module]
    schedules: dict[str, Schedule] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    tested: range = TESTED
    prepare: Callable[[], None] = lambda: None
    calls: int = 0

    def __post_init__(self) -> None:
        for block in self.blocks:
            block.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def sample(self, model: Any, seed: int) -> torch.Tensor:
        """The latents of one sampling with euler."""
        import comfy.sample
        import comfy.samplers

        positive, negative = self.conds(seed)
        given = comfy.samplers.ksampler("euler"), self.sigmas, positive, negative, self.latent
        noise = comfy.sample.prepare_noise(self.latent, seed)
        with torch.inference_mode():
            return comfy.sample.sample_custom(model, noise, self.cfg, *given, disable_pbar=True, seed=seed)

    def samples(self, model: Any, seeds: range) -> tuple[list[torch.Tensor], float]:
        """Of every seed, and the block calls of a sampling."""
        before = self.calls
        return [self.sample(model, seed) for seed in seeds], (self.calls - before) / len(seeds)


def _patcher(config: Any, device: Any = None) -> tuple[Any, Any]:
    import comfy.model_patcher

    device = torch.device("cpu")
    base = config.get_model({}, device="cpu").eval()
    return comfy.model_patcher.ModelPatcher(base, device, device), base.diffusion_model


def _fill(network: Any, seed: int = 0) -> None:
    """Random weights, small enough that the velocities stay of the size of the latents."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            is_scale = weights.dim() == 1 and ("norm" in name or "scale" in name)
            size = 0.12 if weights.dim() > 1 else 0.02
            weights.copy_(torch.randn(weights.shape, generator=generator) * size + float(is_scale))


def _random_conds(width: int, pooled: int) -> Callable[[int], tuple[Any, Any]]:
    def of(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        beside = {"pooled_output": torch.randn(1, pooled, generator=generator)}
        return [[torch.randn(1, 6, width, generator=generator), beside]]

    return lambda seed: (of(seed), of(10**6))


def _levels(model: Any, steps: int) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


def flux(steps: int) -> Subject:
    import comfy.supported_models

    sizes: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "vec_in_dim": 16,
        "context_in_dim": 32,
    }
    sizes |= {"hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 3, "depth_single_blocks": 6}
    more = {"axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "guidance_embed": True, "dtype": torch.float32}
    model, network = _patcher(comfy.supported_models.Flux({"image_model": "flux", **sizes, **more}))
    _fill(network)
    blocks = [*network.double_blocks, *network.single_blocks]
    latent, conds = torch.zeros(1, 16, 16, 16), _random_conds(32, 16)
    return Subject("Flux", "random", model, latent, _levels(model, steps), 4.0, conds, blocks)


def wan(steps: int) -> Subject:
    import comfy.supported_models

    sizes = {"dim": 48, "in_dim": 16, "out_dim": 16, "ffn_dim": 96, "freq_dim": 16, "text_dim": 32, "num_heads": 4}
    more = {"num_layers": 8, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6}
    given = {"image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "dtype": torch.float32}
    model, network = _patcher(comfy.supported_models.WAN21_T2V({**given, **sizes, **more}))
    _fill(network)
    latent, conds = torch.zeros(1, 16, 3, 16, 16), _random_conds(32, 16)
    return Subject("Wan", "random", model, latent, _levels(model, steps), 4.0, conds, list(network.blocks))


def qwen(steps: int) -> Subject:
    """The bundled model, 12 channels of 16x16 for 3 of 32x32, so that a token of 2x2 is one of its 4x4 pixels."""
    import comfy.latent_formats
    import comfy.supported_models

    from layercache.demo.model import CLASS_NAMES, NULL_CLASS, TRANSFORMER_CONFIG
    from layercache.demo.pipeline import load_demo_pipeline

    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    names = ("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    sizes = {
        "patch_size": 2,
        "in_channels": 48,
        "out_channels": 12,
        **{name: TRANSFORMER_CONFIG[name] for name in names},
    }
    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", **sizes, "dtype": torch.float32})
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.latent_channels, config.latent_format.latent_dimensions = 12, 3
    model, network = _patcher(config)
    network.load_state_dict(pipe.transformer.state_dict())

    def cond(number: int) -> Any:
        with torch.no_grad():
            return [[pipe.class_encoder(torch.tensor([number])), {}]]

    def conds(seed: int) -> tuple[Any, Any]:
        return cond(seed % len(CLASS_NAMES)), cond(NULL_CLASS)

    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    latent = torch.zeros(1, 12, 1, 16, 16)
    blocks = list(network.transformer_blocks)
    subject = Subject("Qwen-Image", "trained", model, latent, pipe.scheduler.sigmas.clone(), 4.0, conds, blocks)
    subject.prepare = lambda: _compare_with_diffusers(subject, pipe, steps)
    return subject


def _compare_with_diffusers(subject: Subject, pipe: Any, steps: int) -> None:
    """Full and cached samplings of the same weights in both; a schedule of groups of layers is made there."""
    import comfy.sample

    from layercache.demo.model import CLASS_NAMES

    classes = [CLASS_NAMES[seed % len(CLASS_NAMES)] for seed in RECORDED]
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": subject.cfg}
    profile = layercache.calibrate(pipe, classes, progress=False, partition="thirds", **call)
    schedule = layercache.plan(profile, budget=0.5)
    subject.schedules["groups of layers, from diffusers"] = schedule
    for name, cached in (("full", False), ("groups of layers", True)):
        seed = TESTED[0]
        noise = comfy.sample.prepare_noise(subject.latent, seed)[:, :, 0]
        tokens = noise.reshape(1, 12, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 64, 48)
        given = {"latents": tokens, "output_type": "latent", **call}
        cache = layercache.enable(pipe, schedule) if cached else None
        there = pipe(CLASS_NAMES[seed % len(CLASS_NAMES)], **given).images
        if cache is not None:
            layercache.disable(pipe)
        model = with_schedule(subject.model, schedule)[0] if cached else subject.model
        here = subject.sample(model, seed)[:, :, 0]
        here = here.reshape(1, 12, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 64, 48)
        subject.checks[f"largest difference to diffusers, {name}"] = float((here - there).abs().max())


def with_schedule(model: Any, schedule: Schedule | None, budget: float = 0.5) -> tuple[Any, Any]:
    """The node LayerCache, with a file or without."""
    nodes, engine = sys.modules["layercache_nodes.nodes"], sys.modules["layercache_nodes.engine"]
    if schedule is None:
        return nodes.LayerCacheModel().execute(model, nodes.WITHOUT_FILE, budget)
    path = engine.schedule_path("schedule")
    schedule.save(path)
    return nodes.LayerCacheModel().execute(model, path.name, budget)


def check(subject: Subject, full: list[torch.Tensor]) -> None:
    """Wholly computed samplings through the nodes have the uncached bits; reused ones do not depend on batches."""
    import comfy.samplers

    nodes, recording = sys.modules["layercache_nodes.nodes"], sys.modules["layercache_nodes.recording"]
    recording_model, recorder = nodes.LayerCacheRecord().execute(subject.model, len(RECORDED))
    recorded = [subject.sample(recording_model, seed) for seed in RECORDED]
    uncached = [subject.sample(subject.model, seed) for seed in RECORDED[:2]]
    checks = subject.checks
    checks["recorded: the uncached bits"] = all(map(torch.equal, recorded[:2], uncached))
    schedule = recording.schedule_of(recorder.like_newest, 0.5)
    subject.schedules["whole steps, recorded, budget 0.5"] = schedule
    prints = schedule.fingerprint
    thirds = prints.num_blocks // 3, 2 * prints.num_blocks // 3
    groups = ((0, thirds[0]), thirds, (thirds[1], prints.num_blocks))
    rows = [[None, {step - 1: 1.0} if step % 3 == 2 else None, None] for step in range(prints.num_steps)]
    reusing = Schedule(prints, groups, tuple(map(tuple, rows)), (1.0,) * 3)
    computed = Schedule.compute_all(prints, groups)
    checks["wholly computed: the uncached bits"] = torch.equal(
        subject.sample(with_schedule(subject.model, computed)[0], TESTED[0]), full[0]
    )
    with blocks_replaced():
        model, cache = with_schedule(subject.model, computed)
        found = subject.sample(model, TESTED[0])
    checks["wholly computed by replaced blocks: the uncached bits"] = torch.equal(found, full[0])
    checks["wholly computed by replaced blocks: report"] = str(cache).split("\n\n")[-1]
    model, cache = with_schedule(subject.model, reusing)
    alone = subject.sample(model, TESTED[0])
    checks["groups reused: report"] = str(cache).split("\n\n")[-1]
    checks["groups reused: twice the same bits"] = torch.equal(alone, subject.sample(model, TESTED[0]))
    comfy.samplers.model_management.free = 1 << 40
    together = subject.sample(model, TESTED[0])
    comfy.samplers.model_management.free = 0
    checks["groups reused: largest difference of one batch to two"] = float((alone - together).abs().max())
    clone = subject.sample(subject.model.clone(), TESTED[0])
    checks["a clone without the node: the uncached bits"] = torch.equal(clone, full[0])


@contextmanager
def blocks_replaced() -> Iterator[None]:
    """Blocks are replaced although the schedule reuses none."""
    caching: Any = sys.modules["layercache_nodes.caching"]
    own, caching.is_of_whole_steps = caching.is_of_whole_steps, lambda _: False
    try:
        yield
    finally:
        caching.is_of_whole_steps = own


def psnr(found: torch.Tensor, full: torch.Tensor) -> float:
    """In dB; the peak is the range of the full run's latents."""
    error = float((found - full).double().square().mean())
    return float(20 * np.log10(float(full.max() - full.min())) - 10 * np.log10(error)) if error else float("inf")


def entry(subject: Subject, model: Any, full: list[torch.Tensor], blocks: float) -> dict[str, Any]:
    found, calls = subject.samples(model, subject.tested)
    values = [psnr(one, other) for one, other in zip(found, full, strict=True)]
    low = float(np.quantile(values, 0.1))
    return {"share": calls / blocks, "psnr_mean": float(np.mean(values)), "psnr_p10": low, "psnr": values}


def tuned(subject: Subject, node: Any, share: float, blocks: float) -> tuple[Any, float]:
    """With the largest threshold at which it computes at least a share, as a mean over three of the seeds."""
    low, high = 0.02, 3.0
    for _ in range(5):
        middle = (low * high) ** 0.5
        model = node.execute(subject.model, middle, 0.15, 0.95, False).result[0]
        _, calls = subject.samples(model, subject.tested[:TUNED])
        low, high = (middle, high) if calls / blocks >= share - 1e-9 else (low, middle)
    return node.execute(subject.model, low, 0.15, 0.95, False).result[0], low


def measure(subject: Subject, before: Any) -> dict[str, Any]:
    """All entries, each with share of the block calls and PSNR of the latents to the full run's.

    Args:
        subject: what is measured.
        before: what was measured of it, where EasyCache and LazyCache alone are measured again.
    """
    import comfy_extras.nodes_easycache as theirs

    full, blocks = subject.samples(subject.model, subject.tested)
    entries: dict[str, Any] = {}
    if before:
        subject.checks.update(before["checks"])
        entries = {name: one for name, one in before["entries"].items() if name.startswith("layercache")}
    else:
        subject.prepare()
        check(subject, full)
    for name, schedule in {} if before else {"whole steps, no file, budget 0.5": None, **subject.schedules}.items():
        entries[f"layercache: {name}"] = entry(subject, with_schedule(subject.model, schedule)[0], full, blocks)
        print(subject.name, name, entries[f"layercache: {name}"], flush=True)
    holder = theirs.EasyCacheHolder
    add = getattr(holder, "own_add", holder.apply_cache_diff)
    holder.own_add = add
    # it adds in place, to the latents themselves where the model runs in their number format, as these do
    holder.apply_cache_diff = lambda self, x, uuids: add(self, x.clone(), uuids)
    shares = sorted({one["share"] for one in entries.values()}, reverse=True)
    shares = [share for k, share in enumerate(shares) if all(abs(share - other) > 0.05 for other in shares[:k])]
    for share in shares:
        for name, node in (("EasyCache", theirs.EasyCacheNode), ("LazyCache", theirs.LazyCacheNode)):
            model, threshold = tuned(subject, node, share, blocks)
            label = f"{name} at {share:.2f} or more"
            entries[label] = {"threshold": threshold, **entry(subject, model, full, blocks)}
            print(subject.name, label, entries[label], flush=True)
    settings: dict[str, Any] = {"steps": len(subject.sigmas) - 1, "guidance": subject.cfg, "sampler": "euler"}
    settings["seeds"] = {
        "recorded": list(RECORDED),
        "tested": list(subject.tested),
        "tuned": list(subject.tested[:TUNED]),
    }
    return {"weights": subject.weights, **settings, "block_calls": blocks, "checks": subject.checks, "entries": entries}


def commit_of(checkout: Path) -> str | None:
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--commit", help="of the checkout, where it is no git repository")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--theirs", action="store_true", help="measure EasyCache and LazyCache alone again")
    parser.add_argument("--seeds", type=int, default=len(TESTED), help="of the figures")
    parser.add_argument("--only", nargs="+", choices=("qwen", "flux", "wan"), default=["qwen", "flux", "wan"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as models:
        _, stand_ins = load_engine(given.checkout.resolve(), Path(models))
        import comfyui_version

        found = {"qwen": qwen, "flux": flux, "wan": wan}
        logging.getLogger().setLevel(logging.ERROR)
        for name in given.only:
            subject = found[name](given.steps)
            subject.tested = TESTED[: given.seeds]
            before = json.loads(given.out.read_text()) if given.out.exists() else {"models": {}}
            known = before["models"].get(subject.name) if given.theirs else None
            measured = measure(subject, known)
            data = {
                "comfyui": {
                    "version": comfyui_version.__version__,
                    "commit": given.commit or commit_of(given.checkout),
                    "stand_ins": stand_ins.names,
                },
                "machine": machine_info(),
                "models": {**before["models"], subject.name: measured},
            }
            write_json(given.out, data)


if __name__ == "__main__":
    main()
