"""Compares files of pytest-benchmark, measured in turn, as paired ratios; prints a table in Markdown.

    python .ci/benchmarks.py [--threshold 1.1] BASE.json HEAD.json [BASE.json HEAD.json ...]

A benchmark's ratio is HEAD's median time over BASE's, of the files that were measured one after the other. It is slower
where every pair says so by more than the threshold, which a machine that was busy for a while does not do; the exit
status is 1 then. Benchmarks that only one side has are listed, and decide nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

Medians = Mapping[str, float]  # seconds, by the benchmark's full name


def read(path: Path) -> Medians:
    return {one["fullname"]: float(one["stats"]["median"]) for one in json.loads(path.read_text())["benchmarks"]}


def ratios(pairs: Sequence[tuple[Medians, Medians]]) -> dict[str, list[float]]:
    """Ratios of each pair, of the benchmarks that all files have."""
    names = [name for name in pairs[0][0] if all(name in side for pair in pairs for side in pair)]
    return {name: [head[name] / base[name] for base, head in pairs] for name in names}


def verdict(values: Sequence[float], threshold: float) -> str:
    if min(values) > threshold:
        return "slower"
    return "faster" if max(values) < 1 / threshold else ""


def table(pairs: Sequence[tuple[Medians, Medians]], threshold: float) -> tuple[str, list[str]]:
    """The table, those that changed first, and the names of the slower ones."""
    found = ratios(pairs)
    order = sorted(found, key=lambda name: (not verdict(found[name], threshold), -statistics.median(found[name])))
    lines = [f"Time of this branch over its base's, {len(pairs)} pairs; {threshold:g} times is too much.", ""]
    lines += ["| benchmark | median ratio | of the pairs | |", "|---|---|---|---|"]
    for name in order:
        values = found[name]
        spread = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(f"| {name} | {statistics.median(values):.2f} | {spread} | {verdict(values, threshold)} |")
    everything = dict.fromkeys(name for pair in pairs for side in pair for name in side)
    if others := [name for name in everything if name not in found]:
        lines += ["", f"On one side alone: {', '.join(others)}."]
    return "\n".join(lines), [name for name in order if verdict(found[name], threshold) == "slower"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="BASE.json HEAD.json")
    parser.add_argument("--threshold", type=float, default=1.1)
    options = parser.parse_args(arguments)
    if len(options.files) % 2:
        parser.error("files come in pairs: BASE.json HEAD.json")
    medians = list(map(read, options.files))
    text, slower = table(list(zip(medians[::2], medians[1::2], strict=True)), options.threshold)
    print(text)
    if slower:
        print(f"slower by more than {options.threshold:g} times: {', '.join(slower)}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
