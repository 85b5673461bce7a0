"""One call of every kernel variant, all bf16 where the kernel allows it, for the checks of what is compiled.

Run as a program it stands a stub driver in for a GPU, so that the real launchers, called with CPU tensors, compile
exactly what they would launch; it prints, as JSON, what they compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

KERNELS = Path(__file__).parents[2] / "kernels"
TERMS, SETS = 8, 10
# Constants whose product is the number of elements that a program takes at a time.
SIZES = ("R", "VEC", "GROUPS", "ROWS", "CHUNKS")


@dataclass(frozen=True)
class Launch:
    """A call and what its kernel must compile to.

    Attributes:
        kernel: name of the kernel function looked at.
        call: makes the launch.
        minimum: bytes per element of the first tensor that must move, or None where a loop hides the count.
        registers: ceiling on NVIDIA GPUs; a fifth above what triton 3.9 needs.
        narrow: widths of accesses of single numbers (coefficients, scales), beside partial sums and flags.
        fused: multiply-adds per element, all of which add to sums; outputs round like eager PyTorch.
        codes: whether it reads or writes codes of one byte, eight at a time.
    """

    kernel: str
    call: Callable[[], Any]
    minimum: float | None
    registers: int
    narrow: tuple[str, ...] = ()
    fused: int = 0
    codes: bool = False


def load(folder: Path) -> Callable[[str], ModuleType]:
    """Modules of a folder of kernels, as a package of their own."""
    name = "kernels_under_test"
    spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
    assert spec is not None and spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(folder))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return lambda module: importlib.import_module(f"{name}.{module}")


def launches(module: Callable[[str], ModuleType]) -> dict[str, Launch]:
    import torch

    capture, combine, statistics, compact, moments, router, modulate, guidance, decisions = map(
        module,
        (
            *("capture", "combine", "statistics", "compact", "moments"),
            *("router", "modulate", "guidance", "decisions"),
        ),
    )

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def many(count: int) -> list[torch.Tensor]:
        return [new(1, 64, 128) for _ in range(count)]

    def pair() -> list[torch.Tensor]:
        return [new(1, 64, 128), new(1, 8, 128)]

    def slices() -> list[torch.Tensor]:
        return list(new(2, 72, 128).split([64, 8], dim=1))

    def dense() -> list[torch.Tensor]:
        return [new(2, 64, 128), new(2, 8, 128)]

    def terms(count: int) -> list[list[torch.Tensor]]:
        return [[new(1, 64, 128) for _ in range(count)], [new(1, 8, 128) for _ in range(count)]]

    flag, odd, one = new(1, dtype=torch.int32), new(1, 61, 128), new(1, 64, 128)
    misaligned = new(1 + 64 * 128)[1:].view(1, 64, 128)
    sets = [[1.0 + k, *(-float(k) * (j == k) for j in range(1, SETS))] for k in range(SETS)]
    taylor = [[1.0, None, None], [0.5, -0.5, None], [0.25, -0.25, -0.5]]
    codes, scales = [new(1, 64, 128, dtype=torch.uint8)], [new(1, 64, dtype=torch.float32)]

    def map_of(inputs: int, matrix: list[list[float | None]], **others: Any) -> None:
        combine.linear_map_triton([many(inputs)], [many(len(matrix))], matrix, **others)

    beta, gate = new(1, dtype=torch.float32), new(1, 128)
    wide, row, thin, long = new(1, 64, 2048), new(1, 2048), new(1, 512, 64), new(1, 2048, 2048)
    keep, stats = "_capture_kernel", "_pair_statistics_kernel"
    linear, error = "_linear_map_kernel", "_combination_error_kernel"
    return {
        "capture": Launch(keep, lambda: capture.capture_triton([one], [one], [one]), 6, 40),
        "capture another size": Launch(keep, lambda: capture.capture_triton([odd], [odd], [odd]), 6, 40),
        "capture misaligned": Launch(keep, lambda: capture.capture_triton([one], [misaligned], [one]), None, 255),
        "capture flag": Launch(keep, lambda: capture.capture_triton(pair(), pair(), pair(), flag), 6, 40),
        "capture input": Launch(
            keep, lambda: capture.capture_triton(pair(), pair(), pair(), flag, None, True), 6, 72, (), 2
        ),
        "capture all": Launch(keep, lambda: capture.capture_triton(pair(), pair(), pair(), flag, pair()), 8, 92, (), 4),
        "capture samples": Launch(
            keep, lambda: capture.capture_triton(dense(), dense(), dense(), flag, dense(), False, True), 8, 92, (), 4
        ),
        "capture strided": Launch(keep, lambda: capture.capture_triton(slices(), slices(), dense(), flag), 6, 72),
        "pair": Launch(stats, lambda: statistics.pair_statistics_triton(pair(), pair()), 4, 78, (), 4),
        "pair many": Launch(stats, lambda: statistics.pair_statistics_triton(many(8), many(8)), 4, 78, (), 4),
        "pair strided": Launch(stats, lambda: statistics.pair_statistics_triton(slices(), slices()), 4, 78, (), 4),
        "reuse": Launch(linear, lambda: combine.linear_combination_triton(pair(), terms(1), [1.0]), 6, 40),
        "combine": Launch(linear, lambda: combine.linear_combination_triton(pair(), terms(2), [1.5, -0.5]), 8, 48),
        "combine device": Launch(
            linear,
            lambda: combine.linear_combination_triton(pair(), terms(TERMS), new(TERMS, dtype=torch.float32)),
            2 * (TERMS + 2),
            128,
            ("b32",),
        ),
        "combine gate": Launch(
            linear,
            lambda: combine.linear_combination_triton(dense(), [[t] for t in dense()], [1.0], None, [new(2, 128)] * 2),
            8,
            72,
        ),
        "combine strided": Launch(
            linear, lambda: combine.linear_combination_triton(slices(), [[t] for t in dense()], [1.0]), 6, 56
        ),
        "combine codes": Launch(
            linear,
            lambda: combine.linear_combination_triton([one], [codes], [1.0], None, None, [scales]),
            5,
            48,
            ("b32",),
            codes=True,
        ),
        "taylor update": Launch(linear, lambda: map_of(3, taylor, factors=[1.0, 1.0, 1.0]), 12, 96),
        "taylor": Launch(linear, lambda: map_of(2, [[1.0, 0.5]]), 6, 48),
        "error": Launch(error, lambda: statistics.combination_error_triton(one, many(SETS), sets), 2 * (SETS + 2), 96),
        "gram": Launch("_gram_kernel", lambda: moments.gram_triton(many(8)), 16, 144, (), 36),
        "sums": Launch("_linear_sums_kernel", lambda: moments.align_triton(one, one, many(2), many(2)), 8, 64, (), 7),
        "capture codes": Launch(
            "_capture_compact_kernel",
            lambda: compact.capture_compact_triton(
                [new(1, 64, 4096)], [new(1, 64, 4096)], [new(1, 64, 4096, dtype=torch.uint8)], scales, flag
            ),
            5,
            58,
            fused=1,
            codes=True,
        ),
        "lerp": Launch("_router_lerp_fwd_kernel", lambda: router.router_lerp_triton(one, one, beta), 6, 56, ("b32",)),
        "lerp gated": Launch(
            "_router_lerp_fwd_kernel", lambda: router.router_lerp_triton(one, one, beta, gate, one), 10, 72, ("b32",)
        ),
        "lerp backward": Launch(
            "_router_lerp_bwd_kernel", lambda: router.router_lerp_backward_triton(one, one, one, beta), 8, 64, ("b32",)
        ),
        "modulate": Launch("_modulate_kernel", lambda: modulate.modulate_triton(wide, row, row), 8, 76, (), 1),
        "modulate pairs": Launch("_modulate_kernel", lambda: modulate.modulate_triton(long, row, row), 6, 86, (), 1),
        "modulate metric": Launch(
            "_modulate_kernel", lambda: modulate.modulate_triton(wide, row, row, (), (), wide), 10, 154, (), 5
        ),
        "modulate reuse": Launch(
            "_modulate_kernel",
            lambda: modulate.modulate_triton(wide, row, row, [wide, wide], [1.5, -0.5]),
            12,
            95,
            fused=1,
        ),
        "guidance": Launch("_guidance_kernel", lambda: guidance.guidance_triton(thin, thin, 4.0, True), 6, 40, (), 2),
        "rows": Launch("_row_statistics_kernel", lambda: decisions.row_statistics_triton(wide, wide), 4, 116, (), 3),
    }


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


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a CUDA binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def describe(compiled: Any) -> dict[str, Any]:
    """What a compiled kernel is, as far as it is looked at."""
    options = compiled.metadata
    found = {"warps": options.num_warps, "assembly": compiled.asm.get("ptx") or compiled.asm["amdgcn"]}
    if "cubin" in compiled.asm:
        found["resources"] = resources(compiled.asm["cubin"])
    return found


def main(arch: str, folder: str = str(KERNELS), *wanted: str) -> None:
    """Prints, as JSON, what every launch compiled: ``{launch: {kernel: description}}``."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(StubDriver(arch))
    run, seen = JITFunction.run, []

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        compiled = run(self, *arguments, **options)
        constants = {name: options[name] for name in SIZES if name in options}
        seen.append((self.fn.__name__, compiled, constants))
        return compiled

    JITFunction.run = recorded
    modules = load(Path(folder))
    # CPU tensors stand for those of the GPU that is compiled for
    modules("compact").converts_e4m3 = lambda device: not arch.startswith("gfx") and int(arch) >= 89
    found: dict[str, dict[str, Any]] = {}
    for name, launch in launches(modules).items():
        if wanted and name not in wanted:
            continue
        seen.clear()
        launch.call()
        found[name] = {kernel: describe(compiled) | {"constants": c} for kernel, compiled, c in seen}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
