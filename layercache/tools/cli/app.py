"""The command line: ``layercache demo | calibrate | plan | generate | compare | train-router | show | doctor | bench``.

Nothing heavy is imported here, so that help and mistakes in the arguments are answered at once.
"""

from __future__ import annotations

import inspect
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from layercache import __version__
from layercache.errors import BudgetError, LayerCacheError, UnsupportedModelError
from layercache.tools.cli import bench
from layercache.tools.cli.messages import in_options

if TYPE_CHECKING:
    import numpy as np

    from layercache.planning.front import Front
    from layercache.planning.profile import StabilityProfile
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.schedule.schedule import Schedule

    Content = Schedule | ModuleSchedule | StabilityProfile | Front

DEMO_SAMPLES = 3
PIPE_WIDTH = 120
_TYPED = "layercache.typed"  # in the context: the command and what was typed behind it


class Commands(TyperGroup):
    """Says what went wrong in a sentence instead of a traceback (which ``LAYERCACHE_DEBUG=1`` brings back)."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        ctx.meta[_TYPED] = command, list(rest)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `| head` has seen enough; the framework ends quietly
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (LayerCacheError, OSError) as error:
            if os.environ.get("LAYERCACHE_DEBUG") == "1":
                raise
            console = Console(stderr=True, markup=False, highlight=False)
            console.print(_sentence(error, *ctx.meta.get(_TYPED, ())), style="red", soft_wrap=True)
            raise typer.Exit(1) from None


def _sentence(error: Exception, command: Any = None, typed: Sequence[str] = ()) -> str:
    """The message, by the options of the command that was given; an error of the system names none."""
    text = str(error)
    if command is not None and isinstance(error, LayerCacheError):
        parts = [part for word in typed for part in (word, *word.split("=")[1:])]
        text = in_options(text, _options(command), parts, _every_option())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = text.strip() or type(error).__name__
    return f"Error: {text}" if text.endswith((".", "!", "?")) else f"Error: {text}."


def _options(command: Any) -> dict[str, str]:
    """Of a command, by the name of the parameter; the long form."""
    longest = {one.name: max(one.opts, key=len) for one in command.params if one.param_type_name == "option"}
    return {name: option for name, option in longest.items() if option.startswith("--")}


def _every_option() -> set[str]:
    """Names of the parameters of all commands."""
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    return {name for command in commands for name in _options(command)}


app = typer.Typer(
    name="layercache",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Faster picture generation: layercache computes a transformer's layer groups only at the steps that need it.

    Start with `layercache demo`: it runs on any machine and downloads nothing.

    For your own model: `calibrate` measures it once, `plan` turns the measurement into a schedule for
    the speed you want, `generate` draws with that schedule, `compare` runs every method beside it.
    `show` explains a file, `doctor` your installation, `bench` measures the ops.
    """,
    epilog="Set LAYERCACHE_DEBUG=1 to see the traceback of an error.",
)


app.add_typer(bench.app, name="bench", cls=Commands)


