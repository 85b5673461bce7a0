"""What the launchers compile to for GPUs, looked at without one: access width, local memory, fp64, fused adds.

A stub driver stands in for the GPU, so that the real launchers, called with CPU tensors, compile exactly what they
would launch. It is active in child processes only: `main` below is what they run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CUDA = ["80", "90"]
HIP = ["gfx942"]
TERMS, SETS = 8, 10


class StubDriver:
    """As much of a GPU driver as a launch asks for; the launch itself does nothing."""

    def __init__(self, arch: str) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)
        self.utils = SimpleNamespace(
            # module, function, registers, spills, and since triton 3.4 the most threads
            load_binary=lambda *arguments: (1, 1, 32, 0, 1024)[: 4 if triton.__version__ < "3.4" else 5],
            get_device_properties=lambda device: {"max_shared_mem": 65536, "multiprocessor_count": 132, "warpSize": 32},
        )
        self.launcher_cls = lambda *arguments, **options: lambda *arguments, **options: None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launches() -> dict[str, Callable[[], Any]]:
    """One call of each launcher per kernel variant, all bf16."""
    import torch
    from layercache.kernels import capture, combine, statistics

    def new(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def pair() -> list[torch.Tensor]:
        return [new(1, 64, 128), new(1, 8, 128)]

    def slices() -> list[torch.Tensor]:
        return list(new(2, 72, 128).split([64, 8], dim=1))

    def dense() -> list[torch.Tensor]:
        return [new(2, 64, 128), new(2, 8, 128)]

    def terms(count: int) -> list[list[torch.Tensor]]:
        return [[new(1, 64, 128) for _ in range(count)], [new(1, 8, 128) for _ in range(count)]]

    flag, odd, one = torch.zeros(1, dtype=torch.int32), new(1, 61, 128), new(1, 64, 128)
    misaligned = new(1 + 64 * 128)[1:].view(1, 64, 128)
    sets = [[1.0 + k, *(-float(k) * (j == k) for j in range(1, SETS))] for k in range(SETS)]
    return {
        "capture": lambda: capture.capture_triton([one], [one], [one]),
        "capture another size": lambda: capture.capture_triton([odd], [odd], [odd]),
        "capture misaligned": lambda: capture.capture_triton([one], [misaligned], [one]),
        "capture flag": lambda: capture.capture_triton(pair(), pair(), pair(), flag),
        "capture all": lambda: capture.capture_triton(pair(), pair(), pair(), flag, pair()),
        "capture strided": lambda: capture.capture_triton(slices(), slices(), dense(), flag),
        "pair": lambda: statistics.pair_statistics_triton(pair(), pair()),
        "pair strided": lambda: statistics.pair_statistics_triton(slices(), slices()),
        "combine": lambda: combine.linear_combination_triton(pair(), terms(2), [1.5, -0.5]),
        "combine device": lambda: combine.linear_combination_triton(pair(), terms(TERMS), torch.zeros(TERMS)),
        "error": lambda: statistics.combination_error_triton(one, [new(1, 64, 128) for _ in range(SETS)], sets),
    }


def main(arch: str) -> None:
    """Prints, as JSON, the assembly of every launch and how many binaries it needed."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(StubDriver(arch))
    run, seen = JITFunction.run, []

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        compiled = run(self, *arguments, **options)
        seen.append((self.fn.__name__, compiled))
        return compiled

    JITFunction.run = recorded
    found: dict[str, dict[str, str]] = {}
    for name, launch in launches().items():
        seen.clear()
        launch()
        found[name] = {kernel: compiled.asm.get("ptx") or compiled.asm["amdgcn"] for kernel, compiled in seen}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, dict[str, str]]]:
    """Assembly by launch and kernel for an architecture, compiled in a process of its own at the first request."""
    pytest.importorskip("triton")
    children: dict[str, subprocess.CompletedProcess] = {}
    cache = tmp_path_factory.mktemp("triton")

    def assembly(arch: str) -> dict[str, dict[str, str]]:
        if arch not in children:
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
            environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            command = [sys.executable, __file__, arch]
            children[arch] = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if "ld.lld not found" in children[arch].stderr:
            pytest.skip("triton before 3.5 needs ROCm's linker to compile for AMD GPUs")
        assert children[arch].returncode == 0, children[arch].stderr
        return json.loads(children[arch].stdout)

    return assembly


