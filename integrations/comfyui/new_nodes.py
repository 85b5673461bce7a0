"""The nodes as v3 has them, made from the same classes."""

from __future__ import annotations

from typing import Any

from .nodes import DISPLAY_NAMES, NODES


def extension() -> Any:
    """A ``ComfyExtension`` with all of them."""
    try:
        from comfy_api.v0_0_2 import ComfyExtension, io
    except ImportError:
        from comfy_api.latest import ComfyExtension, io

    class LayerCacheExtension(ComfyExtension):  # type: ignore[misc, unused-ignore]
        async def get_node_list(self) -> list[type]:
            return [_node(io, name, node) for name, node in NODES.items()]

    return LayerCacheExtension()


def _node(io: Any, name: str, node: Any) -> type:
    """A ``io.ComfyNode`` that does what a v1 node does."""

    def define_schema(cls: Any) -> Any:
        inputs = [_input(io, *one) for one in node.INPUT_TYPES()["required"].items()]
        pairs = zip(node.RETURN_TYPES, node.RETURN_NAMES, strict=True)
        return io.Schema(
            node_id=name,
            display_name=DISPLAY_NAMES[name],
            description=node.__doc__,
            category=node.CATEGORY,
            inputs=inputs,
            outputs=[_kind(io, kind).Output(display_name=label) for kind, label in pairs],
            is_output_node=getattr(node, "OUTPUT_NODE", False),
            is_experimental=True,
        )

    def execute(cls: Any, /, **inputs: Any) -> Any:
        return io.NodeOutput(*node().execute(**inputs))

    members = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    if hasattr(node, "IS_CHANGED"):
        members["fingerprint_inputs"] = classmethod(lambda cls, **inputs: node.IS_CHANGED(**inputs))
    return type(name, (io.ComfyNode,), members)


def _kind(io: Any, kind: str) -> Any:
    known = {"MODEL": "Model", "LATENT": "Latent", "STRING": "String", "FLOAT": "Float", "INT": "Int"}
    return getattr(io, known[kind]) if kind in known else io.Custom(kind)


def _input(io: Any, name: str, described: tuple[Any, ...]) -> Any:
    kind, options = described[0], dict(described[1]) if len(described) > 1 else {}
    if isinstance(kind, list):
        return io.Combo.Input(name, options=kind, **options)
    return _kind(io, kind).Input(name, **options)
