"""Dataflow of a forward: which linear layers see the timestep alone, and the program that makes what they see of it.

One forward runs under a dispatch mode. Every tensor carries the names of the arguments that it was made of; operators
on nothing but times and weights are noted, and can be run again for another timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

UNKNOWN = "something that is no argument"
"""Source of tensors that came from outside of the forward, of random numbers and of memory that others write to."""

NOTHING: frozenset[str] = frozenset()
_UNWRITTEN = ("aten::empty", "aten::new_empty", "aten::resize_")
_LITERAL = ("aten::lift_fresh", "aten::lift")

Place = tuple[Any, ...]


class _Mark(str):
    """Among the sources of a tensor, the name of a layer that it was made by."""


class _Ref(NamedTuple):
    """A value of the program, by its number."""

    number: int


class Layer(NamedTuple):
    """A layer of the program, by the numbers of its input and output."""

    input: int
    output: int


class _Apply(NamedTuple):
    """A layer in the program, in the place of its operators."""

    layer: int
    input: int
    output: int


class _Op(NamedTuple):
    """One operator of the program: what it is called with, and the numbers of the values that it makes."""

    call: Callable[..., Any]
    arguments: list[Any]
    tree: TreeSpec
    made: list[int]

    @property
    def reads(self) -> list[int]:
        return [one.number for one in self.arguments if isinstance(one, _Ref)]


def _place(tensor: torch.Tensor) -> Place:
    """Where a tensor's numbers are and how they lie: views that autograd copies have the same place."""
    geometry = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (StorageWeakRef(tensor.untyped_storage()), *geometry)


