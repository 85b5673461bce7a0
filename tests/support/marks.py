"""Parameters that only `make test-all` takes."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Each of ``values``, a tuple where a test takes several arguments, marked ``slow``."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]
