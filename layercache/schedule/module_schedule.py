"""`ModuleSchedule`: for every step and every attention or feed-forward module, compute it or take its last output."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from layercache._utils.checksum import sealed_json
from layercache._utils.formats import MODULES, entries, parse_json, read_json
from layercache._utils.summaries import Rows, Summarised
from layercache.errors import ScheduleError
from layercache.schedule.fingerprint import Fingerprint, check_steps, settings_line
from layercache.schedule.pretrained import Pretrained
from layercache.schedule.schedule import made_by_line

FORMAT, VERSION = MODULES, 3
OLDER = 2  # of files without weights and derived branches
REUSED_STEP = "reuse"


@dataclass(frozen=True, repr=False)
class ModuleSchedule(Summarised, Pretrained):
    """What to do at every step.

    Attributes:
        fingerprint: what it is valid for.
        units: names of the modules (`ModuleUnit`).
        computed: ``computed[step][unit]``; what is not computed is the output of the newest step that was.
        reused_steps: steps that take the final hidden state of the step before as it is; nothing else runs there.
        seconds: measured seconds of every unit, or other weights; of `used`.
        weights: per step, what a module that is not computed adds of the difference between its two newest outputs, the
            newest minus the one before; none at all where it is empty.
        derived: per step, the weights of the low and the high band of the stored difference between guidance branches,
            where the branches behind the first are not run but made from its output; ``None`` where they run. Empty:
            they always run.
        made_by: how it was found, for people to read.

    Raises:
        ScheduleError: on construction, when the parts contradict each other.
    """

    KIND: ClassVar[str] = FORMAT

    fingerprint: Fingerprint
    units: tuple[str, ...]
    computed: tuple[tuple[bool, ...], ...]
    reused_steps: frozenset[int] = frozenset()
    seconds: tuple[float, ...] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    derived: tuple[tuple[float, float] | None, ...] = ()

    def __post_init__(self) -> None:
        check_steps(self.fingerprint)
        steps = self.fingerprint.num_steps
        if len(self.computed) != steps or any(len(row) != len(self.units) for row in self.computed):
            raise ScheduleError(f"a module schedule needs {steps} rows of {len(self.units)} decisions")
        first = self.fingerprint.steps[0]
        if not all(self.computed[first]) or first in self.reused_steps:
            raise ScheduleError(f"step {first} must compute every module; there is nothing to reuse yet")
        if not all(0 <= step < steps for step in self.reused_steps):
            raise ScheduleError(f"reused steps must lie within the {steps} steps, got {sorted(self.reused_steps)}")
        if self.seconds and (len(self.seconds) != len(self.units) or not all(_positive(s) for s in self.seconds)):
            raise ScheduleError("seconds must hold one positive number per module")
        if self.weights and (len(self.weights) != steps or not all(map(math.isfinite, self.weights))):
            raise ScheduleError(f"weights must hold {steps} finite numbers, one per step")
        if self.derived and (len(self.derived) != steps or self.derived[0] is not None):
            raise ScheduleError(f"derived must hold {steps} entries, and step 0 must run every branch")
        if not all(pair is None or (len(pair) == 2 and all(map(math.isfinite, pair))) for pair in self.derived):
            raise ScheduleError("a derived step needs two finite weights, of the low and of the high band")

    @property
    def num_steps(self) -> int:
        return self.fingerprint.num_steps

    @property
    def used(self) -> float:
        """Share of the modules' time that is computed, over the steps at which the transformer runs.

        Where branches are derived from the first at some steps, over all of those that the fingerprint names; over two
        where it names none.
        """
        branches = len(self.fingerprint.branches) or 2
        weights, steps = self.seconds or (1.0,) * len(self.units), self.fingerprint.steps
        spent = 0.0
        for step in steps:
            if step not in self.reused_steps:
                own = sum(weight for weight, computed in zip(weights, self.computed[step], strict=True) if computed)
                spent += own / branches if self.derives(step) else own
        return spent / (len(steps) * sum(weights))

    def derives(self, step: int) -> bool:
        """Whether the branches behind the first are made from its output at this step."""
        return bool(self.derived) and self.derived[step] is not None

    def stored_at(self) -> list[list[bool]]:
        """``[step][unit]``: whether a later step reads the output that a unit gives at a step."""
        stored = [[False] * len(self.units) for _ in range(self.num_steps)]
        run = [step for step in range(self.num_steps) if step not in self.reused_steps]
        for unit in range(len(self.units)):
            newest: list[int] = []  # the newest two computed steps, the newer one first
            for step in run:
                if self.computed[step][unit]:
                    newest = [step, *newest[:1]]
                    continue
                for anchor in newest[: 2 if self.weights and self.weights[step] else 1]:
                    stored[anchor][unit] = True
        return stored

    def _summary(self) -> tuple[str, Rows]:
        prints, reused = self.fingerprint, len(self.reused_steps)
        count = sum(map(self.derives, range(self.num_steps)))
        kept = f"; {reused} of {self.num_steps} steps take the last hidden state as it is" if reused else ""
        return (
            f"ModuleSchedule of {len(prints.steps)} steps for {prints.model_class}, {len(self.units)} modules",
            [
                ("computed", f"{self.used:.1%} of the modules' time{kept}"),
                ("branches", f"derived from the first at {count} steps" if count else ""),
                ("made by", made_by_line(self.made_by, prints.package_version)),
                ("made with", settings_line(prints)),
            ],
        )

    def _fingerprint(self) -> Fingerprint:
        return self.fingerprint

    def _listed(self) -> tuple[float | None, Sequence[float | None]]:
        return self.used, (None, None)

    def to_bytes(self) -> bytes:
        return self.to_json().encode()

    def to_json(self) -> str:
        """The text of its file, with a checksum."""
        extra = {"weights": list(self.weights), "derived": [pair and list(pair) for pair in self.derived]}
        extra = {key: value for key, value in extra.items() if value}
        head = {
            "format": FORMAT,
            "version": VERSION if extra else OLDER,
            "fingerprint": self.fingerprint.to_json(),
            "made_by": dict(self.made_by),
            "seconds": list(self.seconds),
            "units": list(self.units),
            **extra,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}," for key, value in head.items()]
        rows = [
            REUSED_STEP if step in self.reused_steps else "".join("01"[c] for c in row)
            for step, row in enumerate(self.computed)
        ]
        body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        return sealed_json("{\n" + "\n".join(lines) + '\n  "steps": [\n' + body + "\n  ]\n}\n")

    @classmethod
    def from_json(cls, text: str, name: str = "module schedule") -> Self:
        """Parses what `to_json` wrote; ``name`` is used in messages.

        Raises:
            FileFormatError: damaged, changed, of another kind, or written by a newer version.
        """
        return cls.from_data(parse_json(text, FORMAT, VERSION, name), name)

    @classmethod
    def from_data(cls, data: Mapping[str, Any], name: str) -> Self:
        """Of what the JSON holds; ``name`` is used in messages.

        Raises:
            FileFormatError: damaged, of another kind, or written by a newer version.
        """
        with entries(data, FORMAT, VERSION, name):
            rows = [str(row) for row in data["steps"]]
            count = len(data["units"])
            if any(row != REUSED_STEP and set(row) - {"0", "1"} for row in rows):
                raise ScheduleError("a step holds something else than 0 and 1")
            return cls(
                Fingerprint.from_json(data["fingerprint"]),
                tuple(str(unit) for unit in data["units"]),
                tuple((False,) * count if row == REUSED_STEP else tuple(c == "1" for c in row) for row in rows),
                frozenset(step for step, row in enumerate(rows) if row == REUSED_STEP),
                tuple(float(s) for s in data["seconds"]),
                dict(data.get("made_by", {})),
                tuple(float(weight) for weight in data.get("weights", ())),
                tuple(None if pair is None else tuple(map(float, pair)) for pair in data.get("derived", ())),  # type: ignore[misc]
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file.

        Raises:
            FileFormatError: missing, damaged, changed, of another kind, or written by a newer version.
        """
        return cls.from_data(read_json(path, FORMAT, VERSION), str(path))


def reusing(
    fingerprint: Fingerprint,
    units: Sequence[str],
    reused: Mapping[int, Collection[str]],
    seconds: Sequence[float] = (),
) -> ModuleSchedule:
    """A schedule whose modules ``reused[step]`` take their last output at a step; everything else is computed."""
    rows = (tuple(unit not in reused.get(step, ()) for unit in units) for step in range(fingerprint.num_steps))
    return ModuleSchedule(fingerprint, tuple(units), tuple(rows), seconds=tuple(seconds))


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
