"""`Front`: schedules that were tried on calibration samples, and the best of them for every amount of compute."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np

from layercache._utils.checksum import sealed_json
from layercache._utils.formats import FRONT, entries, read_json
from layercache._utils.metrics import Summary, summarise
from layercache._utils.summaries import Rows, Summarised, joined
from layercache._utils.validate import described
from layercache.errors import ArgumentError, BudgetError, CalibrationError, FileFormatError
from layercache.schedule.fingerprint import Fingerprint, settings_line
from layercache.schedule.pretrained import Pretrained
from layercache.schedule.schedule import LONGEST_SECONDS, Schedule

FORMAT = FRONT
VERSION = 2
SLACK = 1e-9
TARGETS = {
    "budget": "budget=0.6 (share of the block time)",
    "full_steps": "full_steps=12 (the same, as so many full steps)",
    "speedup": "speedup=1.4 (of the whole denoising loop)",
    "min_psnr": "min_psnr=40 (mean PSNR in dB)",
}


@dataclass(frozen=True)
class Point:
    """A schedule and what it gave.

    Attributes:
        schedule: with its forecasts.
        origin: how it was found, for people.
        psnr: per calibration picture, in dB against the full run.
        held_out: the same of pictures that nothing was fitted to; empty if there were none.
        expected: per calibration picture, what it would give had nothing been fitted to it; empty if that is not known.
    """

    schedule: Schedule
    origin: str
    psnr: tuple[float, ...]
    held_out: tuple[float, ...] = ()
    expected: tuple[float, ...] = ()

    @property
    def used(self) -> float:
        return self.schedule.used

    @property
    def calibration(self) -> Summary:
        return summarise(self.psnr)

    @property
    def validation(self) -> Summary | None:
        return summarise(self.held_out) if self.held_out else None

    @property
    def likely(self) -> tuple[float, ...]:
        """PSNR in dB of pictures like those of the calibration: ``expected``, or what they had where unknown."""
        return self.expected or self.psnr


def quality(psnr: Sequence[float], tail: float) -> float:
    """``(1 - tail) * mean + tail * 10 % quantile``: with a tail weight, single pictures that go astray count."""
    summary = summarise(psnr)
    return (1 - tail) * summary.mean + tail * summary.quantile10


def check_one_target(targets: Mapping[str, float | None], ways: Iterable[str], more: str = "") -> None:
    """Raises `BudgetError` unless exactly one target is given, and names the ``ways`` to do so; ``more`` comes last.

    An `ArgumentError` where it is no number.
    """
    given = [name for name, value in targets.items() if value is not None]
    for name in given:
        check_number(name, targets[name], TARGETS[name])
    if len(given) == 1:
        return
    *known, last = [TARGETS[name] for name in ways]
    wanted = f"one target, not {' and '.join(given)}" if given else "a target"
    raise BudgetError(f"give {wanted}: {', '.join(known)} or {last}{more}")


def check_number(name: str, value: Any, example: str) -> None:
    """Raises `ArgumentError` where an argument is no number, and says what to give instead, such as the example."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ArgumentError(f"{name} must be a number, got {described(value)}; give {example}", argument=name)


