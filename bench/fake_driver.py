"""A stand-in for the CUDA driver, so that launches can be looked at and their cost to the host measured without a GPU.

Triton's launcher and ours call the real functions of a libcuda.so.1 that only writes down what it is handed, with
tensors of the CPU in the place of tensors on a GPU. `child_environment` is for a new process, which then calls
`stand_in` before it imports layercache.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fake_cuda.c")
_MOST_PARAMETERS = 300  # as in SOURCE
_CPU = 1  # DLPack's number


class _Launch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("parameters", ctypes.c_uint64 * _MOST_PARAMETERS),
    )


@dataclass(frozen=True)
class Launch:
    """What the driver was handed."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int | None
    parameters: tuple[int, ...]


def child_environment(folder: Path) -> dict[str, str]:
    """Compiles the stand-in into a folder; the environment of a process that finds it.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: there is no C compiler, or it fails.
    """
    library = folder / "libcuda.so.1"
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-o", library, SOURCE], check=True)
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    return {**os.environ, "LD_LIBRARY_PATH": paths, "TRITON_LIBCUDA_PATH": str(folder), "TRITON_INTERPRET": "0"}


class Driver:
    """The stand-in, from Python's side."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.fake_launch.restype = ctypes.POINTER(_Launch)
        self._widths: dict[int, list[int]] = {}
        self.runs = 0  # launches by Triton

    def learn(self, compiled: Any) -> None:
        """Takes note of the parameters of a kernel, which a real driver knows from its binary."""
        from layercache.kernels.launching import declared_parameters

        widths = [4 if kind.endswith("32") else 8 for kind in declared_parameters(compiled)]
        self._library.fake_expect(
            ctypes.c_void_p(compiled.function), (ctypes.c_int * len(widths))(*widths), len(widths)
        )
        self._widths[compiled.function] = widths

    def use(self, device: int) -> None:
        """Makes the calling thread's context that of another device."""
        self._library.fake_use(device)

    def forget(self) -> None:
        self._library.fake_forget()

    def launches(self) -> list[Launch]:
        """Since `forget`; parameters only of kernels that were known before."""
        found = []
        for index in range(self._library.fake_count()):
            one = self._library.fake_launch(index).contents
            count = len(self._widths.get(one.function, ()))
            found.append(
                Launch(
                    *(one.function, tuple(one.grid), tuple(one.block), one.shared, one.stream),
                    tuple(one.parameters[:count]),
                )
            )
        return found


def stand_in(arch: int = 90, watch: bool = True) -> Driver:
    """Makes Triton and layercache take the stand-in for a GPU, and tensors of the CPU for tensors on it.

    Args:
        watch: count the launches by Triton and learn the parameters of its kernels, which makes them slower.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.jit import JITFunction

    from layercache.ops import dispatch, repeating

    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: 0
    active.get_current_target = lambda: GPUTarget("cuda", arch, 32)
    triton.runtime.driver.set_active(active)
    driver, run = Driver(), JITFunction.run

    def learned(self: Any, *arguments: Any, **options: Any) -> Any:
        compiled = run(self, *arguments, **options)
        driver.runs += 1
        if compiled.function not in driver._widths:
            driver.learn(compiled)
        return compiled

    if watch:
        JITFunction.run = learned
    dispatch.Kernels.choose = lambda self, tensor, checked=False: self.launch_checked if checked else self.launch
    open_calls = repeating.open_calls
    repeating.trouble = lambda: None
    repeating.open_calls = lambda: open_calls("libcuda.so.1", _CPU)
    return driver


def run_child(script: Path, folder: Path, *arguments: str) -> str:
    """Output of a script in a process that finds the stand-in."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=child_environment(folder), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout
