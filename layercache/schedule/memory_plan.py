"""Planning memory ahead: which slot holds which residual, from the schedule alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from layercache.schedule.schedule import Schedule, Velocity

COMPUTE, CAPTURE, REUSE = "compute", "capture", "reuse"


class GroupAction(NamedTuple):
    """What happens to one group at one step.

    Attributes:
        kind: `COMPUTE`, `CAPTURE` (compute and store the residual) or `REUSE`.
        text: `CAPTURE` also stores the text residual; `REUSE` also advances the text stream.
        ends_run: a reused group behind which a computed one, or the head, follows. Without one at its end, a run
            passes the streams on as they are: the step is skipped.
    """

    kind: str
    text: bool = False
    ends_run: bool = False


@dataclass(frozen=True)
class Run:
    """A run of consecutive reused groups: one linear combination per stream.

    ``image_slots``, ``text_slots`` (``None`` when nothing reads the text behind the run) and
    ``coefficients`` have one entry per stored residual.
    """

    image_slots: tuple[int, ...]
    text_slots: tuple[int, ...] | None
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class RowLayout:
    """One step: the action of every group, the slots it fills, the runs it reuses.

    Attributes:
        actions: per group.
        captures: per group, ``(image slot, text slot or None)`` where the residual is stored.
        runs: per group, the run that ends there.
        reads: ``(image slot, (anchor step, group))`` that must be in place for the row to be valid.
    """

    actions: tuple[GroupAction, ...]
    captures: tuple[tuple[int, int | None] | None, ...]
    runs: tuple[Run | None, ...]
    reads: tuple[tuple[int, tuple[int, int]], ...]


@dataclass(frozen=True)
class VelocityLayout:
    """What happens to the velocity of one step on its way to the sampler.

    Attributes:
        reads: ``(slot, step)`` of the stored velocities that are combined.
        coefficients: theirs, in the same order.
        fresh: coefficient of the model's own output, ``None`` where it is not used.
        latents: coefficient of the latents, ``None`` where they are not used.
        offset: what is added to all elements.
        capture: slot that stores the model's own output.
        changes: whether the sampler gets anything else than the model's own output.
    """

    reads: tuple[tuple[int, int], ...] = ()
    coefficients: tuple[float, ...] = ()
    fresh: float | None = 1.0
    latents: float | None = None
    offset: float = 0.0
    capture: int | None = None
    changes: bool = False


@dataclass(frozen=True)
class Layout:
    """All rows of a schedule and the number of slots they share."""

    rows: tuple[RowLayout, ...]
    image_slots: int
    text_slots: int
    velocities: tuple[VelocityLayout, ...] = ()
    velocity_slots: int = 0


class _Pool:
    """Slots handed out so that one is taken again only after the last step that reads it."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[int] = []
        self._busy: list[tuple[int, int]] = []

    def take(self, step: int, last_use: int) -> int:
        while self._busy and self._busy[0][0] < step:
            heapq.heappush(self._free, heapq.heappop(self._busy)[1])
        if self._free:
            slot = heapq.heappop(self._free)
        else:
            slot = self.size
            self.size += 1
        heapq.heappush(self._busy, (last_use, slot))
        return slot


def _runs(row: Sequence[Any], joined: bool = True) -> Iterator[range]:
    """Ranges of consecutive reused groups of a row of cells; each for itself unless ``joined``."""
    if not joined and any(row):
        yield from (range(group, group + 1) for group, cell in enumerate(row) if cell is not None)
        return
    start = None
    for group, cell in enumerate((*row, None)):
        if cell is not None and start is None:
            start = group
        elif cell is None and start is not None:
            yield range(start, group)
            start = None


