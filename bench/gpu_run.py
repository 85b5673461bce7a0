"""One run that tests and measures everything on a GPU, in parts that fail alone.

    bash bench/gpu.sh                 # on an NVIDIA GPU: ten minutes at the most
    bash bench/gpu.sh --tiny      # the same parts on a CPU, at tiny sizes
    bash bench/gpu.sh --simulate      # no part at all: when each would begin and end

Parts run in the order of what their figures are worth, each in processes of its own and at most for as long as is left.
What a part has measured is in its file after every case, and copied to the folder OUT every few seconds, so that a run
that is cut off at any moment keeps it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
# Seconds of the whole run.
LIMIT = 560.0
# Seconds that a part which keeps time itself gets to write and leave, before it is stopped.
GRACE = 15.0
# Seconds between copies to OUT.
COPY_EVERY = 3.0
# Bytes per second of a copy of 1 GB, read and written, by card: what was measured or, but for these, about 90 % of the
# data sheet. A run whose card is far from it is not to be trusted.
COPY_RATES = {"H100": 3.0e12, "H200": 4.3e12, "A100": 1.75e12, "B200": 7.2e12, "RTX 4090": 0.92e12, "L40": 0.78e12}
TRUSTED = (0.85, 1.25)
MAIN, OTHERS = "1x4096x3072", ("1x8192x6144", "1x256x3072", "1x32768x5120")
TINY, TINY_OTHERS = "1x32x64", ("1x64x128", "1x8x64")
AHEAD_JOBS = 8
# Kernels of an older commit, measured too where they are: git archive COMMIT kernels | tar x -C build/parent
PARENT = ROOT / "build" / "parent" / "kernels"


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        seconds: that it may take.
        command: arguments of python, for the seconds that it is given and the file it writes.
        file: what its result's name ends with, if it writes one.
        needs: packages without which it is left out.
        expected: seconds that it took on an H200 where nothing cut it short; of the kernels see `simulated_kernels`.
        must_end_by: second of the run by which it must have ended when the run is simulated.
        beside: of a command that runs meanwhile.
    """

    name: str
    seconds: float
    command: Callable[[float, Path], list[str]]
    file: str = ""
    needs: tuple[str, ...] = ()
    expected: float = 0.0
    must_end_by: float = LIMIT
    beside: Callable[[float], list[str]] | None = None


@dataclass
class Outcome:
    """How a part went: passed, failed, stopped, or left out with the reason why."""

    name: str
    state: str
    begun: float
    ended: float
    note: str = ""


def parts(tiny: bool) -> list[Part]:
    """All parts, the most valuable first."""
    device, rounds = ("cpu", "1") if tiny else ("cuda", "5")
    script = str(Path(__file__).resolve())

    def kernels(*more: str) -> Callable[[float, Path], list[str]]:
        def command(seconds: float, file: Path) -> list[str]:
            head = ["-m", "layercache", "bench", "kernels", "--device", device, "--json", str(file)]
            return [*head, "--time-limit", f"{max(1.0, seconds - GRACE):.0f}", "--rounds", rounds, *more]

        return command

    def real_size(model: str) -> Callable[[float, Path], list[str]]:
        def command(seconds: float, file: Path) -> list[str]:
            small = (
                ["--tiny", "--rounds", "1", *(["--no-compile"] if model == "flux" else [])]
                if tiny
                else ["--rounds", "2"]
            )
            head = [
                str(ROOT / "bench" / "real_size.py"),
                "--model",
                model,
                "--device",
                device,
                *small,
            ]
            return [*head, "--seconds", f"{max(1.0, seconds - GRACE):.0f}", "--json", str(file)]

        return command

    def sweep(seconds: float, file: Path) -> list[str]:
        head = [str(ROOT / "bench" / "gpu_sweep.py"), *(["--tiny"] if tiny else [])]
        if PARENT.is_dir() and not tiny:
            head += ["--kernels", str(PARENT), "--sweeps", "parent"]
        return [*head, "--seconds", f"{max(1.0, seconds - GRACE):.0f}", "--json", str(file)]

    def search_cost(seconds: float, file: Path) -> list[str]:
        size = ["--steps", "10", "--pictures", "4", "--budgets", "0.5", "0.2"]
        if tiny:
            size = ["--tiny", "--device", "cpu", "--steps", "8", "--pictures", "2", "--budgets", "0.5"]
        # besides the search: the model, and five generations
        head = [str(ROOT / "bench" / "search_cost.py"), *size, "--seconds", f"{max(1.0, seconds - 3 * GRACE):.0f}"]
        return [*head, "--json", str(file)]

    def tests(seconds: float, file: Path) -> list[str]:
        jobs = ["--numprocesses", "2" if tiny else "6", "--dist", "worksteal"] if has("xdist") else []
        return ["-m", "pytest", "-q", "--tb=short", "--maxfail=25", "-p", "no:cacheprovider", *jobs, "tests/gpu"]

    def ahead(seconds: float) -> list[str]:
        return [script, "--compile-ahead", f"{seconds:.0f}", *(["--tiny"] if tiny else [])]

    def machine(seconds: float, file: Path) -> list[str]:
        return [script, "--machine", str(file), *(["--tiny"] if tiny else [])]

    first = kernels("--shape", TINY, "--op", "gram") if tiny else kernels("--shape", MAIN)
    others = [argument for shape in (TINY_OTHERS if tiny else OTHERS) for argument in ("--shape", shape)]
    return [
        Part("machine", 60, machine, "machine", expected=5),
        Part("tests", 150, tests, expected=100, must_end_by=400, beside=ahead),
        Part("kernels", 130, first, "kernels", expected=0, must_end_by=400),
        Part("real size, Qwen-Image", 170, real_size("qwen"), "qwen", ("diffusers",), 130, 400),
        Part("sweep", 70, sweep, "sweep", expected=34),
        Part("kernels, other sizes", 90, kernels("--no-compile", *others), "sizes", expected=0),
        Part("real size, FLUX.1", 110, real_size("flux"), "flux", ("diffusers",), 110),
        Part("search cost, Qwen-Image", 100, search_cost, "search-cost", ("diffusers",), 85),
    ]


