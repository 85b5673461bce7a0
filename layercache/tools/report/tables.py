"""Tables, sentences and JSON for people: what was measured, on which machine, and what a file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from layercache._utils.metrics import Summary, summarise
from layercache._utils.text import shown
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.schedule import Cell, Schedule, Velocity
from layercache.tools.report.fitting import Column, FittingTable
from layercache.tools.report.words import origin_words

if TYPE_CHECKING:
    from layercache.planning.profile import StabilityProfile
    from layercache.schedule.module_schedule import ModuleSchedule

MOST_WIDE_COLUMNS = 4

# Relative change up to which a cell of the stability table has this colour.
STABILITY_STYLES = ((0.05, "green"), (0.1, "yellow"), (0.2, "dark_orange"), (math.inf, "red"))


@dataclass(frozen=True)
class Measured:
    """One way of generating the pictures, as measured.

    Attributes:
        name: shown in tables and figures.
        used: share of the block time that was computed.
        seconds: wall-clock seconds of all its generations.
        psnr, ssim: one value per picture against the full run; empty for the full run itself.
    """

    name: str
    used: float
    seconds: float
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()

    def to_json(self, reference_seconds: float) -> dict[str, Any]:
        """Its figures; ``reference_seconds`` are those of the full run."""
        return {
            "name": self.name,
            "used": self.used,
            "seconds": self.seconds,
            "speedup": reference_seconds / self.seconds,
            "psnr": asdict(summarise(self.psnr)) if self.psnr else None,
            "ssim": asdict(summarise(self.ssim)) if self.ssim else None,
        }


def comparison_table(measured: Sequence[Measured]) -> FittingTable:
    """The figures of several runs, one row each; speedups are against the first one."""
    pictures = max(len(row.psnr) for row in measured)
    caption = (
        f"PSNR in dB (mean, median, 10 % quantile) and SSIM (mean) of {pictures} {_plural('picture', pictures)} "
        f"against the first row."
    )
    columns = [Column("run", numeric=False), Column("used"), Column("seconds", 3), Column("speedup"), Column("PSNR")]
    table = FittingTable([*columns, Column("median", 4), Column("10 %", 1), Column("SSIM", 2)], caption=caption)
    for row in measured:
        psnr, ssim = _summary(row.psnr), _summary(row.ssim)
        table.add_row(
            row.name,
            f"{row.used:.3f}",
            f"{row.seconds:.2f}",
            f"{measured[0].seconds / row.seconds:.2f}x",
            _decibels(psnr.mean) if psnr else "-",
            _decibels(psnr.median) if psnr else "-",
            _decibels(psnr.quantile10) if psnr else "-",
            f"{ssim.mean:.4f}" if ssim else "-",
        )
    return table


def identical_note(measured: Sequence[Measured]) -> str:
    """Names the runs with pictures equal to the full run's, whose PSNR no mean can hold; empty without any."""
    notes = []
    for row in measured:
        psnr = _summary(row.psnr)
        if psnr is not None and psnr.infinite:
            notes.append(f"{row.name}: {psnr.infinite} of {psnr.count} pictures are identical")
    return f"{'; '.join(notes)} (infinite PSNR, left out of the mean)." if notes else ""


def _summary(values: Sequence[float]) -> Summary | None:
    return summarise(values) if values else None


