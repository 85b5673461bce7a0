"""What caches do between the blocks, each in one pass over the memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layercache import ops
from layercache._utils.tensors import dense
from layercache.errors import OpInputError
from layercache.ops.forecasts import newton_coefficients, taylor_coefficients

KINDS = ("l1", "l2", "cosine")

_ABS_DIFFERENCE, _ABS_A, _SQUARED_DIFFERENCE, _SQUARED_A, _SQUARED_B, _PRODUCT = 0, 1, 3, 4, 5, 6


def changes(previous: Sequence[Tensor], current: Sequence[Tensor], kind: str = "l1") -> Tensor:
    """How much tensors have changed: one number per pair, on the device, in one launch for all pairs.

    Args:
        previous, current: pairs of tensors of one shape each, all of one dtype, ``[batch, rows, channels]`` (or any
            contiguous shape); slices of a longer sequence are fine.
        kind: ``"l1"``: ``sum|p - c| / sum|p|``, which is the ratio of the means. ``"l2"``: ``|p - c| / |p|``.
            ``"cosine"``: ``1 - p c / (|p| |c|)``.

    Returns:
        fp32 ``[pairs]``; infinite or NaN where ``previous`` is zero.

    Raises:
        OpInputError: unknown kind, or tensors that do not fit.

    Source: docs/methods.md, Formulas of the ops. Bytes: 2 S.
    """
    if kind not in KINDS:
        raise OpInputError(f"unknown kind {kind!r} of change; choose {', '.join(KINDS)}")
    sums = ops.pair_statistics(previous, current)
    if kind == "l1":
        return sums[:, _ABS_DIFFERENCE] / sums[:, _ABS_A]
    if kind == "l2":
        return (sums[:, _SQUARED_DIFFERENCE] / sums[:, _SQUARED_A]).sqrt()
    return 1 - sums[:, _PRODUCT] / (sums[:, _SQUARED_A] * sums[:, _SQUARED_B]).sqrt()


def change(previous: Tensor, current: Tensor, kind: str = "l1") -> Tensor:
    """`changes` of one pair: a tensor without dims."""
    return changes([previous], [current], kind)[0]


def capture(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], residuals: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """``output - input`` of all streams in one launch, into new tensors or into ``residuals``. Bytes: 3 S."""
    if residuals is None:
        residuals = [torch.empty_like(o, memory_format=torch.contiguous_format) for o in outputs]
    ops.capture(outputs, inputs, residuals)
    return list(residuals)


def probe(
    output: Tensor, before: Tensor, previous: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A probe's residual and its relative L1 change, in one pass.

    Args:
        output, before: behind and in front of the probed blocks.
        previous: the probe's residual that is compared with; ``None`` where there is none yet.
        residual: written instead of a new tensor; it may be ``previous`` itself.

    Returns:
        ``output - before``, and ``sum|residual - previous| / sum|previous|`` on the device, or ``None``.

    Source: docs/methods.md, FBCache and DBCache. Bytes: 4 S, where subtraction and comparison apart take 10 S.
    """
    if residual is None:
        residual = torch.empty_like(output, memory_format=torch.contiguous_format)
    sums = ops.capture([output], [before], [residual], previous=None if previous is None else [previous])
    return residual, None if sums is None else sums[0, 2] / sums[0, 4]


def differences(
    tensor: Tensor, older: Sequence[Tensor], elapsed: int, dtype: torch.dtype, kept: Sequence[Tensor] = ()
) -> list[Tensor]:
    """New ``F_1 .. F_m`` of a tensor, ``F_q = (F_q-1 - old F_q-1) / elapsed``, ``F_0`` being the tensor; one launch.

    They are written into ``kept``, the old ``F_1 ..`` that nobody else holds, as far as those are contiguous and fit.
    """
    rows: list[list[float | None]] = [[1.0, *([None] * len(older))]]
    for q in range(len(older)):
        row = [None if c is None else c / elapsed for c in rows[-1]]
        row[q + 1] = -1.0 / elapsed
        rows.append(row)
    fits = (old for old in kept[: len(older)] if (old.shape, old.dtype) == (tensor.shape, dtype))
    found = [old for old in fits if old.is_contiguous()]
    while len(found) < len(older):
        found.append(torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format))
    ops.linear_map([[as_rows(t) for t in (tensor, *older)]], [[as_rows(t) for t in found]], rows[1:])
    return found


def as_rows(tensor: Tensor) -> Tensor:
    """As the ops take it, ``[batch, rows, channels]``."""
    if tensor.dim() == 3:
        return dense(tensor)
    return tensor.contiguous().view(1, -1, tensor.shape[-1])


