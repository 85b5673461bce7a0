"""Pages of measurements for the documentation site, made from the files in bench/results: no figure is typed."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
LONGEST = 48  # rows of a table that is shown at once; longer ones are opened by a click
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Page:
    """A page: result files whose name one of the patterns fits, in the order of the patterns."""

    name: str
    title: str
    about: str
    patterns: tuple[str, ...]


PAGES = (
    Page(
        "quality",
        "Quality per compute",
        "PSNR in dB of pictures of the bundled models against the full run of the same seed: the mean, and in brackets "
        "what nine pictures of ten exceed. The budget is the share of compute that a method may take.",
        ("demo-cpu", "pareto-.*", "compare-.*", "whole-steps-.*", "groups-.*", "few(er)?-steps?-.*", "free-levels-.*"),
    ),
    Page(
        "planning",
        "Search, learning, defaults",
        "What the parts of a search add, schedules without one, and what they cost. PSNR as on the page of quality.",
        ("ablation-.*", "(learn|universal|defaults|router)-.*", "solvers", "surrogate", "scale", "workers"),
    ),
    Page(
        "cpu",
        "Speed on a CPU",
        "Of the ops, of whole generations, of the host.",
        ("(end-to-end|kernels|peers)-cpu", "host-overhead", "import-time", "launch-plans", "timestep-tables"),
    ),
    Page(
        "elsewhere",
        "In other programs",
        "The nodes in ComfyUI's code; the cache tests of diffusers and cache-dit on the ops.",
        ("comfyui", "peer-tests"),
    ),
    Page("gpu", "Speed on a GPU", "Runs on one NVIDIA H200, random weights of real size.", ("nvidia-.*",)),
)


# --- Cells --------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Four digits, without an exponent where that is readable."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.2e}"


def summary(values: Sequence[float]) -> str:
    """The mean and, in brackets, the 10 % quantile."""
    if len(values) < 2:
        return _pair(values[0])
    return _pair(statistics.fmean(values), statistics.quantiles(values, n=10, method="inclusive")[0])


def _pair(*values: float) -> str:
    """Decibels with one digit behind the point, shares with four."""
    first, *rest = [f"{value:.{4 if abs(value) <= 1 else 1}f}" for value in values]
    return f"{first} ({rest[0]})" if rest else first


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, (int, float)) for one in value)


def flat(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a row by column: numbers, texts, flags and summaries; what is nested deeper is in the file."""
    cells: dict[str, str] = {}
    for name, value in row.items():
        column = name.replace("_", " ")
        if isinstance(value, dict) and {"mean", "quantile10"} <= set(value):
            cells[column] = _pair(value["mean"], value["quantile10"])
        elif isinstance(value, bool):
            cells[column] = "yes" if value else "no"
        elif isinstance(value, (int, float)):
            cells[column] = str(value) if isinstance(value, int) else number(value)
        elif isinstance(value, str):
            cells[column] = value.replace("|", "/")
        elif name == "shape":
            cells[column] = " x ".join(map(str, value))
        elif name == "range":
            cells[column] = " to ".join(map(number, value))
        elif is_numbers(value):
            cells[column] = summary(value)
    return cells


def table(rows: Rows, columns: Sequence[str] = ()) -> str:
    """A table of rows; a column with the same cell everywhere is left out unless columns are named."""
    cells = [flat(row) for row in rows]
    names = columns or list(dict.fromkeys(name for row in cells for name in row))
    if not columns and len(cells) > 1:
        names = [name for name in names if len({row.get(name, "") for row in cells}) > 1]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(row.get(name, '') for name in names)} |" for row in cells]
    if len(rows) <= LONGEST:
        return "\n".join(lines)
    return "\n".join([f'??? note "{len(rows)} rows"', "", *(f"    {line}" for line in lines)])


# --- Tables per kind of file --------------------------------------------------------------------------------------


