"""Planning the device memory of a schedule whose stored tensors are kept in host memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from layercache.schedule.memory_plan import RowLayout, lay_out, lay_out_velocities
from layercache.schedule.schedule import Schedule

Rows = tuple[int, int]
"""The first token of a slice and the one behind its last."""


def slices_of(tokens: int, slices: int) -> list[Rows]:
    """So many slices of some tokens, the larger ones first."""
    size, larger = divmod(tokens, slices)
    edges = list(itertools.accumulate((size + (number < larger) for number in range(slices)), initial=0))
    return list(itertools.pairwise(edges))


def staged_bytes(
    schedule: Schedule,
    streams: Mapping[str, tuple[int, int]],
    latents: int = 0,
    text_leaves: bool = False,
    further: Sequence[int] = (),
    slices: int = 1,
    tokens: tuple[int, int] = (1, 1),
    launch_terms: int = 16,
) -> int:
    """The most that is on the device at a time of what a schedule stores, where that is kept in host memory.

    What one launch reads is there while what the next one reads is on its way; beside them what is being stored, and
    the velocities that the step reads.

    Args:
        streams, latents, text_leaves, further: as of `layercache.schedule.memory_plan.stored_bytes`.
        slices: of the tokens, in which residuals come back.
        tokens: of the image and of the text, for ``slices`` above 1.
        launch_terms: residuals of a stream that one launch reads at most (`layercache.ops.MAX_TERMS`).
    """
    velocities = [lay_out_velocities(schedule, output)[0] for output in range(1 + len(further))]
    pairs = [(own, size) for own, size in zip(velocities, (latents, *further), strict=True) if own]
    layouts = [(lay_out(schedule, bool(own[1]), name, text_leaves), own) for name, own in streams.items()]
    most = 0
    for step in range(schedule.num_steps):
        read = sum(len(own[step].reads) * size for own, size in pairs)
        stored = (size for own, size in pairs if own[step].capture is not None)
        forwards = (_of_forward(layout.rows[step], own, slices, tokens, launch_terms) for layout, own in layouts)
        most = max([most, *(read + size for size in itertools.chain(stored, forwards)), read])
    return most


def _of_forward(row: RowLayout, sizes: tuple[int, int], slices: int, tokens: tuple[int, int], terms: int) -> int:
    """The same of the residuals of one forward."""
    by_group = [list(_launches(row, group, sizes, slices, tokens, terms)) for group in range(len(row.runs))]
    pieces = list(itertools.chain(*itertools.chain(*by_group)))  # in the order in which they are read
    most = ahead = pieces[0] if pieces else 0
    done = 0
    for captures, launches in zip(row.captures, by_group, strict=True):
        if captures is not None:
            most = max(most, ahead + sizes[0] + (0 if captures[1] is None else sizes[1]))
        for _ in itertools.chain(*launches):
            done += 1
            ahead = pieces[done] if done < len(pieces) else 0
            most = max(most, pieces[done - 1] + ahead)
    return most


def _launches(
    row: RowLayout, group: int, sizes: tuple[int, int], slices: int, tokens: tuple[int, int], terms: int
) -> Iterator[list[int]]:
    """Of every launch at the end of a group, the bytes of its slices."""
    run = row.runs[group]
    if run is None:
        return
    streams = [0] if run.text_slots is None else [0, 1]
    count = min(slices, *(tokens[stream] for stream in streams)) if slices > 1 else 1
    for lo in range(0, len(run.coefficients), terms):
        used = len(run.coefficients[lo : lo + terms])
        by_stream = [
            [used * (hi - first) * sizes[stream] // tokens[stream] for first, hi in slices_of(tokens[stream], count)]
            for stream in streams
        ]
        yield [sum(parts) for parts in zip(*by_stream, strict=True)]
