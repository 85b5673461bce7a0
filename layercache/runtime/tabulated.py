"""Linear layers that look their results up in a table, and the tables of one transformer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from layercache._utils.compat import keep_address
from layercache._utils.tensors import empty_for_any_mode
from layercache.runtime.dataflow import Program

_NAMES = ("_layercache_state", "_layercache_table", "_layercache_inputs", "_layercache_fresh")


class TableState:
    """What all layers of one transformer look at.

    Attributes:
        looks_up: the forward under way takes results from the tables; else it computes them.
        row: int64 ``[1]``, which row of the tables, on the device of the tables; row 0 is NaN.
        failed: bool ``[2]``: since it was looked at last, a time was another one than the row's; an input was.
        is_released: the weights are on the host.
        device: where layers run.
        moved: called when the model was moved or cast, and the tables with it are of no use.
    """

    row: torch.Tensor
    failed: torch.Tensor

    def __init__(self, moved: Callable[[], None]):
        self.looks_up = self.is_released = False
        self.device = torch.device("cpu")
        self.moved = moved

    def place(self, device: torch.device) -> None:
        """Layers run on this device from now on."""
        if getattr(self, "row", None) is None or self.device != device:
            self.device = device
            self.row = keep_address(empty_for_any_mode((1,), torch.int64, device))
            self.failed = keep_address(empty_for_any_mode((2,), torch.bool, device))
            self.failed.zero_()
        self.row.zero_()


class TabulatedLinear(nn.Linear):
    """The class of a linear layer while its results are looked up. Copies and pickles are plain linear layers."""

    _layercache_state: TableState
    _layercache_table: torch.Tensor | None
    _layercache_inputs: torch.Tensor | None
    _layercache_fresh: torch.Tensor | None  # what the row was made of, in the first forward that takes it

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        state, table = self._layercache_state, self._layercache_table
        size = input.numel() // self.in_features * self.out_features
        if not state.looks_up or table is None or table.shape[1] != size:
            return self.compute(input)
        row = state.row
        # a compiled graph may keep an input that is compared and not stored in more digits than the table has
        if not torch.compiler.is_compiling():
            inputs = self._layercache_fresh if self._layercache_inputs is None else self._layercache_inputs
            if inputs is not None:
                own = inputs if inputs is self._layercache_fresh else inputs.index_select(0, row)
                differs = (own != input.reshape(1, -1)).any()
                state.failed[1].logical_or_(differs)
                row = row.masked_fill(differs, 0)
        return table.index_select(0, row).view(*input.shape[:-1], self.out_features)

    def compute(self, input: torch.Tensor) -> torch.Tensor:
        """What the layer gives without a table, with its weights brought to the input's device for that."""
        bias = None if self.bias is None else self.bias.to(input.device)
        return functional.linear(input, self.weight.to(input.device), bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Moves or casts the layer; weights on the host stay there."""
        state = self._layercache_state
        before, dtype = state.device, self.weight.dtype
        if not state.is_released:
            result = super()._apply(fn, recurse)
            if (self.weight.device, self.weight.dtype) != (before, dtype):
                state.moved()
            return result
        with torch.no_grad():
            probe = fn(torch.empty(0, dtype=dtype, device=before))
        if probe.dtype != dtype:
            for parameter in self._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.to(probe.dtype)
        if (probe.device, probe.dtype) != (before, dtype):
            state.moved()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        kept = {name: value for name, value in self.__dict__.items() if name not in _NAMES}
        return _plain_layer, (), kept


def _plain_layer() -> nn.Linear:
    return nn.Linear.__new__(nn.Linear)


@dataclass
class Projection:
    """A linear layer that is tabulated, and where it is.

    Attributes:
        parent, leaf: the module that holds it, and its name there.
        is_guarded: whether its input is compared, in every forward, with the one that its results were made of.
        parameters: weight and bias, if it has one.
        versions: of these, which change when somebody writes into them.
    """

    name: str
    layer: nn.Linear
    parent: nn.Module
    leaf: str
    is_guarded: bool
    parameters: tuple[torch.Tensor | None, torch.Tensor | None] = field(init=False, repr=False)
    versions: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.note()

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.layer.parameters(recurse=False))

    @property
    def is_intact(self) -> bool:
        """Whether it is where it was, with the weight and the bias that it had."""
        if self.parent._modules.get(self.leaf) is not self.layer:
            return False
        before, (weight, bias) = self.parameters, self._own()
        if weight is not before[0] or bias is not before[1]:
            return False
        return self.versions == (_version(weight), _version(bias))

    def note(self) -> None:
        self.parameters = self._own()
        self.versions = (_version(self.parameters[0]), _version(self.parameters[1]))

    def _own(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        own = self.layer._parameters
        return own["weight"], own["bias"]

    def enter(self, state: TableState) -> None:
        self.layer.__dict__.update(zip(_NAMES, (state, None, None, None), strict=True))
        self.layer.__class__ = TabulatedLinear

    def leave(self) -> None:
        self.layer.__class__ = nn.Linear
        for name in _NAMES:
            self.layer.__dict__.pop(name, None)

    def move(self, device: torch.device) -> None:
        """Its weights go to a device, as the same parameters where torch can."""
        nn.Module._apply(self.layer, lambda tensor: tensor.to(device))
        self.note()


def _version(parameter: torch.Tensor | None) -> int:
    return -1 if parameter is None or parameter.is_inference() else parameter._version


class Tables:
    """Results of all projections, for forwards of one kind (batch, dtypes, which arguments are given).

    Row 0 is NaN; every other row belongs to one value of the times, the one used longest ago makes room for a new one.
    In the first forward that takes a row the inputs of all projections are compared with those that it was made of;
    later the inputs of those that are guarded.

    Args:
        program: makes the projections' inputs.
        rows: times that are kept.
        times: number of values that the times have together.
        sizes: of every projection, its input and output, one row of the batch: ``(shape, dtype)`` each.
    """

    def __init__(
        self,
        program: Program,
        projections: Sequence[Projection],
        rows: int,
        times: int,
        sizes: Sequence[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
    ):
        self.program, self.projections, self.capacity = program, projections, rows
        self.rows: OrderedDict[Hashable, int] = OrderedDict()
        self.expected: dict[float, int] = {}  # rows by the sampler's timestep
        self.computed, self.has_fresh = 0, False
        # every float16, bfloat16 and float32 and all integers that count steps fit in it
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.times = empty_for_any_mode((rows + 1, times), wide, device)
        self.times.fill_(torch.nan)
        self.tables, self.inputs = [], []
        for projection, (given, made) in zip(projections, sizes, strict=True):
            self.tables.append(self._empty(made, device))
            self.inputs.append(self._empty(given, device) if projection.is_guarded else None)

    def _empty(self, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        made = keep_address(empty_for_any_mode((self.capacity + 1, like.numel()), like.dtype, device))
        made[0].fill_(torch.nan)
        return made

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.times, *self.tables, *self.inputs) if one is not None)

    def use(self) -> None:
        """The layers look up in these tables."""
        for projection, table, inputs in zip(self.projections, self.tables, self.inputs, strict=True):
            values = projection.layer.__dict__
            if values["_layercache_table"] is not table:
                values["_layercache_table"], values["_layercache_inputs"] = table, inputs

    def row_of(self, values: Hashable, times: Sequence[torch.Tensor]) -> tuple[int, bool]:
        """The row of these values of the times, and whether it had to be computed."""
        row = self.rows.get(values)
        if row is not None:
            self.rows.move_to_end(values)
            return row, False
        if len(self.rows) < self.capacity:
            row = len(self.rows) + 1
        else:
            _, row = self.rows.popitem(last=False)
            self.expected = {time: other for time, other in self.expected.items() if other != row}
        self.times[row].copy_(flat(times))
        self.has_fresh = True
        self.program.run(times, lambda index, given: self._compute(index, row, given))
        self.rows[values] = row
        self.computed += 1
        return row, True

    def _compute(self, index: int, row: int, given: torch.Tensor) -> torch.Tensor:
        layer: Any = self.projections[index].layer
        made: torch.Tensor = layer.compute(given)
        self.tables[index][row].copy_(made.reshape(-1))
        inputs = self.inputs[index]
        if inputs is not None:
            inputs[row].copy_(given.reshape(-1))
        else:
            layer.__dict__["_layercache_fresh"] = given.reshape(1, -1).clone()
        return made

    def forget_fresh(self) -> None:
        """The row that was computed last has been taken once."""
        if self.has_fresh:
            self.has_fresh = False
            for projection in self.projections:
                projection.layer.__dict__["_layercache_fresh"] = None


def flat(times: Sequence[torch.Tensor]) -> torch.Tensor:
    """All values of the times in one row, in the widest dtype of the device."""
    wide = torch.float32 if times[0].device.type == "mps" else torch.float64
    return torch.cat([time.reshape(-1).to(wide) for time in times])