def by_budget(rows: Rows, name: str = "name", cell: Callable[[dict[str, Any]], str] | None = None) -> str:
    """One line per name, one column per budget; of several rows with the same name the last settings."""
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    found = {(row[name], row["budget"]): (cell or quality)(row) for row in rows}
    lines = [f"| method | {' | '.join(f'{budget:g}' for budget in budgets)} |", "|---" * (len(budgets) + 1) + "|"]
    for one in dict.fromkeys(row[name] for row in rows):
        lines.append(f"| {one} | {' | '.join(found.get((one, budget), '') for budget in budgets)} |")
    return "\n".join(lines)


def quality(row: dict[str, Any]) -> str:
    return summary(row.get("held_out_psnr") or row["psnr"]) if row.get("held_out_psnr") or row.get("psnr") else ""


def of_front(content: dict[str, Any]) -> list[str]:
    """Searches and their rivals, at every budget; several numbers of steps one below the other."""
    parts = []
    steps = dict.fromkeys(row.get("steps") for row in content["rows"])
    for count in steps:
        rows = [row for row in content["rows"] if row.get("steps") == count]
        parts += [f"{count} steps:", ""] if count else []
        parts += [by_budget(rows), ""]
    return parts


def of_comparison(content: dict[str, Any]) -> list[str]:
    rows = [row for row in content["outcomes"] if not row["error"]]
    used = by_budget(rows, "method", lambda row: f"{row['used']:.3f}, {row['speedup']:.2f}x")
    return [by_budget(rows, "method"), "", "Share of compute that was used, and speedup:", "", used]


def of_kernels(content: dict[str, Any]) -> list[str]:
    def row(one: dict[str, Any]) -> dict[str, Any]:
        ours = one["seconds"]["ours"]["median"]
        cells = {
            "case": one["case"],
            "shape": one["shape"],
            "MB": f"{one['bytes'] / 1e6:.0f}",
            "us": f"{ours * 1e6:.1f}",
        }
        cells["of a copy"] = f"{one['share_of_limit']:.0%}" if one.get("share_of_limit") else ""
        for name in ("eager", "compiled"):
            speedup = one.get(f"speedup_over_{name}")
            cells[name] = f"{speedup:.2f}x" if speedup else ""
        return cells

    return [table([row(one) for one in content["rows"]])]


def of_real_size(content: dict[str, Any]) -> list[str]:
    parts: list[str] = []
    for model, found in content["models"].items():
        rows = []
        for name, row in found["rows"].items():
            seconds = {"ms per step": row["step_seconds"]}
            seconds |= {f"of a {kind} one": value for kind, value in row.get("seconds_of", {}).items() if value}
            times = {name: f"{value * 1e3:.2f}" for name, value in seconds.items()}
            more = {column: row[column] for column in ("used", "speedup", "allowed") if column in row}
            if "peak_bytes_above_full" in row:
                more["MB above the full run"] = f"{row['peak_bytes_above_full'] / 1e6:.0f}"
            rows.append({"run": name} | times | more)
        parts += [f"{model}, without the {content['warm_steps']} steps that warm up:", "", table(rows), ""]
    return parts


def of_ablation(content: dict[str, Any]) -> list[str]:
    steps = content["settings"]["steps"]
    rows = [row | {"budget": round(row["computed"] / steps, 2)} for row in content["rows"]]
    return ["By the share of steps that was computed:", "", by_budget(rows, "variant")]


def of_models(content: dict[str, Any]) -> list[str]:
    """Small models one below the other: runs with their PSNR."""
    parts: list[str] = []
    for model, found in content["models"].items():
        runs = found.get("entries") or {name: {"psnr": psnr} for name, psnr in found["psnr_against_30_steps"].items()}
        rows = [{"run": name} | {k: row[k] for k in ("share", "psnr") if k in row} for name, row in runs.items()]
        parts += [f"{model}:", "", table(rows, list(flat(rows[0]))), ""]
    return parts


