"""Without a GPU these tests are skipped or slow; where one is expected (LAYERCACHE_EXPECT_GPU=1) that is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_configure() -> None:
    if os.environ.get("LAYERCACHE_EXPECT_GPU") == "1" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "LAYERCACHE_EXPECT_GPU=1 is set, but torch.cuda.is_available() is False: the tests of tests/gpu would be "
            "skipped or run on the CPU"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.slow)
