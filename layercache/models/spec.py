"""What is said of a transformer class: where its blocks are, what they take and what they pass on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layercache._utils.tensors import dense
from layercache.errors import UnsupportedModelError

MIRRORED = "mirrored"

Modulation = Callable[[nn.Module, Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor, float]]


Streams = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class ModelSpec:
    """How a transformer's forward runs through its blocks.

    Up to two streams are followed: the one that carries the picture ("image"), and the one beside it ("text"; LTX-2:
    the sound). A block takes and returns them apart, or joined along the tokens.

    Attributes:
        model_class: class name; subclasses of it are found too.
        block_lists: attribute names of the ``ModuleList`` s, in the order the forward runs through them.
        streams: order in which a block returns its streams, of ``"image"`` and ``"text"``. A model whose
            blocks return one tensor has ``("image",)``.
        arguments: the block's argument names of the streams, ``(image, text)``, also their positions.
        joint: block lists whose blocks take and return one tensor, with the order in which the streams are joined in
            it; its argument is the image's. At least the first list must hold the streams apart.
        leaves: streams that the transformer's head reads.
        rewritten: block lists behind whose blocks the forward writes into the stream it was given (ControlNet), and
            the argument of the forward that makes it do so.
        adds: arguments of the forward that make it add something behind single blocks (ControlNet); where none of them
            is given, blocks inside a reused end of a list are not even passed by, and what leaves a group is taken for
            the next one's input. ``None``: not known.
        couples: the forward adds something between blocks that depends on the stream itself (a face adapter), so that
            every reused group's output must be there before the next group.
        skips: long skip connections (U-ViT), pairs ``(k, l)`` of block numbers, counted through all lists: block l is
            also given what block k returned. ``"mirrored"``: the last block that of the first, the last but one that
            of the second, and so on. Where block k lies inside a group that is reused, its output is not there: groups
            are cut behind it, and a schedule that would run block l is refused.
        bypass: arguments of the forward that, when given, leave single blocks out; such a forward runs uncached.
        timestep: argument of the transformer's forward that holds sigma or ``1000 * sigma``, if any does; a transformer
            without a pipeline is followed by it.
        modulation: of the first block and the arguments of its call by name (`named_arguments`), scale and shift
            ``[B, D]`` of its modulated input ``LayerNorm(image) * (1 + scale) + shift``, and the LayerNorm's eps; for
            methods that look at it.
        modules: per block list, the modules of a block whose outputs (before the gate) can be cached apart: each entry
            names submodules (dots lead inside them) that run one after the other, of which the last one's output is
            kept. Each must run once in a forward; an entry is left out of blocks where it is ``None``.
        differentiable: whether gradients pass through the blocks, which Learning-to-Cache needs.
    """

    model_class: str
    block_lists: tuple[str, ...] = ("transformer_blocks",)
    streams: tuple[str, ...] = ("text", "image")
    arguments: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    joint: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    leaves: tuple[str, ...] = ("image",)
    rewritten: Mapping[str, str] = field(default_factory=dict)
    adds: tuple[str, ...] | None = None
    couples: bool = False
    skips: str | tuple[tuple[int, int], ...] = ()
    bypass: tuple[str, ...] = ()
    timestep: str | None = "timestep"
    modulation: Modulation | None = None
    modules: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    differentiable: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.skips, str):
            if self.skips != MIRRORED:
                raise UnsupportedModelError(f"skips are pairs of block numbers, or {MIRRORED!r}; got {self.skips!r}")
        elif not all(0 <= start < end for start, end in self.skips):
            raise UnsupportedModelError(f"a skip leads from a block to a later one, got {self.skips}")

    def skip_pairs(self, blocks: int) -> tuple[tuple[int, int], ...]:
        """The long skip connections of a model with so many blocks."""
        if isinstance(self.skips, str):
            return tuple((k, blocks - 1 - k) for k in range(blocks // 2))
        return self.skips

    @property
    def needs_every_output(self) -> bool:
        """Whether every reused group's output must be there before the next group."""
        return self.couples or bool(self.skips)

    @property
    def has_text(self) -> bool:
        return "text" in self.streams

    @property
    def text_leaves(self) -> bool:
        return "text" in self.leaves

    def block_modules(self, transformer: nn.Module) -> list[nn.ModuleList]:
        return [getattr(transformer, name) for name in self.block_lists]

    def calls(self, index: int) -> BlockCalls:
        """How the blocks of list ``index`` are called."""
        return BlockCalls(self, self.joint.get(self.block_lists[index]))