def of_variants(content: dict[str, Any]) -> list[str]:
    """The kernels with other constants, against those of the parent commit."""
    columns = ("sweep", "case", "variant", "ms", "share of copy", "speedup")
    return [table(content["rows"], columns)]


def tables_of(content: dict[str, Any]) -> list[str]:
    """The tables of a result file of any kind.

    Raises:
        ValueError: there is nothing in it that could be shown.
    """
    rows = content.get("rows") or content.get("methods")
    if "outcomes" in content:
        return of_comparison(content)
    if content.get("kind") == "kernels":
        return of_kernels(content)
    if content.get("kind") == "real size":
        return of_real_size(content)
    if "variants" in content:
        return of_variants(content)
    if isinstance(content.get("models"), dict):
        return of_models(content)
    if rows and "variant" in rows[0]:
        return of_ablation(content)
    if rows and {"name", "budget"} <= set(rows[0]) and ("psnr" in rows[0] or "held_out_psnr" in rows[0]):
        return of_front(content)
    lists = {name: value for name, value in content.items() if _is_table(value) and name != "pictures"}
    if not lists:
        raise ValueError("a result file without rows")
    names = [[f"{name.capitalize()}:", ""] if len(lists) > 1 else [] for name in lists]
    return [part for name, value in zip(names, lists.values(), strict=True) for part in (*name, table(value), "")]


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def machine_line(content: dict[str, Any]) -> str:
    machine = content.get("machine") or content.get("measured", {}).get("machine") or {}
    machine = machine.get("machine", machine)
    versions, threads = machine.get("versions", {}), machine.get("threads")
    words = [machine.get("gpu") or machine.get("cpu") or content.get("gpu", "")]
    if threads and not machine.get("gpu"):
        words.append("one thread" if threads == 1 else f"{threads} threads")
    words += [f"{name} {versions[name]}" for name in ("python", "torch", "diffusers") if versions.get(name)]
    return ", ".join(word for word in words if word)


def section(path: Path, host: str) -> list[str]:
    """A result file: how it was made, where it is, its tables and its plot."""
    content = json.loads(path.read_text())
    content = {"rows": content} if isinstance(content, list) else content
    parts = [f"## {path.stem}", ""]
    parts += ["```console", f"$ {content['command']}", "```", ""] if content.get("command") else []
    about = [machine_line(content), f"[the file]({host}/blob/main/bench/results/{path.name})"]
    about += ["measured with kernels that have changed since"] if content.get("stale") else []
    parts += ["; ".join(one for one in about if one) + ".", "", *tables_of(content), ""]
    if path.with_suffix(".png").exists():
        parts += [f"![plot of {path.stem}](plots/{path.stem}.png)", ""]
    return parts


def write_pages(folder: Path, host: str) -> None:
    """Writes the pages; every result file is on one of them, but for fronts, whose rows are those of another file.

    Raises:
        ValueError: a result file that fits no page, or has nothing to show.
    """
    (folder / "plots").mkdir(parents=True)
    for plot in RESULTS.glob("*.png"):
        shutil.copy(plot, folder / "plots")
    left = {path.stem: path for path in sorted(RESULTS.glob("*.json")) if not path.name.endswith(".front.json")}
    contents = ["# Result files", "", "Made from the files in `bench/results` when this site is built.", ""]
    for page in PAGES:
        parts = [f"# {page.title}", "", page.about, ""]
        contents += [f"## [{page.title}]({page.name}.md)", "", page.about, ""]
        for pattern in page.patterns:
            for stem in [stem for stem in left if re.fullmatch(pattern, stem)]:
                path = left.pop(stem)
                try:
                    parts += section(path, host)
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}: {error!r}") from error
                contents.append(f"- [{stem}]({page.name}.md#{stem})")
        contents.append("")
        (folder / f"{page.name}.md").write_text("\n".join(parts))
    if left:
        raise ValueError(f"result files of no page: {', '.join(left)}")
    (folder / "index.md").write_text("\n".join(contents))
