"""Pages of figures: one HTML file each, which needs no network and no other file."""

from __future__ import annotations

import base64
import functools
import gzip
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercache._utils.files import write_atomically
from layercache._utils.text import cleaned, shown
from layercache._version import __version__
from layercache.errors import MissingExtraError
from layercache.tools.report.fitting import Column, FittingTable
from layercache.tools.report.machine import machine_info, machine_line


@dataclass(frozen=True)
class Text:
    """A list of sentences."""

    lines: Sequence[str]
    title: str = ""
    note: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Row:
    """Cells of a table's row; ``wrong`` ones are coloured."""

    cells: Sequence[str]
    wrong: bool = False


@dataclass(frozen=True)
class Table:
    """A table that a click on a heading sorts."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    note: str = ""
    kind: str = "table"

    @classmethod
    def of(cls, table: FittingTable, title: str = "", note: str = "") -> Table:
        """All columns of a table that is printed too, but those of dashes; ``note`` in the place of its caption."""
        kept = [
            k for k in range(len(table.columns)) if any(row[k].plain != "-" for row in table.rows) or not table.rows
        ]
        rows = [
            Row([cleaned(cells[k].plain) for k in kept], style == "red")
            for cells, style in zip(table.rows, table.styles, strict=True)
        ]
        return cls([table.columns[k] for k in kept], rows, title or table.title, note or table.caption)


@dataclass(frozen=True)
class Chart:
    """A plot that answers to the pointer; ``spec`` is of Vega-Lite (`layercache.tools.report.charts`)."""

    spec: Mapping[str, Any]
    title: str = ""
    note: str = ""
    kind: str = "chart"


@dataclass(frozen=True)
class Pictures:
    """Full and cached pictures under a slider; ``data`` is of `layercache.tools.report.pictures`."""

    data: Mapping[str, Any]
    gain: str
    title: str = ""
    note: str = ""
    kind: str = "pictures"


Block = Text | Table | Chart | Pictures


def check_installed() -> None:
    """Raises `MissingExtraError` when no page could be made, for callers with a long job ahead."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"pages need Jinja2, Altair and vl-convert, and {error.name} is not installed: "
            'pip install "layercache[compare]"'
        ) from error


def save_page(
    path: str | os.PathLike[str],
    title: str,
    blocks: Sequence[Block],
    *,
    lead: Sequence[str] = (),
    commands: Sequence[str] | None = None,
    machine: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a page, whole or not at all.

    Args:
        path: of the file.
        title: its heading.
        blocks: from top to bottom.
        lead: sentences below the heading.
        commands: that give the figures again; by default the one that this process was started with, if it is ours.
        machine: where they were measured, see `layercache.tools.report.machine.machine_info`; by default here.

    Raises:
        MissingExtraError: a package that pages need is missing.
        OutputError: it cannot be written.
    """
    check_installed()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("layercache.tools.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    own = command_line()
    text = environment.get_template("page.html").render(
        title=shown(title),
        lead=[shown(line) for line in lead if line],
        blocks=blocks,
        commands=[shown(line) for line in (commands if commands is not None else [own] if own else [])],
        foot=shown(f"layercache {__version__}. {machine_line(machine if machine is not None else machine_info())}"),
        library=_plot_library() if any(isinstance(block, Chart) for block in blocks) else "",
    )
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def command_line() -> str:
    """The command that this process was started with, where it is layercache's; else empty."""
    program = Path(sys.argv[0])
    own = program.stem == "layercache" or (program.name == "__main__.py" and program.parent.name == "layercache")
    return shlex.join(["layercache", *sys.argv[1:]]) if own else ""


@functools.cache
def _plot_library() -> str:
    """Vega-Embed with all it needs as gzip in base64: 0.4 MB instead of 0.9, and nothing in it that ends a script."""
    import altair
    import vl_convert

    # of the Vega-Lite that Altair writes
    version = "_".join(altair.SCHEMA_VERSION.split(".")[:2])
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed", vl_version=version)
    return base64.b64encode(gzip.compress(bundle.encode(), 9, mtime=0)).decode()
