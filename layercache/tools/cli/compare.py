"""``layercache compare``."""

from __future__ import annotations

import shlex
import textwrap
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
from layercache.tools.cli.finished import request_of
from layercache.tools.cli.options import CallOptions, ModelOptions, PromptOptions, with_options, words_of
from layercache.tools.cli.pipelines import gives_video, load_with_prompts, quiet_call, refused_arguments
from layercache.tools.cli.workers import WorkerOptions, crew_for

if TYPE_CHECKING:
    from layercache.parallel.crew import Crew
    from layercache.tools.compare.run import Comparison, Outcome

SHOWN = 8
BAR = "comparing: {n} of {total} |{bar}| {elapsed}, {remaining} left{postfix}"

Methods = Annotated[
    str, typer.Option(help="Names with commas between them; 'ours', 'peers' or 'all' for all of a kind.")
]
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
    methods: Methods = "all",
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
    SSIM are of other seeds. Given again with the same folder, it goes on where it was stopped; one that is finished
    loads nothing.

    Example: `layercache compare --methods layercache,meancache,fbcache,diffusers:fbcache --budgets 0.6,0.4`
    """
    if leads():
        check_output_folder(output, "output")
    check_outputs({"json_to": json_to}, [prompts.prompts_file])
    names, shares, printer = _method_names(methods), parse_budgets(budgets), Printer(json_to)
    counts = {"seeds": seeds, "batch": batch, "calibration": calibration, "steps": num_inference_steps}
    given = {**counts, "effort": effort.value, "prompts": read_prompts(prompts.prompts, prompts.prompts_file)}
    request = request_of(model, call, given)
    title = f"{model.model}, {num_inference_steps} steps, {seeds} pictures"
    before = None if retry or not leads() else _finished(output, names, shares, request)
    # the processes of one command end together; of one that would start them, nothing is started
    if before is None or not is_alone():
        crew = crew_for(workers, samples=-(-seeds // batch) if batch else None, files=[output])
        before = crew.agree(before)
    if before is not None:
        return _say_again(printer, before, title, output)
    pipe, found = load_with_prompts(model, prompts, call)
    batch = batch or (1 if call.image or gives_video(pipe) else 4)
    settings = _Settings(shares, effort.value, seeds, calibration, batch, request)
    arguments = quiet_call(pipe, num_inference_steps, call)
    again = shlex.join(["layercache", "compare", *words_of(model), "-o", shown(output)])
    with when_stopped(f"Stopped. What was measured is in {shown(output)}; the same command ({again} ...) goes on."):
        comparison = settings.comparison(pipe, found, arguments, output, crew)
        outcomes = _run(printer, comparison, names, title, retry)
    printer.figures({"outcomes": [asdict(outcome) for outcome in outcomes]})


@dataclass(frozen=True)
class _Settings:
    """What is compared on how many pictures."""

    shares: tuple[float, ...]
    effort: str
    seeds: int
    calibration: int
    batch: int
    request: dict[str, Any]

    def comparison(self, pipe: Any, prompts: list[str], call: dict[str, Any], folder: Path, crew: Crew) -> Comparison:
        from layercache.tools.compare.calls import batched
        from layercache.tools.compare.entries import CalibratedModel
        from layercache.tools.compare.run import Comparison

        tuned_on = batched(prompts, self.seeds, self.calibration, self.batch)
        behind = list(range(self.seeds, self.seeds + self.calibration))
        calibrated = CalibratedModel(pipe, tuned_on, behind, call, self.shares, self.effort, folder / "search")
        batches, numbers = batched(prompts, 0, self.seeds, self.batch), list(range(self.seeds))
        return Comparison(calibrated, batches, numbers, folder, request=self.request, crew=crew)


def _finished(
    folder: Path, names: list[str], shares: tuple[float, ...], request: dict[str, Any]
) -> list[Outcome] | None:
    """The outcomes of a comparison that was asked for before and has nothing left to run or to write."""
    from layercache.tools.compare.entries import jobs_of, methods_of
    from layercache.tools.compare.files import finished

    files = finished(folder, names, shares, request)
    if files is None or not (folder / "compare.html").exists():
        return None
    return files.of(list(jobs_of(methods_of(names), shares)))


def _say_again(printer: Printer, outcomes: list[Outcome], title: str, folder: Path) -> None:
    """A comparison that is finished, from its file."""
    from layercache.tools.compare.report import comparison_table, failures

    printer.say(comparison_table(outcomes, title, printer.console.width), *failures(outcomes), "")
    files = [folder / name for name in ("compare.json", "compare.png", "pictures.png", "compare.html")]
    printer.say(
        f"This comparison was finished before: {', '.join(shown(path) for path in files if path.exists())}. What "
        "failed runs again with --retry."
    )
    printer.figures({"outcomes": [asdict(outcome) for outcome in outcomes]})


def _method_names(text: str) -> list[str]:
    """The methods that were asked for; what is missing or unknown is refused before anything is loaded."""
    from layercache.tools.compare.entries import METHODS, PEERS, check_methods
    from layercache.tools.report import pages, plots

    plots.check_installed()
    pages.check_installed()
    kinds = {"ours": list(METHODS), "peers": list(PEERS), "all": [*METHODS, *PEERS]}
    names = kinds.get(text) or [name.strip() for name in text.split(",") if name.strip()]
    check_methods(names)
    return names


def _run(printer: Printer, comparison: Comparison, names: list[str], title: str, retry: bool) -> list[Outcome]:
    from tqdm.auto import tqdm

    from layercache.tools.compare.entries import jobs_of, methods_of
    from layercache.tools.compare.report import comparison_table, failures, save_comparison

    count = len(list(jobs_of(methods_of(names), comparison.model.budgets)))
    leads = comparison.crew.leads
    with refused_arguments(), tqdm(total=count, bar_format=BAR, leave=False, disable=not leads) as bar:
        outcomes = comparison.run(names, lambda text: bar.set_postfix_str(shown(text)), bar.update, retry)
    if not leads:
        return outcomes
    prompts = [prompt for batch in comparison.prompts for prompt in batch][:SHOWN]
    files = save_comparison(comparison, outcomes, [textwrap.shorten(prompt, 16) for prompt in prompts], title)
    printer.say(comparison_table(outcomes, title, printer.console.width), *failures(outcomes), "")
    printer.say(*(f"{name}: {shown(path)}" for name, path in files.items()))
    return outcomes
