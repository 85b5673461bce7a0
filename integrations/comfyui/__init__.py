"""The layercache nodes of ComfyUI: samplings whose steps are partly forecast, and schedules made from them."""

from __future__ import annotations

from typing import Any

from .nodes import DISPLAY_NAMES, NODES

NODE_CLASS_MAPPINGS = NODES
NODE_DISPLAY_NAME_MAPPINGS = DISPLAY_NAMES

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "comfy_entrypoint"]


def comfy_entrypoint() -> Any:
    """The same nodes for a ComfyUI that no longer looks at ``NODE_CLASS_MAPPINGS``."""
    from .new_nodes import extension

    return extension()
