"""The velocity on its way from the model to the sampler: storing it, and putting older ones in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from layercache import ops
from layercache._utils.tensors import empty_for_any_mode
from layercache.errors import CacheStateError
from layercache.runtime.offload import HostTensor, Transfers, host_bytes, prefetch
from layercache.runtime.samples import bad_samples
from layercache.schedule.memory_plan import VelocityLayout, lay_out_velocities
from layercache.schedule.schedule import Schedule

MAX_INPUTS = ops.MAX_TERMS + 1  # a linear map takes as many tensors as a combination with its base


def combine(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[float], store: tuple[int, torch.Tensor] | None
) -> Any:
    """``sum_k c_k t_k`` as a new tensor, in the first tensor's shape and dtype.

    Args:
        tensors: of one shape, latent-sized; dtypes may differ.
        coefficients: one for each.
        store: ``(k, copy)``: tensor k is also copied there, in the same launch.
    """
    flat = [as_rows(t) for t in tensors]
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
    outputs: list[torch.Tensor] = [as_rows(result)]
    matrix: list[list[float | None]] = [list(coefficients[:MAX_INPUTS])]
    if store is not None and store[0] < MAX_INPUTS:
        outputs.append(as_rows(store[1]))
        matrix.append([1.0 if k == store[0] else None for k in range(len(matrix[0]))])
    ops.linear_map([flat[:MAX_INPUTS]], [outputs], matrix)
    for lo in range(MAX_INPUTS, len(flat), MAX_INPUTS - 1):
        part = flat[lo : lo + MAX_INPUTS - 1]
        row = [1.0, *coefficients[lo : lo + MAX_INPUTS - 1]]
        ops.linear_map([[outputs[0], *part]], [outputs[:1]], [row])
    return result


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Of any rank, as the ops take it: ``[1, rows, channels]``."""
    return tensor.contiguous().view(1, -1, tensor.shape[-1] if tensor.dim() else 1)


def sample_shape(arguments: Mapping[str, Any]) -> Any:
    """Shape of one sample among the latents that a transformer is given, its first argument."""
    latents = next(iter(arguments.values()), None)
    if isinstance(latents, (list, tuple)):
        latents = latents[0] if latents else None
        return latents.shape if isinstance(latents, torch.Tensor) else None
    return latents.shape[1:] if isinstance(latents, torch.Tensor) else None


def require_one_shape(tensors: Sequence[torch.Tensor]) -> None:
    """Raises `CacheStateError` where velocities that are combined are not of one shape and device."""
    first = tensors[0]
    for other in tensors[1:]:
        if other.shape != first.shape or other.device != first.device:
            raise CacheStateError(
                f"the sampler is given a velocity of shape {tuple(first.shape)} on {first.device} where the stored one "
                f"is {tuple(other.shape)} on {other.device}: the latents changed their shape in the middle of a step"
            )


Slot = torch.Tensor | HostTensor | None


