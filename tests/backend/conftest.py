"""The bundled model's pipeline."""

from __future__ import annotations

import pytest

from layercache.demo.pipeline import DemoPipeline, load_demo_pipeline


@pytest.fixture(scope="session")
def pipe() -> DemoPipeline:
    pipe = load_demo_pipeline("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe
