"""The parts of the build that must be code; all metadata is in pyproject.toml."""

import os
import re
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext


def kernel_packages() -> list[str]:
    """``kernels/`` and its sub-folders, which hold no ``__init__.py`` for find_packages to see.

    Without that file a package of the same name elsewhere on the path keeps its top-level name.
    """
    folders = {path.parent for path in Path("kernels").rglob("*.py")}
    return sorted("layercache." + ".".join(folder.parts) for folder in folders | {Path("kernels")})


def home() -> str:
    """The repository's address, which GitHub's workflows say; empty elsewhere."""
    repository = os.environ.get("GITHUB_REPOSITORY")
    return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}" if repository else ""


def readme() -> str:
    """README.md for an index, where links to files of the repository lead to its host, at the tag that is built.

    Outside of a workflow links stay as they are.
    """
    text = Path("README.md").read_text(encoding="utf-8")
    if not home():
        return text
    named = "GITHUB_REF_NAME" if os.environ.get("GITHUB_REF_TYPE") == "tag" else "GITHUB_SHA"
    ref = os.environ.get(named, "HEAD")
    relative = r"(?!https?://|#)([^)\s]+)\)"
    text = re.sub(r"(!\[[^\]]*\]\()" + relative, rf"\1{home()}/raw/{ref}/\2)", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()" + relative, rf"\1{home()}/blob/{ref}/\2)", text)


def urls() -> dict[str, str]:
    """Links of the project's page in an index."""
    pages = {"Repository": "", "Documentation": "/tree/HEAD/docs", "Issues": "/issues"}
    pages["Changelog"] = "/blob/HEAD/CHANGELOG.md"
    return {name: home() + page for name, page in pages.items()} if home() else {}


# Such as "address,undefined" or "thread": builds the extensions with these sanitizers of gcc and clang.
SANITIZERS = os.environ.get("LAYERCACHE_SANITIZE", "")


class BuildExt(build_ext):
    """Adds the flags that only gcc and clang understand."""

    def build_extensions(self) -> None:
        if self.compiler.compiler_type == "unix":
            for extension in self.extensions:
                # Contracted multiply-adds would let the same table give another schedule on another machine.
                extension.extra_compile_args += ["-O3", "-ffp-contract=off"]
                if SANITIZERS:
                    flags = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
                    flags += ["-fno-omit-frame-pointer", "-g1", "-O1"]
                    extension.extra_compile_args += flags
                    extension.extra_link_args += flags
            if sys.platform == "linux":
                self.share_openmp()
        super().build_extensions()

    def share_openmp(self) -> None:
        """No library of OpenMP for the CPU kernels, which share the threads of torch's (ops/native.py).

        Symbols are bound at once, so that a process without that library fails to import and not to run.
        """
        (kernels,) = (extension for extension in self.extensions if extension.name == "layercache._cpu")
        kernels.extra_link_args += ["-Wl,-z,now"]


# As many files at once as there are cores, or as MAX_JOBS says; setuptools alone compiles one after another.
ParallelCompile("MAX_JOBS", default=0).install()
setup(
    project_urls=urls(),
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["layercache", "layercache.*"]) + kernel_packages(),
    package_dir={"layercache.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "layercache._core",
            sorted(glob("csrc/*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/*.hpp")),
            cxx_std=17,
        ),
        Pybind11Extension(
            "layercache._cpu",
            sorted(glob("csrc/cpu/*.cpp")),
            include_dirs=["csrc/cpu", "csrc"],
            depends=["csrc/dlpack.hpp", *sorted(glob("csrc/cpu/*.hpp") + glob("csrc/cpu/*.inl"))],
            cxx_std=17,
        ),
    ],
    cmdclass={"build_ext": BuildExt},
)
