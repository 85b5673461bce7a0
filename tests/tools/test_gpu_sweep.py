"""The sweep over variants of the kernels, without a GPU: their texts, their packages, what is written and when."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_sweep.py"


@pytest.fixture(scope="module")
def gpu_sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_sweep", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_sweep"] = module
    spec.loader.exec_module(module)
    return module


Make = Callable[..., Any]


@pytest.fixture
def make(gpu_sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A sweep over some variants of two cases that PyTorch computes; one fails wherever GROUPS is 512."""

    def plain(kernels: Callable[[str], ModuleType], t: Any) -> Any:
        t.y[0].copy_(t.x[0])
        return t.y, [t.x[0].float().sum(dtype=torch.float32).view(1)]

    def picky(kernels: Callable[[str], ModuleType], t: Any) -> Any:
        if kernels("tiles").GROUPS == 512:
            raise RuntimeError("too many registers")
        return plain(kernels, t)

    def build(variants: list[Any], seconds: float = 60.0) -> Any:
        monkeypatch.setattr(
            gpu_sweep, "CASES", tuple(gpu_sweep.Case(run.__name__, 1, 1, run) for run in (plain, picky))
        )
        options = gpu_sweep.parse(["--json", str(tmp_path / "sweep.json"), "--shape", "1x4x32"])
        (tmp_path / "work").mkdir()
        deadline = time.monotonic() + seconds
        everything = [gpu_sweep.Variant(gpu_sweep.CURRENT, "parent"), *variants]
        sweep = gpu_sweep.Sweep(
            *(options, tmp_path / "work", torch.device("cpu"), deadline, everything, gpu_sweep.HostClock())
        )
        sweep.write_packages()
        sweep.load_packages()
        return sweep

    return build


def test_every_text_occurs(gpu_sweep: ModuleType, tmp_path: Path) -> None:
    everything = gpu_sweep.variants()
    assert len({variant.package for variant in everything}) == len(everything)
    for variant in everything:
        gpu_sweep.write_package(variant, tmp_path / variant.package)
        for change in variant.replacements:
            assert change.new.strip() in (tmp_path / variant.package / change.file).read_text()
        known = {case.name for case in gpu_sweep.CASES}
        assert {*variant.cases, *variant.instead} <= known


def test_variants_are_packages_of_their_own(gpu_sweep: ModuleType, make: Make) -> None:
    from layercache.kernels import statistics, tiles

    now = tiles.GROUPS, tiles.MAX_PROGRAMS, statistics.GROUPS
    sweep = make([v for v in gpu_sweep.variants() if v.sweep == "tiles"])
    assert not sweep.failures
    current, other = sweep.kernels["current"], sweep.kernels["GROUPS 512, MAX_PROGRAMS 2048"]
    assert (current("tiles").GROUPS, current("statistics").GROUPS) == now[::2]
    assert (other("tiles").GROUPS, other("statistics").GROUPS) == (512, 512)
    assert other("capture").MAX_PROGRAMS == 2048
    assert (tiles.GROUPS, tiles.MAX_PROGRAMS, statistics.GROUPS) == now
    assert other("capture").__file__.startswith(str(sweep.work))


@pytest.mark.slow
def test_failures_are_rows_and_stop_nobody(gpu_sweep: ModuleType, make: Make) -> None:
    gone = gpu_sweep.Variant("gone", "hints", replacements=(gpu_sweep.Replacement("capture.py", "no such text", ""),))
    syntax = gpu_sweep.Variant("syntax", "hints", added={"tiles.py": "GROUPS = ="})
    large = gpu_sweep.Variant("large", "tiles", replacements=gpu_sweep.constants(512))
    small = gpu_sweep.Variant("small", "tiles", replacements=gpu_sweep.constants(128))
    sweep = make([gone, syntax, large, small])
    sweep.measure_all()
    failed = {(row["case"], row["variant"]): row["failure"] for row in sweep.rows if "failure" in row}
    assert {name for _, name in failed} == {"gone", "syntax", "large"}
    assert failed["plain", "gone"] == "text not found: capture.py: no such text"
    assert failed["plain", "syntax"].startswith("SyntaxError")
    assert failed["picky", "large"] == "RuntimeError: too many registers"
    measured = {(row["case"], row["variant"]) for row in sweep.rows if "ms" in row}
    assert {("plain", "large"), ("plain", "small"), ("picky", "small"), ("picky", "copy")} <= measured