def has(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


# --- the run ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Parts one after the other, within a limit.

    Attributes:
        prefix: of the result files, with their folder.
        out: where results are copied to.
        machine: what the part of that name found.
    """

    prefix: Path
    limit: float
    tiny: bool
    out: Path | None = None
    machine: dict[str, Any] | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def passed(self) -> float:
        return time.monotonic() - self.start

    def file(self, part: Part) -> Path:
        return Path(f"{self.prefix}-{part.file}.json")

    def run(self, part: Part) -> Outcome:
        """Runs a part for as long as it may, and writes how it went."""
        begun = self.passed
        # a run at tiny sizes is for finding faults, however slow the machine
        given = self.limit - begun if self.tiny else min(part.seconds, self.limit - begun)
        missing = [package for package in part.needs if not has(package)]
        if missing:
            state, note = "left out", f"{', '.join(missing)} is not installed"
        elif given < 5:
            state, note = "left out", "no time is left"
        else:
            print(f"== {part.name}: at {begun:.0f} s, for {given:.0f} s at most", flush=True)
            with contextlib.ExitStack() as stack:
                beside = stack.enter_context(started(part.beside(given))) if part.beside else None
                main = stack.enter_context(started(part.command(given, self.file(part))))
                state, note = wait(main, given)
                if beside is not None:
                    wait(beside, max(1.0, given - (self.passed - begun)))
        outcome = Outcome(part.name, state, round(begun, 1), round(self.passed, 1), note)
        print(f"-- {part.name}: {state}, {outcome.ended - outcome.begun:.0f} s {note}", flush=True)
        self.outcomes.append(outcome)
        self.write()
        return outcome

    def write(self) -> None:
        """How all parts went so far, and on which machine; whole or not at all."""
        machine = Path(f"{self.prefix}-machine.json")
        if machine.exists():
            self.machine = json.loads(machine.read_text())
            machine.unlink()
        found = {
            "kind": "gpu run",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "tiny": self.tiny,
            "limit_seconds": self.limit,
            "machine": self.machine,
            "parts": [asdict(outcome) for outcome in self.outcomes],
        }
        write_whole(Path(f"{self.prefix}-run.json"), json.dumps(found, indent=1) + "\n")

    def copy(self) -> None:
        """Results to the folder OUT; each of them is whole at any moment."""
        if self.out is not None:
            for path in self.prefix.parent.glob(f"{self.prefix.name}-*.json"):
                if path.name.endswith("-machine.json"):
                    continue  # it becomes a part of the run's own file
                with contextlib.suppress(OSError):
                    shutil.copy2(path, self.out / path.name)

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Copies every few seconds, and at the end."""
        ended = threading.Event()

        def again() -> None:
            while not ended.wait(COPY_EVERY):
                self.copy()

        thread = threading.Thread(target=again, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.copy()


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen]:
    """Python with these arguments, in a process group that is ended with the context, whatever it left running."""
    options: dict[str, Any] = {"cwd": ROOT, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen([PYTHON, *arguments], process_group=0, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(process: subprocess.Popen, seconds: float) -> tuple[str, str]:
    """How a process ended within ``seconds``: its state, and why."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "stopped", f"after {seconds:.0f} s"
    return ("passed", "") if status == 0 else ("failed", f"exit status {status}")


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all, before layercache can be imported."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)


# --- parts that are here ------------------------------------------------------------------------------------


def measure_machine(path: Path, tiny: bool) -> int:
    """Writes card, versions and the rate of a copy of 1 GB; 1 where that is not what the card can do."""
    import torch

    from layercache.tools.bench.clocks import clock_of
    from layercache.tools.report.machine import machine_info, write_json

    device = torch.device("cpu" if tiny else "cuda")
    elements = (2**20 if tiny else 2**29) // 4
    pairs = [[torch.randn(elements, device=device) for _ in range(2)] for _ in range(2)]
    calls = iter(lambda: lambda: [a.copy_(b) for a, b in pairs], None)
    clock = clock_of(device)
    for _ in range(3):
        next(calls)()
    seconds = min(clock.seconds(calls, 5) for _ in range(5))
    rate = 2 * 2 * elements * 4 / seconds
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    expected = next((rate for card, rate in COPY_RATES.items() if card in name), None)
    trusted = None if expected is None else TRUSTED[0] <= rate / expected <= TRUSTED[1]
    figures = {"copy_bytes_per_second": rate, "expected": expected, "trusted": trusted}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        figures |= {"memory": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    write_json(path, {"kind": "machine", "machine": machine_info(), **figures})
    print(f"{name}: a copy moves {rate / 1e12:.2f} TB/s" + (f" of {expected / 1e12:.2f}" if expected else ""))
    if trusted is False:
        print("DISTRUST this run: the card is shared, throttled, or not what it says")
    return 1 if trusted is False else 0


def compile_ahead(seconds: float, tiny: bool) -> int:
    """Every case once, in several processes, so that what Triton and torch.compile make of it is on the disk."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    jobs = 2 if tiny else AHEAD_JOBS
    command = [PYTHON, __file__, *(["--tiny"] if tiny else []), "--compile-share"]
    children = [subprocess.Popen([*command, f"{job}/{jobs}"], env=environment, cwd=ROOT) for job in range(jobs)]
    end = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, end - time.monotonic()))
        child.kill()
    return 0


def compile_share(share: str, tiny: bool) -> int:
    """Every so many-th case, for the device and in the shape that is measured."""
    import torch

    from layercache.tools.bench.cases import CASES, find_cases

    job, jobs = map(int, share.split("/"))
    cases = find_cases(["gram"]) if tiny else list(CASES)
    shape = tuple(map(int, (TINY if tiny else MAIN).split("x")))
    for case in cases[job::jobs]:
        inputs = case.inputs(shape, torch.bfloat16, torch.device("cpu" if tiny else "cuda"))
        torch._dynamo.reset()
        try:
            with torch.set_grad_enabled(case.gradient):
                case.ours(inputs)
                case.compile()(inputs)
        except Exception as error:  # the measurement says what is wrong
            print(f"ahead: {case.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return 0


# --- a run that is only reckoned -------------------------------------------------------------------------------


def simulated_kernels(shapes: list[str], compiled: bool) -> float:
    """Seconds of the kernels at these shapes, by the code that times them under a simulated clock."""
    import itertools

    import torch

    from layercache.tools.bench.cases import CASES
    from layercache.tools.bench.clocks import SimulatedClock
    from layercache.tools.bench.measure import in_turn
    from layercache.tools.cli.bench import CASE_SECONDS

    total = START_SECONDS
    for shape in shapes:
        for case in CASES:
            size = case.bytes(tuple(map(int, shape.split("x"))), torch.bfloat16)
            # ours, eager with its many passes, the copy, compiled
            factors = {"ours": 1.3, "eager": 6.0, "copy": 1.0} | ({"compiled": 1.5} if compiled else {})
            for name, factor in factors.items():
                clock = SimulatedClock(call=max(2.5e-6, factor * size / 3.0e12), host=20e-6 * factor)
                in_turn({name: itertools.repeat(lambda: None)}, 5, clock, CASE_SECONDS / len(factors))
                total += clock.elapsed
            total += PREPARE_SECONDS + size / PREPARE_RATE + (COMPILED_SECONDS if compiled else 0.0)
    return total


# Of starting a process with torch; of making a case's inputs and checking its values, and the bytes of a call per
# second of that; of taking up a compiled function from the disk.
START_SECONDS, PREPARE_SECONDS, PREPARE_RATE, COMPILED_SECONDS = 6.0, 0.1, 6e9, 0.3


def simulate(limit: float) -> int:
    """Prints when every part would begin and end on a GPU as fast as an H100; 1 where one would end too late."""
    now, late = 0.0, []
    print(f"{'part':28s} {'begins':>7s} {'ends':>7s} {'by':>5s}")
    for part in parts(tiny=False):
        expected = part.expected
        if part.file == "kernels":
            expected = simulated_kernels([MAIN], True)
        elif part.file == "sizes":
            expected = simulated_kernels(list(OTHERS), False)
        given = min(part.seconds, limit - now)
        if given < 5:
            print(f"{part.name:28s} left out, no time is left")
            late += [part.name] if part.must_end_by < LIMIT else []
            continue
        cut = "  cut short" if expected > given else ""
        end = now + min(expected, given)
        print(f"{part.name:28s} {now:7.0f} {end:7.0f} {part.must_end_by:5.0f}{cut}")
        # what must be there whole may not be cut short either
        if end > part.must_end_by or (cut and part.must_end_by < LIMIT):
            late.append(part.name)
        now = end
    if late:
        print(f"too late: {', '.join(late)}")
    return 1 if late else 0


# --- command line ----------------------------------------------------------------------------------------------


def card() -> str | None:
    """The GPU's name as part of a file name; None where torch sees none."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, cwd=ROOT)
    name = found.stdout.strip().splitlines()[-1:] or [""]
    return name[0].lower().replace(" ", "-") or None


def build() -> str | None:
    """Builds the extensions for this Python where they were not carried along; returns what went wrong."""
    # torch first: the CPU kernels share its OpenMP
    check = [PYTHON, "-c", "import torch, layercache._core, layercache._cpu"]
    if subprocess.run(check, cwd=ROOT, capture_output=True).returncode == 0:
        return None
    print("== building the extensions, which were not carried along for this Python", flush=True)
    command = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace", "--parallel", "3"]
    built = subprocess.run(command, cwd=ROOT, timeout=240)
    return None if built.returncode == 0 else "the extensions could not be built"


def run_all(args: argparse.Namespace) -> int:
    """All parts; 1 where one failed."""
    name = "tiny" if args.tiny else card()
    if name is None:
        print("no GPU: torch.cuda.is_available() is False, or torch is missing; see bench/gpu.sh --tiny")
        return 2
    if problem := build():
        print(problem)
        return 2
    folder = Path(args.results or (tempfile.mkdtemp(prefix="tiny-") if args.tiny else ROOT / "bench/results"))
    prefix = folder.resolve() / f"{name}-{datetime.now(UTC):%Y-%m-%d-%H%M}"
    out = Path(args.out) if args.out else None
    run = Run(prefix, args.limit, args.tiny, out)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if not args.tiny:
        os.environ["LAYERCACHE_EXPECT_GPU"] = "1"
    with run.copying():
        for part in parts(args.tiny):
            if not args.only or part.name in args.only or part.file in args.only:
                run.run(part)
    failed = [outcome.name for outcome in run.outcomes if outcome.state in ("failed", "stopped")]
    print(f"FAILED: {', '.join(failed)}" if failed else "all parts passed", f"; results: {run.prefix}-*.json", sep="")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", "--rehearse", action="store_true", help="every part on a CPU, at tiny sizes")
    parser.add_argument("--simulate", action="store_true", help="only print when each part would begin and end")
    parser.add_argument("--limit", type=float, default=float(os.environ.get("LIMIT", LIMIT)), help="seconds in all")
    parser.add_argument("--only", action="append", metavar="PART", help="only this part; may be repeated")
    parser.add_argument("--results", help="folder of the result files; bench/results")
    parser.add_argument("--out", default=os.environ.get("OUT"), help="folder where results are copied to; $OUT")
    parser.add_argument("--machine", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--compile-ahead", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    parser.add_argument("--compile-share", metavar="JOB/JOBS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.machine:
        return measure_machine(Path(args.machine), args.tiny)
    if args.compile_ahead is not None:
        return compile_ahead(args.compile_ahead, args.tiny)
    if args.compile_share:
        return compile_share(args.compile_share, args.tiny)
    if args.simulate:
        return simulate(args.limit)
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
