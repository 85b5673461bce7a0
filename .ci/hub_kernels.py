"""Writes the Triton kernels as a repository for Hugging Face's `kernels`, and loads it: `make hub-kernels`.

The rules are those of https://huggingface.co/docs/kernels/kernel-requirements: imports are relative, or of the standard
library and torch; Python 3.9; ops in a namespace of each build's own. Triton is imported at the first launch.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / ".ci" / "hub"
NAME, VERSION, LICENSE = "layercache-kernels", 1, "apache-2.0"
PYTHON_NAME = NAME.replace("-", "_")
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
TYPING_OF_3_9 = {"TYPE_CHECKING", "Any", "NamedTuple", "TypeVar"}

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = ["cuda", "rocm", "xpu"]

[general.hub]
repo-id = "{repository}"

[torch-noarch]
pyext = ["py"]
"""
FOR_OLD_CLIENTS = '''\
"""The package of the folder above, for clients that look for one of its name."""

import importlib.util
import sys
from pathlib import Path

if "{identity}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{identity}", Path(__file__).resolve().parents[1] / "__init__.py")
    sys.modules["{identity}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{identity}"])
__all__ = sys.modules["{identity}"].__all__
globals().update({{name: getattr(sys.modules["{identity}"], name) for name in __all__}})
'''


def sources() -> dict[str, str]:
    """The package's files but for its namespace. Of `zip`, Python 3.9 does not know `strict`."""
    found = {"__init__.py": (HUB / "api.py").read_text()}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        found[path.name] = re.sub(r", strict=(True|False)\)", ")", path.read_text())
    used, waiting = {}, ["__init__.py"]
    while waiting:  # only what the ops need
        name = waiting.pop()
        if name in found and name not in used:
            used[name] = found[name]
            waiting += [f"{module}.py" for module in re.findall(r"^from \.(\w+) import", found[name], re.MULTILINE)]
    return dict(sorted(used.items()))


def faults(name: str, source: str) -> list[str]:
    """What a file does that a kernel on the Hub must not."""
    tree = ast.parse(source, name, feature_version=(3, 9))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.ImportFrom) and node.level):
            continue
        for module in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
            room = module.partition(".")[0]
            if room not in sys.stdlib_module_names and room != "torch" and (room != "triton" or node in top):
                found.append(f"{name}:{node.lineno} imports {module}")
        if node in top and isinstance(node, ast.ImportFrom) and node.module == "typing":
            found += [f"{name}: typing.{a.name}" for a in node.names if a.name not in TYPING_OF_3_9]
    return found


def digest(folder: Path) -> dict[str, object]:
    files = sorted(path for path in folder.rglob("*.py"))
    hashed = {
        str(f.relative_to(folder)): base64.b64encode(hashlib.sha256(f.read_bytes()).digest()).decode() for f in files
    }
    return {"algorithm": "sha256", "files": hashed}


def write_variant(folder: Path, backend: str, files: dict[str, str]) -> None:
    build = hashlib.sha256(json.dumps([backend, files]).encode()).hexdigest()[:8]
    identity = f"_{PYTHON_NAME}_{backend}_{build}"
    (folder / PYTHON_NAME).mkdir(parents=True)
    for name, source in (files | {"_namespace.py": f'NAMESPACE = "{identity}"\n'}).items():
        (folder / name).write_text(source)
    (folder / PYTHON_NAME / "__init__.py").write_text(FOR_OLD_CLIENTS.format(identity=identity))
    metadata = {"id": identity, "name": NAME, "version": VERSION, "license": LICENSE, "python-depends": []}
    metadata |= {"backend": {"type": backend}, "digest": digest(folder)}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write(tree: Path, repository: str) -> None:
    """The sources of the repository, and what is built of them: the same files for every backend."""
    files = sources()
    if wrong := [fault for name, source in files.items() for fault in faults(name, source)]:
        raise SystemExit("\n".join(wrong))
    shutil.rmtree(tree, ignore_errors=True)
    for backend in BACKENDS:
        write_variant(tree / "build" / f"torch-{backend}", backend, files)
    source = tree / "torch-ext" / PYTHON_NAME
    source.mkdir(parents=True)
    for name, text in files.items():
        (source / name).write_text(text)
    settings = {"name": NAME, "version": VERSION, "license": LICENSE, "repository": repository}
    (tree / "build.toml").write_text(BUILD_TOML.format(**settings))
    (tree / "CARD.md").write_text((HUB / "CARD.md").read_text().replace("REPOSITORY", repository))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT / "build" / "hub-kernels")
    parser.add_argument("--repository", default=f"OWNER/{NAME}", help="its name on the Hub")
    parser.add_argument("--no-check", action="store_true", help="write only: `kernels` is not needed")
    options = parser.parse_args()
    write(options.tree, options.repository)
    if not options.no_check:
        sys.path.insert(0, str(HUB))
        from check import check

        check(options.tree)


if __name__ == "__main__":
    main()
