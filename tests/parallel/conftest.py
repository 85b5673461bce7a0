"""Results are compared with those of processes that have one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.crews import one_thread


@pytest.fixture(scope="module", autouse=True)
def thread() -> Iterator[None]:
    with one_thread():
        yield