def lay_out(
    schedule: Schedule, has_text: bool, branch: str = "", text_leaves: bool = False, joined: bool = True
) -> Layout:
    """Slots of one branch by liveness: a residual that is never read is never stored, a dead one gives up its slot.

    The text residual is stored only where a run that reads it is followed by a computed group, or where the head reads
    the text stream too (``text_leaves``). Consecutive reused groups are one run unless ``joined`` is false.
    Source: docs/methods.md, Stored residuals.
    """
    num_groups, cells = len(schedule.groups), schedule.cells_of(branch)
    last_image: dict[tuple[int, int], int] = {}
    last_text: dict[tuple[int, int], int] = {}
    for step, row in enumerate(cells):
        for run in _runs(row, joined):
            for group in run:
                for anchor in row[group] or ():
                    last_image[anchor, group] = step
                    if has_text and (text_leaves or run.stop < num_groups):
                        last_text[anchor, group] = step

    images, texts = _Pool(), _Pool()
    slots: dict[tuple[int, int], tuple[int, int | None]] = {}
    rows = []
    for step, row in enumerate(cells):
        actions = [GroupAction(COMPUTE)] * num_groups
        captures: list[tuple[int, int | None] | None] = [None] * num_groups
        runs: list[Run | None] = [None] * num_groups
        reads: list[tuple[int, tuple[int, int]]] = []
        for run in _runs(row, joined):
            text = has_text and (text_leaves or run.stop < num_groups)
            terms = [((anchor, g), c) for g in run for anchor, c in sorted((row[g] or {}).items(), reverse=True)]
            for group in run:
                actions[group] = GroupAction(REUSE, text, bool(terms) and group == run.stop - 1)
            if not terms:
                continue
            runs[run.stop - 1] = Run(
                image_slots=tuple(slots[key][0] for key, _ in terms),
                text_slots=tuple(slots[key][1] for key, _ in terms) if text else None,  # type: ignore[misc]
                coefficients=tuple(c for _, c in terms),
            )
            reads += [(slots[key][0], key) for key, _ in terms]
        for group in range(num_groups):
            key = (step, group)
            if row[group] is None and key in last_image:
                text_slot = texts.take(step, last_text[key]) if key in last_text else None
                slots[key] = captures[group] = (images.take(step, last_image[key]), text_slot)
                actions[group] = GroupAction(CAPTURE, text_slot is not None)
        rows.append(RowLayout(tuple(actions), tuple(captures), tuple(runs), tuple(reads)))
    return Layout(tuple(rows), images.size, texts.size, *lay_out_velocities(schedule))


def stored_bytes(
    schedule: Schedule,
    streams: Mapping[str, tuple[int, int]],
    latents: int = 0,
    text_leaves: bool = False,
    further: Sequence[int] = (),
) -> int:
    """Memory of everything that a schedule stores, all branches together.

    Args:
        streams: per branch, the bytes of the image and of the text stream (0 without one).
        latents: bytes of a velocity.
        further: the same of each output behind the first.
    """
    total = 0
    for branch, (image, text) in streams.items():
        layout = lay_out(schedule, bool(text), branch, text_leaves)
        total += layout.image_slots * image + layout.text_slots * text
    sizes = enumerate((latents, *further))
    return total + sum(lay_out_velocities(schedule, output)[1] * size for output, size in sizes)


def lay_out_velocities(schedule: Schedule, output: int = 0) -> tuple[tuple[VelocityLayout, ...], int]:
    """The same for the velocities of an output: every step's combination, and the slots it needs."""
    velocities = schedule.velocities_of(output)
    if not velocities:
        return (), 0
    last_use = {source: step for step, v in enumerate(velocities) if v for source in v.terms if source < step}
    pool, slots = _Pool(), dict[int, int]()
    layouts = []
    for step, velocity in enumerate(velocities):
        older = [] if velocity is None else [(s, c) for s, c in velocity.terms.items() if s < step]
        reads = tuple((slots[source], source) for source, _ in older)
        if step in last_use:
            slots[step] = pool.take(step, last_use[step])
        layouts.append(
            VelocityLayout(
                reads=reads,
                coefficients=tuple(c for _, c in older),
                fresh=1.0 if velocity is None else velocity.terms.get(step),
                latents=(velocity.latents or None) if velocity else None,
                offset=velocity.offset if velocity else 0.0,
                capture=slots.get(step),
                changes=velocity is not None and velocity != Velocity({step: 1.0}),
            )
        )
    return tuple(layouts), pool.size