@dataclass(frozen=True, repr=False)
class Front(Summarised, Pretrained):
    """The Pareto front ``used -> quality`` of everything that was tried; less used comes first.

    Attributes:
        points: each of higher `quality` than all that use less.
        seconds: of a step, ``(blocks, everything else, a skipped or reused step's own)``; for speedups.
        tried: how many runs the search took: the full one, and each schedule's; those of a search that was stopped and
            went on are counted too.
        notes: what the search found out on the way, a sentence each.

    Raises:
        CalibrationError: on construction, when seconds are negative or not finite, or a PSNR is not a number.
    """

    KIND: ClassVar[str] = FORMAT
    SOURCE: ClassVar[str] = "layercache.search gives one, layercache.Front.load(path) reads one"

    points: tuple[Point, ...]
    seconds: tuple[float, float, float]
    tried: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        blocks, fixed, reuse = self.seconds
        if not (0 < blocks <= LONGEST_SECONDS and 0 <= fixed <= LONGEST_SECONDS and 0 <= reuse <= LONGEST_SECONDS):
            raise CalibrationError(f"the measured seconds are not usable: {self.seconds}")
        for point in self.points:
            if any(math.isnan(value) for value in (*point.psnr, *point.held_out, *point.expected)):
                raise CalibrationError("a PSNR is not a number; search again")

    @classmethod
    def of(
        cls,
        points: Iterable[Point],
        seconds: Sequence[float],
        tried: int = 0,
        notes: Iterable[str] = (),
        tail: float = 0.0,
    ) -> Front:
        """Keeps of all points those that no other point beats in `quality` with this tail weight."""
        kept: list[Point] = []
        for point in sorted(points, key=lambda p: (p.used, -quality(p.likely, tail))):
            if not kept or quality(point.likely, tail) > quality(kept[-1].likely, tail):
                kept.append(point)
        blocks, fixed, reuse = seconds
        return cls(tuple(kept), (blocks, fixed, reuse), tried, tuple(notes))

    def speedup(self, point: Point) -> float:
        """Expected speedup of the denoising loop, by the measured seconds (docs/methods.md, Budget and speedup)."""
        blocks, fixed, reuse = self.seconds
        return (fixed + blocks) / (fixed + point.used * blocks + (1 - point.used) * reuse)

    def choose(
        self,
        budget: float | None = None,
        *,
        speedup: float | None = None,
        min_psnr: float | None = None,
        percentile: float | None = None,
    ) -> Point:
        """The best point within a budget or at a speedup, or the one of least used with this PSNR.

        Args:
            budget: share of the block time, above 0 and at most 1.
            speedup: of the denoising loop, at least 1.
            min_psnr: in dB, of `Point.likely`: their mean.
            percentile: of them that ``min_psnr`` is asked of instead, 0 to 100: with 10, nine pictures in ten reach it.

        Raises:
            ArgumentError: a condition, or ``percentile``, is no number.
            BudgetError: not exactly one condition, or none of the points fulfils it.
        """
        targets = {"budget": budget, "speedup": speedup, "min_psnr": min_psnr}
        check_one_target(targets, targets)
        if percentile is not None:
            check_number("percentile", percentile, "percentile=10")
        if percentile is not None and not (min_psnr is not None and 0 <= percentile <= 100):
            raise BudgetError(
                f"percentile is what min_psnr is asked of, from 0 to 100, got {percentile}", argument="percentile"
            )
        if not self.points:
            raise BudgetError("the front is empty; search for schedules first (layercache.search)")
        if min_psnr is not None:
            reached = [
                float(np.mean(p.likely) if percentile is None else np.percentile(p.likely, percentile))
                for p in self.points
            ]
            fitting = [p for p, psnr in zip(self.points, reached, strict=True) if psnr >= min_psnr][:1]
            known = f"the best schedule found reaches {max(reached):.1f} dB"
        elif budget is not None:
            if not 0 < budget <= 1:
                raise BudgetError(
                    f"budget must be a share of the block time above 0 and at most 1, got {budget}", argument="budget"
                )
            fitting = [p for p in self.points if p.used <= budget + SLACK]
            known = f"the cheapest schedule found uses {self.points[0].used:.3f}"
        else:
            assert speedup is not None
            if not (math.isfinite(speedup) and speedup >= 1):
                raise BudgetError(f"speedup must be a number of at least 1, got {speedup}", argument="speedup")
            fitting = [p for p in self.points if self.speedup(p) >= speedup - SLACK]
            known = f"the fastest schedule found has {self.speedup(self.points[0]):.2f}"
        if not fitting:
            refused = next(name for name, value in targets.items() if value is not None)
            raise BudgetError(
                f"no schedule of this front fulfils that: {known}; search with other budgets", argument=refused
            )
        return fitting[-1]

    def _summary(self) -> tuple[str, Rows]:
        if not self.points:
            return "Front of no schedules", [("notes", joined(self.notes))]
        prints, count = self.points[0].schedule.fingerprint, len(self.points)
        likely = [summarise(point.likely) for point in self.points]
        ends = [self.points[0], self.points[-1]]
        speeds = " to ".join(f"{self.speedup(point):.2f}x" for point in ends)
        tenths = " to ".join(f"{one.quantile10:.1f}" for one in (likely[0], likely[-1]))
        return (
            f"Front of {count} schedule{'s' if count > 1 else ''} of {prints.num_steps} steps for {prints.model_class}",
            [
                ("computed", f"{' to '.join(f'{p.used:.3f}' for p in ends)} of the block time, speed-up {speeds}"),
                ("expected", f"PSNR {likely[0].mean:.1f} to {likely[-1].mean:.1f} dB, nine pictures of ten {tenths}"),
                ("search", joined([f"{self.tried} runs", *self.notes])),
                ("made with", settings_line(prints)),
            ],
        )

    def _fingerprint(self) -> Fingerprint:
        if not self.points:
            raise CalibrationError("the front is empty, and of no model; search first (layercache.search)")
        prints = [point.schedule.fingerprint for point in self.points]
        return next((one for one in prints if one.sigmas_given), prints[0])  # what is called as these are serves all

    def _listed(self) -> tuple[float | None, Sequence[float | None]]:
        best = summarise(self.points[-1].likely)
        return self.points[0].used, (best.mean, best.quantile10)

    def to_bytes(self) -> bytes:
        data = {
            "format": FORMAT,
            "version": VERSION,
            "seconds": list(self.seconds),
            "tried": self.tried,
            "notes": list(self.notes),
            "points": [
                {
                    "used": point.used,
                    "origin": point.origin,
                    "psnr": list(point.psnr),
                    "held_out": list(point.held_out),
                    "expected": list(point.expected),
                    "schedule": json.loads(point.schedule.unsealed_json()),
                }
                for point in self.points
            ],
        }
        return sealed_json(json.dumps(data, allow_nan=False) + "\n").encode()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a front file.

        Warns:
            LayerCacheWarning: its checksum was removed.

        Raises:
            FileFormatError: missing, damaged, changed, of another kind, or written by a newer version.
        """
        return cls.from_data(read_json(path, FORMAT, VERSION), os.fspath(path))

    @classmethod
    def from_data(cls, data: Mapping[str, Any], name: str) -> Self:
        """Of what the JSON holds; ``name`` is used in messages.

        Raises:
            FileFormatError: damaged, of another kind, or written by a newer version.
        """
        with entries(data, FORMAT, VERSION, name):
            blocks, fixed, reuse = (float(value) for value in data["seconds"])
            points = tuple(_point(entry, f"schedule {k} of {name}") for k, entry in enumerate(data["points"]))
            notes = tuple(str(note) for note in data.get("notes", ()))
            return cls(points, (blocks, fixed, reuse), int(data["tried"]), notes)


def _point(entry: Any, name: str) -> Point:
    if not entry["psnr"]:
        raise FileFormatError(f"{name} has no PSNR of any picture; search again")
    return Point(
        schedule=Schedule.from_data(entry["schedule"], name),
        origin=str(entry["origin"]),
        psnr=tuple(float(value) for value in entry["psnr"]),
        held_out=tuple(float(value) for value in entry["held_out"]),
        expected=tuple(float(value) for value in entry.get("expected", ())),
    )
