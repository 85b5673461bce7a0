"""The run on a GPU, tried without one: parts fail alone, time is kept, and a run that is cut off loses nothing."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from layercache.tools.bench.clocks import SimulatedClock
from layercache.tools.bench.measure import LEAST_ROUNDS, in_turn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "bench" / "gpu_run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    return module


def tiny_run(folder: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(folder / "out")}
    command = ["bash", "bench/gpu.sh", "--tiny", "--results", str(folder / "results"), *more]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, text=True)


def end_session(leader: int) -> None:
    """Kills every process of a session, as a machine that is taken away does."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader:
                    os.kill(int(entry.name), signal.SIGKILL)
            except (OSError, IndexError):
                continue


def measured_in(folder: Path) -> Iterator[str]:
    """What the files of a run hold, as its log names it."""
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text())
        yield from (f"{row['case']}, {'x'.join(map(str, row['shape']))}" for row in data.get("rows", ()))
        yield from (f"{model}: {name}" for model, facts in data.get("models", {}).items() for name in facts["rows"])


PARTS = ("machine", "kernels", "qwen", "sweep", "sizes", "flux", "end-to-end")


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes(tmp_path: Path) -> None:
    """All but tests/gpu, which are tests of this suite."""
    run = tiny_run(tmp_path, *(word for part in PARTS for word in ("--only", part)))
    try:
        assert run.wait(570) == 0
    finally:
        end_session(run.pid)
    found = {path.name.removeprefix("tiny-")[11:-5]: path for path in (tmp_path / "out").glob("*.json")}
    assert set(found) == {"run", *PARTS[1:]}
    summary = json.loads(found["run"].read_text())
    assert [part["state"] for part in summary["parts"]] == ["passed"] * len(PARTS)
    assert summary["machine"]["copy_bytes_per_second"] > 0 and json.loads(found["sizes"].read_text())["rows"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes of a session are found in /proc")
def test_a_run_killed_at_any_moment_keeps_what_was_measured(tmp_path: Path) -> None:
    moments = random.Random(1)
    for attempt in range(5):
        folder, log = tmp_path / str(attempt), tmp_path / f"{attempt}.log"
        environment = os.environ | {"PYTHON": sys.executable}
        command = ["bash", "bench/gpu.sh", "--rehearse", "--results", str(folder), "--only", "sizes", "--only", "qwen"]
        with log.open("w") as output:
            run = subprocess.Popen(
                command, cwd=ROOT, env=environment, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
            )
            until = time.monotonic() + 120
            while "measured:" not in log.read_text() and time.monotonic() < until:
                time.sleep(0.2)
            time.sleep(moments.uniform(0, 6))
            end_session(run.pid)
            run.wait()
        finished = re.findall(r"^measured: (.+)$", log.read_text(), re.MULTILINE)
        assert finished and {name.partition(": ms")[0] for name in finished} <= set(measured_in(folder))


def test_simulated_run_ends_in_time(gpu_run: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert gpu_run.simulate(gpu_run.LIMIT) == 0
    ends = {
        line[:28].strip(): float(line[36:44])
        for line in capsys.readouterr().out.splitlines()[1:]
        if "left out" not in line
    }
    assert all(ends[name] <= 400 for name in ("tests", "kernels", "real size, Qwen-Image"))
    assert gpu_run.simulate(200) == 1


@pytest.mark.parametrize("call", [3e-6, 3e-5, 1e-3, 1e-2])
@pytest.mark.parametrize("host", [5e-6, 3e-4])
def test_timing_of_a_case_is_bounded(call: float, host: float) -> None:
    """Before, a case of 3 us took 25 s."""
    clock = SimulatedClock(call, host)
    variants = {name: itertools.repeat(lambda: None) for name in ("ours", "eager", "copy", "compiled")}
    times, repeats = in_turn(variants, 50, clock, limit=0.5)
    assert all(LEAST_ROUNDS <= len(own) < 50 for own in times.values())
    assert all(5 <= count <= 100 for count in repeats.values())
    slowest = len(variants) * max(4e-3 + 6e-3, 5 * call + max(5 * host, 6e-3)) * 1.2
    assert clock.elapsed <= 0.5 + (LEAST_ROUNDS + 6) * slowest


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_costs_itself_alone(gpu_run: ModuleType, tmp_path: Path) -> None:
    def python(text: str):
        return lambda seconds, file: ["-c", text, str(file)]

    write = "import sys; open(sys.argv[1], 'w').write('{}')"
    out = tmp_path / "out"
    out.mkdir()
    run = gpu_run.Run(tmp_path / "card-day", 60, False, out)
    with run.copying():
        run.run(gpu_run.Part("fails", 30, python("raise SystemExit(3)"), "a"))
        run.run(gpu_run.Part("hangs", 5.5, python("import time; time.sleep(60)"), "b"))
        run.run(gpu_run.Part("is lacking", 30, python(write), "c", ("no_such_package",)))
        run.run(gpu_run.Part("works", 30, python(write), "d"))
        run.limit = 0
        run.run(gpu_run.Part("is late", 30, python(write), "e"))
    states = ["failed", "stopped", "left out", "passed", "left out"]
    assert [part["state"] for part in json.loads((out / "card-day-run.json").read_text())["parts"]] == states
    assert sorted(path.name for path in out.iterdir()) == ["card-day-d.json", "card-day-run.json"]


def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "bench/gpu_run.py", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU" in done.stdout and not list(tmp_path.iterdir())
