"""The scripts of the release and of pull requests: the change log's form and notes, benchmarks compared in pairs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHANGES = (ROOT / "CHANGELOG.md").read_text()
GOOD = """# Changes

## 0.3.0 - 2026-12-24

### Added

* [How](docs/planning.md), [why](https://example.org).

## 0.2.0 - 2026-11-28

### Fixed

* That.

## 0.1.0 - not published

### Changed

* This.
"""


@pytest.fixture(scope="module")
def changelog() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "changelog.py"))


def test_the_change_log_keeps_its_form(changelog: dict[str, Any]) -> None:
    assert changelog["faults"](CHANGES) == changelog["faults"](GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("0.3.0 - 2026-12-24", "Unreleased", "'Unreleased' is no version"),
        ("0.2.0 - 2026-11-28", "0.2.0 - unreleased", "0.2.0 has no date but 'unreleased'"),
        ("2026-12-24", "24-12-2026", "0.3.0 has no date but '24-12-2026'"),
        ("2026-12-24", "2026-11-24", "0.2.0 is dated after 0.3.0"),
        ("0.2.0", "0.10.0", "0.10.0 stands below 0.3.0"),
        ("### Fixed", "### New", "0.2.0 has a section 'New'"),
        ("* That.", "* That.\n\n### Fixed\n\n* More.", "0.2.0 does not begin with a section, or has one twice"),
        ("* That.\n", "", "0.2.0 has an empty section"),
    ],
)
def test_a_change_log_that_does_not(old: str, new: str, fault: str, changelog: dict[str, Any]) -> None:
    (found,) = changelog["faults"](GOOD.replace(old, new))
    assert found.startswith(fault)


def test_notes_of_a_release(changelog: dict[str, Any]) -> None:
    notes = changelog["notes_of"]
    linked = "### Added\n\n* [How](https://h/o/r/blob/v0.3.0/docs/planning.md), [why](https://example.org)."
    assert notes("0.3.0", GOOD, "https://h/o/r") == linked
    for version, text in (("0.2.0", GOOD), ("0.3.0", GOOD.replace("2026-12-24", "unreleased"))):
        with pytest.raises(SystemExit, match="begins with 0.3.0"):
            notes(version, text)


@pytest.mark.parametrize(
    ("head", "status"),
    [((1.0, 1.0), 0), ((1.2, 1.05), 0), ((1.12, 1.3), 1)],
    ids=["same", "one pair", "every pair"],
)
def test_benchmarks_are_compared_in_pairs(
    head: tuple[float, float], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second pair ran on a machine twice as slow; only what every pair says counts."""

    def measured(name: str, **medians: float) -> str:
        rows = [{"fullname": key, "stats": {"median": value}} for key, value in medians.items()]
        (tmp_path / name).write_text(json.dumps({"benchmarks": rows}))
        return str(tmp_path / name)

    main = runpy.run_path(str(ROOT / ".ci" / "benchmarks.py"))["main"]
    files = [
        measured("1", op=2e-3, quick=1e-3, gone=1.0),
        measured("2", op=2e-3 * head[0], quick=0.8e-3, new=1.0),
        measured("3", op=4e-3, quick=2e-3, gone=1.0),
        measured("4", op=4e-3 * head[1], quick=1.6e-3, new=1.0),
    ]
    assert main(["--threshold", "1.1", *files]) == status
    out, error = capsys.readouterr()
    assert f"| op | {sum(head) / 2:.2f} | {min(head):.2f} to {max(head):.2f} | {'slower' if status else ''} |" in out
    assert "| quick | 0.80 | 0.80 to 0.80 | faster |" in out and "On one side alone: gone, new." in out
    assert ("op" in error) == bool(status)
