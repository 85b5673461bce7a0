"""What a comparison depends on, so that one that is finished is known without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercache._version import __version__
from layercache.tools.cli.loading import split_name, split_weight
from layercache.tools.cli.options import CallOptions, ModelOptions, words_of


def request_of(model: ModelOptions, call: CallOptions, more: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a comparison was asked for, with the times at which the files it names were changed."""
    paths = [model.model, *(split_name(text, "")[1] for text in (*(model.transformer or ()), *(call.image or ())))]
    paths += [split_weight(text)[0] for text in model.lora or ()]
    changed = {path: _changed(Path(path)) for path in (*paths, model.controlnet or "demo")}
    return {"version": __version__, "options": [*words_of(model), *words_of(call)], "files": changed, **more}


def _changed(path: Path) -> int | None:
    """When a file, or the newest file of a folder, was changed; ``None`` where there is none."""
    if path.is_dir():
        return max((one.stat().st_mtime_ns for one in path.rglob("*") if one.is_file()), default=None)
    return path.stat().st_mtime_ns if path.is_file() else None
