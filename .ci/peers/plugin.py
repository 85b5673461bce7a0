"""A plug-in of pytest that accelerates a package before its tests are imported, and records what became of each.

Settings come by the environment: PEER_PACKAGE is accelerated, where it is given; PEER_OUTCOMES is the file written.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

calls = 0  # of the functions that replace those of the package
outcomes: dict[str, dict[str, Any]] = {}


def _counted(replacement: Any) -> Any:
    @functools.wraps(replacement)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global calls
        calls += 1
        return replacement(*args, **kwargs)

    return counted


def pytest_configure(config: pytest.Config) -> None:
    package = os.environ.get("PEER_PACKAGE")
    if not package:
        return
    from layercache.backend import patching

    home, _ = patching._KNOWN[package]
    patching._KNOWN[package] = home, ("",)  # any version, so that a new release is tried before it is declared known
    for owner, name, _ in patching.accelerate(package)._before:
        setattr(owner, name, _counted(owner.__dict__[name]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Gives models without a seed of their own the same random weights in every run."""
    torch.manual_seed(0)
    item.stash[_BEFORE] = calls


def pytest_runtest_teardown(item: pytest.Item) -> None:
    item.user_properties.append(("calls", calls - item.stash.get(_BEFORE, calls)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = outcomes.setdefault(report.nodeid, {"outcome": "passed"})
    if report.outcome != "passed" and found["outcome"] == "passed":
        found["outcome"] = report.outcome
        found["message"] = "" if report.skipped else str(report.longrepr).strip().splitlines()[-1]
    found |= dict(report.user_properties)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # of xdist's processes only the first hears of all tests
        Path(os.environ["PEER_OUTCOMES"]).write_text(json.dumps(outcomes))


_BEFORE = pytest.StashKey[int]()
