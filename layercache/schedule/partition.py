"""Cutting a transformer's blocks into layer groups."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np

from layercache.errors import ScheduleError
from layercache.schedule.schedule import check_groups

Partition = str | Sequence[tuple[int, int]]
NAMES = ("thirds", "sixth", "measured", "whole")


def cut(partition: Partition, list_lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Block ranges of a named or explicit partition.

    ``thirds``: boundaries at ``round(L/3)`` and ``round(2L/3)``; ``sixth``: at ``L//6`` and ``L - L//6``;
    ``whole``: one group. In a model with several block lists the boundary nearest to each transition is
    moved onto it. Source: docs/methods.md, Groups of blocks. (``measured`` is cut by `cut_by_curves`.)

    Args:
        partition: a name, or block ranges that tile the blocks.
        list_lengths: number of blocks in each block list, in order.

    Raises:
        ScheduleError: unknown name, or ranges that do not tile the blocks.
    """
    total = sum(list_lengths)
    if partition == "thirds":
        inner = [round(total / 3), round(2 * total / 3)]
    elif partition == "sixth":
        inner = [total // 6, total - total // 6]
    elif partition == "whole":
        return ((0, total),)
    elif isinstance(partition, str):
        raise ScheduleError(
            f"unknown partition {partition!r}; choose one of {', '.join(NAMES)} or give block ranges",
            argument="partition",
        )
    else:
        groups = tuple((int(lo), int(hi)) for lo, hi in partition)
        check_groups(groups, total)
        return groups
    return _ranges(_snap(inner, list_lengths), total)


def _snap(inner: list[int], list_lengths: Sequence[int]) -> list[int]:
    for transition in np.cumsum(list_lengths)[:-1].tolist():
        nearest = min(range(len(inner)), key=lambda k: abs(inner[k] - transition))
        inner[nearest] = transition
    return inner


def _ranges(inner: Sequence[int], total: int) -> tuple[tuple[int, int], ...]:
    edges = sorted({0, total, *(b for b in inner if 0 < b < total)})
    return tuple(pairwise(edges))


def cut_behind_skips(
    groups: Sequence[tuple[int, int]], skips: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Groups with further boundaries, so that any of them may be reused: see `broken_skip`."""
    edges = {0, *(hi for _, hi in groups)}
    while True:
        found = _ranges(sorted(edges), max(edges))
        broken = {start + 1 for start, end in skips if _hides(found, start, end)}
        if not broken:
            return found
        edges |= broken


def broken_skip(
    groups: Sequence[tuple[int, int]], reused: Collection[int], skips: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """A long skip connection that would give a computed block something else than what its other end returned.

    What a group gives as a whole is there where it is reused, what blocks inside it would have given is not.

    Args:
        groups: block ranges.
        reused: numbers of those that are reused in a step.
        skips: pairs of block numbers, where the first one's output is read by the second.
    """
    for start, end in skips:
        if _group_of(groups, start) in reused and _group_of(groups, end) not in reused and _hides(groups, start, end):
            return start, end
    return None


def _hides(groups: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    """Whether a block's output is inside a group, and read outside of it."""
    own = _group_of(groups, start)
    return start != groups[own][1] - 1 and own != _group_of(groups, end)


def _group_of(groups: Sequence[tuple[int, int]], block: int) -> int:
    return next(number for number, (lo, hi) in enumerate(groups) if lo <= block < hi)


def cut_by_curves(curves: np.ndarray, num_groups: int) -> tuple[tuple[int, int], ...]:
    """Groups of similar blocks: least sum of within-group variance of the blocks' error curves.

    Args:
        curves: error of each block at each step, ``[N, L]``, finite.
        num_groups: number of contiguous groups, at most ``L``.

    Exact, by dynamic programming over the boundaries. Source: docs/methods.md, Groups of blocks.
    """
    steps, blocks = curves.shape
    if not 1 <= num_groups <= blocks:
        raise ScheduleError(f"cannot cut {blocks} blocks into {num_groups} groups", argument="num_groups")
    sums = np.concatenate([np.zeros((steps, 1)), curves.cumsum(axis=1)], axis=1)
    squares = np.concatenate([np.zeros((steps, 1)), (curves**2).cumsum(axis=1)], axis=1)

    def scatter(lo: int, hi: int) -> float:
        total, square = sums[:, hi] - sums[:, lo], squares[:, hi] - squares[:, lo]
        return float((square - total**2 / (hi - lo)).sum())

    best = {(0, 0): (0.0, 0)}
    for count in range(1, num_groups + 1):
        for hi in range(count, blocks + 1):
            options = [(best[count - 1, lo][0] + scatter(lo, hi), lo) for lo in range(hi) if (count - 1, lo) in best]
            best[count, hi] = min(options)
    edges = [blocks]
    for count in range(num_groups, 0, -1):
        edges.append(best[count, edges[-1]][1])
    return tuple(pairwise(reversed(edges)))
