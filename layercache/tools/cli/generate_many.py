"""``layercache generate --prompts-file``: a folder of pictures or videos that goes on where it was stopped."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from layercache._utils.files import check_output_folder
from layercache._utils.processes import HOSTED, leads
from layercache._utils.text import shown
from layercache.errors import LayerCacheError
from layercache.tools.cli.common import Printer, check_outputs, read_prompts, when_stopped
from layercache.tools.cli.files import load_schedule
from layercache.tools.cli.options import CallOptions, ModelOptions, words_of
from layercache.tools.cli.pipelines import call_arguments, figures_of_call, folded, load_pipeline, report_tables
from layercache.tools.cli.results import VIDEO_ENDINGS
from layercache.tools.cli.workers import WorkerOptions, crew_for

if TYPE_CHECKING:
    from layercache.tools.batch.entries import Entry
    from layercache.tools.batch.run import Batch

FOLDER = Path("pictures")
SHOWN_FAILURES = 5


@dataclass(frozen=True)
class ManyPrompts:
    """What the command was given."""

    file: Path
    model: ModelOptions
    call: CallOptions
    workers: WorkerOptions
    schedule: Path | None
    seed: int
    steps: int | None
    output: Path | None
    compare: bool
    json_to: str | None
    fold_timesteps: bool

    @property
    def folder(self) -> Path:
        return self.output or FOLDER


def check_one(workers: WorkerOptions) -> None:
    """Refuses options of several processes for a single picture."""
    if given := words_of(workers):
        raise typer.BadParameter(
            "one picture is made by one process; give --prompts-file with it.", param_hint=given[0].partition("=")[0]
        )


def draw_many(given: ManyPrompts, default_steps: int) -> None:
    """Makes what is not there yet of all prompts, and says what there is; exit code 1 where any failed."""
    from layercache.tools.batch.manifest import NAME, forget_changed

    _check(given)
    entries = read_prompts(None, given.file, given.seed)
    plan = load_schedule(given.schedule) if given.schedule is not None else None
    steps = given.steps or (plan.num_steps if plan is not None else default_steps)
    if leads() and not os.environ.get(HOSTED):  # else the process that started this one has, where the files are
        forget_changed(given.folder, entries)
    crew = crew_for(given.workers, len(entries), files=[given.folder / NAME])
    pictures_follow = any(entry.inputs() for entry in entries)
    pipe = load_pipeline(given.model, given.call, pictures_follow)
    call = {"num_inference_steps": steps, **call_arguments(pipe, given.call, pictures_follow)}
    settings = {"model": given.model.model, "schedule": given.schedule and given.schedule.name}
    about = {"settings": settings | figures_of_call(call, given.call)}

    from layercache.tools.batch.run import generate_all

    stopped = f"Stopped. What was made is in {shown(given.folder)}; the same command goes on with the rest."
    first = _call_of(entries[0]) if given.fold_timesteps else {}
    with when_stopped(stopped), folded(pipe, given.fold_timesteps, call | first) as tables:
        batch = generate_all(
            pipe,
            entries,
            given.folder,
            call,
            schedule=plan,
            compare=given.compare,
            frame_rate=given.call.frame_rate,
            about=about,
            crew=crew,
            look=False,
        )
    printer = Printer(given.json_to)
    _report(printer, batch, about["settings"] | report_tables(printer, tables))
    if batch.failures:
        raise typer.Exit(1)


def _check(given: ManyPrompts) -> None:
    """Names and places of what is to be written, and the packages that are needed for it."""
    from PIL import Image

    folder = given.folder
    if not folder.is_dir() and folder.suffix.lower() in {*VIDEO_ENDINGS, *Image.registered_extensions()}:
        raise typer.BadParameter(
            f"{shown(folder)} is the name of one file; the pictures of a --prompts-file go into a folder.",
            param_hint="--output",
        )
    if leads():
        check_output_folder(folder, "output")
    check_outputs({"json_to": given.json_to}, [given.schedule, given.file])
    if given.compare:
        from layercache._utils import metrics

        metrics.check_installed()


def _call_of(entry: Entry) -> dict[str, Any]:
    """The arguments of the prompt whose first forward says what can be folded."""
    try:
        return entry.call()
    except OSError as error:
        raise LayerCacheError(f"the first prompt's picture cannot be read: {error}", argument="prompts_file") from error


def _report(printer: Printer, batch: Batch, settings: dict[str, Any]) -> None:
    from layercache._utils.metrics import summarise
    from layercache.tools.report.machine import machine_info

    there, rate = batch.count - len(batch.failures), batch.made / max(batch.seconds, 1e-9)
    now = f"{batch.made} made now in {batch.seconds:.1f} s, {rate:.3g} per second" if batch.made else "none made now"
    printer.say(f"pictures: {shown(batch.folder)} ({there} of {batch.count}; {now})")
    printer.say(f"manifest: {shown(batch.manifest)}")
    psnr = summarise(batch.psnr) if batch.psnr else None
    if batch.used is not None:
        printer.say(f"computed: {batch.used:.1%} of the block time")
    if psnr is not None:
        printer.say(f"PSNR: {psnr.mean:.2f} dB, worst tenth {psnr.quantile10:.2f} dB, of {psnr.count} pictures")
    for name, values in batch.by_category.items():
        own = summarise(values)
        printer.say(shown(f"  {name}: {own.mean:.2f} dB, worst tenth {own.quantile10:.2f} dB, of {own.count}"))
    if batch.failures:
        printer.say(f"{len(batch.failures)} failed; the same command tries them again:", style="red")
        for number, error in list(batch.failures.items())[:SHOWN_FAILURES]:
            printer.say(f"  {number}: {error}")
        if len(batch.failures) > SHOWN_FAILURES:
            printer.say(f"  and {len(batch.failures) - SHOWN_FAILURES} more, in the manifest")
    figures = {"kind": "generations", **settings, **asdict(batch), "psnr": psnr and asdict(psnr)}
    printer.figures(figures | {"machine": machine_info()})
