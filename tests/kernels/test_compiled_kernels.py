"""What the launchers compile to for GPUs, looked at without one: widths and bytes of accesses, registers, memory.

`launches` makes the calls in child processes, one per architecture, under a stub driver. sm_90 is looked at every day,
other architectures in `make test-all`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from support import launches
from support.launches import KERNELS, Launch
from support.marks import slow

CUDA = ["80", "90", "100", "120"]
HIP = ["gfx942"]
ALL = launches.launches(launches.load(KERNELS))
FAST = [name for name in ALL if name != "capture misaligned"]

cuda = pytest.mark.parametrize("arch", ["90", *slow("80", "100", "120")])

Compiled = dict[str, dict[str, Any]]


def run_child(cache: Path, arch: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, launches.__file__, arch, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def compiled(cache: Path) -> Callable[[str], Compiled]:
    """What every launch compiled for an architecture, which happens at the first request."""
    pytest.importorskip("triton")

    @functools.cache
    def find(arch: str) -> Compiled:
        child = run_child(cache, arch)
        if "ld.lld not found" in child.stderr:
            pytest.skip("triton before 3.5 needs ROCm's linker to compile for AMD GPUs")
        assert child.returncode == 0, child.stderr
        return json.loads(child.stdout)

    return find


def accesses(ptx: str, kind: str) -> dict[str, int]:
    """Global loads (``ld``) or stores (``st``) by width, such as ``{"v4.b32": 4}``."""
    widths = re.findall(rf"\b{kind}\.(?:\w+\.)*?global[.\w:]*?\.((?:v\d\.)?[bfsu]\d+)\b", ptx)
    return {width: widths.count(width) for width in sorted(set(widths))}


def elements(kernel: dict[str, Any]) -> int:
    """Elements that a thread takes at a time."""
    return math.prod(kernel["constants"].values()) / (32 * kernel["warps"])


def check_accesses(launch: Launch, kernel: dict[str, Any]) -> None:
    """All wide, and as many bytes per element as must move."""
    ptx = kernel["assembly"]
    loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
    every = sum(loads.values()) + sum(stores.values())
    assert len(re.findall(r"\b(?:ld|st)\.(?:\w+\.)*?global", ptx)) == every, "an access of a width not looked for"
    moved = 16 * (loads.pop("v4.b32", 0) + stores.pop("v4.b32", 0))
    if launch.codes:
        moved += 8 * (loads.pop("v2.b32", 0) + stores.pop("v2.b32", 0))
    # what is left are single numbers: coefficients and scales in, partial sums and the flag out
    assert set(loads) <= set(launch.narrow), f"narrow loads: {loads}"
    assert set(stores) <= {"b32"}, f"narrow stores: {stores}"
    assert moved / elements(kernel) == launch.minimum, "more bytes than must move"


def check_rounding(launch: Launch, kernel: dict[str, Any]) -> None:
    """As many multiply-adds as its sums have, and none for its outputs, which round like eager PyTorch.

    A bf16 subtraction is written as one by -1, which rounds the same.
    """
    found = re.findall(r"fma\.rn\.f32(x2)?", kernel["assembly"])
    assert sum(2 if pair else 1 for pair in found) == launch.fused * elements(kernel)


def is_older() -> bool:
    """Whether triton is one of those that torch for CUDA asks for; their ptxas takes other numbers of registers."""
    return tuple(map(int, version("triton").split(".")[:2])) < (3, 8)


def check_resources(launch: Launch, kernel: dict[str, Any]) -> None:
    """No spills, no local memory, few enough registers.

    Compilers may keep one address on the stack although registers are free.
    """
    found, room = kernel["resources"], 1.3 if is_older() else 1.0
    assert found["STACK"] <= 8 and found["LOCAL"] == 0, f"spills: {found}"
    assert ".local" not in kernel["assembly"]
    assert found["REG"] <= launch.registers * room, f"{found['REG']} registers"


def check_bytes_in_flight(launch: Launch, kernel: dict[str, Any], arch: str) -> None:
    """32 KB of loads per multiprocessor hide the latency of memory."""
    warps, registers = kernel["warps"], -(-kernel["resources"]["REG"] // 8) * 8
    most_warps = 48 if arch == "120" else 64
    blocks = min(65536 // (32 * warps * registers), most_warps // warps)
    loads = accesses(kernel["assembly"], "ld")
    flying = 16 * loads.get("v4.b32", 0) + 8 * loads.get("v2.b32", 0)
    assert blocks * flying * 32 * warps >= 32 * 1024


@cuda
@pytest.mark.parametrize("name", ALL)
def test_a_launch_moves_what_it_must_in_wide_accesses_and_rounds_like_eager(
    name: str, arch: str, compiled: Callable
) -> None:
    """Accesses, registers and memory, bytes in flight, multiply-adds, and nothing slow in any of its kernels."""
    launch, kernels = ALL[name], compiled(arch)[name]
    kernel = kernels[launch.kernel]
    check_resources(launch, kernel)
    if name == "capture misaligned":
        assert set(accesses(kernel["assembly"], "ld")) == {"b16"}
    else:
        check_accesses(launch, kernel)
        check_bytes_in_flight(launch, kernel, arch)
        check_rounding(launch, kernel)
    for own, found in kernels.items():
        ptx = found["assembly"]
        assert ".f64" not in ptx, f"{own} computes in fp64"
        assert own == launch.kernel or "fma.rn.f32" not in ptx, f"{own} fuses multiply-adds"
        assert not re.search(r"\b(atom|red)\.", ptx), f"{own} uses atomics"


@cuda
def test_another_size_needs_no_other_binary(arch: str, compiled: Callable) -> None:
    assembly = compiled(arch)
    assert assembly["capture another size"] == assembly["capture"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", HIP)
@pytest.mark.parametrize("name", FAST)
def test_amd_accesses_are_wide(name: str, arch: str, compiled: Callable) -> None:
    text = compiled(arch)[name][ALL[name].kernel]["assembly"]
    # four waves of 64 threads get 8 bytes each of a tile or chunk of 128 groups
    assert re.search(r"_load_dwordx[24]\b", text)
    assert not re.search(r"_(load|store)_(ushort|short|ubyte|sbyte|byte|d16)", text)
    assert re.search(r"\.vgpr_spill_count:\s*0\b", text)
    assert re.search(r"\.private_segment_fixed_size:\s*0\b", text)


WORSE = {
    "masked by elements": (
        "combine.py",
        "reuse",
        "live = (group < groups)[:, None]",
        "live = (group[:, None] * VEC + tl.arange(0, VEC)[None, :]) < groups * VEC - VEC // 2",
        check_accesses,
    ),
    "an input read twice": (
        "capture.py",
        "capture",
        "stored = (o - i)",
        "stored = (o + tl.load(in_ptr + i_off + 0 * groups, mask=live, other=0.0, volatile=True).to(tl.float32) - i)",
        check_accesses,
    ),
    "tiles too large for the registers": ("tiles.py", "capture all", "GROUPS = 128", "GROUPS = 2048", check_resources),
}


@pytest.mark.parametrize("name", [[*WORSE][0], *slow(*[*WORSE][1:])])
def test_a_kernel_made_worse_is_found(name: str, cache: Path, tmp_path: Path) -> None:
    file, launch, good, bad, check = WORSE[name]
    folder = Path(shutil.copytree(KERNELS, tmp_path / "kernels"))
    source = (folder / file).read_text()
    assert source.count(good) >= 1
    (folder / file).write_text(source.replace(good, bad))
    child = run_child(cache, "90", str(folder), launch)
    assert child.returncode == 0, child.stderr
    kernel = json.loads(child.stdout)[launch][ALL[launch].kernel]
    with pytest.raises(AssertionError):
        check(ALL[launch], kernel)
