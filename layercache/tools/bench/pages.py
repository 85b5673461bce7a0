"""Pages of stored results: kernels, caches of other packages, comparisons, and whatever else has rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercache.tools.bench import peer_table
from layercache.tools.bench.measure import Row, Timing
from layercache.tools.report import pages
from layercache.tools.report.charts import bars_chart
from layercache.tools.report.fitting import Column, FittingTable

KERNELS, PEERS, COMPARISON, FRONT, OTHER = "kernels", "peers", "comparison", "front", "other"
STALE = "These figures are of other kernels than the present ones."


def kind_of(data: Mapping[str, Any]) -> str:
    """What a result file holds, by its fields; empty of a file without results."""
    if data.get("kind") in (KERNELS, PEERS):
        return str(data["kind"])
    if data.get("outcomes"):
        return COMPARISON
    rows = data.get("rows")
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        return ""
    return FRONT if all("held_out_psnr" in row and "used" in row for row in rows) else OTHER


def result_tables(data: Mapping[str, Any]) -> list[FittingTable]:
    """The figures of a result file, as they were printed when they were measured."""
    kind = kind_of(data)
    if kind == KERNELS:
        from layercache.tools.bench.results import table

        rows = kernel_rows(data)
        return [table([row for row in rows if row.shape == shape]) for shape in dict.fromkeys(r.shape for r in rows)]
    if kind == PEERS:
        return [peer_table.table([peer_table.Row(**row) for row in data["rows"]])]
    if kind == COMPARISON:
        from layercache.tools.compare.categories import category_table
        from layercache.tools.compare.report import comparison_table

        by_category = category_table(_outcomes(data), _categories(data))
        return [comparison_table(_outcomes(data)), *([by_category] if by_category else [])]
    if kind == FRONT:
        from layercache.tools.report.front import front_table, rows_from_json

        return [front_table(rows_from_json(data["rows"]))]
    return [_plain_table(data["rows"])]


def _categories(data: Mapping[str, Any]) -> list[str]:
    """Of every picture of a comparison; none where its prompts had none."""
    settings = data.get("settings")
    return [str(one) for one in settings.get("categories", ())] if isinstance(settings, Mapping) else []


def save_result_page(
    path: str | os.PathLike[str], data: Mapping[str, Any], title: str, file: Path | None = None
) -> Path:
    """The page of a result file, with the machine and the command that it names.

    Args:
        path: of the page.
        data: what the file holds.
        title: of the page, where the settings of the results give none.
        file: the file itself: the front and the pictures beside it are shown too.

    Raises:
        MissingExtraError: a package that pages need is missing.
        OutputError: it cannot be written.
    """
    settings: dict[str, Any] = {"commands": [data["command"]] if data.get("command") else []}
    if {"cpu", "gpu", "threads", "versions"} <= set(data.get("machine") or ()):
        settings["machine"] = data["machine"]
    kind, title = kind_of(data), _title(data) or title
    if kind == COMPARISON:
        from layercache.tools.compare.report import save_page

        settings["categories"] = _categories(data)
        return save_page(Path(path), _outcomes(data), title, _pictures(data, file), **settings)
    if kind == FRONT:
        from layercache.tools.report.front import rows_from_json, save_front_page

        rows, front = rows_from_json(data["rows"]), _front(file)
        return save_front_page(path, rows, title, front=front, notes=_notes(data), **settings)
    chart = {KERNELS: _kernels_chart, PEERS: _peers_chart}.get(kind)
    blocks: list[pages.Block] = [chart(data)] if chart else []
    blocks += [pages.Table.of(table, table.title or "Figures") for table in result_tables(data)]
    if failures := data.get("failures"):
        blocks.append(pages.Text([f"{name}: {reason}" for name, reason in failures.items()], "What failed"))
    return pages.save_page(path, title, blocks, lead=[STALE] * bool(data.get("stale")) + _notes(data), **settings)


def kernel_rows(data: Mapping[str, Any]) -> list[Row]:
    """Rows of a result of ``layercache bench kernels``."""
    names = {field.name for field in dataclasses.fields(Row)}
    return [
        Row(
            **{name: value for name, value in row.items() if name in names and name not in ("shape", "seconds")},
            shape=tuple(row["shape"]),
            seconds={name: Timing(**timing) for name, timing in row["seconds"].items()},
        )
        for row in data["rows"]
    ]


def _outcomes(data: Mapping[str, Any]) -> list[Any]:
    from layercache.tools.compare.run import Outcome

    return [Outcome.from_json(outcome) for outcome in data["outcomes"]]


def _pictures(data: Mapping[str, Any], file: Path | None) -> list[pages.Block]:
    """Those that were kept beside a comparison's file."""
    from layercache.tools.compare.files import ComparisonFiles
    from layercache.tools.compare.report import folder_pictures

    if file is None or file.name != "compare.json":
        return []
    files = ComparisonFiles.read(file.parent)
    return folder_pictures(files, _outcomes(data), files.captions) if files.has_full_pictures else []


def _front(file: Path | None) -> Any:
    """The front whose schedules the results are of, if it lies beside them."""
    from layercache.planning.front import Front

    beside = None if file is None else file.with_suffix(".front.json")
    return Front.load(beside) if beside is not None and beside.exists() else None


def _title(data: Mapping[str, Any]) -> str:
    """Of results of one model at one setting; else empty."""
    settings = data.get("settings")
    if not isinstance(settings, dict) or not {"model", "steps", "guidance", "seeds"} <= set(settings):
        return ""
    seeds = settings["seeds"]
    return (
        f"{settings['model']}, {settings['steps']} steps, guidance {settings['guidance']:g}, {seeds} held-out pictures"
    )


def _notes(data: Mapping[str, Any]) -> list[str]:
    return [str(note) for note in data.get("notes") or ()]


def _kernels_chart(data: Mapping[str, Any]) -> pages.Chart:
    rows = kernel_rows(data)
    several = len({row.shape for row in rows}) > 1
    bars = [
        {
            "case": row.case + (f", {'x'.join(map(str, row.shape))}" if several else ""),
            "variant": f"over {name}",
            "value": round(speedup, 4),
        }
        for row in rows
        for name, variant in (("eager", "eager"), ("torch.compile", "compiled"))
        if (speedup := row.speedup(variant)) is not None
    ]
    return pages.Chart(bars_chart(bars, "times as fast", from_one=True), "Times as fast as PyTorch")


def _peers_chart(data: Mapping[str, Any]) -> pages.Chart:
    bars = [
        {
            "case": f"{row['mode']}, {'reusing' if row['reuses'] else 'computing'}",
            "variant": "on layercache's ops" if row["accelerated"] else "as it is",
            "value": round(row["seconds"] * 1e3, 4),
        }
        for row in data["rows"]
    ]
    return pages.Chart(bars_chart(bars, "milliseconds of the cache in a step"), "Time of the cache in a step")


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> FittingTable:
    """Fields of the rows that are one value each; those behind the first three are left out first."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if _is_plain(rows, name)]
    table = FittingTable([Column(name, max(0, place - 2), _is_number(rows, name)) for place, name in enumerate(names)])
    for row in rows:
        table.add_row(*(_value(row.get(name)) for name in names))
    return table


def _is_plain(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return not any(isinstance(row.get(name), dict | list) for row in rows)


def _is_number(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(isinstance(row.get(name), int | float | None) for row in rows)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