class Dtype(str, Enum):
    """Number formats a model can be loaded in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Partition(str, Enum):
    """Ways to cut the blocks into groups."""

    thirds = "thirds"
    sixth = "sixth"
    measured = "measured"
    whole = "whole"


class Method(str, Enum):
    """Solvers."""

    best = "best"
    exact = "exact"
    lagrangian = "lagrangian"
    removal = "removal"
    addition = "addition"


class Sensitivity(str, Enum):
    """How the sensitivity of a group is measured."""

    substitution = "substitution"
    random = "random"


class ForecastKind(str, Enum):
    """What the residual of a cached group is taken to be."""

    secant = "secant"
    fitted = "fitted"
    newton = "newton"
    taylor = "taylor"
    hold = "hold"


def _share(value: float | None) -> float | None:
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value:g} is not a share of the block time above 0 and at most 1, such as 0.6.")
    return value


Model = Annotated[
    str,
    typer.Option(
        help="'demo' for the bundled model, a Hugging Face model id, a folder with a pipeline, or a .json file that "
        "describes one with random weights (examples/tiny_flux.json)."
    ),
]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cuda or cpu; a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of the model ('demo' is always float32).")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own default if left out.")]
Height = Annotated[int | None, typer.Option(min=1, help="Height in pixels.")]
Width = Annotated[int | None, typer.Option(min=1, help="Width in pixels.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON; '-' prints them and only them.")
]


class Printer:
    """Text for people, and figures as JSON where they were asked for."""

    def __init__(self, json_to: str | None):
        self.json_to = json_to
        self.console = Console(stderr=json_to == "-", markup=False, highlight=False)
        if not self.console.is_terminal:
            # into a file or a pipe, tables keep their columns
            self.console = Console(stderr=json_to == "-", markup=False, highlight=False, width=PIPE_WIDTH)

    def say(self, *parts: Any, style: str | None = None) -> None:
        for part in parts:
            self.console.print(part, style=style)

    def figures(self, data: Any) -> None:
        from layercache.tools.report.machine import print_json, write_json

        if self.json_to == "-":
            print_json(data)
        elif self.json_to is not None:
            self.say(f"figures: {write_json(self.json_to, data)}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layercache {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


# --- demo --------------------------------------------------------------------------------------------------


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures and figures.")] = Path(
        "demo-output"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Only 10 steps and 4 pictures.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    budget: Annotated[
        float, typer.Option(callback=_share, help="Share of the block time that may be computed, above 0 to 1.")
    ] = 0.6,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures to compare.")] = 24,
    device: Device = None,
    json_to: Json = None,
) -> None:
    """See what caching does to speed and pictures, on a small model that comes along.

    It generates the same pictures in full, with LayerCache as planned and as searched, and with whole-step reuse at
    the same budget, prints speed and similarity, and saves pictures to look at. Two minutes on two CPU cores.

    Example: `layercache demo --budget 0.5`
    """
    from layercache.tools.demo import run_demo

    printer = Printer(json_to)
    pipe = _load_pipeline("demo", device, Dtype.float32)
    result = run_demo(output, steps=steps, budget=budget, seeds=seeds, quick=quick, console=printer.console, pipe=pipe)
    printer.say(result)
    printer.figures(result.figures)


# --- calibrate ---------------------------------------------------------------------------------------------


@app.command()
def calibrate(
    model: Model = "demo",
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file with one prompt per line.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Generations to measure, prompts in turn; one per prompt if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample, the others follow.")] = 0,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps you will generate with.")] = 30,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    partition: Annotated[Partition, typer.Option(help="How to cut the blocks into groups.")] = Partition.thirds,
    groups: Annotated[int, typer.Option(min=1, help="Number of groups of the 'measured' partition.")] = 3,
    sensitivity: Annotated[
        Sensitivity | None, typer.Option(help="Also measure what a group's error does to the result (twice the time).")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write.")] = Path("profile.safetensors"),
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Measure a model once: how much each group of layers changes from step to step, and what it costs.

    Use the steps, size and guidance you will generate with; a schedule holds for these only.
    Three prompts are enough to begin with.

    Example: `layercache calibrate --model Qwen/Qwen-Image --steps 50 --guidance 4 -p "a red fox" -p "an old map"
    -p "a city at night" -o qwen.safetensors`
    """
    import layercache
    from layercache.tools.report import tables

    printer = Printer(json_to)
    prompts: list[Any] = [*(prompt or []), *_read_prompts(prompts_file)]
    if not prompts and model != "demo":
        raise typer.BadParameter("give at least one --prompt, or a --prompts-file.")
    pipe = _load_pipeline(model, device, dtype)
    if not prompts:
        # one sample of the demo model is a picture of every class
        prompts, samples = [_demo_classes()], samples or DEMO_SAMPLES
    _check_demo_prompts(pipe, prompts)
    count = samples or len(prompts)
    with _pipeline_complaints():
        profile = layercache.calibrate(
            pipe,
            [prompts[k % len(prompts)] for k in range(count)],
            seeds=range(seed, seed + count),
            num_inference_steps=steps,
            partition=partition.value,
            num_groups=groups,
            sensitivity=sensitivity.value if sensitivity else None,
            **_call_arguments(pipe, guidance, height, width),
        )
    profile.save(output)
    printer.say(tables.profile_sentences(profile), f"profile: {output}")
    printer.say(f"next: layercache plan {output} --budget 0.6", style="dim")
    printer.figures(tables.profile_figures(profile))


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return []
    from layercache._utils.formats import what_is

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise _no_prompts(f"{path} {what_is(path)}") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise _no_prompts(f"{path} holds no prompt")
    return prompts


def _no_prompts(what: str) -> typer.BadParameter:
    hint = "a text file (UTF-8) with one prompt per line is expected."
    return typer.BadParameter(f"{what}; {hint}", param_hint="--prompts-file")


def _demo_classes() -> list[str]:
    from layercache.demo.model import CLASS_NAMES

    return list(CLASS_NAMES)


def _check_demo_prompts(pipe: Any, prompts: Sequence[Any]) -> None:
    """The demo model knows classes, not prompts; say so before anything runs."""
    if not _is_demo(pipe):
        return
    try:
        for prompt in prompts:
            pipe.class_ids(prompt)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None


# --- plan --------------------------------------------------------------------------------------------------