class VelocityTrack:
    """Stored velocities of one generation, and what the sampler is given at each step.

    One per generation and output of the model, not per branch: it sees the velocity after guidance. The memory,
    ``slots``, is taken over from the generation before. That of the first output has those of ``further`` ones. With
    ``transfers`` the velocities are kept in host memory, and brought back when the step begins that reads them.
    """

    def __init__(
        self,
        layouts: Sequence[VelocityLayout],
        num_slots: int,
        slots: list[Slot] | None = None,
        further: Sequence[VelocityTrack] = (),
        transfers: Transfers | None = None,
    ):
        self.layouts, self.further, self.transfers = layouts, further, transfers
        none: list[Slot] = [None] * num_slots
        self.slots = none if slots is None else slots
        self.held: list[int | None] = [None] * num_slots
        self.step = self.taken = -1
        self._shape: Any = None
        self._conditions: tuple[str, ...] = ()
        self.is_complete = False
        self.fallbacks = 0

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        outputs: int,
        before: VelocityTrack | None = None,
        transfers: Transfers | None = None,
    ) -> VelocityTrack:
        """Of a schedule for a model with so many outputs, in the memory of an earlier track of it."""
        memory = [None] * outputs if before is None else [before.slots, *(one.slots for one in before.further)]
        tracks = [
            cls(*lay_out_velocities(schedule, output), memory[output], transfers=transfers) for output in range(outputs)
        ]
        tracks[0].further = tracks[1:]
        return tracks[0]

    def begin(self, step: int, shape: Any = None, conditions: tuple[str, ...] = ()) -> None:
        """A forward of this step starts, on samples of this shape; of another one nothing is stored.

        Args:
            step: of the run.
            shape: of a sample.
            conditions: that a guider runs at this step; a velocity is of those of its own step, and of no use where
                guidance begins or ends. Empty where no guider says them.

        Raises:
            CacheStateError: an output's sampler did not ask for its velocity of the step before.
        """
        if shape != self._shape:
            self._shape = shape
            self.reset()
        if step == self.step:
            return
        if conditions and conditions != self._conditions:
            if self._conditions:
                self.reset()
            self._conditions = conditions
        for track in self.further:
            if self.taken == self.step != track.taken:
                raise CacheStateError(
                    "the model has a further output whose sampler is not known, so that it cannot be given the "
                    "velocity of skipped steps: the pipeline copies its scheduler for it in no way that is followed"
                )
            track.begin(step)
        self.step = step
        # decided once a step, for all its branches
        complete = all(self.held[slot] == source for slot, source in self.layouts[step].reads)
        self.is_complete = complete and all(track.is_complete for track in self.further)
        if self.transfers is not None and self.is_complete:
            self.transfers.settle()
            prefetch(self.slots[slot] for slot, _ in self.layouts[step].reads)

    def reset(self) -> None:
        """No stored velocity is valid any more; the memory stays."""
        for slot in self.slots:
            if isinstance(slot, HostTensor):
                slot.drop()
        self.held = [None] * len(self.held)
        self.step = self.taken = -1
        for track in self.further:
            track.reset()

    def replace_velocity(self, velocity: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What the sampler gets instead of the model's ``velocity``; stores that where it is read later."""
        self.taken = self.step
        layout = self.layouts[self.step]
        slot = self._slot(layout.capture, velocity)
        if layout.capture is not None:
            self.held[layout.capture] = self.step
        if not layout.changes or not self.is_complete:
            self.fallbacks += layout.changes
            if slot is not None:
                slot.copy_(velocity)
                self._keep(layout.capture, slot)
            return velocity
        stored = [self._stored_velocity(slot) for slot, _ in layout.reads]
        tensors, coefficients = self._terms(layout, velocity, stored, latents)
        require_one_shape(tensors)
        result = combine(tensors, coefficients, None if slot is None else (0, slot))
        if layout.offset:
            result.add_(layout.offset)
        if self.transfers is not None:
            for one in stored:
                self.transfers.unstage(one)
            if slot is not None:
                self._keep(layout.capture, slot)
        return result if result.dtype == velocity.dtype else result.to(velocity.dtype)

    def _terms(
        self, layout: VelocityLayout, velocity: Any, stored: Sequence[Any], latents: Any
    ) -> tuple[list[torch.Tensor], list[float]]:
        """What is combined; the fresh velocity first where it is used or stored."""
        terms: list[tuple[Any, float]] = []
        if layout.fresh is not None or layout.capture is not None:
            terms.append((velocity, layout.fresh or 0.0))
        terms += zip(stored, layout.coefficients, strict=True)
        if layout.latents is not None:
            terms.append((latents, layout.latents))
        return [t for t, _ in terms], [c for _, c in terms]

    def _slot(self, index: int | None, like: torch.Tensor) -> torch.Tensor | None:
        if index is None:
            return None
        slot: Any = self.slots[index]
        if self.transfers is not None:
            self.transfers.settle()
            return self.transfers.stage(like.shape, like.dtype, like.device)
        if slot is None or slot.shape != like.shape or slot.dtype != like.dtype or slot.device != like.device:
            slot = self.slots[index] = empty_for_any_mode(like.shape, like.dtype, like.device)
        return slot

    def _stored_velocity(self, index: int) -> Any:
        """A stored velocity, on its device."""
        slot = self.slots[index]
        return slot.fetch() if isinstance(slot, HostTensor) else slot

    def _keep(self, index: int | None, staged: torch.Tensor) -> None:
        """Moves what was just stored to the host, where it is to be kept there."""
        if self.transfers is None or index is None:
            return
        slot = self.slots[index]
        if not isinstance(slot, HostTensor):
            slot = self.slots[index] = HostTensor(self.transfers)
        slot.put(staged)

    def is_finite(self) -> bool:
        """Whether the stored velocities are; asks the device. What is not finite once stays so by the latents."""
        return all(bool(torch.isfinite(slot).all()) for slot in self._stored())

    def bad_samples(self) -> set[int]:
        """Samples of the batch whose stored velocities are not finite; asks the device."""
        return set[int]().union(*map(bad_samples, self._stored()))

    def _stored(self) -> list[torch.Tensor]:
        pairs = zip(self.slots, self.held, strict=True)
        held = [slot for slot, step in pairs if slot is not None and step is not None]
        own = [slot.settled() if isinstance(slot, HostTensor) else slot for slot in held]
        return own + [slot for track in self.further for slot in track._stored()]

    @property
    def nbytes(self) -> int:
        own = sum(slot.nbytes for slot in self.slots if slot is not None)
        return own + sum(track.nbytes for track in self.further)

    @property
    def host_bytes(self) -> int:
        return host_bytes(self.slots) + sum(track.host_bytes for track in self.further)
