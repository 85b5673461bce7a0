"""What `make hub-kernels` writes for Hugging Face's `kernels`, without that package: it needs nothing else of ours."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

CI = Path(__file__).resolve().parents[2] / ".ci"
pytestmark = pytest.mark.skipif(not CI.exists(), reason="an sdist does not have it")


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_written_kernels_load_alone_and_agree_with_torch(tmp_path, monkeypatch):
    load("hub_kernels", CI / "hub_kernels.py").write(tmp_path, "somebody/layercache-kernels")
    monkeypatch.setitem(sys.modules, "layercache", None)  # importing it fails
    variant = tmp_path / "build" / "torch-cpu"
    described = json.loads((variant / "metadata.json").read_text())
    assert {"id", "name", "version", "license", "python-depends", "backend", "digest"} <= set(described)
    ops = load(described["id"], variant / "__init__.py")
    load("hub_check", CI / "hub" / "check.py").compare(ops, compiled=False)
    old = load("layercache_kernels", variant / "layercache_kernels" / "__init__.py")
    assert old.gram is ops.gram  # the ops are registered once


def test_an_import_that_is_not_allowed_is_found():
    faults = load("hub_kernels", CI / "hub_kernels.py").faults
    source = "import triton\nfrom numpy import ones\nfrom .tiles import new\ndef f():\n    import triton\n"
    assert faults("x.py", source) == ["x.py:1 imports triton", "x.py:2 imports numpy"]
