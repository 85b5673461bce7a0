"""Notebooks of docs/notebooks as pages of the documentation site: run from the first cell to the last, then written."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
CELL_LIMIT = 600  # seconds
WARNINGS = "ignore:IProgress not found,ignore:clamping frac"  # of progress bars, where there are no widgets
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def write_page(source: Path, pages: Path) -> None:
    """Runs a notebook in a folder of its own and writes its page, with what the cells gave and drew.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the error shows it.
    """
    import nbclient
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(source, as_version=4)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": WARNINGS}
    with tempfile.TemporaryDirectory() as place:
        resources = {"metadata": {"path": place}}
        client = nbclient.NotebookClient(notebook, timeout=CELL_LIMIT, coalesce_streams=True, resources=resources)
        client.execute(env=environment)
    for cell in notebook.cells:
        for one in cell.get("outputs", []):
            if one.output_type == "stream":
                one.text = as_a_terminal_shows(one.text)
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": f"{source.stem}-files/output"})
    page = pages / "notebooks" / f"{source.stem}.md"
    for name, data in resources["outputs"].items():
        (page.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (page.parent / name).write_bytes(data)
    page.write_text(without_markup(text))


def as_a_terminal_shows(text: str) -> str:
    """What stays on a terminal: a bar in its last state; warnings without the line that gave them."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in COLOURS.sub("", text).split("\n")]
    return re.sub(r"^\S+\.py:\d+: (\w+Warning: .*)\n  .*$", r"\1", "\n".join(lines), flags=re.MULTILINE)


def without_markup(text: str) -> str:
    """A page without style sheets of a notebook's own, and with names for its pictures."""
    return re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL).replace("![png]", "![what the cell drew]")


def stored_outputs(source: Path) -> list[int]:
    """Numbers of the cells of a notebook that are stored with what they once gave; the site runs them itself."""
    import json

    cells = json.loads(source.read_text())["cells"]
    return [number for number, cell in enumerate(cells) if cell.get("outputs") or cell.get("execution_count")]
