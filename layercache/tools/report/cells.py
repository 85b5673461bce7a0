"""Pages of profiles and schedules: maps of steps by groups of layers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercache._utils.text import shown
from layercache.errors import LayerCacheError
from layercache.schedule.schedule import Cell, Schedule
from layercache.tools.report import pages, tables
from layercache.tools.report.charts import cells_chart
from layercache.tools.report.fitting import Column, FittingTable
from layercache.tools.report.tables import cell_text, group_name, velocity_text

if TYPE_CHECKING:
    from layercache.planning.profile import StabilityProfile
    from layercache.schedule.module_schedule import ModuleSchedule

# Shares of the block time for which a profile's page shows what would be planned.
BUDGETS = (0.75, 0.6, 0.5)
READ_A_CELL = "Point at a cell, or touch it, to read what stands there."


def save_profile_page(
    path: str | os.PathLike[str], profile: StabilityProfile, title: str, commands: Sequence[str] | None = None
) -> Path:
    """How much each group changes from step to step, and what would be planned from that."""
    blocks: list[pages.Block] = [
        pages.Chart(stability_chart(profile), "Change since the step before", tables.profile_legend(profile, False))
    ]
    planned = dict[str, Schedule]()
    for budget in BUDGETS:
        try:
            schedule = _planned(profile, budget)
        except LayerCacheError:  # another budget may be possible
            continue
        planned[f"budget {budget:g}"] = schedule
    if planned:
        blocks.append(pages.Chart(schedules_chart(planned), "What would be planned from it", READ_A_CELL))
    blocks += [
        pages.Table.of(_seconds_table(profile), "Groups"),
        pages.Table.of(tables.profile_table(profile, compact=False), "Step by step"),
    ]
    return pages.save_page(path, title, blocks, lead=_lead(tables.profile_sentences(profile)), commands=commands)


def _lead(sentences: str) -> list[str]:
    """Sentences without those of single groups, which stand in a table."""
    return [line.removeprefix("- ") for line in sentences.splitlines() if not line.startswith("- block")]


def _seconds_table(profile: StabilityProfile) -> FittingTable:
    table = FittingTable([Column("group", numeric=False), Column("ms to compute"), Column("ms to reuse")])
    for group, seconds, reuse in zip(profile.groups, profile.group_seconds, profile.reuse_seconds, strict=True):
        table.add_row(group_name(group), f"{seconds * 1e3:.3f}", f"{reuse * 1e3:.3f}")
    return table


def _groups_table(schedule: Schedule) -> FittingTable:
    ways = ("computed_steps", "skipped_steps", "reused_steps", "forecast_steps")
    headings = ("computed", "skipped", "reused", "forecast", "longest run without computing")
    table = FittingTable([Column("group", numeric=False), *(Column(heading) for heading in headings)])
    for group in tables.schedule_figures(schedule)["groups"]:
        lo, hi = group["blocks"]
        table.add_row(group_name((lo, hi)), *(str(group[way]) for way in ways), str(group["longest_cached_run"]))
    return table


def _planned(profile: StabilityProfile, budget: float) -> Schedule:
    import layercache

    return layercache.plan(profile, budget)


def save_schedule_page(
    path: str | os.PathLike[str],
    schedule: Schedule | ModuleSchedule,
    title: str,
    commands: Sequence[str] | None = None,
) -> Path:
    """What a schedule computes, reuses and forecasts."""
    if isinstance(schedule, Schedule):
        lines, legend = tables.schedule_sentences(schedule), tables.schedule_legend(schedule, compact=False)
        blocks: list[pages.Block] = [
            pages.Chart(schedules_chart({"": schedule}), "Steps by groups of layers", READ_A_CELL),
            pages.Table.of(_groups_table(schedule), "Steps of each group"),
            pages.Table.of(tables.schedule_table(schedule, compact=False), "Step by step", legend),
        ]
    else:
        lines, listed = tables.module_sentences(schedule), tables.module_table(schedule)
        blocks = [
            pages.Chart(modules_chart(schedule), "Steps by modules", READ_A_CELL),
            pages.Table.of(listed, "Step by step", tables.MODULE_LEGEND),
        ]
    return pages.save_page(path, title, blocks, lead=_lead(lines), commands=commands)


def stability_chart(profile: StabilityProfile) -> dict[str, Any]:
    """Relative change of each group's residual since the step before."""
    names, sigmas = [group_name(group) for group in profile.groups], profile.fingerprint.sigmas
    cells = [
        {
            "step": step,
            "sigma": _rounded(sigmas[step]),
            "group": name,
            "change": None if math.isnan(value) else round(float(value), 5),
        }
        for step, row in enumerate(profile.stability())
        for name, value in zip(names, row, strict=True)
    ]
    return cells_chart(cells, names)


def schedules_chart(schedules: dict[str, Schedule]) -> dict[str, Any]:
    """One or several schedules, by name: a line each where all are of whole steps, else a choice of maps."""
    if len(schedules) > 1 and all(len(schedule.groups) == 1 for schedule in schedules.values()):
        cells = [cell for name, own in schedules.items() for cell in _cells(own, "", [name])]
        return cells_chart(cells, list(schedules))
    several = len(schedules) > 1
    cells = [cell for name, own in schedules.items() for cell in _cells(own, name if several else "")]
    groups = list(dict.fromkeys(cell["group"] for cell in cells))
    return cells_chart(cells, groups, list(schedules) if several else ())


def _cells(schedule: Schedule, choice: str, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    names, found = names or [group_name(group) for group in schedule.groups], []
    for step, row in enumerate(schedule.cells):
        velocity = velocity_text(step, schedule.velocity(step)).plain
        for name, cell in zip(names, row, strict=True):
            runs = step in schedule.fingerprint.steps
            entry: dict[str, Any] = {"step": step, "sigma": _rounded(schedule.fingerprint.sigmas[step]), "group": name}
            entry["does"] = _does(cell) if runs else "not run"
            entry["how"] = velocity if cell == {} else cell_text(cell).plain
            found.append(entry | ({"choice": choice} if choice else {}))
    return found


def _rounded(sigma: float) -> float:
    return round(float(sigma), 4)


def _does(cell: Cell) -> str:
    if cell is None:
        return "computed"
    return ("skipped", "reused", "forecast")[min(len(cell), 2)]


def modules_chart(schedule: ModuleSchedule) -> dict[str, Any]:
    """Steps by single modules."""
    names = [shown(unit) for unit in schedule.units]
    cells = [
        {
            "step": step,
            "sigma": _rounded(schedule.fingerprint.sigmas[step]),
            "group": name,
            "does": "computed" if runs and step not in schedule.reused_steps else "reused",
            "how": "the step before" if step in schedule.reused_steps else "",
        }
        for step, row in enumerate(schedule.computed)
        for name, runs in zip(names, row, strict=True)
    ]
    return cells_chart(cells, names)
