"""What is built, what it holds, and that `layercache.kernels` resolves however the package got there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from layercache.tools.needs import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
# Copies leave out what earlier builds left behind: setuptools would pick some of it up again.
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so", "demo-output")
SYSTEM_LIBRARIES = {"libstdc++", "libgcc_s", "libm", "libc", "libpthread", "libdl", "ld-linux-x86-64", "linux-vdso"}
EMPTY_EXTENSION = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "NAME", nullptr, -1};
PyMODINIT_FUNC PyInit_NAME() { return PyModule_Create(&definition); }
"""
EXTENSIONS = {"_core": "csrc", "_cpu": "csrc/cpu"}
WHERE_KERNELS_ARE = "import importlib.util as util; print(util.find_spec('layercache.kernels.{}').origin)"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output; the test fails with both streams when the command does."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{command} returned {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


def new_python(folder: Path) -> Path:
    """A virtual environment that sees our dependencies, but not the editable install of this checkout.

    A path file names a folder without running the path files inside it, where editable installs live.
    """
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    (Path(site_packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python: Path, *arguments: str | Path, cwd: Path) -> None:
    run(python, "-m", "pip", "--no-input", "--quiet", *arguments, cwd=cwd)


def kernel_module() -> str:
    return min(path.stem for path in (ROOT / "kernels").glob("*.py"))


def kernels_origin(python: Path, cwd: Path, **environment: str) -> Path:
    return Path(run(python, "-c", WHERE_KERNELS_ARE.format(kernel_module()), cwd=cwd, **environment))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_python(tmp_path_factory.mktemp("environment"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as a fresh clone has it: nothing built."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "repository", ignore=LEFT_OUT))


@pytest.fixture(scope="module")
def sdist(checkout: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(python, "-c", build, folder, cwd=checkout)
    return next(folder.glob("layercache-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which therefore holds all the build needs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip(python, "wheel", sdist, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, cwd=folder)
    return next(folder.glob("layercache-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip(python, "install", wheel, "--no-deps", "--no-index", "--target", folder, cwd=folder)
    return folder


def shipped_files(checkout: Path) -> set[str]:
    """Every file of the two package folders, by its name in the wheel."""
    package = [path.relative_to(checkout) for path in (checkout / "layercache").rglob("*") if path.is_file()]
    kernels = [path.relative_to(checkout) for path in (checkout / "kernels").rglob("*") if path.is_file()]
    return {path.as_posix() for path in package} | {f"layercache/{path.as_posix()}" for path in kernels}


@pytest.mark.slow
def test_sdist_holds_sources_and_headers(sdist: Path, checkout: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    expected = [checkout / name for name in ("setup.py", "pyproject.toml", "LICENSE", "Makefile", "constraints.txt")]
    expected += [
        *(path for path in (checkout / "csrc").rglob("*") if path.is_file()),
        *(checkout / "kernels").rglob("*.py"),
        *(path for name in ("bench", "docs", "examples", "tests") for path in (checkout / name).rglob("*.*")),
    ]
    expected = [path for path in expected if path.is_file() and "deep_model/transformer" not in path.as_posix()]
    assert sum(member.size for member in members) < 16e6  # no weights
    assert {path.relative_to(checkout).as_posix() for path in expected} <= names


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path, checkout: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if name.startswith("layercache/")}
    extension = {name for name in code if name.endswith(sysconfig.get_config_var("EXT_SUFFIX"))}
    assert code - extension == shipped_files(checkout)
    assert sorted(Path(name).name.partition(".")[0] for name in extension) == sorted(EXTENSIONS)
    assert all(name.startswith("layercache-") and ".dist-info/" in name for name in names - code)
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
@pytest.mark.parametrize("name", EXTENSIONS)
def test_extension_links_only_the_compiler_runtime(installed: Path, name: str) -> None:
    (extension,) = (installed / "layercache").glob(f"{name}.*.so")
    lines = run("ldd", extension, cwd=installed).splitlines()
    libraries = {Path(line.split()[0]).name.partition(".so")[0] for line in lines}
    assert "libstdc++" in libraries
    assert libraries <= SYSTEM_LIBRARIES


@pytest.mark.slow
def test_installed_wheel_is_complete(installed: Path, python: Path, tmp_path: Path) -> None:
    origin = kernels_origin(python, tmp_path, PYTHONPATH=str(installed))
    assert origin.parent == installed / "layercache" / "kernels"
    solve = (
        "import numpy as np; from layercache._core import solve\n"
        "errors = np.ones((4, 1, 4, 1))\n"
        "print(solve(errors, [1.0], [0.0], 2.0, np.zeros((4, 1), bool), []).cells.ravel().tolist())"
    )
    assert run(python, "-c", solve, cwd=tmp_path, PYTHONPATH=str(installed)).count("-1") == 2


@pytest.mark.slow
def test_demo_runs_from_the_wheel_with_what_make_demo_installs(
    installed: Path, python: Path, checkout: Path, tmp_path: Path
) -> None:
    """Without a compiler, and without the optional packages of other extras; with the weights of layercache-demo."""
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--target"]
    pip(python, "install", *flags, tmp_path / "weights", checkout / "integrations" / "demo", cwd=tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "site").mkdir()
    missing = [module for extra, (modules, _) in EXTRAS.items() if extra != "figures" for module in modules.values()]
    missing.remove("jinja2")  # torch brings it,
    missing.remove("imageio")  # and scikit-image this
    missing += ["peft", "cache_dit"]
    hide = f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(hide)
    path = os.pathsep.join(map(str, (tmp_path / "site", tmp_path / "weights", installed)))
    place = {"PYTHONPATH": path, "PATH": str(tmp_path / "bin"), "HOME": str(tmp_path)}
    run(python, "-m", "layercache", "demo", "--quick", "--output", "shown", cwd=tmp_path, **place)
    assert any((tmp_path / "shown").iterdir())


def names_in(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in requirements}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_installs_the_runtime_alone(tmp_path: Path) -> None:
    """Exactly what it asks pip for, by name: nothing of the tests, the pages or the comparison may come along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    commands = run("make", "-nB", "demo", "TORCH_ARGS=--quiet", cwd=tmp_path).splitlines()
    asked = [shlex.split(line.partition(" install ")[2]) for line in commands if " install " in line]
    names = {word for words in asked for word in words if word[0] != "-"}
    assert names == {"torch", "setuptools", "setuptools-scm", "pybind11", ".[figures]", "constraints.txt"}
    installed = names_in([*project["dependencies"], *project["optional-dependencies"]["figures"]])
    runtime = {"torch", "diffusers", "numpy", "safetensors", "typer", "rich", "tqdm", "platformdirs"}
    assert installed == runtime | {"scikit-image", "matplotlib", "pillow"}


def test_versions_of_trees(tmp_path: Path) -> None:
    """A copy without git, a clone without tags, the tag, a commit after it, and a copy inside another repository."""
    scm = pytest.importorskip("setuptools_scm")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    prepared = settings["fallback_version"].removesuffix(".dev0")
    tree, inner = tmp_path / "tree", tmp_path / "tree" / "vendored" / "layercache"
    inner.mkdir(parents=True)

    def git(*words: str) -> None:
        run("git", "-c", "user.name=a", "-c", "user.email=a@b", *words, cwd=tree)

    def version(root: Path = tree) -> str:
        return str(scm.get_version(root=str(root), **settings))

    found = [version()]
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "first")
    found.append(version())
    git("tag", "-a", f"v{prepared}", "-m", "released")
    found.append(version())
    git("commit", "--quiet", "--allow-empty", "-m", "next")
    found += [version(), version(inner)]
    after = f"{prepared.split('.')[0]}.{int(prepared.split('.')[1]) + 1}.0.dev1"
    assert found == [f"{prepared}.dev0", f"{prepared}.dev1", prepared, after, f"{prepared}.dev0"]


@pytest.fixture(scope="module")
def quick_checkout(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with an empty extension: where modules are found does not depend on what it holds."""
    copy = Path(shutil.copytree(checkout, tmp_path_factory.mktemp("quick") / "repository", ignore=LEFT_OUT))
    shutil.rmtree(copy / "csrc")
    for name, folder in EXTENSIONS.items():
        (copy / folder).mkdir()
        (copy / folder / "empty.cpp").write_text(EMPTY_EXTENSION.replace("NAME", name))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install_finds_the_kernels(mode: str, quick_checkout: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(quick_checkout, tmp_path / "repository"))
    python = new_python(tmp_path / "environment")
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    pip(python, "install", *flags, "--config-settings", f"editable_mode={mode}", "-e", repository, cwd=tmp_path)
    for folder in (tmp_path, repository):
        assert repository in kernels_origin(python, folder).parents
        for name in EXTENSIONS:
            assert run(python, "-c", f"import layercache.{name} as extension; print(extension.__name__)", cwd=folder)


def test_raw_checkout_finds_the_kernels(checkout: Path, python: Path, tmp_path: Path) -> None:
    origin = kernels_origin(python, tmp_path, PYTHONPATH=str(checkout))
    assert origin == checkout / "kernels" / f"{kernel_module()}.py"
    assert kernels_origin(python, checkout) == origin


def test_another_package_keeps_the_name_kernels(checkout: Path, python: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    path = os.pathsep.join([str(checkout), str(tmp_path)])
    file = run(python, "-c", "import kernels; print(kernels.__file__)", cwd=checkout, PYTHONPATH=path)
    assert Path(file) == tmp_path / "kernels" / "__init__.py"
    assert kernels_origin(python, checkout, PYTHONPATH=path).parent == checkout / "kernels"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["layercache", "layercache.backend", "layercache.ops"])
def test_import_without_triton(module: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['triton'] = None; import {module}"
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))


# --- used by others -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_project_that_depends_on_the_wheel_alone(
    installed: Path, python: Path, checkout: Path, tmp_path: Path
) -> None:
    """examples/consumer: built, run and type-checked with nothing of ours but the installed wheel."""
    project = tmp_path / "consumer"
    shutil.copytree(checkout / "examples" / "consumer", project)
    target = tmp_path / "site"
    pip(python, "install", project, "--no-deps", "--no-build-isolation", "--no-index", "--target", target, cwd=tmp_path)
    paths = f"{target}{os.pathsep}{installed}"
    printed = run(python, "-m", "blockskip.cache", cwd=tmp_path, PYTHONPATH=paths)
    assert printed.strip().startswith("8 of 10 calls skipped, backend 1.")
    # found by MYPYPATH the package would be checked as if it were the project's own; installed ones are not
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-layercache.*]\nignore_errors = True\n")
    command = ("-m", "mypy", "--config-file", tmp_path / "mypy.ini", target / "blockskip")
    checked = run(sys.executable, *command, cwd=tmp_path, MYPYPATH=str(installed))
    assert "Success" in checked


@pytest.mark.slow
@pytest.mark.parametrize("module", ["layercache", "layercache.ops", "layercache.backend"])
def test_importing_costs_little_beyond_torch(module: str, installed: Path, python: Path, tmp_path: Path) -> None:
    """Neither triton nor diffusers is loaded, and nothing is done."""
    code = (
        f"import sys, torch; before = set(sys.modules); import {module}; after = set(sys.modules) - before; "
        "heavy = sorted(m for m in after if m.split('.')[0] in ('triton', 'diffusers', 'transformers', 'matplotlib')); "
        "print(heavy, len(after))"
    )
    printed = run(python, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    heavy, count = printed.strip().rsplit(" ", 1)
    assert heavy == "[]" and int(count) < 40
