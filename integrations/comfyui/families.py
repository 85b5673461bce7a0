"""Which models' blocks ComfyUI lets a node replace one by one, and which schedules of diffusers fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layercache.errors import ScheduleMismatchError
from layercache.schedule import Schedule

DOUBLE, SINGLE = "double_block", "single_block"


@dataclass(frozen=True)
class Family:
    """A kind of network of ComfyUI.

    Attributes:
        lists: its block lists in the order of its forward, each with the name of its blocks in ``patches_replace``.
        width: attribute with the channels of its streams.
        diffusers: transformer classes of diffusers with the same blocks in the same order.
        lengths: of their configurations, the entries with the blocks of each list.
    """

    lists: tuple[tuple[str, str], ...]
    width: str
    diffusers: tuple[str, ...]
    lengths: tuple[str, ...] = ("num_layers", "num_single_layers")


_TWO = (("double_blocks", DOUBLE), ("single_blocks", SINGLE))
_HUNYUAN = ("HunyuanVideo", "HunyuanVideoFramepack", "HunyuanVideo15", "HunyuanImage")
_WAN = (("blocks", DOUBLE),)

FAMILIES: dict[str, Family | None] = {
    "Flux": Family(_TWO, "hidden_size", ("FluxTransformer2DModel",)),
    "Chroma": Family(_TWO, "hidden_size", ("ChromaTransformer2DModel",)),
    "HunyuanVideo": Family(
        _TWO,
        "hidden_size",
        tuple(f"{name}Transformer{'2D' if name.endswith('Image') else '3D'}Model" for name in _HUNYUAN),
    ),
    "QwenImageTransformer2DModel": Family(
        (("transformer_blocks", DOUBLE),), "inner_dim", ("QwenImageTransformer2DModel",)
    ),
    "QwenImage21Transformer2DModel": Family(
        (("transformer_blocks", SINGLE),), "inner_dim", ("QwenImage21Transformer2DModel",)
    ),
    "WanModel": Family(_WAN, "dim", ("WanTransformer3DModel", "SkyReelsV2Transformer3DModel")),
    "VaceWanModel": Family(_WAN, "dim", ("WanVACETransformer3DModel",)),
    "AnimateWanModel": Family(_WAN, "dim", ("WanAnimateTransformer3DModel",)),
    "WanModel_S2V": None,  # its blocks are replaced without being given the options of the forward
    "LTXVModel": Family((("transformer_blocks", DOUBLE),), "inner_dim", ("LTXVideoTransformer3DModel",)),
}
"""By the class of the network; classes made from one of these are of its family. ``None``: whole steps only."""


def family_of(network: Any) -> Family | None:
    """The family of a network; ``None`` where its blocks cannot be replaced one by one (Lumina, HiDream, UNets)."""
    return next((FAMILIES[cls.__name__] for cls in type(network).__mro__ if cls.__name__ in FAMILIES), None)


def lengths_of(network: Any, family: Family) -> tuple[int, ...] | None:
    """Blocks of each of its lists; ``None`` where it has no such lists."""
    lists = [getattr(network, name, None) for name, _ in family.lists]
    if not all(isinstance(one, torch.nn.ModuleList) for one in lists):
        return None
    return tuple(len(one) for one in lists)  # type: ignore[arg-type]


def check_family(schedule: Schedule, network: Any, family: Family, lengths: Sequence[int]) -> None:
    """Raises `ScheduleMismatchError` where a schedule made with diffusers is of other blocks than a network's."""
    prints, width = schedule.fingerprint, getattr(network, family.width, None)
    given = prints.architecture
    heads, channels = given.get("num_attention_heads"), given.get("attention_head_dim")
    there = heads * channels if isinstance(heads, int) and isinstance(channels, int) else None
    blocks = tuple(given.get(name) or 0 for name in family.lengths[: len(lengths)])
    if prints.model_class in family.diffusers and (there, blocks) == (width, tuple(lengths)):
        return
    raise ScheduleMismatchError(
        f"this schedule was made for {prints.model_class} with {_listed(blocks)} blocks of {there} channels; the model "
        f"is {type(network).__name__} with {_listed(lengths)} blocks of {width} channels, for which schedules of "
        f"{' or '.join(family.diffusers)} of that size fit: choose one, or record runs of this model and make one"
    )


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


@dataclass(frozen=True)
class Part:
    """A group of a schedule, or as much of it as lies in one block list.

    Attributes:
        group: its number.
        kind: of its blocks in ``patches_replace``.
        first, last: its blocks, counted in their list.
        is_end: whether no block of the network follows.
    """

    group: int
    kind: str
    first: int
    last: int
    is_end: bool


def parts_of(groups: Sequence[tuple[int, int]], family: Family, lengths: Sequence[int]) -> tuple[Part, ...]:
    """The groups of a schedule in the block lists, cut where one list ends: streams are joined there."""
    parts, start, total = list[Part](), 0, sum(lengths)
    for (_, kind), length in zip(family.lists, lengths, strict=True):
        for number, (lo, hi) in enumerate(groups):
            first, behind = max(lo, start), min(hi, start + length)
            if first < behind:
                parts.append(Part(number, kind, first - start, behind - 1 - start, behind == total))
        start += length
    return tuple(parts)
