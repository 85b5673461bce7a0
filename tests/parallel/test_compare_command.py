"""`layercache compare` by several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from layercache.tools.cli.app import app
from support.hosts import command, ended, ranks_of, running, wait_until

WORDS = ("--methods", "uniform,fbcache", "--budgets", 0.5, "--steps", 6, "--seeds", 3, "--batch", 1, "--calibration", 2)


def figures_in(folder: Path) -> list[Any]:
    """Outcomes but their times, and digests of the pictures."""
    data = json.loads((folder / "compare.json").read_text())
    times = ("seconds", "speedup", "speedups")
    return [data["pictures"], *({k: v for k, v in one.items() if k not in times} for one in data["outcomes"])]


def test_more_processes_than_calls_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    words = ["compare", *map(str, WORDS), "--workers", "4", "-o", str(tmp_path / "new")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "4 processes cannot share 3 samples" in " ".join(result.output.split())
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_killed_process_changes_no_bit_and_what_is_finished_starts_none(tmp_path: Path) -> None:
    with running(command("compare", *WORDS, "-o", "one"), tmp_path) as process:
        assert "figures: one" in ended(process)
    with running(command("compare", *WORDS, "--workers", 2, "-o", "two"), tmp_path) as process:
        file = tmp_path / "two" / "compare.json"
        wait_until(lambda: file.exists() and len(json.loads(file.read_text())["outcomes"]) > 0, process)
        ranks_of(process)[-1].kill()
        text = ended(process)
    assert process.returncode == 0 and "restart 1" in text, text
    assert figures_in(tmp_path / "one") == figures_in(tmp_path / "two")
    with running(command("compare", *WORDS, "--workers", 2, "-o", "two"), tmp_path) as process:
        assert "was finished before" in ended(process)
