"""Figures in tables of documents are those of the result files that their section links to."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
UNITS = (1, 100, 1e3, 1e6, 1e-6, 1e-9)  # of seconds and shares: as they are, per cent, ms, us; of bytes: MB, GB
PAIR = re.compile(r"(\d+\.\d) \((\d+\.\d)\)")
FIGURE = re.compile(r"(?<![\w.+-])-?\d[\d,]*\.\d+")
LINK = re.compile(r"\]\(([^)\s]*bench/results/[^)\s]*\.(?:json|txt))\)")
RESULTS = ROOT / "bench" / "results"


@dataclass
class Values:
    """What is in result files: numbers, of lists and summaries the mean and the 10 % quantile."""

    numbers: list[float] = field(default_factory=list)
    means: set[str] = field(default_factory=set)
    quantiles: set[str] = field(default_factory=set)

    def add(self, value: Any) -> None:
        if isinstance(value, dict):
            if {"mean", "quantile10"} <= set(value):
                self._add_summary(value["mean"], value["quantile10"])
            for one in value.values():
                self.add(one)
        elif isinstance(value, list):
            if len(value) > 1 and all(isinstance(one, (int, float)) for one in value):
                self._add_summary(statistics.fmean(value), statistics.quantiles(value, n=10, method="inclusive")[0])
                self.numbers += [min(value), statistics.median(value)]
            for one in value:
                self.add(one)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            self.numbers.append(value)

    def _add_summary(self, mean: float, quantile: float) -> None:
        self.means.add(f"{mean:.1f}")
        self.quantiles.add(f"{quantile:.1f}")
        self.numbers += [mean, quantile]

    def has(self, text: str) -> bool:
        """Whether a number is there that is written like this, in one of the units."""
        digits = len(text.partition(".")[2])
        half = 0.5 * 10**-digits * (1 + 1e-9)
        value = float(text.replace(",", ""))
        return any(abs(value - number * unit) <= half for number in self.numbers for unit in UNITS)


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects of a file, the innermost too."""
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(one)


def values_of(files: list[Path], label: str = "") -> Values:
    """Of the objects and lines of text that have a label; of all of a file of text, or of all files, where none has."""
    values, found = Values(), Values()
    for path in files:
        if path.suffix == ".txt":
            text = path.read_text()
            rows = re.findall(rf"^ *{re.escape(label)}  .*$", text, re.MULTILINE) if label else []
            found.numbers += [float(one) for one in re.findall(r"\d+\.\d+", "\n".join(rows) or text)]
            continue
        content = json.loads(path.read_text())
        values.add(content)
        for one in objects(content) if label else ():
            if label in one.values():
                found.add(one)
    return found if found.numbers else values


def quotients(cells: list[str]) -> set[str]:
    """Of two figures of a row, with a digit behind the point."""
    figures = [float(one.replace(",", "")) for cell in cells for one in FIGURE.findall(cell)]
    return {f"{a / b:.1f}" for a in figures for b in figures if b}


def wrong_cells(rows: list[str], files: list[Path]) -> list[str]:
    """Cells with a figure that no file has. Signed ones are differences, columns with a formula follow from others."""
    heads = [cell.strip() for cell in rows[0].strip("|").split("|")]
    every, wrong = values_of(files), []
    for row in rows[1:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        own = values_of(files, cells[0]) if cells[0] else every
        for head, cell in zip(heads[1:], cells[1:], strict=True):
            if "ceil" in head or cell[:1] in "+-":
                continue
            pairs = PAIR.findall(cell)
            if pairs:
                fine = all(mean in every.means and quantile in every.quantiles for mean, quantile in pairs)
            else:
                given = FIGURE.findall(cell)
                fine = all(own.has(one) or (f"{one}x" in cell and one in quotients(cells)) for one in given)
            wrong += [] if fine else [f"{cell} in {row}"]
    return wrong


def tables(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Rows of each table of a document, without the line below its head, and the result files of its section."""
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE):
        for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            yield [line for line in block.splitlines() if not line.startswith("|---")], LINK.findall(section)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_figures_of_tables_are_those_of_result_files(path: Path) -> None:
    for rows, links in tables(path.read_text()):
        if links:
            assert not wrong_cells(rows, [(path.parent / link).resolve() for link in dict.fromkeys(links)])


def best_of_rivals(rows: list[dict[str, Any]], budget: float) -> list[float]:
    """How far layercache lies above the best rival of a budget: mean, 10 % quantile, worst."""

    def figures(row: dict[str, Any]) -> list[float]:
        psnr = row["held_out_psnr"]
        return [statistics.fmean(psnr), statistics.quantiles(psnr, n=10, method="inclusive")[0], min(psnr)]

    found = [(row["name"], figures(row)) for row in rows if row["budget"] == budget]
    ours = next(one for name, one in found if name == "layercache")
    rivals = [one for name, one in found if name != "layercache"]
    return [own - max(one[number] for one in rivals) for number, own in enumerate(ours)]


def test_differences_of_further_models_follow_from_their_files() -> None:
    section = (ROOT / "docs" / "results.md").read_text().partition("### Two more models")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    said = [[float(one) for one in row[-3:]] for row in rows[1:]]
    follow = []
    for stem in ("pareto-m12-30-cfg4", "pareto-m12-50-cfg4", "pareto-m20-30-cfg4"):
        measured = json.loads((RESULTS / f"{stem}.json").read_text())["rows"]
        budgets = sorted({row["budget"] for row in measured}, reverse=True)
        follow += [best_of_rivals(measured, budget) for budget in budgets]
    assert len(said) == len(follow)
    for row, own in zip(said, follow, strict=True):
        assert all(math.isclose(a, b, abs_tol=0.0501) for a, b in zip(row, own, strict=True)), (row, own)
