"""The parts of the build that must be code; all metadata is in pyproject.toml."""

import os
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