@functools.lru_cache(maxsize=64)
def _positions(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that a class's forward takes by position."""
    found = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


def named_arguments(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a block's call, each under its name."""
    if not args:
        return kwargs
    own = getattr(block, "_orig_mod", block)  # of a compiled one
    return dict(zip(_positions(type(own).forward), args, strict=False)) | dict(kwargs)


class Tokens:
    """How many tokens each stream has in the present forward, noted where the streams are apart."""

    def __init__(self) -> None:
        self.image = self.text = 0

    def note(self, image: torch.Tensor, text: torch.Tensor | None) -> None:
        self.image, self.text = image.shape[1], 0 if text is None else text.shape[1]

    def split(self, joined: torch.Tensor, order: tuple[str, str]) -> Streams:
        """Views of image and text."""
        if order[0] == "text":
            return joined[:, self.text :], joined[:, : self.text]
        return joined[:, : self.image], joined[:, self.image :]


class BlockCalls:
    """How the blocks of one list take and return their streams.

    Attributes:
        order: how they join the streams; ``None`` where they are apart.
        single: whether they take and return one tensor.
    """

    def __init__(self, spec: ModelSpec, order: tuple[str, str] | None):
        self.order = order
        self.single = order is not None or not spec.has_text
        self._first, self._second = spec.arguments[0], spec.arguments[-1]  # of one stream there may be one
        self._image, self._text = spec.streams.index("image"), 1 - spec.streams.index("image")

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The first stream argument of a block's call: the image, or both streams joined."""
        return kwargs[self._first] if self._first in kwargs else args[0]

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: Tokens) -> Streams:
        """Image and text stream among the arguments of a call."""
        first = kwargs[self._first] if self._first in kwargs else args[0]
        if self.order is not None:
            return tokens.split(first, self.order)
        if not first.is_contiguous():
            first = dense(first)
        if self.single:
            return first, None
        second = kwargs[self._second] if self._second in kwargs else args[1]
        return first, second if second.is_contiguous() else dense(second)

    def unpack(self, output: Any, tokens: Tokens) -> Streams:
        """Image and text stream of a block's output."""
        if self.order is not None:
            return tokens.split(output, self.order)
        if self.single:
            return dense(output[0] if isinstance(output, tuple) else output), None
        image, text = output[self._image], output[self._text]
        if not image.is_contiguous():
            image = dense(image)
        return image, text if text is None or text.is_contiguous() else dense(text)

    def pack(self, image: torch.Tensor, text: torch.Tensor | None) -> Any:
        """The output a block would give that does not join its streams."""
        if self.single:
            return image
        return (image, text) if self._image == 0 else (text, image)

    def joined(self, image: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        """The output of a block that joins its streams."""
        assert self.order is not None and text is not None
        return torch.cat((text.to(image.dtype), image) if self.order[0] == "text" else (image, text.to(image.dtype)), 1)

    def passed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output of a block that changes nothing."""
        first = kwargs[self._first] if self._first in kwargs else args[0]
        if self.single:
            return first
        second = kwargs[self._second] if self._second in kwargs else args[1]
        return (first, second) if self._image == 0 else (second, first)

    def copied(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The same where the forward writes into it: the image (or both streams, joined) is another tensor."""
        first = self.given(args, kwargs).clone()
        if self.single:
            return first
        return self.pack(first, kwargs[self._second] if self._second in kwargs else args[1])