def _storages(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of: itself, or those of a subclass (quantised weights)."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None or type(tensor) in (torch.Tensor, nn.Parameter):
        return [tensor]
    return [inner for name in flatten(tensor)[0] for inner in _storages(getattr(tensor, name))]


class Dataflow(TorchDispatchMode):
    """Context in which a forward runs: follows what its tensors are made of.

    Args:
        model: its weights and buffers are made of nothing.
        arguments: tensors of the forward, by the name of its argument.
        times: names of the arguments that hold the time.
    """

    def __init__(self, model: nn.Module, arguments: Iterable[tuple[str, torch.Tensor]], times: tuple[str, ...]):
        super().__init__()
        self._times = frozenset(times)
        self._sources: dict[StorageWeakRef, frozenset[str]] = {}
        self._numbers: dict[Place, int] = {}
        self._literals: dict[Place, torch.Tensor] = {}
        self._ops: list[_Op] = []
        self._inputs: list[int] = []
        self._count = 0
        for tensor in (*model.parameters(), *model.buffers()):
            for inner in _storages(tensor):
                self._sources[self._storage(inner)] = NOTHING
                self._literals[_place(inner)] = inner
        for name, tensor in arguments:
            for inner in _storages(tensor):
                self._add_sources(inner, frozenset((name,)))
        given = dict(arguments)
        for name in times:
            self._inputs.append(self._number(given[name]))

    @staticmethod
    def _storage(tensor: torch.Tensor) -> StorageWeakRef:
        return StorageWeakRef(tensor.untyped_storage())

    def sources(self, tensor: torch.Tensor) -> frozenset[str]:
        """Names of the arguments that a tensor was made of."""
        return frozenset(one for one in self._all_sources(tensor) if not isinstance(one, _Mark))

    def layers(self, tensor: torch.Tensor) -> frozenset[str]:
        """Names of the layers that a tensor was made by, of those that were marked."""
        return frozenset(str(one) for one in self._all_sources(tensor) if isinstance(one, _Mark))

    def mark(self, tensor: torch.Tensor, layer: str) -> None:
        """This value, and what is made of it, was made by a layer."""
        self._add_sources(tensor, frozenset((_Mark(layer),)))

    def _all_sources(self, tensor: torch.Tensor) -> frozenset[str]:
        found = NOTHING
        for inner in _storages(tensor):
            found |= self._sources.get(self._storage(inner), frozenset((UNKNOWN,)))
        return found

    def number(self, tensor: torch.Tensor) -> int | None:
        """The number of a value of the program; ``None`` where the program does not make it."""
        return self._numbers.get(_place(tensor))

    def program(self, layers: Sequence[Layer]) -> Program:
        """What makes the inputs and outputs of these layers of the times, without everything else."""
        made_by = {layer.output: index for index, layer in enumerate(layers)}
        needed, kept = set(made_by), []
        for op in reversed(self._ops):
            if not needed.intersection(op.made):
                continue
            index = next((made_by[number] for number in op.made if number in made_by), None)
            kept.append(op if index is None else _Apply(index, *layers[index]))
            needed.update(op.reads if index is None else [layers[index].input])
        return Program(tuple(self._inputs), tuple(reversed(kept)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, tree = tree_flatten((args, dict(kwargs or {})))
        name = func._schema.name
        if name in _LITERAL and self._place_of(given[0]) not in self._numbers:
            literal = given[0]
            self._sources.setdefault(self._storage(literal), NOTHING)
            self._literals.setdefault(_place(literal), literal)
        with self:  # composite ones arrive here in inference mode: what they consist of is noted
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        self._note(func, given, tree, result)
        return result

    def _place_of(self, value: Any) -> Place | None:
        return _place(value) if isinstance(value, torch.Tensor) else None

    def _note(self, func: Any, given: list[Any], tree: TreeSpec, result: Any) -> None:
        made, tensors = _tensors(result), _tensors(given)
        sources = NOTHING.union(*map(self._all_sources, tensors))
        writes = func._schema.is_mutable
        if func._schema.name.startswith(_UNWRITTEN) or torch.Tag.nondeterministic_seeded in func.tags:
            sources |= {UNKNOWN}
        if all(one in self._times for one in sources if not isinstance(one, _Mark)):
            arguments = [self._argument(one) for one in given]
            plain = all(type(one) in (torch.Tensor, nn.Parameter) for one in (*tensors, *made))
            if plain and not any(a is None and b is not None for a, b in zip(arguments, given, strict=True)):
                self._ops.append(_Op(func, arguments, tree, [self._number(one, anew=not writes) for one in made]))
            else:
                sources |= {UNKNOWN}
        for one in (*made, *(tensors if writes else ())):  # which of them it writes does not matter: all of them may be
            for inner in _storages(one):
                self._add_sources(inner, sources)

    def _argument(self, value: Any) -> Any:
        """An operator's argument as the program holds it; ``None`` of a tensor that it does not know."""
        if not isinstance(value, torch.Tensor):
            return value
        place = _place(value)
        if place in self._numbers:
            return _Ref(self._numbers[place])
        return self._literals.get(place)

    def _number(self, tensor: torch.Tensor, anew: bool = True) -> int:
        place = _place(tensor)
        if anew or place not in self._numbers:
            self._numbers[place] = self._count
            self._count += 1
        return self._numbers[place]

    def _add_sources(self, tensor: torch.Tensor, sources: frozenset[str]) -> None:
        storage = self._storage(tensor)
        self._sources[storage] = self._sources.get(storage, NOTHING) | sources


@dataclass(frozen=True)
class Program:
    """Operators that make values of the times, in the order of the forward that they were seen in.

    It holds for times of the shapes, dtypes and devices that it was seen with.
    """

    inputs: tuple[int, ...]
    ops: tuple[_Op | _Apply, ...] = field(repr=False)

    def run(self, times: Iterable[torch.Tensor], apply: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        """Makes the inputs of all layers, in their order.

        Args:
            times: values of the arguments that hold the time.
            apply: called with a layer's index and its input, gives its output.
        """
        values: dict[int, torch.Tensor] = dict(zip(self.inputs, times, strict=True))
        for op in self.ops:
            if isinstance(op, _Apply):
                values[op.output] = apply(op.layer, values[op.input])
                continue
            given = [values[one.number] if isinstance(one, _Ref) else one for one in op.arguments]
            args, kwargs = tree_unflatten(given, op.tree)
            result = op.call(*args, **kwargs)
            values.update(zip(op.made, _tensors(result), strict=True))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [one for one in tree_flatten(tree)[0] if isinstance(one, torch.Tensor)]
