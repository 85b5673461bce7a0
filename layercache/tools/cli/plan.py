"""``layercache plan``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.tools.cli.common import Budget, Json, MaxCacheBytes, Printer, check_outputs, parse_spans, save
from layercache.tools.cli.files import load_source
from layercache.tools.cli.following import generate_with

if TYPE_CHECKING:
    from layercache.planning.front import Front
    from layercache.planning.profile import StabilityProfile
    from layercache.schedule.schedule import Schedule


class Solver(str, Enum):
    """Ways to choose the cells to compute."""

    best = "best"
    exact = "exact"
    lagrangian = "lagrangian"
    removal = "removal"
    addition = "addition"


class ForecastKind(str, Enum):
    """What the residual of a cached group is taken to be."""

    secant = "secant"
    fitted = "fitted"
    newton = "newton"
    taylor = "taylor"
    hold = "hold"


Source = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="A profile from 'calibrate', or a front from 'search'.")
]
Speedup = Annotated[
    float | None, typer.Option(min=1.0, help="Instead of a budget: how many times faster the steps should be.")
]
FullSteps = Annotated[
    float | None, typer.Option(min=0.0, help="Instead of a budget: the compute of so many full steps.")
]
MinPsnr = Annotated[
    float | None, typer.Option(help="Instead of a budget, from a front: the mean PSNR to reach with least compute.")
]
Percentile = Annotated[
    float | None, typer.Option(min=0.0, max=100.0, help="What --min-psnr is asked of instead of the mean, such as 10.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The schedule to write.")]
Spans = Annotated[str, typer.Option(help="Spans K a forecast may use, such as '1,2,3'; 'none' for plain reuse.")]
History = Annotated[int, typer.Option(min=1, help="Computed steps whose residuals are kept in memory.")]
MaxRun = Annotated[int, typer.Option(min=1, help="Longest run of steps a group may go without computing.")]
ProtectFirst = Annotated[int | None, typer.Option(min=0, help="First steps that are always computed.")]
ProtectLast = Annotated[int | None, typer.Option(min=0, help="Last steps that are always computed.")]
Tau = Annotated[float, typer.Option(min=0.0, help="Gain over plain reuse from which on a forecast is used.")]
Gamma = Annotated[float, typer.Option(min=0.0, help="Above 1, single large errors weigh more.")]
Kappa = Annotated[float, typer.Option(min=0.0, help="Standard deviations added to the mean error.")]
Method = Annotated[Solver, typer.Option(help="Which solver.")]
Forecast = Annotated[ForecastKind, typer.Option(help="What cached groups are given.")]
Order = Annotated[int, typer.Option(min=0, help="Residuals more than one that a forecast combines.")]


def plan(
    profile: Source,
    budget: Budget = None,
    speedup: Speedup = None,
    full_steps: FullSteps = None,
    min_psnr: MinPsnr = None,
    percentile: Percentile = None,
    output: Output = Path("schedule.json"),
    spans: Spans = "1,2,3,4,5,6",
    history: History = 3,
    max_run: MaxRun = 8,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    tau: Tau = 0.05,
    gamma: Gamma = 1.0,
    kappa: Kappa = 0.0,
    method: Method = Solver.best,
    forecast: Forecast = ForecastKind.secant,
    order: Order = 1,
    max_cache_bytes: MaxCacheBytes = None,
    json_to: Json = None,
) -> None:
    """Turn a profile, or a front, into a schedule for the budget or the speedup you want.

    A budget of 0.6 computes at most 60 % of the block time; a smaller one is faster and further from the
    full picture. From a profile this takes less than a second, so try several.

    Example: `layercache plan qwen.safetensors --budget 0.6 -o qwen-60.json`
    """
    check_outputs({"output": output, "json_to": json_to}, [profile])
    targets = {"budget": budget, "speedup": speedup, "full_steps": full_steps, "min_psnr": min_psnr}
    if sum(value is not None for value in targets.values()) != 1:
        raise typer.BadParameter("give either --budget, --speedup, --full-steps or, from a front, --min-psnr.")
    cells = {"max_run": max_run, "protect_first": protect_first, "protect_last": protect_last, "method": method.value}
    errors = {"tau": tau, "gamma": gamma, "kappa": kappa, "forecast": forecast.value, "order": order}
    memory = {"spans": parse_spans(spans), "history": history, "max_cache_bytes": max_cache_bytes}
    settings = {**targets, **cells, **errors, **memory, "percentile": percentile}
    _write_schedule(Printer(json_to), profile, settings, output)


def _write_schedule(printer: Printer, path: Path, settings: dict[str, Any], output: Path) -> None:
    import layercache
    from layercache.tools.report import tables

    source = load_source(path)
    schedule = layercache.plan(source, **settings)
    save(output, schedule.save)
    printer.say(tables.schedule_sentences(schedule), *_memory_line(source, schedule), f"schedule: {shown(output)}")
    drawing = generate_with(output, schedule.fingerprint, "--compare")
    if drawing is not None:
        printer.following(drawing)
    else:
        printer.say("Draw with it by 'layercache generate --schedule', with the model it was made for.", style="dim")
    printer.figures(tables.schedule_figures(schedule))


def _memory_line(source: StabilityProfile | Front, schedule: Schedule) -> list[str]:
    """What the schedule will store, where that is known."""
    from layercache.planning.profile import StabilityProfile

    if not isinstance(source, StabilityProfile) or not source.stream_bytes:
        return []
    size = source.cache_bytes(schedule) / 1e6
    return [f"It stores {size:.1f} MB of residuals for a batch as large as the calibration's."]