def _decibels(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else str(value)


# --- what a schedule holds ---------------------------------------------------------------------------------


def group_name(group: tuple[int, int]) -> str:
    """``(0, 5)`` as a person counts: ``blocks 0-4``."""
    lo, hi = group
    return f"blocks {lo}-{hi - 1}" if hi - lo > 1 else f"block {lo}"


def schedule_figures(schedule: Schedule) -> dict[str, Any]:
    """What `schedule_sentences` says, as data."""
    groups = []
    for index, group in enumerate(schedule.groups):
        column = [schedule.cells[step][index] for step in schedule.fingerprint.steps]
        groups.append(
            {
                "blocks": list(group),
                "seconds": schedule.group_seconds[index],
                "computed_steps": sum(cell is None for cell in column),
                "skipped_steps": sum(cell is not None and not cell for cell in column),
                "reused_steps": sum(cell is not None and len(cell) == 1 for cell in column),
                "forecast_steps": sum(cell is not None and len(cell) > 1 for cell in column),
                "longest_cached_run": _longest_cached_run(column),
            }
        )
    return {
        "kind": "schedule",
        "model_class": schedule.fingerprint.model_class,
        "num_blocks": schedule.fingerprint.num_blocks,
        "num_steps": schedule.num_steps,
        **_steps_run(schedule.fingerprint),
        "branches": list(schedule.fingerprint.branches),
        "used": schedule.used,
        "groups": groups,
        "made_by": dict(schedule.made_by),
        "package_version": schedule.fingerprint.package_version,
    }


def _steps_run(fingerprint: Fingerprint) -> dict[str, Any]:
    return {"steps_run": list(fingerprint.steps_run)} if fingerprint.steps_run else {}


def _steps_text(fingerprint: Fingerprint) -> str:
    """``50 steps``, and which of them are the transformer's own."""
    own, text = fingerprint.steps_run, f"{fingerprint.num_steps} steps"
    if not own:
        return text
    gapless = len(own) == own[-1] - own[0] + 1
    steps_run = f"{own[0]}-{own[-1]}" if gapless else ", ".join(map(str, own))
    return f"{text}, of which the transformer runs {len(own)} ({steps_run})"


def _longest_cached_run(column: Sequence[Cell]) -> int:
    longest = current = 0
    for cell in column:
        current = 0 if cell is None else current + 1
        longest = max(longest, current)
    return longest


def schedule_sentences(schedule: Schedule) -> str:
    """A schedule in words."""
    figures = schedule_figures(schedule)
    lines = [
        f"A schedule for {shown(figures['model_class'])} ({figures['num_blocks']} blocks in {len(schedule.groups)} "
        f"{_plural('group', len(schedule.groups))}) and {_steps_text(schedule.fingerprint)}.",
        f"It computes {schedule.used:.1%} of the block time; the rest is put together from what is stored.",
    ]
    for group in figures["groups"]:
        lines.append(_group_sentence(group, len(schedule.fingerprint.steps)))
    lines += _velocity_sentences(schedule)
    if schedule.branch_cells:
        lines.append(f"- Branch {shown(', '.join(schedule.branch_cells))} has steps of its own; the others are shown.")
    made_by = ", ".join(
        f"{shown(key)} {shown(origin_words(_setting(value)))}"
        for key, value in schedule.made_by.items()
        if value is not None
    )
    lines.append(f"Made by layercache {shown(figures['package_version'])}: {made_by or 'unknown'}.")
    return "\n".join(lines)


def _group_sentence(group: Mapping[str, Any], num_steps: int) -> str:
    lo, hi = group["blocks"]
    text = f"- {group_name((lo, hi))}: computed at {group['computed_steps']} of {num_steps} steps"
    ways = [
        f"{verb} at {group[key]}"
        for verb, key in (("skipped", "skipped_steps"), ("reused", "reused_steps"), ("forecast", "forecast_steps"))
        if group[key]
    ]
    if not ways:
        return text + "."
    return f"{text}, {', '.join(ways)}; longest cached run: {group['longest_cached_run']}."


def _velocity_sentences(schedule: Schedule) -> list[str]:
    """What happens to velocities on their way to the sampler; nothing where they are the model's own."""
    steps = schedule.fingerprint.steps
    skipped = sum(schedule.is_skipped(step) for step in steps)
    given = [step for step in steps if schedule.velocity(step) is not None]
    lines = []
    if skipped:
        lines.append(
            f"- {skipped} steps are skipped whole: no block runs, no residual is stored, and the velocity is put "
            "together from those of earlier steps."
        )
    if len(given) > skipped:
        lines.append(
            f"- At {len(given) - skipped} further steps the model's own velocity is corrected by earlier ones."
        )
    return lines


def velocity_text(step: int, velocity: Velocity | None) -> Text:
    """The combination that the sampler gets, newest first; x are the latents."""
    if velocity is None:
        return Text("")
    terms = [f"{c:+.2f}·v{source}" for source, c in sorted(velocity.terms.items(), reverse=True)]
    terms += [f"{velocity.latents:+.3f}·x"] if velocity.latents else []
    terms += [f"{velocity.offset:+.3f}"] if velocity.offset else []
    return Text(" ".join(terms).removeprefix("+"), style="green" if step in velocity.terms else "magenta")


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_setting(item) for item in value) + ")"
    return str(value)


def cell_text(cell: Cell, compact: bool = False) -> Text:
    """What a cell does; ``compact`` takes one character: computed, reused, or the span of the forecast."""
    if cell is None:
        return Text("■" if compact else "compute", style="bold green")
    anchors = sorted(cell, reverse=True)
    if not anchors:
        return Text("-" if compact else "skip", style="cyan")
    if len(anchors) == 1 and cell[anchors[0]] == 1.0:
        return Text("·" if compact else f"as step {anchors[0]}", style="cyan")
    if compact:
        return Text(str(anchors[0] - anchors[-1]), style="magenta")
    terms = [f"{cell[anchor]:+.2f}·r{anchor}" for anchor in anchors]
    return Text(" ".join(terms).removeprefix("+"), style="magenta")


