"""The stored residuals of one generation and the rows that use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layercache import ops
from layercache._utils.compat import keep_address
from layercache._utils.tensors import empty_for_any_mode
from layercache.errors import CacheStateError
from layercache.runtime.signature import Signature
from layercache.runtime.storage import Buffer, Storage, describe
from layercache.schedule.memory_plan import Layout, RowLayout
from layercache.schedule.schedule import Cell

MAX_TERMS = ops.MAX_TERMS


class Terms:
    """Stored residuals of one launch, of the image and where it advances the text, and their coefficients.

    Newest anchor of the shallowest group first.
    """

    def __init__(self, buffers: list[list[Buffer]], values: tuple[float, ...]):
        self.buffers, self.values = buffers, values
        self.coefficients: torch.Tensor | None = None

    def beside(self, stream: torch.Tensor) -> torch.Tensor | tuple[float, ...]:
        """The coefficients for an op on a stream. A compiled graph, and a GPU, do not depend on them as numbers."""
        if stream.is_cpu and not torch.compiler.is_dynamo_compiling():
            return self.values
        assert self.coefficients is not None
        return self.coefficients


class Row:
    """A `RowLayout` bound to the buffers of one branch."""

    def __init__(self, layout: RowLayout, cells: Sequence[Cell], images: list[Buffer], texts: list[Buffer]):
        self.layout, self.cells = layout, cells
        self.captures: list[Any] = [
            None if slots is None else (images[slots[0]], None if slots[1] is None else texts[slots[1]])
            for slots in layout.captures
        ]
        self.stores = [(slots[0], group) for group, slots in enumerate(layout.captures) if slots is not None]
        self.runs: list[Any] = []  # of `Terms`, or None where no run of reused groups ends
        for run in layout.runs:
            if run is None:
                self.runs.append(None)
                continue
            launches = []
            for lo in range(0, len(run.coefficients), MAX_TERMS):
                part = slice(lo, lo + MAX_TERMS)
                buffers = [[images[s] for s in run.image_slots[part]]]
                if run.text_slots is not None:
                    buffers.append([texts[s] for s in run.text_slots[part]])
                launches.append(Terms(buffers, run.coefficients[part]))
            self.runs.append(launches)
        self.reads = [terms.buffers for launches in self.runs if launches for terms in launches]


class CacheState:
    """Stored residuals of one branch of one generation, in memory that the next one takes over.

    Slots are allocated together at the first capture, because only then their shapes are known (where a
    graph is compiled: before the forward, by a dry run), and again when shape, dtype or device of the
    streams change.

    Attributes:
        bad_samples: of the batch, those that `is_finite` found not to be.
    """

    def __init__(self, layout: Layout, cells: Sequence[Sequence[Cell]], storage: Storage):
        self.layout, self.storage = layout, storage
        self.images = [storage.new_buffer() for _ in range(layout.image_slots)]
        self.texts = [storage.new_buffer() for _ in range(layout.text_slots)]
        self.flag = Buffer()
        self.rows = [Row(*pair, self.images, self.texts) for pair in zip(layout.rows, cells, strict=True)]
        self.bad_samples: set[int] = set()
        self._uploaded_to: torch.device | None = None
        self.start()

    def start(self) -> None:
        """A generation begins: nothing is stored. The memory stays, without a meaning."""
        self.signature = Signature()
        self.reset()
        if self.flag.tensor is not None:
            self.flag.tensor.zero_()

    def reset(self) -> None:
        """No stored residual is valid any more; the memory stays."""
        self.held: list[tuple[int, int] | None] = [None] * self.layout.image_slots
        self.validated_groups: set[tuple[int, bool]] = set()  # (group, without text)

    def free(self) -> None:
        """Nothing is stored, and the memory is given back."""
        self.reset()
        for buffer in (*self.images, *self.texts, self.flag):
            buffer.free()

    def is_valid(self, row: Row) -> bool:
        """Whether every residual the row reads was stored in this generation."""
        held = self.held
        for slot, key in row.layout.reads:  # at every step; a generator would cost more than the rest
            if held[slot] != key:
                return False
        return True

    def fit(self, image: torch.Tensor, text: torch.Tensor | None) -> None:
        """Makes every slot fit the streams; does nothing when they already do.

        The slots of the text are fitted at the first group that gives one: the last block of some models gives none. A
        group whose streams are of another dtype fits its own slots when it stores them.

        Raises:
            CacheStateError: they fit the streams of another group, which has stored something already.
        """
        has_text = any(not without_text for _, without_text in self.validated_groups)
        self._fit(self.images, image, bool(self.validated_groups))
        if text is not None:
            self._fit(self.texts, text, has_text)
        if self.flag.tensor is None or self.flag.tensor.device != image.device:
            self.flag.tensor = keep_address(empty_for_any_mode((1,), torch.int32, image.device).zero_())

    def _fit(self, buffers: list[Buffer], stream: torch.Tensor, stored: bool) -> None:
        """The slots of one stream; ``stored`` where another group has stored its own already."""
        storage = self.storage
        if not buffers or (storage.has_shape if stored else storage.fits)(buffers[0], stream):
            return
        if stored:
            raise CacheStateError(
                f"a stream behind a group of blocks is {describe(stream)}, and {describe(buffers[0].like)} behind "
                "the groups before it; layercache follows streams that keep their size through all groups"
            )
        for buffer in buffers:
            storage.make_room(buffer, stream)

    def is_finite(self) -> bool:
        """Whether the stored residuals are; asks the device. Clears the flag, and forgets what is not."""
        if self.flag.tensor is None:
            return True
        held = [buffer for buffer, key in zip(self.images, self.held, strict=True) if key is not None]
        bad = bool(self.flag.tensor.item()) or not all(map(self.storage.is_finite, held))
        self.bad_samples = set()
        if bad:
            self.bad_samples = self.storage.bad_among(held)
            self.flag.tensor.zero_()
            self.reset()
        return not bad

    def upload_coefficients(self) -> None:
        """Puts the coefficients of all rows where the residuals are, in one transfer."""
        if not self.images or self.flag.tensor is None:
            return
        device = self.flag.tensor.device
        if device == self._uploaded_to:
            return
        self._uploaded_to = device
        terms = [t for row in self.rows for run in row.runs if run is not None for t in run]
        if not terms:
            return
        table = torch.tensor([v for t in terms for v in t.values], dtype=torch.float32).to(device)
        for part, values in zip(terms, table.split([len(t.values) for t in terms]), strict=True):
            part.coefficients = values

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.images, *self.texts))

    @property
    def host_bytes(self) -> int:
        return sum(buffer.host_bytes for buffer in (*self.images, *self.texts))
