"""Transformers that are known, with the pipelines that run them: users know those by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layercache._utils.text import shown
from layercache.errors import UnsupportedModelError
from layercache.tools.needs import known_classes, unet_sentence
from layercache.tools.pipeline_names import pipelines_of, transformers_of_pipelines


def named_rows(name: str | None = None) -> list[dict[str, Any]]:
    """What is known of every transformer, or of those with this in their name or in that of a pipeline of theirs.

    Raises:
        UnsupportedModelError: none has; the message says what it is, where diffusers has it.
    """
    from layercache.tools.report.tables import model_rows

    rows = [row | {"pipelines": pipelines_of(row["model"])} for row in model_rows()]
    if not name:
        return rows
    found = [row for row in rows if any(name.lower() in one.lower() for one in (row["model"], *row["pipelines"]))]
    if not found:
        raise UnsupportedModelError(_why_not(name))
    return found


def _why_not(name: str) -> str:
    pipelines = transformers_of_pipelines()
    own = pipelines.get(name)
    if own is None:
        return (
            f"neither a transformer that is known nor a pipeline has {shown(name)} in its name; see layercache models"
        )
    if not own:
        return unet_sentence(name, "")
    unknown = [cls for cls in own if cls not in known_classes()]
    return (
        f"{name} runs {' or '.join(unknown)}, which layercache does not know: layercache.infer_model(pipe, lambda: "
        "pipe(...)) finds out how it runs through its blocks"
    )


def pipeline_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """``FluxTransformer2DModel: FluxPipeline, FluxKontextPipeline, ...``, a line for each transformer."""
    return [f"{row['model']}: {', '.join(row['pipelines']) or 'none'}" for row in rows]
