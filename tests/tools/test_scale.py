"""bench/scale.py: simulated processes share out as real ones do, and the document says what was simulated."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from layercache.errors import CalibrationError, CrewError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("scale")


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "bench" / "results" / "scale.json").read_text())
    return found


def settings(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": 0, "slower": 1.0, "step": 0.5, "spread": 0.0} | changes)


def measured(milliseconds: float) -> dict[str, Any]:
    return {"exchange": {"512": [2e-3 * milliseconds]}, "pass": {"16384": [1e-3 * milliseconds]}}


def test_processes_leave_an_exchange_together(scale: ModuleType) -> None:
    def task(crew: Any) -> tuple[list[int], float]:
        crew.work(crew.rank)
        found = crew.gather(crew.share(range(7)))
        crew.unsent = 5000
        crew.gather([0])
        return found, crew.clock

    meeting = scale.Meeting(3, lambda size: 0.25 if size < 4096 else 10.0)
    assert scale.on_threads(task, meeting) == [([0, 1, 2, 3, 4, 5, 6], 12.25)] * 3


def test_errors_reach_all_of_them(scale: ModuleType) -> None:
    errors = []

    def task(crew: Any) -> None:
        def run(number: int) -> int:
            if number in (3, 4):
                raise CalibrationError(f"sample {number}")
            return number

        try:
            crew.map(run, range(6))
        except CalibrationError as error:
            errors.append(str(error))
        if crew.rank == 1:
            raise ValueError("gone")
        with pytest.raises(CrewError):
            crew.gather([0])

    with pytest.raises(ValueError, match="gone"):
        scale.on_threads(task, scale.Meeting(3))
    assert errors == ["sample 3"] * 3


def test_efficiency_is_that_of_a_clock(scale: ModuleType) -> None:
    work = scale.Work("refit", 4, [(10.0, 100, 1), (0.0, 100, 1)], host_seconds=2.0)
    row = scale.simulated(measured(0.0), work, 4, 6, settings())
    assert row["seconds"] == pytest.approx(2 * 10 * 0.5 + 3.0)  # two samples of some, 3 s beside the model
    assert row["speedup"] == pytest.approx((6 * 5 + 3) / 13)
    slow = scale.simulated(measured(100.0), work, 4, 6, settings())
    assert slow["seconds"] == pytest.approx(row["seconds"] + 2 * 3 * 0.1)  # three rounds for four processes
    calibration = scale.Work("calibrate", 4, [(10.0, 16384, 1), (0.0, 100, 1)])
    row = scale.simulated(measured(100.0), calibration, 4, 4, settings())
    assert row["seconds"] == pytest.approx(5 + 0.3 + 0.3 + 0.3, rel=1e-3)  # two exchanges, one of which goes around


def test_the_same_seed_gives_the_same_figures(scale: ModuleType, committed: dict[str, Any]) -> None:
    wanted = next(row for row in committed["rows"] if row["work"] == "refit" and row["processes"] == 8)
    data = next(one for one in committed["measured"]["work"] if one["name"] == "refit")
    args = settings(**committed["settings"])
    found = scale.simulated(committed["measured"], scale.Work(**data), 8, wanted["samples"], args)
    assert found == pytest.approx(wanted)


def test_64_processes_are_of_use(committed: dict[str, Any]) -> None:
    found = {row["work"]: row for row in committed["rows"] if (row["samples"], row["processes"]) == (64, 64)}
    assert committed["settings"]["step"] == 0.3
    assert all(found[name]["efficiency"] >= 0.9 for name in ("calibrate", "refit"))


def test_the_document_says_what_was_simulated(committed: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "distributed.md").read_text()
    rows = re.findall(r"^\| ([a-z, ]+) \| (\d+) \| (\d+) \| ([\d.]+)x \| ([\d.]+) \|", text, re.MULTILINE)
    by_place = {(row["work"], row["samples"], row["processes"]): row for row in committed["rows"]}
    assert len(rows) >= 10
    for name, samples, processes, speedup, efficiency in rows:
        found = by_place[name, int(samples), int(processes)]
        assert (speedup, efficiency) == (f"{found['speedup']:.1f}", f"{found['efficiency']:.2f}")
    said = " ".join(text.split())
    for figure in _figures_of(committed):
        assert figure in said, figure


def _figures_of(committed: dict[str, Any]) -> list[str]:
    """What the document says beside its table."""
    measured, found = committed["measured"], {(row["work"], row["processes"]): row for row in committed["rows"]}
    work = {one["name"]: one for one in measured["work"]}
    times = {size: [1e3 * value for value in values] for size, values in measured["exchange"].items()}
    low, high = (np.quantile(times["512"], 0.99), np.quantile(times["16384"], 0.99))
    exchanges = sum(count for _, _, count in work["search"]["intervals"])
    size = sum(size * count for _, size, count in work["search"]["intervals"]) / exchanges
    varied = [
        [f"{row['efficiency']:.2f}" for row in committed["variations"] if name in row]
        for name in ("step", "slower", "spread")
    ]
    return [
        f"sends {max(size for _, size, _ in work['calibrate']['intervals']) / 1e6:.1f} MB once",
        f"{exchanges} exchanges, one for every step that is fitted and a few for every run, of {size:.0f} bytes",
        f"take {np.median(times['512']):.1f} ms for one of 512 bytes",
        f"and {np.median(times['16384']):.1f} ms for one of 16 kB",
        f"99 % are below {low:.0f} and {high:.0f} ms",
        f"{work['search']['host_seconds']:.0f} s of its {found['search', 1]['seconds']:.0f} s",
        f"as long, of {found['search', 8]['seconds']:.0f} s",
        "is {} for calibration and {} for refitting, of a search of 8 on 8 {}.".format(*varied[0]),
        "{}, {} and {} at 0.3 s".format(*varied[1]),
        "{}, {} and {}.".format(*varied[2]),
    ]
