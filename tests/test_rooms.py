"""Imports between the rooms of the package run one way, downwards, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

import layercache

# From top to bottom, as in docs/architecture.md; rooms of one line do not import each other.
ROOMS = (
    ("tools",),
    ("methods",),
    ("planning", "metrics"),
    ("runtime",),
    ("models",),
    ("schedule", "backend"),
    ("ops", "parallel"),
    ("_utils", "demo"),
    ("errors", "_version"),
)
FLOOR = {f"layercache.{room}": floor for floor, rooms in enumerate(ROOMS) for room in rooms}


@pytest.fixture(scope="module")
def graph() -> Iterator[grimp.ImportGraph]:
    folder = str(Path(layercache.__file__).parent)
    with pytest.MonkeyPatch.context() as patched:
        # in a checkout the folder above is searched too, for the kernels
        patched.setattr(layercache.__spec__, "submodule_search_locations", [folder])
        yield grimp.build_graph("layercache", exclude_type_checking_imports=True, cache_dir=None)


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_every_room_has_a_place_in_the_order(graph):
    rooms = {room_of(module) for module in graph.modules if "." in module}
    assert rooms - {"layercache.__main__"} == set(FLOOR)


def test_no_room_imports_from_a_higher_one(graph):
    upwards = [
        (module, other)
        for module in graph.modules
        for other in graph.find_modules_directly_imported_by(module)
        if room_of(module) in FLOOR and room_of(other) in FLOOR and room_of(module) != room_of(other)
        if FLOOR[room_of(other)] <= FLOOR[room_of(module)]
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle(graph):
    """A package's ``__init__`` hands on names of its modules, so that it counts as all of them."""
    circles = []
    for module in graph.modules:
        below = graph.find_upstream_modules(module)
        if any(
            module in graph.find_upstream_modules(other)
            for other in graph.find_modules_directly_imported_by(module) & below
        ):
            circles.append(module)
    assert not circles


def test_files_and_functions_are_short():
    """500 lines a file, unless its head says why it is longer; 80 a function."""
    root = Path(layercache.__file__).parents[1]
    long = []
    for path in (path for room in ("layercache", "kernels", "csrc") for path in (root / room).rglob("*.*")):
        if path.suffix not in (".py", ".cpp", ".hpp", ".inl"):
            continue
        text = path.read_text()
        lines = text.splitlines()
        if len(lines) > 500 and "longer than others" not in " ".join(lines[:6]):
            long.append(path.name)
        if path.suffix == ".py":
            functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
            long += [f"{path.name}: {f.name}" for f in functions if (f.end_lineno or 0) - f.lineno >= 80]
    assert not long