def apply_residuals(
    streams: Sequence[Tensor], residuals: Sequence[Tensor], results: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """``stream + residual`` for all streams in one launch; ``results`` may be the streams themselves. Bytes: 3 S."""
    return ops.linear_combination(streams, [[residual] for residual in residuals], (1.0,), results)


def apply_residual(stream: Tensor, residual: Tensor, result: Tensor | None = None) -> Tensor:
    """`apply_residuals` of one stream."""
    return apply_residuals([stream], [residual], None if result is None else [result])[0]


class TaylorForecaster:
    """A tensor's Taylor expansion over the steps at which it was computed.

    Call `mark_step_begin` at every step, then `update` where the tensor was computed and `approximate` where not::

        F_0 = Y,  F_q+1 = (F_q - old F_q) / (steps since the last update),  approximation = sum_q t^q / q! F_q

    Args:
        order: derivatives kept, 0 to 5.
        dtype: of the stored derivatives; the tensor's own if left out.

    Source: docs/methods.md, TaylorSeer. Bytes: update ``(2 order + 2) S``, approximation ``(order + 2) S``; one launch.
    """

    def __init__(self, order: int = 1, dtype: torch.dtype | None = None):
        if not 0 <= order <= 5:
            raise OpInputError(f"order must be from 0 to 5, got {order}")
        self.order, self.dtype = order, dtype
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.step = -1
        self.updated = -1
        self.count = 0
        self._factors: list[Tensor] = []

    def mark_step_begin(self) -> None:
        self.step += 1

    def update(self, tensor: Tensor) -> None:
        """The tensor was computed at this step; another shape starts the expansion anew."""
        if self._factors and (self._factors[0].shape != tensor.shape or self._factors[0].device != tensor.device):
            self._factors, self.count = [], 0
        elapsed = self.step - self.updated
        if self.count and elapsed < 1:
            raise OpInputError("update is called twice in one step; call mark_step_begin at every step")
        known = min(self.count, self.order)
        while len(self._factors) <= known:
            self._factors.append(torch.empty_like(tensor, dtype=self.dtype, memory_format=torch.contiguous_format))
        ops.taylor_update(tensor, self._factors[: known + 1], self._inverse_steps(known))
        self.count += 1
        self.updated = self.step

    def approximate(self) -> Tensor:
        """The expansion at this step, a new tensor in the dtype of the stored derivatives.

        Raises:
            OpInputError: nothing was computed yet.
        """
        if not self.count:
            raise OpInputError("there is nothing to approximate from; call update first")
        known = min(self.count - 1, self.order)
        return ops.taylor_forecast(self._factors[: known + 1], self._coefficients(known))

    def _inverse_steps(self, known: int) -> list[float]:
        return [1.0 / (self.step - self.updated)] * known

    def _coefficients(self, known: int) -> list[float]:
        return taylor_coefficients(known, float(self.step - self.updated))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._factors)


class NewtonForecaster(TaylorForecaster):
    """Newton's polynomial through the last ``order + 1`` positions at which a tensor was computed.

    As `TaylorForecaster`, but of divided differences, so that it is exact for polynomials however far apart the updates
    were::

        F_0 = Y,  F_q+1 = (F_q - old F_q) / (x - x_q),  approximation = sum_q F_q (x - x_0) ... (x - x_q-1)

    where ``x_q`` are the positions of the older updates, the newest first.

    Source: docs/methods.md, Secant forecast. Bytes: as `TaylorForecaster`.
    """

    def reset(self) -> None:
        super().reset()
        self.position = -1.0
        self._nodes: list[float] = []

    def mark_step_begin(self, position: float | None = None) -> None:
        """A step starts, at a position such as its sigma; without one positions are the numbers of the steps.

        Raises:
            OpInputError: the position is not a finite number.
        """
        at = _finite(self.step + 1 if position is None else position)
        super().mark_step_begin()
        self.position = at

    def update(self, tensor: Tensor) -> None:
        """The tensor was computed at this step; another shape starts the polynomial anew.

        Raises:
            OpInputError: called twice in a step, or at a position at which the tensor was computed before.
        """
        if self.position in self._nodes:
            raise OpInputError(
                f"update is called twice at position {self.position:g}; give every step a position of its own, and "
                "call reset when a generation starts"
            )
        super().update(tensor)
        self._nodes = [self.position, *(self._nodes if self.count > 1 else ())][: self.order + 1]

    def _inverse_steps(self, known: int) -> list[float]:
        return [1.0 / (self.position - node) for node in self._nodes[:known]]

    def _coefficients(self, known: int) -> list[float]:
        steps = [newer - older for newer, older in itertools.pairwise(self._nodes)]
        return newton_coefficients(known, self.position - self._nodes[0], steps)


def _finite(position: float) -> float:
    try:
        value = float(position)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor with several numbers
        value = math.nan
    if not math.isfinite(value):
        raise OpInputError(f"the position of a step must be a finite number, such as its sigma; got {position!r}")
    return value
