"""`Schedule`: for every step and layer group, either "compute" or a combination of stored residuals."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar, Self

from layercache._utils.checksum import sealed_json
from layercache._utils.formats import SCHEDULE, entries, parse_json, read_json
from layercache._utils.summaries import Rows, Summarised, joined
from layercache.errors import ScheduleError
from layercache.schedule.fingerprint import Fingerprint, check_steps, settings_line
from layercache.schedule.pretrained import Pretrained
from layercache.schedule.step_mask import StepMask

FORMAT = SCHEDULE
VERSION = 3

LARGEST_COEFFICIENT = 1e4
"""Far above what a fit gives (below 10), and far below where a residual times it leaves the range of float32."""

LONGEST_SECONDS = 1e9
"""What a group may take at most, so that sums stay numbers."""

Cell = Mapping[int, float] | None
"""``None`` computes the group; a mapping ``{anchor step: coefficient}`` adds that combination instead.

An empty mapping passes the group by: its step is skipped as a whole. The velocity comes from a `Velocity`, or, at steps
at which the transformer does not run (`Fingerprint.steps`), from another transformer."""


@dataclass(frozen=True)
class Velocity:
    """How the velocity that the sampler gets at a step is put together: ``sum_k c_k v[k] + latents * x + offset``.

    ``v[k]`` is what the model itself (guidance included) gave at step k, the step's own number standing for the
    fresh one; ``x`` are the latents the step starts from. Source: docs/methods.md, Fitted forecasts.

    Attributes:
        terms: ``{step: coefficient}``.
        latents: coefficient of ``x``.
        offset: a number that is added to all elements.
    """

    terms: Mapping[int, float]
    latents: float = 0.0
    offset: float = 0.0

    def shifted(self, steps: int) -> Velocity:
        """The same of velocities so many steps later."""
        return replace(self, terms={step + steps: value for step, value in self.terms.items()})

    def to_json(self) -> dict[str, float]:
        more = {name: value for name, value in (("latents", self.latents), ("offset", self.offset)) if value}
        return {str(step): value for step, value in self.terms.items()} | more

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Velocity:
        terms = {int(step): float(value) for step, value in data.items() if step not in ("latents", "offset")}
        return cls(terms, float(data.get("latents", 0.0)), float(data.get("offset", 0.0)))


EXPECTED_PSNR = "expected_psnr"
"""In `Schedule.made_by`: mean and 10 % quantile in dB."""


@dataclass(frozen=True, repr=False)
class Schedule(Summarised, Pretrained):
    """What to do at every step.

    Attributes:
        fingerprint: what it is valid for.
        groups: block ranges ``[lo, hi)`` that tile ``0..num_blocks``, counted over all block lists.
        cells: ``cells[step][group]``, see `Cell`.
        group_seconds: measured seconds of computing each group once, weights of `used`; where nobody measured them, 1
            or numbers of blocks (`is_timed`).
        branch_cells: cells of branches that do not follow ``cells``, by the branch's name. A step is skipped as a
            whole in all branches or in none.
        velocities: per step what the sampler gets, or ``None`` for the model's own output; empty: none is changed.
        made_by: how it was found (method, budget, predicted error, ...), for people to read.
        further_velocities: of a model with several outputs (video and sound), the same for each behind the first;
            empty: all outputs follow ``velocities``.

    Raises:
        ScheduleError: on construction, when the parts contradict each other.
    """

    KIND: ClassVar[str] = FORMAT
    SOURCE: ClassVar[str] = "layercache.plan(profile, budget=0.6) makes one, layercache.Schedule.load(path) reads one"

    fingerprint: Fingerprint
    groups: tuple[tuple[int, int], ...]
    cells: tuple[tuple[Cell, ...], ...]
    group_seconds: tuple[float, ...]
    made_by: Mapping[str, Any] = field(default_factory=dict)
    velocities: tuple[Velocity | None, ...] = ()
    branch_cells: Mapping[str, tuple[tuple[Cell, ...], ...]] = field(default_factory=dict)
    further_velocities: tuple[tuple[Velocity | None, ...], ...] = ()

    def __post_init__(self) -> None:
        check_steps(self.fingerprint)
        check_groups(self.groups, self.fingerprint.num_blocks)
        if len(self.group_seconds) != len(self.groups) or not all(0 < s <= LONGEST_SECONDS for s in self.group_seconds):
            raise ScheduleError(f"group_seconds must hold one positive number per group, got {self.group_seconds}")
        for velocities in (self.velocities, *self.further_velocities):
            if len(velocities) not in ({0, self.num_steps} if velocities is self.velocities else {self.num_steps}):
                raise ScheduleError(f"{len(velocities)} velocities for {self.num_steps} steps")
        self._check_cells(self.cells, "")
        for branch, cells in self.branch_cells.items():
            if branch not in self.fingerprint.branches:
                raise ScheduleError(f"cells for branch {branch!r}, which is none of {self.fingerprint.branches}")
            self._check_cells(cells, f" of branch {branch}")
        for step in range(self.num_steps):
            for output in range(1 + len(self.further_velocities)):
                self._check_velocity(step, output)

    def _check_cells(self, cells: Sequence[Sequence[Cell]], whose: str) -> None:
        if len(cells) != self.num_steps:
            raise ScheduleError(f"{len(cells)} rows of cells{whose} for {self.num_steps} steps")
        steps = self.fingerprint.steps
        for step, row in enumerate(cells):
            if len(row) != len(self.groups):
                raise ScheduleError(f"step {step}{whose} has {len(row)} cells for {len(self.groups)} groups")
            if _is_skip(row) != self.is_skipped(step):
                raise ScheduleError(f"step {step} is skipped as a whole in some branches only; skip it in all")
            if not _is_skip(row) and step not in steps:
                raise ScheduleError(
                    f"step {step} is none of those at which the transformer runs, {list(steps)}; leave it empty, "
                    "as layercache.plan does"
                )
            for group, cell in enumerate(row):
                if cell is not None:
                    self._check_cell(cells, step, group, whose)

    def call_arguments(self) -> dict[str, Any]:
        """Arguments that the pipeline is called with to run it: its noise levels where they are its own, else none.

        ``pipe(prompt, **schedule.call_arguments())``
        """
        return {"sigmas": list(self.fingerprint.sigmas_given)} if self.fingerprint.sigmas_given else {}

    def cells_of(self, branch: str) -> tuple[tuple[Cell, ...], ...]:
        """The cells a branch follows."""
        return self.branch_cells.get(branch, self.cells)

    def is_skipped(self, step: int) -> bool:
        """Whether the blocks are passed by: the velocity comes from older ones alone, or another transformer."""
        return _is_skip(self.cells[step])

    @property
    def expected_psnr(self) -> tuple[float, float] | None:
        """Mean and 10 % quantile of the PSNR in dB that other pictures should have; ``None`` where it is not known."""
        match self.made_by.get(EXPECTED_PSNR):
            case [float() | int() as mean, float() | int() as tenth]:
                return float(mean), float(tenth)
        return None

    @property
    def takes_experts(self) -> bool:
        """Whether it is of the whole steps of a run, whichever of a pipeline's transformers runs them (Wan 2.2)."""
        is_whole = not self.branch_cells and not any(cell for row in self.cells for cell in row)
        is_of_all = not self.fingerprint.steps_run or bool(self.fingerprint.settings.get("experts"))
        return any(self.velocities) and is_whole and is_of_all

    def velocity(self, step: int, output: int = 0) -> Velocity | None:
        """What the sampler of an output gets at a step; ``None`` for the model's own."""
        velocities = self.velocities_of(output)
        return velocities[step] if velocities else None

    def velocities_of(self, output: int) -> tuple[Velocity | None, ...]:
        return self.further_velocities[output - 1] if output and self.further_velocities else self.velocities

    def _check_velocity(self, step: int, output: int) -> None:
        velocity = self.velocity(step, output)
        if velocity is None:
            if self.is_skipped(step) and step in self.fingerprint.steps:
                raise ScheduleError(f"step {step} skips every group but has no velocity to go on with")
            return
        if step not in self.fingerprint.steps:
            raise ScheduleError(f"step {step} has a velocity, but the transformer does not run there; leave it out")
        if not velocity.terms:
            raise ScheduleError(f"the velocity of step {step} needs a term: {velocity}")
        for coefficient in (*velocity.terms.values(), velocity.latents, velocity.offset):
            _check_coefficient(coefficient, f"the velocity of step {step}")
        for source in velocity.terms:
            if not 0 <= source <= step or self.is_skipped(source):
                raise ScheduleError(
                    f"the velocity of step {step} reads that of step {source}, which is not an earlier step at which "
                    "the model runs"
                )

    def _check_cell(self, cells: Sequence[Sequence[Cell]], step: int, group: int, whose: str) -> None:
        cell = cells[step][group] or {}
        place = f"cell (step {step}, group {group}){whose}"
        if not cell and not self.is_skipped(step):
            raise ScheduleError(f"{place} combines no residual; compute it, or skip all groups of the step")
        for anchor, coefficient in cell.items():
            if not 0 <= anchor < step or cells[anchor][group] is not None:
                raise ScheduleError(
                    f"{place} reads step {anchor}, which is not an earlier step that computes the group"
                )
            _check_coefficient(coefficient, place)

    @classmethod
    def compute_all(cls, fingerprint: Fingerprint, groups: Sequence[tuple[int, int]] | None = None) -> Schedule:
        """The schedule that caches nothing."""
        ranges = tuple(groups) if groups is not None else ((0, fingerprint.num_blocks),)
        cells: list[Cell] = [None if step in fingerprint.steps else {} for step in range(fingerprint.num_steps)]
        seconds = tuple(float(hi - lo) for lo, hi in ranges)
        return cls(fingerprint, ranges, tuple((cell,) * len(ranges) for cell in cells), seconds, {"method": "full"})

    def to_step_mask(self) -> StepMask:
        """Which steps are computed, for stable-diffusion.cpp, cache-dit and SGLang, which take a mask of steps.

        How reused steps are forecast does not go with it: those engines have forecasts of their own.

        Raises:
            ScheduleError: it reuses some of the groups of blocks at a step and computes others, or its transformer
                runs at some of the steps only.
        """
        mask = []
        for step in range(self.num_steps):
            kinds = {cell is None for cells in (self.cells, *self.branch_cells.values()) for cell in cells[step]}
            if len(kinds) > 1:
                raise ScheduleError(
                    f"a mask has whole steps, and this schedule computes step {step} in part; take one of whole steps "
                    "(layercache.search), or plan with one group of blocks"
                )
            mask.append(int(kinds.pop()))
        if self.fingerprint.steps_run and not self.takes_experts:
            raise ScheduleError(
                f"a mask is of all steps of a run, and this schedule's transformer runs at "
                f"{len(self.fingerprint.steps)} of {self.num_steps}"
            )
        return StepMask(mask)

    @property
    def is_timed(self) -> bool:
        """Whether the groups' seconds were measured; where they were not, they are 1 or numbers of blocks."""
        blocks = tuple(float(hi - lo) for lo, hi in self.groups)
        return self.group_seconds not in ((1.0,) * len(blocks), blocks)

    @property
    def num_steps(self) -> int:
        return self.fingerprint.num_steps

    @property
    def used(self) -> float:
        """Share of the block time of the steps that are run that is computed, by the measured seconds of the groups."""
        branches = self.fingerprint.branches or ("",)
        rows = [self.cells_of(branch)[step] for branch in branches for step in self.fingerprint.steps]
        computed = [sum(cell is None for cell in column) for column in zip(*rows, strict=True)]
        return time_share(self.group_seconds, computed, [len(rows)] * len(computed))

    def _summary(self) -> tuple[str, Rows]:
        prints, own, psnr = self.fingerprint, self.fingerprint.steps, self.expected_psnr
        skipped = sum(self.is_skipped(step) for step in own)
        full = sum(all(cell is None for cell in self.cells[step]) for step in own)
        parts = {"in full": full, "in part": len(own) - full - skipped, "skipped": skipped}
        counts = ", ".join(f"{count} {name}" for name, count in parts.items() if count)
        groups = f"{len(self.groups)} group{'s' if len(self.groups) > 1 else ''}"
        return (
            f"Schedule of {prints.num_steps} steps for {prints.model_class}, {prints.num_blocks} blocks in {groups}",
            [
                ("computed", f"{self.used:.1%} of the block time; of {len(own)} steps {counts}"),
                ("expected", "PSNR {:.1f} dB, nine pictures of ten above {:.1f}".format(*psnr) if psnr else ""),
                ("made by", made_by_line(self.made_by, prints.package_version)),
                ("made with", settings_line(prints)),
            ],
        )

    def _fingerprint(self) -> Fingerprint:
        return self.fingerprint

    def _listed(self) -> tuple[float | None, Sequence[float | None]]:
        return self.used, self.expected_psnr or (None, None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a schedule file.

        Warns:
            LayerCacheWarning: its checksum was removed.

        Raises:
            FileFormatError: missing, damaged, changed, of another kind, or written by a newer version.
        """
        return cls.from_data(read_json(path, FORMAT, VERSION), str(path))

    def to_bytes(self) -> bytes:
        return self.to_json().encode()

    def to_json(self) -> str:
        """The text of its file, with a checksum."""
        return sealed_json(self.unsealed_json())

    def unsealed_json(self) -> str:
        """The same without a checksum, as it stands in the file of a front."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint.to_json(),
            "groups": [list(r) for r in self.groups],
            "group_seconds": list(self.group_seconds),
            "made_by": dict(self.made_by),
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}," for key, value in head.items()]
        text = "{\n" + "\n".join(lines) + '\n  "cells": ' + _rows_json(self.cells, "  ")
        if self.branch_cells:
            own = [f"    {json.dumps(name)}: " + _rows_json(cells, "    ") for name, cells in self.branch_cells.items()]
            text += ',\n  "branch_cells": {\n' + ",\n".join(own) + "\n  }"
        if self.velocities:
            given = [json.dumps(v and v.to_json(), allow_nan=False) for v in self.velocities]
            text += ',\n  "velocities": [\n    ' + ",\n    ".join(given) + "\n  ]"
        if self.further_velocities:
            more = [[v and v.to_json() for v in velocities] for velocities in self.further_velocities]
            text += ',\n  "further_velocities": ' + json.dumps(more, allow_nan=False)
        return text + "\n}\n"

    @classmethod
    def from_json(cls, text: str, name: str = "schedule") -> Self:
        """Parses what `to_json` wrote; ``name`` is used in messages.

        Raises:
            FileFormatError: as for `load`.
        """
        return cls.from_data(parse_json(text, FORMAT, VERSION, name), name)

    @classmethod
    def from_data(cls, data: Mapping[str, Any], name: str) -> Self:
        """Of what the JSON holds.

        Raises:
            FileFormatError: damaged, of another kind, or written by a newer version.
        """
        with entries(data, FORMAT, VERSION, name):
            return cls(
                fingerprint=Fingerprint.from_json(data["fingerprint"]),
                groups=tuple((int(lo), int(hi)) for lo, hi in data["groups"]),
                cells=_rows_from_json(data["cells"]),
                group_seconds=tuple(float(s) for s in data["group_seconds"]),
                made_by=dict(data.get("made_by", {})),
                velocities=tuple(v and Velocity.from_json(v) for v in data.get("velocities", ())),
                branch_cells={str(k): _rows_from_json(rows) for k, rows in data.get("branch_cells", {}).items()},
                further_velocities=tuple(
                    tuple(v and Velocity.from_json(v) for v in velocities)
                    for velocities in data.get("further_velocities", ())
                ),
            )


