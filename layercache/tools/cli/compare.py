"""``layercache compare``."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.files import check_output_folder
from layercache._utils.processes import is_alone, leads
from layercache._utils.text import shown
from layercache.tools.cli.common import (
    Budgets,
    Effort,
    EffortOption,
    Json,
    Printer,
    check_outputs,
    parse_budgets,
    read_prompts,
    when_stopped,
)
from layercache.tools.cli.compare_options import (
    FigureOptions,
    PlanOptions,
    Wanted,
    methods_for,
    request_for,
    scorer_for,
    settings_for,
    wanted_of,
)
from layercache.tools.cli.finished import request_of
from layercache.tools.cli.options import CallOptions, ModelOptions, PromptOptions, with_options, words_of
from layercache.tools.cli.pipelines import (
    bring_pictures,
    gives_video,
    load_with_entries,
    quiet_call,
    refused_arguments,
)
from layercache.tools.cli.workers import WorkerOptions, crew_for

if TYPE_CHECKING:
    from layercache.parallel.crew import Crew
    from layercache.tools.batch.entries import Entry
    from layercache.tools.compare.files import ComparisonFiles
    from layercache.tools.compare.run import Comparison, Outcome
    from layercache.tools.compare.scores import Scorer
    from layercache.tools.compare.transfer_table import TransferTable

BAR = "comparing: {n} of {total} |{bar}| {elapsed}, {remaining} left{postfix}"
TRANSFER = "transfer.json"

Seeds = Annotated[int, typer.Option(min=1, help="Pictures to compare.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Pictures per call: 4, or 1 of videos and of pipelines that take pictures.")
]
Calibration = Annotated[int, typer.Option(min=1, help="Pictures to fit and tune on, with other seeds.")]
Retry = Annotated[bool, typer.Option("--retry", help="Run again what failed before, whatever the reason.")]
FourSteps = Annotated[int, typer.Option("--steps", min=4, help="Denoising steps.")]
Folder = Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Folder; a comparison in it goes on.")]


@with_options
def compare(
    model: ModelOptions,
    prompts: PromptOptions,
    call: CallOptions,
    workers: WorkerOptions,
    plans: PlanOptions,
    figures: FigureOptions,
    budgets: Budgets = "0.75,0.5,0.33",
    seeds: Seeds = 12,
    batch: Batch = None,
    calibration: Calibration = 8,
    num_inference_steps: FourSteps = 30,
    effort: EffortOption = Effort.normal,
    output: Folder = Path("comparison"),
    retry: Retry = False,
    json_to: Json = None,
) -> None:
    """Compare every caching method, and the caches of other packages, on one model, the same seeds and budgets.

    Thresholds are tuned on calibration pictures so that every method comes as close to each budget as it can; PSNR and
    SSIM are of other seeds, and by category where a --prompts-file has a column of that name. Given again with the same
    folder, it goes on where it was stopped; one that is finished loads nothing.

    Example: `layercache compare --methods layercache,meancache,fbcache,diffusers:fbcache --budgets 0.6,0.4`
    """
    check_outputs({"json_to": json_to}, [prompts.prompts_file, *(plans.schedule or ())])
    counts = {"seeds": seeds, "batch": batch, "calibration": calibration, "steps": num_inference_steps}
    entries, wanted = read_prompts(prompts.prompts, prompts.prompts_file), wanted_of(plans.transfer or ())
    request = request_of(model, call, {**counts, "effort": effort.value, **request_for(entries, wanted, figures)})
    title = f"{model.model}, {num_inference_steps} steps, {seeds} pictures"
    asked = _Asked(methods_for(plans), parse_budgets(budgets), request, wanted, output, title, retry)
    if leads():
        check_output_folder(output, "output")
    before = None if retry or not leads() else asked.found_before()
    # the processes of one command end together; of one that would start them, nothing is started
    if before is None or not is_alone():
        crew = crew_for(workers, samples=-(-seeds // batch) if batch else None, files=[output])
        before = crew.agree(before)
    if before is not None:
        return _say_again(Printer(json_to), asked, before)
    scorer = scorer_for(figures)
    pipe, found = load_with_entries(model, prompts, call)
    batch = batch or (1 if call.image or gives_video(pipe) else 4)
    _say_left_out(Printer(json_to), found, seeds)
    settings = _Settings(asked.shares, effort.value, seeds, calibration, batch, asked.base_request, scorer)
    arguments = quiet_call(pipe, num_inference_steps, call, bring_pictures(entry.arguments for entry in found))
    again = shlex.join(["layercache", "compare", *words_of(model), "-o", shown(output)])
    with when_stopped(f"Stopped. What was measured is in {shown(output)}; the same command ({again} ...) goes on."):
        _run(Printer(json_to), asked, settings.comparison(pipe, found, arguments, output, crew))


@dataclass(frozen=True)
class _Asked:
    """What was asked for."""

    methods: dict[str, Any]
    shares: tuple[float, ...]
    request: dict[str, Any]
    wanted: list[Wanted]
    folder: Path
    title: str
    retry: bool

    @property
    def base_request(self) -> dict[str, Any]:
        """Without the other settings: the comparison is the same whatever they are."""
        return {name: value for name, value in self.request.items() if name != "transfer"}

    def found_before(self) -> tuple[list[Outcome], TransferTable | None] | None:
        """A comparison that has nothing left to run or to write, and its plans with other settings."""
        from layercache.errors import FileFormatError
        from layercache.tools.compare.entries import jobs_of, methods_of
        from layercache.tools.compare.files import finished
        from layercache.tools.compare.transfer_table import TransferTable
        from layercache.tools.report.machine import json_text

        files = finished(self.folder, self.methods, self.shares, self.base_request)
        if files is None or not (self.folder / "compare.html").exists():
            return None
        outcomes = files.of(list(jobs_of(methods_of(self.methods), self.shares)))
        if not self.wanted:
            return outcomes, None
        try:
            table = TransferTable.load(self.folder / TRANSFER)
        except FileFormatError:
            return None
        asked = json.loads(json_text(self.request | {"methods": list(self.methods), "budgets": self.shares}))
        return (outcomes, table) if table.request == asked else None


@dataclass(frozen=True)
class _Settings:
    """What is compared on how many pictures."""

    shares: tuple[float, ...]
    effort: str
    seeds: int
    calibration: int
    batch: int
    request: dict[str, Any]
    scorer: Scorer

    def comparison(self, pipe: Any, entries: list[Entry], call: dict[str, Any], folder: Path, crew: Crew) -> Comparison:
        from layercache.tools.compare.calls import batched
        from layercache.tools.compare.categories import in_turn
        from layercache.tools.compare.entries import CalibratedModel
        from layercache.tools.compare.run import Comparison

        prompts, numbers = [entry.sample for entry in entries], seeds_of(entries, self.seeds)
        tuned_on, first = batched(prompts, self.seeds, self.calibration, self.batch), max(numbers) + 1
        behind = list(range(first, first + self.calibration))
        calibrated = CalibratedModel(pipe, tuned_on, behind, call, self.shares, self.effort, folder / "search")
        batches = batched(prompts, 0, self.seeds, self.batch)
        more: dict[str, Any] = {
            "categories": in_turn([entry.category for entry in entries], self.seeds),
            "scorer": self.scorer,
        }
        return Comparison(calibrated, batches, numbers, folder, request=self.request, crew=crew, **more)


def _say_left_out(printer: Printer, entries: list[Entry], count: int) -> None:
    """Categories of which there is no picture among so many."""
    names = dict.fromkeys(entry.category for entry in entries[count:] if entry.category)
    if left_out := [name for name in names if name not in {entry.category for entry in entries[:count]}]:
        text = f"No picture of {', '.join(left_out)} is among the first {count}: --seeds {len(entries)} makes all."
        printer.say(shown(text), style="dim")


def seeds_of(entries: list[Entry], count: int) -> list[int]:
    """Seeds of so many pictures, whose prompts come in turn: those of the file, then numbers above all of them."""
    first = [entry.seed if entry.has_own_seed else number for number, entry in enumerate(entries)]
    behind = max(first) + 1
    return [first[k] if k < len(first) else behind + k - len(first) for k in range(count)]


def _say_again(printer: Printer, asked: _Asked, before: tuple[list[Outcome], TransferTable | None]) -> None:
    """A comparison that is finished, from its files."""
    from layercache.tools.compare.files import ComparisonFiles

    _say(printer, ComparisonFiles.read(asked.folder), before[0], asked, before[1])
    names = ("compare.json", "compare.png", "pictures.png", "compare.html", TRANSFER, "transfer.html")
    files = [asked.folder / name for name in names if before[1] is not None or not name.startswith("transfer")]
    printer.say(
        f"This comparison was finished before: {', '.join(shown(path) for path in files if path.exists())}. What "
        "failed runs again with --retry."
    )


def _run(printer: Printer, asked: _Asked, comparison: Comparison) -> None:
    from tqdm.auto import tqdm

    from layercache.tools.compare.entries import methods_of
    from layercache.tools.compare.report import save_comparison
    from layercache.tools.compare.transfer import Transfer

    methods, leads = methods_of(asked.methods), comparison.crew.leads
    settings = settings_for(comparison.model.pipeline, asked.wanted)
    count = comparison.count_jobs(methods) * (1 + len(settings))
    table = None
    with refused_arguments(), tqdm(total=count, bar_format=BAR, leave=False, disable=not leads) as bar:
        shows = (lambda text: bar.set_postfix_str(shown(text)), bar.update, asked.retry)
        outcomes = comparison.run(methods, *shows)
        if settings:
            table = Transfer(comparison, methods, settings).run(*shows, title=asked.title)
    if not leads:
        return
    files = save_comparison(comparison, outcomes, comparison.captions, asked.title)
    if table is not None:
        table.request = {**asked.request, "methods": list(asked.methods), "budgets": asked.shares}
        files["other settings"] = table.save(asked.folder / TRANSFER)
        files["page of them"] = table.save_html(asked.folder / "transfer.html")
    _say(printer, comparison, outcomes, asked, table)
    printer.say(*(f"{name}: {shown(path)}" for name, path in files.items()))


def _say(
    printer: Printer, files: ComparisonFiles, outcomes: list[Outcome], asked: _Asked, table: TransferTable | None
) -> None:
    """The tables, what failed and why, and the figures."""
    from layercache.tools.compare.categories import category_rows, category_table
    from layercache.tools.compare.report import comparison_table, failures, full_clip_line

    width, categories = printer.console.width, files.categories
    by_category = category_table(outcomes, categories, width)
    printer.say(comparison_table(outcomes, asked.title, width), *full_clip_line(files), *failures(outcomes), "")
    printer.say(*([by_category, ""] if by_category is not None else []))
    if table is not None:
        printer.say(table.table(width), *table.notes, "")
    figures: dict[str, Any] = {"outcomes": [asdict(outcome) for outcome in outcomes]}
    if categories:
        figures["categories"] = [asdict(row) for row in category_rows(outcomes, categories)]
    if files.full_clip:
        figures["full_clip"] = files.full_clip
    if table is not None:
        figures["transfer"] = [asdict(row) for row in table.rows]
    printer.figures(figures)