@app.command()
def plan(
    profile: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A profile from 'calibrate', or a front from --pareto.")
    ],
    budget: Annotated[
        float | None, typer.Option(callback=_share, help="Share of the block time that may be computed, above 0 to 1.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(min=1.0, help="Instead of a budget: how many times faster the steps should be.")
    ] = None,
    full_steps: Annotated[
        float | None, typer.Option(min=0.0, help="Instead of a budget: the compute of so many full steps.")
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="Instead of a budget, from a front: the mean PSNR to reach with least compute.")
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Run candidates on the model and keep the best for every budget (minutes)."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="What to write: schedule.json, with --pareto front.json.")
    ] = None,
    spans: Annotated[
        str, typer.Option(help="Spans K a forecast may use, such as '1,2,3'; 'none' for plain reuse.")
    ] = "1,2,3,4,5,6",
    history: Annotated[int, typer.Option(min=1, help="Computed steps whose residuals are kept in memory.")] = 3,
    max_run: Annotated[int, typer.Option(min=1, help="Longest run of steps a group may go without computing.")] = 8,
    protect_first: Annotated[int | None, typer.Option(min=0, help="First steps that are always computed.")] = None,
    protect_last: Annotated[int | None, typer.Option(min=0, help="Last steps that are always computed.")] = None,
    tau: Annotated[float, typer.Option(min=0.0, help="Gain over plain reuse from which on a forecast is used.")] = 0.05,
    gamma: Annotated[float, typer.Option(min=0.0, help="Above 1, single large errors weigh more.")] = 1.0,
    kappa: Annotated[float, typer.Option(min=0.0, help="Standard deviations added to the mean error.")] = 0.0,
    method: Annotated[Method, typer.Option(help="Which solver.")] = Method.best,
    forecast: Annotated[ForecastKind, typer.Option(help="What cached groups are given.")] = ForecastKind.secant,
    order: Annotated[int, typer.Option(min=0, help="Residuals more than one that a forecast combines.")] = 1,
    model: Annotated[str, typer.Option(help="--pareto: the model, as for 'calibrate'.")] = "demo",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="--pareto: a prompt to fit to; may be repeated.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="--pareto: a text file with one prompt per line.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="--pareto: pictures to fit to, prompts in turn.")] = 16,
    validation: Annotated[
        int, typer.Option(min=0, help="--pareto: further pictures, with other seeds, to judge the result by.")
    ] = 16,
    budgets: Annotated[str, typer.Option(help="--pareto: budgets to search at.")] = "0.75,0.6,0.5,0.4,0.33,0.25",
    trials: Annotated[int, typer.Option(min=0, help="--pareto: exchanges of steps to try per budget.")] = 40,
    time_limit: Annotated[
        float | None, typer.Option(min=0.0, help="--pareto: seconds after which no further exchange is tried.")
    ] = None,
    max_cache_mb: Annotated[float | None, typer.Option(min=0.0, help="Store no more than so many MB.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="--pareto: seed of the first picture, the others follow.")] = 1000,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Turn a profile into a schedule for the budget or the speedup you want.

    A budget of 0.6 computes at most 60 % of the block time; a smaller one is faster and further from the
    full picture. From a profile this takes less than a second, so try several.

    With --pareto candidates are run on the model, and their forecasts fitted to what they miss: many decibels better,
    but it takes minutes. It writes a front, from which 'plan' then picks a schedule at once, and beside it the front
    as a plot (.png) and a page (.html).

    Examples: `layercache plan qwen.safetensors --budget 0.6 -o qwen-60.json`

    `layercache plan qwen.safetensors --pareto --model Qwen/Qwen-Image --guidance 4 --prompts-file prompts.txt
    -o front.json`, then `layercache plan front.json --budget 0.5`
    """
    import layercache
    from layercache.tools.report import tables

    printer = Printer(json_to)
    conditions = sum(value is not None for value in (budget, speedup, full_steps, min_psnr))
    if pareto:
        if conditions:
            raise typer.BadParameter("--pareto searches all --budgets; pick one from the front afterwards.")
        prompts = [*(prompt or []), *_read_prompts(prompts_file)]
        settings = _SearchSettings(samples, validation, _parse_shares(budgets), trials, time_limit, max_cache_mb, seed)
        measured = layercache.StabilityProfile.load(profile)
        pipe = _load_pipeline(model, device, dtype)
        call = _call_arguments(pipe, guidance, height, width)
        _plan_front(printer, measured, pipe, prompts, settings, call, output or Path("front.json"))
        return
    if conditions != 1:
        raise typer.BadParameter(
            "give either --budget, --speedup, --full-steps or, from a front, --min-psnr; or --pareto."
        )
    chosen_spans = _parse_spans(spans)
    source = _load_source(profile)
    schedule = layercache.plan(
        source,
        budget,
        speedup=speedup,
        full_steps=full_steps,
        min_psnr=min_psnr,
        max_cache_bytes=_bytes(max_cache_mb),
        spans=chosen_spans,
        history=history,
        max_run=max_run,
        protect_first=protect_first,
        protect_last=protect_last,
        tau=tau,
        gamma=gamma,
        kappa=kappa,
        method=method.value,
        forecast=forecast.value,
        order=order,
    )
    output = output or Path("schedule.json")
    schedule.save(output)
    printer.say(tables.schedule_sentences(schedule), *_memory_line(source, schedule), f"schedule: {output}")
    printer.say(f"next: layercache generate --schedule {output} --prompt ... --compare", style="dim")
    printer.figures(tables.schedule_figures(schedule))


def _bytes(megabytes: float | None) -> int | None:
    return None if megabytes is None or megabytes == float("inf") else int(megabytes * 1e6)


def _memory_line(source: StabilityProfile | Front, schedule: Schedule) -> list[str]:
    """What the schedule will store, where that is known."""
    from layercache.planning.profile import StabilityProfile

    if not isinstance(source, StabilityProfile) or not source.stream_bytes:
        return []
    size = source.cache_bytes(schedule) / 1e6
    return [f"It stores {size:.1f} MB of residuals for a batch as large as the calibration's."]


@dataclass(frozen=True)
class _SearchSettings:
    samples: int
    validation: int
    budgets: tuple[float, ...]
    trials: int
    time_limit: float | None
    max_cache_mb: float | None
    seed: int


def _plan_front(
    printer: Printer,
    profile: StabilityProfile,
    pipe: Any,
    prompts: list[Any],
    settings: _SearchSettings,
    call: dict[str, Any],
    output: Path,
) -> None:
    import layercache
    from layercache.tools.report import plots
    from layercache.tools.report.front import front_table, order_sentence, rows_of, save_front_page, save_front_plot

    plots.check_installed()
    prompts = prompts or _demo_prompts(pipe)
    _check_demo_prompts(pipe, prompts)

    def chosen(count: int) -> list[Any]:
        names = [prompts[k % len(prompts)] for k in range(count)]
        return [names] if _is_demo(pipe) else names

    first, last = settings.seed, settings.seed + settings.samples
    held_out = (chosen(settings.validation), range(last, last + settings.validation)) if settings.validation else None
    with _pipeline_complaints():
        front = layercache.search(
            pipe,
            chosen(settings.samples),
            seeds=range(first, last),
            profiles=profile,
            validation=held_out,
            budgets=settings.budgets,
            trials=settings.trials,
            time_limit=settings.time_limit,
            max_cache_bytes=_bytes(settings.max_cache_mb),
            resume=output.with_suffix(".journal.json"),
            num_inference_steps=profile.fingerprint.num_steps,
            **call,
        )
    if not front.points:
        raise BudgetError("no schedule keeps to these --budgets and --max-cache-mb; allow more of either")
    rows = rows_of(front)
    title = f"{profile.fingerprint.model_class}, {profile.fingerprint.num_steps} steps"
    front.save(output)
    save_front_plot(output.with_suffix(".png"), rows, title)
    page = save_front_page(output.with_suffix(".html"), rows, title)
    told = [order_sentence(rows)] if len(rows) > 1 else []
    printer.say(front_table(rows, title), *told, *front.notes, f"front: {output}", f"page: {page}")
    printer.say(f"next: layercache plan {output} --budget {front.points[0].used:.2f}", style="dim")
    printer.figures({"kind": "front", "runs": front.tried, "points": [row.to_json() for row in rows]})


def _is_demo(pipe: Any) -> bool:
    from layercache.demo.pipeline import DemoPipeline

    return isinstance(pipe, DemoPipeline)


def _demo_prompts(pipe: Any) -> list[Any]:
    if not _is_demo(pipe):
        raise typer.BadParameter("give at least one --prompt, or a --prompts-file.")
    return _demo_classes()


def _parse_shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = (0.0,)
    if not all(0 < share <= 1 for share in shares):
        raise typer.BadParameter(f"--budgets takes shares above 0 and at most 1 such as '0.6,0.5'; got {text!r}.")
    return shares


def _parse_spans(text: str) -> tuple[int, ...]:
    if text.strip().lower() in ("", "none"):
        return ()
    try:
        spans = tuple(int(part) for part in text.split(","))
    except ValueError:
        spans = (0,)
    if min(spans) < 1:
        raise typer.BadParameter(f"--spans takes positive numbers such as '1,2,3', or 'none'; got {text!r}.")
    return spans


# --- generate ----------------------------------------------------------------------------------------------


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")],
    model: Model = "demo",
    schedule: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A schedule from 'plan' or 'train-router'; nothing is cached without."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the starting noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; those of the schedule if left out, 30 without one.")
    ] = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")] = Path("picture.png"),
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also draw without a cache; print PSNR, SSIM and times; save both."),
    ] = False,
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Draw a picture with a schedule.

    Example: `layercache generate --model Qwen/Qwen-Image --guidance 4 --schedule qwen-60.json
    -p "a red fox" -o fox.png --compare`
    """
    if compare and schedule is None:
        raise typer.BadParameter("--compare needs a --schedule to compare with the full run.")
    _check_picture_name(output)
    if compare:
        _check_extras()
    from layercache.tools.report.machine import machine_info

    printer = Printer(json_to)
    plan = _load_schedule(schedule) if schedule is not None else None
    steps = steps or (plan.num_steps if plan is not None else 30)
    pipe = _load_pipeline(model, device, dtype)
    _check_demo_prompts(pipe, [prompt])
    call = {"prompt": prompt, "num_inference_steps": steps, **_call_arguments(pipe, guidance, height, width)}
    figures: dict[str, Any] = {"kind": "generation", "model": model, "seed": seed, **call}
    with _pipeline_complaints():
        if compare:
            # once more beforehand: the first run of a process also pays for kernels being built and memory found
            _draw(pipe, call, seed, plan, "warm-up")
        picture, seconds, cache = _draw(pipe, call, seed, plan, "drawing")
        full = _draw(pipe, call, seed, None, "full run") if compare else None
    _save_picture(picture, output)
    figures |= {"seconds": seconds, "picture": output, "cache": asdict(cache) if cache is not None else None}
    printer.say(f"picture: {output} ({seconds:.2f} s)")
    if cache is not None:
        printer.say(str(cache))
        if full is not None:
            figures["comparison"] = _compare(printer, picture, seconds, full, cache.used, output)
    printer.figures(figures | {"machine": machine_info()})


def _draw(
    pipe: Any, call: dict[str, Any], seed: int, plan: Schedule | ModuleSchedule | None, label: str
) -> tuple[np.ndarray, float, Any]:
    """The picture ``[H, W, 3]`` in 0..1, its seconds, and the report of the cache."""
    import torch

    import layercache

    pipe.set_progress_bar_config(desc=label)
    generator = torch.Generator("cpu").manual_seed(seed)
    with layercache.enabled(pipe, plan) if plan is not None else nullcontext() as cache:
        start = time.perf_counter()
        # pictures arrive in host memory, so nothing is left running when the call returns
        picture = pipe(generator=generator, output_type="np", **call).images[0]
        seconds = time.perf_counter() - start
        return picture, seconds, cache.report() if cache is not None else None


def _compare(
    printer: Printer,
    picture: np.ndarray,
    seconds: float,
    full: tuple[np.ndarray, float, Any],
    used: float,
    output: Path,
) -> dict[str, Any]:
    from layercache._utils import metrics
    from layercache.tools.report import plots, tables

    reference, full_seconds, _ = full
    psnr, ssim = metrics.psnr(reference, picture), metrics.ssim(reference, picture)
    measured = [
        tables.Measured("full", 1.0, full_seconds),
        tables.Measured("cached", used, seconds, tuple(psnr), tuple(ssim)),
    ]
    beside = output.with_name(f"{output.stem}-comparison.png")
    gain = f"|difference| x{plots.DIFFERENCE_GAIN:g}"
    panels = [reference, picture, plots.difference(reference, picture)[0]]
    titles = ["full", f"cached, {psnr[0]:.1f} dB", gain]
    plots.save_pictures(beside, [plots.PictureRow("", panels)], titles, smallest=256)
    printer.say(tables.comparison_table(measured), f"comparison: {beside}")
    return {"file": beside, "runs": [row.to_json(full_seconds) for row in measured]}


def _save_picture(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    from layercache._utils.files import write_atomically

    image = Image.fromarray((picture * 255).round().astype("uint8"))
    write_atomically(path, lambda temporary: image.save(temporary))


def _check_picture_name(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise typer.BadParameter(f"{path} does not end like a picture; use .png.", param_hint="--output")


def _check_extras() -> None:
    """Says what is missing before the long part, not after it."""
    from layercache._utils import metrics
    from layercache.tools.report import plots

    metrics.check_installed()
    plots.check_installed()


# --- train-router ------------------------------------------------------------------------------------------


@app.command("train-router")
def train_router(
    model: Model = "demo",
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file with one prompt per line.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Generations to learn from.")] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per generation.")] = 4,
    penalty: Annotated[float, typer.Option(min=0, help="Weight of computing, beside the error.")] = 1e-4,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 0.1,
    shifted: Annotated[
        bool, typer.Option("--shifted", help="Cache the points of the outer grid of single-step DPM-Solver-2.")
    ] = False,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Modules with a larger beta are computed.")] = 0.1,
    budget: Annotated[
        float | None, typer.Option(callback=_share, help="Instead of a threshold: share of the modules' time.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps you will generate with.")] = 30,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The schedule to write.")] = Path("router.json"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="File kept after every round; OUTPUT.pt if left out. Training goes on from it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the loss curve, as PNG.")] = None,
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Train a Learning-to-Cache router: which modules can be left out at every second step.

    It learns from the model's own generations; the model is not changed. A training that was stopped goes on when the
    same command is given again.

    Example: `layercache train-router --rounds 40 --budget 0.7 -o router.json`
    """
    from layercache.methods import l2c
    from layercache.tools.report import plots

    printer = Printer(json_to)
    if plot is not None:
        plots.check_installed()
        _check_picture_name(plot)
    prompts: list[str] = [*(prompt or []), *_read_prompts(prompts_file)]
    if not prompts and model != "demo":
        raise typer.BadParameter("give at least one --prompt, or a --prompts-file.", param_hint="--prompt")
    settings = l2c.LearningToCache(penalty, learning_rate, rounds, shifted=shifted)
    pipe = _load_pipeline(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts or _demo_classes()
    _check_demo_prompts(pipe, prompts)
    given = 4.0 if guidance is None and model == "demo" else guidance
    call = {"num_inference_steps": steps, **_call_arguments(pipe, given, height, width)}
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        call["output_type"] = "latent"
    samples = [[prompts[(k + j) % len(prompts)] for j in range(batch)] for k in range(0, len(prompts), batch)]
    kept = checkpoint or output.with_suffix(".pt")
    with _pipeline_complaints():
        router = settings.train(pipe, samples, kept, printer.console.is_terminal, **call)
    schedule = router.schedule(budget=budget) if budget is not None else router.schedule(threshold)
    files = {"schedule": schedule.save(output), "checkpoint": kept}
    if plot is not None:
        files["loss curve"] = plots.save_losses(plot, router.losses, len(router.units))
    first, last = router.losses[0], router.losses[-1]
    printer.say(
        f"squared error {first[0]:.3g} in the first round, {last[0]:.3g} in the last; "
        f"{last[1]:.1f} of {len(router.units)} modules in use at a cache step",
        f"the schedule computes {schedule.used:.1%} of the modules' time",
        *(f"{name}: {path}" for name, path in files.items()),
    )
    printer.figures({"losses": router.losses, "used": schedule.used, "beta": router.beta.tolist()})


# --- compare -----------------------------------------------------------------------------------------------


@app.command()
def compare(
    model: Model = "demo",
    methods: Annotated[
        str, typer.Option(help="Names with commas between them; 'ours', 'peers' or 'all' for all of a kind.")
    ] = "all",
    budgets: Annotated[str, typer.Option(help="Shares of the block time, with commas between them.")] = "0.75,0.5,0.33",
    seeds: Annotated[int, typer.Option(min=1, help="Pictures to compare.")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per call.")] = 4,
    calibration: Annotated[int, typer.Option(min=1, help="Pictures to fit and tune on, with other seeds.")] = 8,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A text file with one prompt per line.")
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Denoising steps.")] = 30,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    trials: Annotated[int, typer.Option(min=0, help="Exchanges of LayerCache's search, per budget.")] = 12,
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder; a comparison in it goes on.")
    ] = Path("comparison"),
    device: Device = None,
    dtype: DtypeOption = Dtype.bfloat16,
    json_to: Json = None,
) -> None:
    """Compare every caching method, and the caches of other packages, on one model, the same seeds and budgets.

    Thresholds are tuned on calibration pictures so that every method comes as close to each budget as it can; PSNR and
    SSIM are of other seeds. Given again with the same folder, it goes on where it was stopped.

    Example: `layercache compare --methods layercache,meancache,fbcache,diffusers:fbcache --budgets 0.6,0.4`
    """
    from layercache.tools.compare.entries import METHODS, PEERS, CalibratedModel, check_methods
    from layercache.tools.compare.report import comparison_table, failures, save_comparison
    from layercache.tools.compare.run import Comparison
    from layercache.tools.report import plots

    printer = Printer(json_to)
    plots.check_installed()
    kinds = {"ours": list(METHODS), "peers": list(PEERS), "all": [*METHODS, *PEERS]}
    names = kinds.get(methods) or [name.strip() for name in methods.split(",") if name.strip()]
    check_methods(names)
    shares = _parse_shares(budgets)
    prompts: list[str] = [*(prompt or []), *_read_prompts(prompts_file)]
    if not prompts and model != "demo":
        raise typer.BadParameter("give at least one --prompt, or a --prompts-file.", param_hint="--prompt")
    pipe = _load_pipeline(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts or _demo_classes()
    _check_demo_prompts(pipe, prompts)
    given = 4.0 if guidance is None and model == "demo" else guidance
    call = {"num_inference_steps": steps, **_call_arguments(pipe, given, height, width)}

    def batches(first: int, count: int) -> list[list[str]]:
        chosen = [prompts[k % len(prompts)] for k in range(first, first + count)]
        return [chosen[lo : lo + batch] for lo in range(0, count, batch)]

    output.mkdir(parents=True, exist_ok=True)
    calibrated = CalibratedModel(
        pipe,
        batches(seeds, calibration),
        list(range(seeds, seeds + calibration)),
        call,
        shares,
        trials,
        output / "search.journal.json",
    )
    with _pipeline_complaints(), printer.console.status("comparing") as status:
        comparison = Comparison(calibrated, batches(0, seeds), list(range(seeds)), output)
        outcomes = comparison.run(names, lambda text: status.update(text))
    title = f"{model}, {steps} steps, {seeds} pictures"
    shown = [name for one in batches(0, min(seeds, 8)) for name in one]
    files = save_comparison(comparison, outcomes, [textwrap.shorten(name, 16) for name in shown], title)
    printer.say(comparison_table(outcomes, title, printer.console.width), *failures(outcomes), "")
    printer.say(*(f"{name}: {path}" for name, path in files.items()))
    printer.figures({"outcomes": [asdict(outcome) for outcome in outcomes]})


# --- show and doctor ---------------------------------------------------------------------------------------


@app.command()
def show(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A schedule, a profile or a front.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw it, as a PNG.")] = None,
    json_to: Json = None,
) -> None:
    """Explain a schedule or a profile in words and as a table of steps by groups; a front as a table of schedules.

    Example: `layercache show schedule.json --plot schedule.png`
    """
    printer = Printer(json_to)
    content = _load(file)
    parts, legend, figures = _explain(content)
    if plot is not None:
        _plot(plot, file.name, content)
    printer.say(*parts)
    printer.say(legend, style="dim")
    if plot is not None:
        printer.say(f"plot: {plot}")
    printer.figures(figures)


def _explain(content: Content) -> tuple[tuple[Any, ...], str, dict[str, Any]]:
    """What to print, what its marks mean, and the figures."""
    from layercache.planning.front import Front
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.schedule.schedule import Schedule
    from layercache.tools.report import tables

    if isinstance(content, Front):
        return _explain_front(content)
    if isinstance(content, ModuleSchedule):
        parts = (tables.module_sentences(content), "", tables.module_table(content), "")
        return (
            parts,
            "Modules that are computed, of each kind; the others take their last output.",
            {
                "kind": "module schedule",
                "used": content.used,
                "reused_steps": sorted(content.reused_steps),
                "made_by": dict(content.made_by),
            },
        )
    if isinstance(content, Schedule):
        parts = (tables.schedule_sentences(content), "", tables.schedule_table(content), "")
        return parts, tables.schedule_legend(content), tables.schedule_figures(content)
    parts = (tables.profile_sentences(content), "", tables.profile_table(content), "")
    return parts, tables.profile_legend(content), tables.profile_figures(content)


def _explain_front(front: Front) -> tuple[tuple[Any, ...], str, dict[str, Any]]:
    from layercache.tools.report.front import front_table, order_sentence, rows_of

    rows = rows_of(front)
    figures = {"kind": "front", "notes": list(front.notes), "points": [row.to_json() for row in rows]}
    legend = f"{order_sentence(rows)} 'layercache plan' takes one out by --budget and the like.".lstrip()
    return (front_table(rows), *front.notes), legend, figures


def _load(path: Path, *expected: str) -> Content:
    """A file of one of these formats (`layercache.reading.KINDS`); by default of any that can be shown."""
    from layercache._utils.formats import FRONT, MODULES, PROFILE, SCHEDULE, format_of, unexpected, what_is

    found, wanted = format_of(path), expected or (SCHEDULE, MODULES, PROFILE, FRONT)
    if found is None or found not in wanted:
        raise unexpected(path, what_is(path), *wanted)
    return _load_as(found, path)


def _load_as(kind: str, path: Path) -> Content:
    from layercache import Front, Schedule, StabilityProfile
    from layercache._utils.formats import FRONT, MODULES, PROFILE, SCHEDULE
    from layercache.schedule.module_schedule import ModuleSchedule

    kinds: dict[str, Any] = {SCHEDULE: Schedule, MODULES: ModuleSchedule, PROFILE: StabilityProfile, FRONT: Front}
    return kinds[kind].load(path)


def _load_source(path: Path) -> StabilityProfile | Front:
    """What a schedule can be planned from."""
    from layercache._utils.formats import FRONT, MODULES, PROFILE, SCHEDULE, format_of

    if format_of(path) in (SCHEDULE, MODULES):
        raise typer.BadParameter(f"{path} is a schedule already; give a profile, or a front.")
    return _load(path, PROFILE, FRONT)  # type: ignore[return-value]


def _load_schedule(path: Path) -> Schedule | ModuleSchedule:
    """Of groups of layers, or of single modules."""
    from layercache._utils.formats import MODULES, SCHEDULE

    return _load(path, SCHEDULE, MODULES)  # type: ignore[return-value]


def _plot(path: Path, title: str, content: Content) -> Path:
    from layercache.planning.front import Front
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.schedule.schedule import Schedule
    from layercache.tools.report import plots

    if isinstance(content, Front):
        from layercache.tools.report.front import rows_of, save_front_plot

        return save_front_plot(path, rows_of(content), title)
    if isinstance(content, ModuleSchedule):
        return plots.save_modules(path, content, f"{title}: {content.used:.1%} of the modules' time computed")
    sigmas = content.fingerprint.sigmas
    if isinstance(content, Schedule):
        title = f"{title}: {content.used:.1%} of the block time computed"
        panel = plots.MapPanel(title, content.groups, sigmas, schedule=content)
    else:
        panel = plots.MapPanel(title, content.groups, sigmas, stability=content.stability())
    return plots.save_maps(path, [panel])


@app.command()
def models(json_to: Json = None) -> None:
    """List the transformers that are known, and which methods each can take.

    Schedules of groups and steps, and FBCache, DBCache, DiCache, MagCache, MeanCache and the like run on all of them.
    TeaCache and SpectralCache watch the modulated input of the first block, InvarDiff and Learning-to-Cache cache
    single modules: where the table has a dash, the model's description does not say where those are. Another class is
    found out with `layercache.infer_model(pipe, lambda: pipe(...))`.
    """
    from layercache.tools.report.tables import model_rows, models_table

    printer = Printer(json_to)
    rows = model_rows()
    printer.say(models_table(rows))
    printer.figures({"models": rows})


@app.command()
def doctor(json_to: Json = None) -> None:
    """Check the installation: packages, compiled core, GPU, and what each operation will run on.

    Ends with exit code 0 when layercache can be used. Put its output into a bug report.

    Example: `layercache doctor --json doctor.json`
    """
    from layercache.tools.doctor import diagnose
    from layercache.tools.report.machine import machine_line

    printer = Printer(json_to)
    diagnosis = diagnose()
    printer.say(diagnosis, machine_line(diagnosis.machine))
    printer.figures(diagnosis.to_json())
    raise typer.Exit(0 if diagnosis.usable else 1)


# --- pipelines ---------------------------------------------------------------------------------------------


def choose_device(name: str | None) -> str:
    import torch

    available = torch.cuda.is_available()
    if name is None:
        return "cuda" if available else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is not a device; use cuda, cuda:1 or cpu.", param_hint="--device") from None
    if wanted.type == "cuda" and not available:
        raise typer.BadParameter("torch finds no CUDA GPU here; see layercache doctor.", param_hint="--device")
    return name


def _load_pipeline(model: str, device: str | None, dtype: Dtype) -> Any:
    import torch

    device = choose_device(device)
    try:
        if model == "demo":
            from layercache.demo.pipeline import load_demo_pipeline

            return load_demo_pipeline(device)
        if model.endswith(".json"):
            from layercache.models.random_weights import load_random_pipeline

            return load_random_pipeline(model, getattr(torch, dtype.value)).to(device)
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype.value)).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("LAYERCACHE_DEBUG") == "1":
            raise
        raise LayerCacheError(f"cannot load the model {model!r} on {device}: {_why(model, error)}") from error


def _why(model: str, error: Exception) -> str:
    """The first line of the error, except where diffusers takes the bundled model for one of the hub's."""
    if model == "demo":
        from layercache.demo.pipeline import WEIGHTS

        if not WEIGHTS.is_dir():
            return f"its weights are not in {WEIGHTS}, reinstall layercache"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _call_arguments(pipe: Any, guidance: float | None, height: int | None, width: int | None) -> dict[str, Any]:
    """Arguments of the pipeline's call, by the names this pipeline has for them."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    wanted = {"height": height, "width": width}
    if guidance is not None:
        wanted |= _guidance_arguments(pipe, accepted, guidance)
    arguments = {name: value for name, value in wanted.items() if value is not None}
    unknown = sorted(set(arguments) - set(accepted))
    if unknown:
        raise UnsupportedModelError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave the option out")
    return arguments


def _guidance_arguments(pipe: Any, accepted: Any, guidance: float) -> dict[str, Any]:
    """Distilled models embed ``guidance_scale``; ``true_cfg_scale`` is a second forward with a negative prompt."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    distilled = bool(getattr(config, "guidance_embeds", False))
    if "true_cfg_scale" not in accepted or distilled:
        return {"guidance_scale": guidance}
    arguments: dict[str, Any] = {"true_cfg_scale": guidance}
    if guidance > 1 and "negative_prompt" in accepted:
        arguments["negative_prompt"] = " "  # without one the second forward is silently left out
    return arguments


@contextmanager
def _pipeline_complaints() -> Iterator[None]:
    """A pipeline refuses sizes and prompts with ValueError, which is the caller's mistake and not a bug."""
    try:
        yield
    except LayerCacheError:
        raise
    except ValueError as error:
        if os.environ.get("LAYERCACHE_DEBUG") == "1":
            raise
        raise LayerCacheError(f"the pipeline refused its arguments: {error}") from error


def main() -> None:
    """Entry point of the ``layercache`` command."""
    app()


if __name__ == "__main__":
    main()