def schedule_table(schedule: Schedule, compact: bool | None = None) -> FittingTable:
    """One line per step, one column per group; `schedule_legend` explains the cells.

    ``compact`` cells take a character or two, which by default is so of many groups.
    """
    compact = _is_compact(schedule.groups) if compact is None else compact
    table = _steps_table(
        schedule.groups, compact, [Column("velocity", numeric=False, wraps=True)] * bool(schedule.velocities)
    )
    for step, row in enumerate(schedule.cells):
        runs = step in schedule.fingerprint.steps
        cells = [cell_text(cell, compact) if runs else Text("") for cell in row]
        if schedule.velocities:
            cells.append(velocity_text(step, schedule.velocity(step)))
        table.add_row(str(step), f"{schedule.fingerprint.sigmas[step]:.3f}", *cells)
    return table


def module_sentences(schedule: ModuleSchedule) -> str:
    """What a schedule of single modules does, in words."""
    prints, reused = schedule.fingerprint, sorted(schedule.reused_steps)
    made_by = shown(schedule.made_by.get("method", "unknown"))
    lines = [
        f"A schedule of {len(schedule.units)} modules of {shown(prints.model_class)} over {_steps_text(prints)}, "
        f"made by {made_by}: {schedule.used:.1%} of the modules' time is computed."
    ]
    if reused:
        lines.append(f"Steps {', '.join(map(str, reused))} take the last hidden state of the step before as it is.")
    return "\n".join(lines)


def module_table(schedule: ModuleSchedule) -> FittingTable:
    """Steps by kinds of modules: how many are computed."""
    kinds = [_kind_of(name) for name in schedule.units]
    columns = list(dict.fromkeys(kinds))
    table = FittingTable([Column(heading) for heading in ("step", "sigma", *columns)], keys=2)
    for step, row in enumerate(schedule.computed):
        counts = [
            f"{sum(c for c, own in zip(row, kinds, strict=True) if own == kind)} of {kinds.count(kind)}"
            for kind in columns
        ]
        cells = ["reuse"] * len(columns) if step in schedule.reused_steps else counts
        cells = cells if step in schedule.fingerprint.steps else [""] * len(columns)
        table.add_row(str(step), f"{schedule.fingerprint.sigmas[step]:.3f}", *cells)
    return table


def _kind_of(unit: str) -> str:
    """``blocks.3.attn`` is a ``blocks.attn``."""
    parts = shown(unit).split(".", 2)
    return f"{parts[0]}.{parts[2]}" if len(parts) == 3 else shown(unit)


MODULE_LEGEND = "Modules that are computed, of each kind; the others take their last output."


def schedule_legend(schedule: Schedule, compact: bool | None = None) -> str:
    """How to read `schedule_table`."""
    return _cell_legend(_is_compact(schedule.groups) if compact is None else compact) + (
        " skip (-): no block runs. velocity: what the sampler gets, v5 being what the model gave at step 5 and x the "
        "latents; empty: the model's own."
        if schedule.velocities
        else ""
    )


def _cell_legend(compact: bool) -> str:
    if compact:
        return (
            "A column is headed by its group's first block. ■: the blocks run. ·: the stored residual (output minus "
            "input) is added again. A number: a forecast from two stored residuals that many steps apart."
        )
    return (
        "compute: the blocks run. as step n: the residual (output minus input) stored at step n is added again. "
        "a·rn - b·rm: a forecast, the line through the residuals of steps n and m."
    )


# --- what a profile holds ----------------------------------------------------------------------------------


def profile_figures(profile: StabilityProfile) -> dict[str, Any]:
    """What `profile_sentences` and `profile_table` say, as data."""
    return {
        "kind": "profile",
        "model_class": profile.fingerprint.model_class,
        "num_blocks": profile.fingerprint.num_blocks,
        "num_steps": profile.fingerprint.num_steps,
        **_steps_run(profile.fingerprint),
        "branches": list(profile.fingerprint.branches),
        "samples": list(profile.samples),
        "groups": [list(group) for group in profile.groups],
        "group_seconds": list(profile.group_seconds),
        "reuse_seconds": list(profile.reuse_seconds),
        "fixed_seconds": profile.fixed_seconds,
        "stability": profile.stability().tolist(),
        "package_version": profile.fingerprint.package_version,
    }


