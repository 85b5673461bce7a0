"""``layercache bench``: nothing heavy is imported here before a command runs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.errors import FileFormatError
from layercache.tools.cli.common import Device, Json, Plot, Printer, check_outputs, when_stopped
from layercache.tools.cli.loading import choose_device
from layercache.tools.cli.options import Dtype

if TYPE_CHECKING:
    from layercache.tools.bench.case import Case
    from layercache.tools.bench.measure import Row

app = typer.Typer(no_args_is_help=True, help="Measure the ops on this machine, and look after stored results.")

RESULTS = Path("bench") / "results"
# Timing of one case on a GPU, after which no further round is begun.
CASE_SECONDS = 0.5


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a shape such as 1x4096x3072 (batch x rows x channels).")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _torch_dtype(dtype: Dtype) -> Any:
    import torch

    return getattr(torch, dtype.value)


Ops = Annotated[
    list[str] | None, typer.Option("--op", help="Only this op or case, such as 'capture'; may be repeated.")
]
Shapes = Annotated[list[str] | None, typer.Option("--shape", help="Batch x rows x channels; may be repeated.")]
Shape = Annotated[str, typer.Option(help="Batch x rows x channels of the image stream.")]
NumberFormat = Annotated[Dtype, typer.Option(help="Number format of the tensors.")]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Also measure torch.compile.")]
Rounds = Annotated[int, typer.Option(min=1, help="Times that each variant is measured.")]
TimeLimit = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0, help="Begin no case after this; what was measured until then is kept."),
]


@app.command()
def kernels(
    op: Ops = None,
    shape: Shapes = None,
    dtype: NumberFormat = Dtype.bfloat16,
    device: Device = None,
    compiled: Compiled = True,
    rounds: Rounds = 7,
    time_limit: TimeLimit = None,
    json_to: Json = None,
) -> None:
    """Time every op beside eager PyTorch, torch.compile and a plain copy of as many bytes.

    Variants are measured in turn, and a speedup is shown only where the values agree; the command fails if they do
    not somewhere, or if a case could not be measured. The columns are explained in docs/benchmarks.md.

    Example: `layercache bench kernels --op linear_combination --shape 1x4096x3072`
    """
    check_outputs({"json_to": json_to})
    shapes = [_shape(text) for text in shape or ["1x4096x3072"]]
    import torch

    from layercache.tools.bench.cases import find_cases

    place = torch.device(choose_device(device))
    cases = find_cases(op or ())
    run = _Run(_torch_dtype(dtype), place, rounds, compiled, time_limit, Printer(json_to))
    is_kept = json_to not in (None, "-")
    with when_stopped(f"Stopped. What was measured is in {json_to}." if is_kept else "Stopped; nothing was written."):
        run.measure([(case, size) for size in shapes for case in cases])
    run.report()
    if run.failures or run.skipped or not all(row.right for row in run.rows):
        raise typer.Exit(1)


class _Run:
    """Cases measured one after the other; what is measured is written at once."""

    def __init__(
        self, dtype: Any, device: Any, rounds: int, compiled: bool, time_limit: float | None, printer: Printer
    ):
        self.dtype, self.device, self.rounds, self.compiled = dtype, device, rounds, compiled
        self.time_limit, self.printer = time_limit, printer
        self.start = time.monotonic()
        self.shapes: list[tuple[int, int, int]] = []
        self.rows: list[Row] = []
        self.failures: dict[str, str] = {}
        self.skipped: list[str] = []

    def measure(self, cases: Sequence[tuple[Case, tuple[int, int, int]]]) -> None:
        """Every case at its size, then, on a GPU, the launches of each."""
        from tqdm.auto import tqdm

        self.shapes = list(dict.fromkeys(size for _, size in cases))
        with tqdm(total=len(cases), unit="case", leave=False, disable=None) as bar:
            for case, size in cases:
                bar.set_description(case.name)
                self._measure_case(case, size)
                bar.update()
        if self.device.type == "cuda":
            self._count_launches({case.name: case for case, _ in cases})

    def _measure_case(self, case: Case, size: tuple[int, int, int]) -> None:
        from layercache.tools.bench.measure import measure

        name = f"{case.name}, {'x'.join(map(str, size))}"
        if self._is_late():
            self.skipped.append(name)
            return
        # a case on a GPU has no noise that takes longer to average out
        limit = CASE_SECONDS if self.device.type == "cuda" else math.inf
        try:
            row = measure(case, size, self.dtype, self.device, rounds=self.rounds, compiled=self.compiled, limit=limit)
        except Exception as error:  # one case must not lose the others
            self.failures[name] = f"{type(error).__name__}: {error}"
        else:
            self.rows.append(row)
        self._write()
        if not self.printer.console.is_terminal:
            # instead of a bar, and only once it is written: whoever reads the log knows what the file holds
            self.printer.say(f"measured: {name}")

    def _count_launches(self, cases: dict[str, Case]) -> None:
        from layercache.tools.bench.measure import count_launches

        for at, row in enumerate(self.rows):
            if not self._is_late():
                with contextlib.suppress(Exception):  # the count is shown where there is one
                    launches = count_launches(cases[row.case], row.shape, self.dtype)
                    self.rows[at] = dataclasses.replace(row, launches=launches)
        self._write()

    def _is_late(self) -> bool:
        return self.time_limit is not None and time.monotonic() - self.start > self.time_limit

    def _write(self) -> None:
        """Whoever stops this process keeps what was measured until then."""
        from layercache.tools.report.machine import write_json

        if self.printer.json_to not in (None, "-"):
            write_json(self.printer.json_to, self._figures())

    def _figures(self) -> dict[str, Any]:
        from layercache.tools.bench import results

        settings = {
            "rounds": self.rounds,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "shapes": [list(size) for size in self.shapes],
        }
        return results.figures(self.rows, settings) | {"failures": self.failures, "not_begun": self.skipped}

    def report(self) -> None:
        """A table for every size, what failed, what was not begun, and the figures."""
        from layercache.tools.bench import results

        for size in self.shapes:
            if rows := [row for row in self.rows if row.shape == size]:
                self.printer.say(results.table(rows))
        for name, reason in self.failures.items():
            self.printer.say(f"failed: {name}: {reason}", style="red")
        if self.skipped:
            every = len(self.rows) + len(self.failures) + len(self.skipped)
            self.printer.say(
                f"not begun within {self.time_limit:g} s: {len(self.skipped)} of {every}, from {self.skipped[0]} on",
                style="red",
            )
        self.printer.figures(self._figures())


@app.command()
def peers(
    shape: Shape = "1x4096x3072",
    dtype: NumberFormat = Dtype.bfloat16,
    device: Device = None,
    rounds: Rounds = 5,
    plot: Plot = None,
    json_to: Json = None,
) -> None:
    """Count and time what the caches of diffusers and cache-dit do, as they are and on our ops.

    The blocks return prepared tensors, so that the time is that of the cache alone. Operators have an operand as large
    as the image stream; passes are such tensors read and written; reads wait for the device.

    Example: `layercache bench peers --shape 1x4096x3072 --json peers.json`
    """
    check_outputs({"json_to": json_to, "plot": plot})
    import torch

    from layercache.tools.bench import peers as measuring
    from layercache.tools.bench import results
    from layercache.tools.report import plots
    from layercache.tools.report.machine import machine_info

    if plot is not None:
        plots.check_installed()
    printer, size, place = Printer(json_to), _shape(shape), torch.device(choose_device(device))
    rows = _measure_peers(size, _torch_dtype(dtype), place, rounds)
    printer.say(measuring.table(rows))
    if plot is not None:
        printer.say(f"plot: {measuring.save_plot(plot, rows, f'{shape}, {dtype.value}, {place}')}")
    settings = {"rounds": rounds, "dtype": dtype.value, "device": str(place), "shape": list(size)}
    head = {"kernel_hash": results.hash_or_none(), "machine": machine_info()}
    figures = {"kind": "peers", **head, "settings": settings}
    printer.figures({**figures, "rows": [dataclasses.asdict(row) for row in rows]})


def _measure_peers(shape: tuple[int, int, int], dtype: Any, device: Any, rounds: int) -> list[Any]:
    from tqdm.auto import tqdm

    from layercache.tools.bench import peers as measuring

    with tqdm(total=2 * len(measuring.modes()), leave=False, unit="mode") as bar:

        def advance(name: str) -> None:
            bar.set_description(name)
            bar.update()

        return measuring.measure(shape, dtype, device, rounds, advance)


@app.command("results")
def list_results(
    folder: Annotated[
        Path | None,
        typer.Argument(exists=True, file_okay=False, help="Folder with result files; bench/results if left out."),
    ] = None,
    mark_stale: Annotated[
        bool, typer.Option("--mark-stale", help="Write into files measured with other kernels that they are stale.")
    ] = False,
) -> None:
    """List stored results; those measured with other kernels than these are stale.

    Example: `layercache bench results --mark-stale`
    """
    from layercache.tools.bench import results

    place = _results_folder(folder)
    if mark_stale:
        for path in results.mark_stale(place):
            typer.echo(f"marked as stale: {shown(path)}")
    unmarked, files = set(results.stale_files(place)), sorted(place.glob("*.json"))
    for path in files:
        typer.echo(f"{shown(path.name)}: {_state(path, path in unmarked)}")
    if not files:
        typer.echo(f"no results in {shown(place)}")


def _results_folder(folder: Path | None) -> Path:
    if folder is None and not RESULTS.is_dir():
        raise FileFormatError(
            f"there is no folder {RESULTS} here; results are stored in a checkout of layercache: run this in one, or "
            "name a folder of results"
        )
    return folder or RESULTS


def _state(path: Path, is_stale: bool) -> str:
    from layercache._utils.formats import what_is
    from layercache.tools.bench import results

    data = results.read_result(path)
    if data is None:
        return f"no result, it {what_is(path)}"
    if data.get("kernel_hash") is None:
        return "of no kernel"
    return "stale" if is_stale or data.get("stale") else "current"