def call_arguments(plan: Any) -> dict[str, Any]:
    """Arguments that a pipeline's call takes to run a plan, `Schedule.call_arguments`; of other plans none."""
    return plan.call_arguments() if isinstance(plan, Schedule) else {}


def made_by_line(made_by: Mapping[str, Any], version: str) -> str:
    """How something was made, in a line: the method, what it was asked for, and by which version."""
    names = ("method", "origin", "solver", "forecast", "budget", "speedup", "note")
    given = [made_by[name] if name in names[:2] else f"{name} {made_by[name]}" for name in names if made_by.get(name)]
    return joined([*given, f"layercache {version}"])


def time_share(seconds: Sequence[float], counts: Sequence[int], totals: Sequence[int]) -> float:
    """``sum(seconds * counts) / sum(seconds * totals)`` without rounding on the way.

    Half the steps of every group are half the time then, whatever the seconds, and no budget is missed by a digit.
    """
    spent, due = (sum(Fraction(float(s)) * n for s, n in zip(seconds, own, strict=True)) for own in (counts, totals))
    return float(Fraction(spent) / Fraction(due))


def _check_coefficient(value: float, place: str) -> None:
    """Raises `ScheduleError` where a residual times the coefficient could not be trusted."""
    if not math.isfinite(value):
        raise ScheduleError(f"{place} has the coefficient {value}, which is not finite")
    if abs(value) > LARGEST_COEFFICIENT:
        raise ScheduleError(
            f"{place} has the coefficient {value:g}; none is larger than {LARGEST_COEFFICIENT:g} in a schedule that "
            "gives pictures, plan again"
        )


def _is_skip(row: Sequence[Cell]) -> bool:
    return all(cell is not None and not cell for cell in row)


def _rows_json(cells: Sequence[Sequence[Cell]], indent: str) -> str:
    """One line per step."""
    lines = []
    for row in cells:
        items = ["compute" if cell is None else {str(a): c for a, c in cell.items()} for cell in row]
        lines.append(indent + "  " + json.dumps(items, allow_nan=False))
    return "[\n" + ",\n".join(lines) + "\n" + indent + "]"


def _rows_from_json(rows: Any) -> tuple[tuple[Cell, ...], ...]:
    return tuple(
        tuple(None if c == "compute" else {int(a): float(k) for a, k in c.items()} for c in row) for row in rows
    )


def check_groups(groups: Sequence[tuple[int, int]], num_blocks: int) -> None:
    """Raises `ScheduleError` unless the ranges tile ``0..num_blocks`` in order, each with a block at least."""
    expected = 0
    for lo, hi in groups:
        if lo != expected or hi <= lo:
            raise ScheduleError(f"groups must tile the blocks 0..{num_blocks} in order, got {list(groups)}")
        expected = hi
    if expected != num_blocks:
        raise ScheduleError(f"groups end at block {expected}, the model has {num_blocks} blocks")