def accesses(ptx: str, kind: str) -> dict[str, int]:
    """Global loads (``ld``) or stores (``st``) by width, such as ``{"v4.b32": 4}``."""
    widths = re.findall(rf"\b{kind}\.global[.\w:]*?\.((?:v\d\.)?[bfsu]\d+)\b", ptx)
    return {width: widths.count(width) for width in sorted(set(widths))}


# The kernel of a launch, and its loads and stores of 16 bytes: for every tensor of every stream two per thread and
# tile, in the kernel with half tiles one.
EXPECTED = {
    "capture": ("_capture_kernel", 4, 2),
    "capture flag": ("_capture_kernel", 8, 4),
    "capture all": ("_capture_kernel", 12, 4),
    "capture strided": ("_capture_kernel", 8, 4),
    "pair": ("_pair_statistics_kernel", 8, 0),
    "pair strided": ("_pair_statistics_kernel", 8, 0),
    "combine": ("_linear_combination_kernel", 12, 4),
    "combine device": ("_linear_combination_kernel", 2 * 2 * (TERMS + 1), 4),
    "error": ("_combination_error_kernel", 2 + SETS, 0),
}


@pytest.mark.parametrize("arch", CUDA)
@pytest.mark.parametrize("name", EXPECTED)
def test_accesses_are_16_bytes_wide(name: str, arch: str, compiled: Callable) -> None:
    kernel, loads, stores = EXPECTED[name]
    ptx = compiled(arch)[name][kernel]
    found = {"ld": accesses(ptx, "ld"), "st": accesses(ptx, "st")}
    assert found["ld"].pop("v4.b32") == loads
    assert found["st"].pop("v4.b32", 0) == stores
    # what is left are single numbers: coefficients in, partial sums and the flag out
    assert set(found["ld"]) == ({"b32"} if name == "combine device" else set())
    assert set(found["st"]) <= {"b32"}
    every = sum(found["ld"].values()) + loads + sum(found["st"].values()) + stores
    assert len(re.findall(r"\b(?:ld|st)\.global", ptx)) == every, "an access of a width not looked for"


@pytest.mark.parametrize("arch", CUDA)
def test_nothing_slow_and_nothing_fused(arch: str, compiled: Callable) -> None:
    for name, kernels in compiled(arch).items():
        for kernel, ptx in kernels.items():
            assert ".local" not in ptx, f"{name}: {kernel} uses local memory"
            assert ".f64" not in ptx, f"{name}: {kernel} computes in fp64"
            # a bf16 subtraction is written as a multiply-add by -1, which rounds the same
            assert "fma.rn.f32" not in ptx, f"{name}: {kernel} rounds otherwise than eager PyTorch"
            assert not re.search(r"\b(atom|red)\.", ptx), f"{name}: {kernel} uses atomics"


@pytest.mark.parametrize("arch", CUDA)
def test_another_size_needs_no_other_binary(arch: str, compiled: Callable) -> None:
    assembly = compiled(arch)
    assert assembly["capture another size"] == assembly["capture"]


@pytest.mark.parametrize("arch", CUDA)
def test_misaligned_tensors_take_the_slow_path(arch: str, compiled: Callable) -> None:
    (ptx,) = compiled(arch)["capture misaligned"].values()
    assert set(accesses(ptx, "ld")) == {"b16"}


@pytest.mark.parametrize("arch", HIP)
@pytest.mark.parametrize("name", EXPECTED)
def test_amd_accesses_are_wide(name: str, arch: str, compiled: Callable) -> None:
    text = compiled(arch)[name][EXPECTED[name][0]]
    # a wave of 64 threads gets 8 bytes each from the half tiles of the error kernel
    assert re.search(rf"_load_dwordx{2 if name == 'error' else 4}\b", text)
    assert not re.search(r"_(load|store)_(ushort|short|ubyte|sbyte|byte|d16)", text)
    assert re.search(r"\.vgpr_spill_count:\s*0\b", text)
    assert re.search(r"\.private_segment_fixed_size:\s*0\b", text)


if __name__ == "__main__":
    main(sys.argv[1])
