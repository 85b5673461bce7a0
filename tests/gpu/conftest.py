"""Stops a run that expects a GPU (LAYERCACHE_EXPECT_GPU=1) where there is none: its tests would only be skipped."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure() -> None:
    if os.environ.get("LAYERCACHE_EXPECT_GPU") == "1" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "LAYERCACHE_EXPECT_GPU=1 is set, but torch.cuda.is_available() is False: the tests of tests/gpu would be "
            "skipped or run on the CPU"
        )
