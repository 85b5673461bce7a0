"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Files that take longest, which are begun first, so that no process is left alone with one at the end.
LONG = (
    "tools/test_cli.py",
    "kernels/test_compiled_kernels.py",
    "methods/test_dynamic_methods.py",
    "tools/test_cli_pipelines.py",
    "runtime/test_surroundings.py",
    "runtime/test_compile.py",
    "backend/test_backend.py",
    "ops/test_native.py",
    "ops/test_ops.py",
    "core/test_scheduler.py",
    "models/test_descriptions.py",
    "planning/test_rollout.py",
    "planning/test_learn.py",
    "models/test_models.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learnt in a test is known to no other."""
    monkeypatch.setenv("LAYERCACHE_HOME", str(tmp_path / "layercache home"))


@pytest.fixture(scope="module")
def short_searches() -> Iterator[None]:
    """Searches at the lowest effort run a third of the schedules, for tests of everything but how good they are."""
    from layercache.planning.search import EFFORTS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", 12)
        yield


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that a result which was never written cannot look right by accident."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
            tensor = allocate(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
