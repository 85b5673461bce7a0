"""What timestep tables save, class by class: real configurations on the meta device, so that no weights are made.

    python bench/timestep_tables.py --json bench/results/timestep-tables.json
    python bench/timestep_tables.py --only Qwen-Image FLUX.1-dev

One forward per model is followed as `layercache.fold_timesteps` follows it, on shapes alone. Bytes are those of
bfloat16, but for modules that diffusers keeps in float32, and of tables for 50 distinct timesteps of one sample.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from layercache.runtime.projections import Found, find_projections, times_of
from layercache.runtime.tabulated import Tables
from layercache.tools.report.machine import write_json

STEPS = 50
TEXT, SIDE = 8, 4  # tokens of the text, side of the picture in patches: nothing here depends on them
NUMBERS = torch.bfloat16


class Model(NamedTuple):
    """A published model: its class, what its configuration has besides the class's defaults, and arguments."""

    name: str
    model_class: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]


def noise(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=NUMBERS, device="meta")


def time(value: float = 500.0) -> torch.Tensor:
    return torch.full((1,), value, device="meta")


def tokens(channels: int, text: int, **more: Any) -> dict[str, Any]:
    return {"hidden_states": noise(1, SIDE * SIDE, channels), "encoder_hidden_states": noise(1, TEXT, text)} | more


def picture(channels: int, text: int, **more: Any) -> dict[str, Any]:
    shape = (1, channels, 2 * SIDE, 2 * SIDE)
    return {"hidden_states": noise(*shape), "encoder_hidden_states": noise(1, TEXT, text), "timestep": time()} | more


def video(channels: int, text: int, frames: int = 2, **more: Any) -> dict[str, Any]:
    shape = (1, channels, frames, 2 * SIDE, 2 * SIDE)
    return {"hidden_states": noise(*shape), "encoder_hidden_states": noise(1, TEXT, text), "timestep": time()} | more


def mask() -> torch.Tensor:
    return torch.ones(1, TEXT, dtype=torch.bool, device="meta")


def ids(axes: int) -> dict[str, torch.Tensor]:
    return {"img_ids": torch.zeros(SIDE * SIDE, axes, device="meta"), "txt_ids": torch.zeros(TEXT, axes, device="meta")}


def flux(guidance: bool) -> dict[str, Any]:
    more = {"pooled_projections": noise(1, 768), "timestep": time(0.5)} | ids(3)
    return tokens(64, 4096, **more) | ({"guidance": time(3.5)} if guidance else {})


def z_image() -> dict[str, Any]:
    return {"x": [noise(16, 1, 2 * SIDE, 2 * SIDE)], "t": time(0.5), "cap_feats": [noise(TEXT, 2560)]}


def cogvideox() -> dict[str, Any]:
    rotary = tuple(torch.empty(2 * SIDE * SIDE, 64, device="meta") for _ in range(2))
    shape = (1, 2, 16, 2 * SIDE, 2 * SIDE)
    return {"hidden_states": noise(*shape), "encoder_hidden_states": noise(1, TEXT, 4096)} | {
        "timestep": torch.full((1,), 500, device="meta"),
        "image_rotary_emb": rotary,
    }


def ltx() -> dict[str, Any]:
    sizes = {"num_frames": 1, "height": SIDE, "width": SIDE}
    return tokens(128, 4096, timestep=time(), encoder_attention_mask=mask(), **sizes)


SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
SD35_LARGE |= {"in_channels": 16, "qk_norm": "rms_norm"}
COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
WAN_1B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}

MODELS = (
    Model(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        {},
        lambda: tokens(64, 3584, timestep=time(0.5), img_shapes=[[(1, SIDE, SIDE)]]),
    ),
    Model("Z-Image", "ZImageTransformer2DModel", {}, z_image),
    Model("AuraFlow", "AuraFlowTransformer2DModel", {"pos_embed_max_size": 9216}, lambda: picture(4, 2048)),
    Model("CogVideoX-5B", "CogVideoXTransformer3DModel", COGVIDEOX_5B, cogvideox),
    Model("Wan 2.1 14B", "WanTransformer3DModel", {}, lambda: video(16, 4096)),
    Model("Wan 2.1 1.3B", "WanTransformer3DModel", WAN_1B, lambda: video(16, 4096)),
    Model("LTX-Video", "LTXVideoTransformer3DModel", {}, ltx),
    Model("Chroma", "ChromaTransformer2DModel", {}, lambda: tokens(64, 4096, timestep=time(0.5), **ids(3))),
    Model("FLUX.1-dev", "FluxTransformer2DModel", {"guidance_embeds": True}, lambda: flux(True)),
    Model("FLUX.1-schnell", "FluxTransformer2DModel", {}, lambda: flux(False)),
    Model(
        "FLUX.2-dev",
        "Flux2Transformer2DModel",
        {},
        lambda: tokens(128, 15360, timestep=time(0.5), guidance=time(4.0), **ids(4)),
    ),
    Model(
        "Stable Diffusion 3.5 Large",
        "SD3Transformer2DModel",
        SD35_LARGE,
        lambda: picture(16, 4096, pooled_projections=noise(1, 2048)),
    ),
)


def cast(transformer: Any) -> Any:
    """To bfloat16 as ``from_pretrained(torch_dtype=torch.bfloat16)`` does."""
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(NUMBERS)
    return transformer


def figures_of(model: Model) -> dict[str, Any]:
    """What its tables hold and what they replace, or why there are none."""
    with torch.device("meta"):
        transformer = cast(getattr(diffusers, model.model_class)(**model.config).eval())
    inputs = model.inputs()
    with torch.no_grad():
        found = find_projections(transformer, inputs, functools.partial(transformer, **inputs), STEPS)
    weights = sum(one.nbytes for one in (*transformer.parameters(), *transformer.buffers()))
    figures = {"model": model.name, "class": model.model_class, "config": model.config, "bytes": weights}
    return figures | {"kept": dict(found.kept)} | _folded(found, sum(one.numel() for one in times_of(inputs).values()))


def _folded(found: Found, times: int) -> dict[str, Any]:
    projections = found.projections
    tables = Tables(found.program, projections, STEPS, times, found.sizes, torch.device("meta"))
    folded = sum(one.nbytes for one in projections)
    held = tables.nbytes if projections else 0
    return {"projections": len(projections), "weights": folded, "tables": held, "saved": folded - held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODEL", choices=[model.name for model in MODELS])
    parser.add_argument("--json", type=Path, help="where the figures are written")
    options = parser.parse_args()
    rows = [figures_of(model) for model in MODELS if not options.only or model.name in options.only]
    for row in rows:
        why = "; ".join(f"{count} {reason}" for reason, count in row["kept"].items())
        print(
            f"{row['model']:28s} {row['bytes'] / 1e9:6.2f} GB, {row['projections']:4d} projections: "
            f"{row['weights'] / 1e6:9.1f} MB, tables {row['tables'] / 1e6:7.1f} MB  {why}"
        )
    if options.json:
        settings = {"steps": STEPS, "dtype": "bfloat16", "batch": 1, "diffusers": diffusers.__version__}
        write_json(options.json, settings | {"models": rows})


if __name__ == "__main__":
    main()
