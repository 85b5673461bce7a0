"""``layercache show`` and ``layercache models``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.tools.cli.common import Json, Plot, Printer, check_outputs
from layercache.tools.cli.files import load

if TYPE_CHECKING:
    from layercache.planning.front import Front
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.tools.cli.files import Content

Page = Annotated[Path | None, typer.Option(help="Also write it as a page, with plots and maps to point at (HTML).")]

StepMaskTo = Annotated[
    bool, typer.Option("--step-mask", help="Print only which steps are computed, as other engines take it.")
]

# What is printed, what its marks mean, and the figures.
Explained = tuple[tuple[Any, ...], str, dict[str, Any]]


def show(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A schedule, a profile, a front, or a file of results.")
    ],
    plot: Plot = None,
    page: Page = None,
    step_mask: StepMaskTo = False,
    json_to: Json = None,
) -> None:
    """Explain a schedule or a profile in words and as a table of steps by groups; a front or results as a table.

    Example: `layercache show schedule.json --page schedule.html`
    """
    check_outputs({"plot": plot, "page": page, "json_to": json_to}, [file])
    if page is not None:
        from layercache.tools.report import pages

        pages.check_installed()
    printer = Printer(json_to)
    if step_mask:
        _show_step_mask(printer, file)
        return
    if results := _results(file):
        _show_results(printer, file, results, plot, page)
        return
    content = load(file)
    parts, legend, figures = _explain(content)
    if plot is not None:
        _plot(plot, file.name, content)
    if page is not None:
        _save_page(page, file.name, content)
    printer.say(*parts)
    printer.say(legend, style="dim")
    printer.say(*(f"{name}: {shown(path)}" for name, path in (("plot", plot), ("page", page)) if path is not None))
    printer.figures(figures)


def _show_step_mask(printer: Printer, file: Path) -> None:
    from layercache._utils.formats import SCHEDULE

    mask = load(file, SCHEDULE).to_step_mask()  # type: ignore[union-attr]
    computed, reused = mask.to_bins()
    lines = {
        "stable-diffusion.cpp, --scm-mask": mask.to_text(),
        "cache-dit, steps_computation_mask": str(list(mask)),
        "SGLang, SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": ",".join(map(str, computed)),
        "SGLang, SGLANG_CACHE_DIT_SCM_CACHE_BINS": ",".join(map(str, reused)),
    }
    for name, value in lines.items():
        printer.console.print(f"{name}: {value}", soft_wrap=True)
    printer.figures({"kind": "step mask", "steps": list(mask), "compute_bins": computed, "cache_bins": reused})


def _results(file: Path) -> dict[str, Any]:
    """What a file of results holds; empty of any other file."""
    from layercache._utils.formats import COMPARISON, format_of

    if format_of(file) not in (None, COMPARISON):
        return {}
    from layercache.tools.bench.pages import kind_of
    from layercache.tools.bench.results import read_result

    found = read_result(file) or {}
    return found if kind_of(found) else {}


def _show_results(printer: Printer, file: Path, results: dict[str, Any], plot: Path | None, page: Path | None) -> None:
    from layercache.errors import FileFormatError
    from layercache.tools.bench.pages import result_tables, save_result_page

    if plot is not None:
        raise FileFormatError(f"{shown(file)} is a file of results, which --page draws, not --plot", argument="plot")
    try:
        tables = result_tables(results)
        written = save_result_page(page, results, file.stem, file) if page is not None else None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{shown(file)} is no whole file of results: {error}") from error
    printer.say(*tables)
    if written is not None:
        printer.say(f"page: {shown(written)}")
    printer.figures(results)


def _explain(content: Content) -> Explained:
    from layercache.planning.front import Front
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.schedule.schedule import Schedule
    from layercache.tools.report import tables

    if isinstance(content, Front):
        return _explain_front(content)
    if isinstance(content, ModuleSchedule):
        return _explain_modules(content)
    if isinstance(content, Schedule):
        parts = (tables.schedule_sentences(content), "", tables.schedule_table(content), "")
        return parts, tables.schedule_legend(content), tables.schedule_figures(content)
    parts = (tables.profile_sentences(content), "", tables.profile_table(content), "")
    return parts, tables.profile_legend(content), tables.profile_figures(content)


def _save_page(path: Path, title: str, content: Content) -> Path:
    from layercache.planning.front import Front
    from layercache.planning.profile import StabilityProfile
    from layercache.tools.report import cells

    if isinstance(content, Front):
        from layercache.tools.report.front import rows_of, save_front_page

        return save_front_page(path, rows_of(content), title, front=content)
    if isinstance(content, StabilityProfile):
        return cells.save_profile_page(path, content, title)
    return cells.save_schedule_page(path, content, title)


def _explain_modules(schedule: ModuleSchedule) -> Explained:
    from layercache.tools.report import tables

    parts = (tables.module_sentences(schedule), "", tables.module_table(schedule), "")
    figures = {
        "kind": "module schedule",
        "used": schedule.used,
        "reused_steps": sorted(schedule.reused_steps),
        "made_by": dict(schedule.made_by),
    }
    return parts, tables.MODULE_LEGEND, figures


def _explain_front(front: Front) -> Explained:
    from layercache.tools.report.front import front_table, order_sentence, rows_of

    rows = rows_of(front)
    figures = {"kind": "front", "notes": list(front.notes), "points": [row.to_json() for row in rows]}
    legend = f"{order_sentence(rows)} 'layercache plan' takes one out by --budget and the like.".lstrip()
    return (front_table(rows), *map(shown, front.notes)), legend, figures


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


def models(
    name: Annotated[
        str | None, typer.Argument(help="A transformer or a pipeline, or a part of its name, such as Kontext.")
    ] = None,
    json_to: Json = None,
) -> None:
    """List the transformers that are known, the pipelines that run them, and which methods each supports.

    Schedules of groups and steps, and FBCache, DBCache, DiCache, MagCache, MeanCache and the like run on all of them.
    TeaCache, SpectralCache and SeaCache watch the modulated input of the first block, InvarDiff and Learning-to-Cache
    cache single modules: where the table has a dash, the model's description does not say where those are. Another
    class is found out with `layercache.infer_model(pipe, lambda: pipe(...))`.

    Example: `layercache models FluxKontextPipeline`
    """
    from layercache.tools.known_models import named_rows, pipeline_lines
    from layercache.tools.report.tables import models_table

    check_outputs({"json_to": json_to})
    printer = Printer(json_to)
    rows = named_rows(name)
    printer.say(models_table(rows), "Pipelines of this diffusers:", *pipeline_lines(rows))
    printer.figures({"models": rows})
