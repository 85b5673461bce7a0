"""bench/real_size.py on a CPU: a run that is killed keeps what it measured, an entry that fails stops nobody."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.marks import slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def real_size(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("real_size")


def settings(path: Path, **changes: Any) -> argparse.Namespace:
    wanted = {"entry": ["full", "one group, half"], "compile": False, "steps": 6, "rounds": 2, "seconds": 100.0}
    return argparse.Namespace(tiny=True, device="cpu", json=path, start=time.monotonic(), **wanted | changes)


@pytest.mark.slow
def test_a_killed_run_keeps_every_entry_that_it_told(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, "bench/real_size.py", "--tiny", "--device", "cpu", "--model", "qwen", "--no-compile"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*command, "--json", str(path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    entries: list[str] = []
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("measured: "):
            entries.append(line.split(": ")[2])
        if len(entries) == 4:
            break
    run.kill()
    run.wait()
    run.stdout.close()
    found = json.loads(path.read_text())["models"]["qwen"]
    assert len(entries) == 4 and set(entries) <= set(found["rows"]) and not found["failures"]
    half, half_steps = found["rows"]["layercache, one group, half"], ["computed", "reused"]
    assert half["steps"] == ["computed"] * 2 + half_steps * 3 and half["blocks_run"] == [3, 3, 3, 0, 3, 0, 3, 0]
    assert half["predicted_bytes"] == half["cache_bytes"] > 0 and half["finite"] and half["fallback_rows"] == 0


@pytest.mark.parametrize("model", slow("qwen", "flux"))
def test_an_entry_that_fails_stops_nobody(real_size: ModuleType, tmp_path: Path, model: str) -> None:
    def breaks(pipe: Any) -> Any:
        raise RuntimeError("out of memory")

    known: dict[str, Any] = {"models": {}}
    measurement = real_size.Measurement(settings(tmp_path / "found.json"), model, known)
    measurement.entries = {"breaks": real_size.Entry(breaks), **measurement.entries}
    measurement.run()
    found = json.loads((tmp_path / "found.json").read_text())["models"][model]
    assert found["failures"] == {"breaks": "RuntimeError: out of memory"} and found["finished"]
    assert all(len(row["device"]) == 2 for row in found["rows"].values())
    assert found["rows"]["layercache, one group, half"]["allowed"] > 1


def test_nothing_is_begun_after_the_limit(real_size: ModuleType, tmp_path: Path) -> None:
    known: dict[str, Any] = {"models": {}}
    measurement = real_size.Measurement(settings(tmp_path / "found.json", seconds=0.0), "qwen", known)
    measurement.run()
    found = json.loads((tmp_path / "found.json").read_text())["models"]["qwen"]
    assert not found["rows"] and found["not_begun"] == list(measurement.entries)
