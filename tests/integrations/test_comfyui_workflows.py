"""The example workflows of the ComfyUI nodes: nodes, inputs and connections that there are."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING")
CORE = {
    "UNETLoader": ({"unet_name": "COMBO", "weight_dtype": "COMBO"}, ["MODEL"]),
    "CLIPLoader": ({"clip_name": "COMBO", "type": "COMBO", "device": "COMBO"}, ["CLIP"]),
    "DualCLIPLoader": (dict.fromkeys(("clip_name1", "clip_name2", "type", "device"), "COMBO"), ["CLIP"]),
    "VAELoader": ({"vae_name": "COMBO"}, ["VAE"]),
    "CLIPTextEncode": ({"text": "STRING", "clip": "CLIP"}, ["CONDITIONING"]),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": "FLOAT"}, ["CONDITIONING"]),
    "ModelSamplingAuraFlow": ({"model": "MODEL", "shift": "FLOAT"}, ["MODEL"]),
    "EmptySD3LatentImage": (dict.fromkeys(("width", "height", "batch_size"), "INT"), ["LATENT"]),
    "KSampler": (
        {"model": "MODEL", "seed": "INT", "steps": "INT", "cfg": "FLOAT", "sampler_name": "COMBO", "scheduler": "COMBO"}
        | {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "denoise": "FLOAT"},
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, []),
    "PreviewAny": ({"source": "*"}, []),
}
"""ComfyUI's own nodes, as its version 0.3.64 has them: inputs in their order, and outputs."""


@pytest.fixture(scope="module")
def own():
    """The same of the nodes of the pack."""
    spec = importlib.util.spec_from_file_location("layercache_comfyui", PACK / "__init__.py")
    pack = sys.modules.get(spec.name) or importlib.util.module_from_spec(spec)
    if spec.name not in sys.modules:
        sys.modules[spec.name] = pack
        spec.loader.exec_module(pack)
    found = {}
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        inputs = {key: "COMBO" if isinstance(d[0], list) else d[0] for key, d in node.INPUT_TYPES()["required"].items()}
        found[name] = inputs, list(node.RETURN_TYPES)
    return found


@pytest.mark.parametrize("path", sorted(PACK.glob("example_workflows/*.json")), ids=lambda path: path.stem)
def test_workflows_are_of_nodes_that_there_are(path, own):
    flow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in flow["nodes"]}
    links = {link[0]: link[1:] for link in flow["links"]}
    assert len(links) == len(flow["links"]) and any(node["type"] in own for node in nodes.values())
    used = []
    for node in nodes.values():
        inputs, outputs = {**CORE, **own}[node["type"]]
        assert {entry["name"]: entry["type"] for entry in node["inputs"]} == inputs
        assert [entry["type"] for entry in node["outputs"]] == outputs
        widgets = [name for name, kind in inputs.items() if kind in WIDGETS]
        values = list(node["widgets_values"])
        if "seed" in widgets:
            assert values.pop(widgets.index("seed") + 1) == "fixed"
        assert len(values) == len(widgets)
        for name, value in zip(widgets, values, strict=True):
            assert isinstance(value, {"INT": int, "FLOAT": float}.get(inputs[name], str)), (node["type"], name)
        for slot, entry in enumerate(node["inputs"]):
            if entry["name"] in widgets:
                assert entry["widget"] == {"name": entry["name"]} and entry["link"] is None
                continue
            source, out, target, at, kind = links[entry["link"]]
            assert (target, at) == (node["id"], slot) and nodes[source]["order"] < node["order"]
            assert kind == nodes[source]["outputs"][out]["type"] and entry["type"] in (kind, "*")
            assert entry["link"] in nodes[source]["outputs"][out]["links"]
            used.append(entry["link"])
    assert sorted(used) == sorted(links)


def test_the_guide_has_the_figures_of_its_result_file():
    root = PACK.parents[1]
    guide = (root / "docs" / "guides" / "comfyui.md").read_text()
    data = json.loads((root / "bench" / "results" / "comfyui.json").read_text())
    rows = {
        f"| {model} | {name} | {e['share']:.2f} | {e['psnr_mean']:.1f} | {e['psnr_p10']:.1f} |"
        for model, found in data["models"].items()
        for name, e in found["entries"].items()
    }
    assert rows == {line for line in guide.splitlines() if line.endswith(" |") and line.split(" | ")[-1][:2].isdigit()}
    assert data["comfyui"]["version"] in guide and data["comfyui"]["commit"] in guide