def profile_sentences(profile: StabilityProfile) -> str:
    """A profile in words."""
    fingerprint, samples = profile.fingerprint, len(profile.samples)
    blocks = sum(profile.group_seconds)
    lines = [
        f"A profile of {shown(fingerprint.model_class)} ({fingerprint.num_blocks} blocks in {len(profile.groups)} "
        f"{_plural('group', len(profile.groups))}) over {_steps_text(fingerprint)}, "
        f"measured on {samples} {_plural('sample', samples)}.",
        f"A step takes {_milliseconds(blocks + profile.fixed_seconds)}: {_milliseconds(blocks)} in the blocks, "
        f"{_milliseconds(profile.fixed_seconds)} outside of them, which no schedule can save.",
    ]
    for group, seconds, reuse in zip(profile.groups, profile.group_seconds, profile.reuse_seconds, strict=True):
        name = f"- {group_name(group)}"
        lines.append(f"{name}: {_milliseconds(seconds)} to compute, {_milliseconds(reuse)} to reuse.")
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.4g} s"


def profile_table(profile: StabilityProfile, compact: bool | None = None) -> FittingTable:
    """Relative change of each group's residual since the step before: one line per step, one column per group."""
    compact = _is_compact(profile.groups) if compact is None else compact
    table = _steps_table(profile.groups, compact)
    for step, row in enumerate(profile.stability()):
        cells = [stability_text(float(value), compact) for value in row]
        table.add_row(str(step), f"{profile.fingerprint.sigmas[step]:.3f}", *cells)
    return table


def stability_text(change: float, compact: bool = False) -> Text:
    """A relative change in percent, coloured from green (stable, cheap to cache) to red."""
    if math.isnan(change):
        return Text("-", style="dim")
    style = next(style for limit, style in STABILITY_STYLES if change <= limit)
    return Text(f"{100 * change:.0f}" if compact else f"{change:.1%}", style=style)


def profile_legend(profile: StabilityProfile, compact: bool | None = None) -> str:
    """How to read `profile_table`."""
    compact = _is_compact(profile.groups) if compact is None else compact
    heading = "In percent, a column is headed by its group's first block. " if compact else ""
    return (
        f"{heading}How much the residual (output minus input) of each group changed since the step before, relative "
        "L1: where it changes little, caching costs little."
    )


def _is_compact(groups: Sequence[tuple[int, int]]) -> bool:
    """Whether so many groups would be wider than a terminal in full."""
    return len(groups) > MOST_WIDE_COLUMNS


def _steps_table(groups: Sequence[tuple[int, int]], compact: bool, more: Sequence[Column] = ()) -> FittingTable:
    """Without rows; groups that do not fit come below, behind step and sigma again."""
    headings = ["step", "sigma", *(str(group[0]) if compact else group_name(group) for group in groups)]
    columns = [*map(Column, headings), *more]
    return FittingTable(columns, keys=2, boxed=False, gap=1 if compact else 2)


def model_rows() -> list[dict[str, Any]]:
    """What is known of every transformer class, as plain data."""
    import diffusers

    from layercache.models.registry import known_models

    return [
        {
            "model": spec.model_class,
            "block_lists": list(spec.block_lists),
            "joined": list(spec.joint),
            "streams": list(spec.streams),
            "teacache": spec.modulation is not None,
            "modules": bool(spec.modules),
            "learning_to_cache": bool(spec.modules) and spec.differentiable,
            "installed": hasattr(diffusers, spec.model_class),
        }
        for spec in known_models()
    ]


def models_table(rows: Sequence[Mapping[str, Any]]) -> FittingTable:
    """The same as a table."""
    importance = {"transformer": 0, "blocks": 2, "streams": 1, "TeaCache": 0, "modules": 0}
    wrapping = ("transformer", "blocks", "streams")
    table = FittingTable([Column(name, rank, False, name in wrapping) for name, rank in importance.items()])
    for row in rows:
        lists = [f"{name} (joined)" if name in row["joined"] else name for name in row["block_lists"]]
        name = row["model"] if row["installed"] else f"{row['model']} (not in this diffusers)"
        marks = ["yes" if row[key] else "-" for key in ("teacache", "modules")]
        if row["modules"] and not row["learning_to_cache"]:
            marks[-1] = "InvarDiff only"
        table.add_row(name, ", ".join(lists), ", ".join(row["streams"]), *marks)
    return table
