"""Pipelines of the installed diffusers and their transformers, read from its sources: importing them takes long."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from pathlib import Path

_CLASS = re.compile(r"^class (\w+Pipeline)\b", re.MULTILINE)
_TRANSFORMER = re.compile(r"^ +transformer(?:_2)?: ([^=\n]+?)(?: = None)?,?$", re.MULTILINE)
_NAME = re.compile(r"\w+Model\b")


def diffusers_folder() -> Path | None:
    """Where diffusers is installed; ``None`` where it is not."""
    found = importlib.util.find_spec("diffusers")
    return None if found is None or not found.origin else Path(found.origin).parent


@functools.lru_cache(maxsize=1)
def transformers_of_pipelines() -> dict[str, tuple[str, ...]]:
    """Per pipeline class, the classes its transformer may be of; empty of one that has none (a UNet)."""
    folder = diffusers_folder()
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted((folder / "pipelines").rglob("pipeline*.py")) if folder else ():
        text = path.read_text(encoding="utf-8", errors="replace")
        starts = [match.start() for match in _CLASS.finditer(text)]
        for start, end in itertools.pairwise([*starts, len(text)]):
            name = text[start:end].split("(")[0].removeprefix("class ").strip()
            initial = text[start:end].partition("def __init__(")[2].partition("super().__init__")[0]
            classes = [one for annotation in _TRANSFORMER.findall(initial) for one in _NAME.findall(annotation)]
            found[name] = tuple(dict.fromkeys(classes))
    return found


def pipelines_of(model_class: str) -> list[str]:
    """Names of the pipelines that run a transformer of this class, the shortest first."""
    names = [name for name, classes in transformers_of_pipelines().items() if model_class in classes]
    return sorted(names, key=lambda name: (len(name), name))


def is_in_diffusers(name: str) -> bool:
    """Whether the installed diffusers has a class of this name."""
    folder = diffusers_folder()
    return folder is not None and re.search(rf'"{re.escape(name)}"', _exports(folder)) is not None


@functools.lru_cache(maxsize=1)
def _exports(folder: Path) -> str:
    return (folder / "__init__.py").read_text(encoding="utf-8", errors="replace")