def test_json_after_every_case(gpu_sweep: ModuleType, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make([gpu_sweep.Variant("small", "tiles", replacements=gpu_sweep.constants(128))])
    written: list[dict[str, Any]] = []
    write = gpu_sweep.Sweep.write

    def look(self: Any) -> None:
        write(self)
        written.append(json.loads(self.options.json.read_text()))

    monkeypatch.setattr(gpu_sweep.Sweep, "write", look)
    sweep.measure_all()
    # two cases of the current kernels, then both with the variant
    assert [len(data["rows"]) for data in written] == [2, 4, 7, 10]
    row = next(row for row in written[-1]["rows"] if row["variant"] == "small")
    assert row["right"] and row["outputs_equal"] and row["ms"] > 0 and row["speedup"] > 0 and row["share_of_copy"] > 0


def test_nothing_is_begun_late(gpu_sweep: ModuleType, make: Make) -> None:
    sweep = make([], seconds=-1.0)
    sweep.measure_all()
    assert not sweep.rows
    assert len(sweep.facts["left_out"]) == 2


def test_wrong_results_are_found(gpu_sweep: ModuleType) -> None:
    known = [torch.ones(4)], [torch.full((8,), 1000.0)]
    assert gpu_sweep.compared(known, known)["right"]
    assert gpu_sweep.compared(([torch.ones(4)], [torch.full((8,), 1000.01)]), known)["right"]
    assert not gpu_sweep.compared(([torch.ones(4)], [torch.full((8,), 1000.1)]), known)["right"]
    assert not gpu_sweep.compared(([torch.tensor([1.0, 1.0, 1.0, float("nan")])], known[1]), known)["right"]
    assert not gpu_sweep.compared((known[0], [torch.full((8,), float("nan"))]), known)["right"]


def test_a_lost_gpu_ends_the_sweep(gpu_sweep: ModuleType, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    sweep = make([gpu_sweep.Variant("large", "tiles", replacements=gpu_sweep.constants(512))])
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(gpu_sweep.ContextLost):
        sweep.device = SimpleNamespace(type="cuda")
        sweep.look_at(RuntimeError("too late"))


def test_what_processes_find_out_is_known(gpu_sweep: ModuleType, make: Make) -> None:
    gone = gpu_sweep.Variant("gone", "tiles", replacements=(gpu_sweep.Replacement("tiles.py", "no such text", ""),))
    large = gpu_sweep.Variant("large", "tiles", replacements=gpu_sweep.constants(512))
    small = gpu_sweep.Variant("small", "tiles", replacements=gpu_sweep.constants(128))
    sweep = make([gone, large, small])
    case = gpu_sweep.CASES[0]
    # in whose midst process 1 died, and process 2 was stopped
    sweep.job_file(large, case, "claim").write_text("1")
    sweep.job_file(small, case, "claim").write_text("2")
    assert gpu_sweep.compile_share(sweep, 0) == 0
    assert gpu_sweep.note_failures(sweep, [0, -11, None]) == 4
    assert sweep.case_failures == {
        ("large", "plain"): "the process that compiled it died",
        ("large", "picky"): "RuntimeError: too many registers",
    }
    assert not (sweep.work / gone.package).exists()


class FakeGpu:
    """A GPU whose calls take no time; until ``late`` bursts have begun it is never held long enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late: int) -> None:
        self.slept: list[int] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None: ...

            def query(self) -> bool:
                return len(gpu.slept) <= late

            def elapsed_time(self, other: Any) -> float:
                return 50.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)


@pytest.mark.slow
def test_bursts_that_were_not_held_are_repeated(gpu_sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, late=1)
    calls: list[int] = []
    times = gpu_sweep.measure({"current": calls.append}, gpu_sweep.GpuClock(), rounds=3)["current"]
    assert times.count == gpu_sweep.MOST_CALLS and len(gpu.slept) == 4 and gpu.slept[1] > gpu.slept[0]
    assert times.held and times.seconds == pytest.approx([1e-3] * 3)
    assert len(calls) == 3 + 4 * 50
    FakeGpu(monkeypatch, late=99)
    assert not gpu_sweep.measure({"current": calls.append}, gpu_sweep.GpuClock(), rounds=1)["current"].held


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_a_part_runs_in_the_interpreter(tmp_path: Path) -> None:
    """The whole program with the ticket, in Triton's interpreter where that works."""
    pytest.importorskip("triton")
    file = tmp_path / "sweep.json"
    cases = ["--sweeps", "ticket", "hints", "--cases", "pair statistics", "reuse"]
    done = run_script(str(SCRIPT), "--tiny", "--jobs", "0", "--json", str(file), *cases)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    assert not any(variant["failure"] for variant in data["variants"].values())
    if "the interpreter fails" not in done.stdout:
        (row,) = [row for row in data["rows"] if row["variant"] == "last program finalises"]
        assert row["right"]


COMPILE = """
import sys, time
from pathlib import Path
import torch, triton
import gpu_sweep
from support import launches

work = Path(sys.argv[1])
triton.runtime.driver.set_active(launches.StubDriver("90"))
clock, options = gpu_sweep.HostClock(), gpu_sweep.parse([])
chosen = {
    "last program finalises": "pair statistics",
    "8 warps, GROUPS 256": "reuse",
    "loads .cg": "capture and change",
    "loads evict first, stores .cs": "reuse",
}
variants = [variant for variant in gpu_sweep.variants() if variant.name in chosen]
assert len(variants) == len(chosen)
sweep = gpu_sweep.Sweep(options, work, torch.device("cpu"), time.monotonic() + 99, variants, clock)
sweep.write_packages()
sweep.load_packages()
assert not sweep.failures, sweep.failures
for variant in variants:
    case = next(case for case in gpu_sweep.CASES if case.name == chosen[variant.name])
    gpu_sweep.run_of(variant, sweep.kernels[variant.name], case)(case.tensors((1, 4, 3072), sweep.device, 0))
"""


@pytest.mark.slow
def test_variants_compile(tmp_path: Path) -> None:
    """One of each kind, for sm_90, with a stub driver."""
    pytest.importorskip("triton")
    (tmp_path / "work").mkdir()
    program = f"import sys; sys.path[:0] = {[str(ROOT / 'bench'), str(ROOT / 'tests'), str(ROOT)]!r}\n{COMPILE}"
    done = run_script("-c", program, str(tmp_path / "work"))
    assert done.returncode == 0, done.stderr
