"""Projections of the timestep alone: found by following what a forward's tensors are made of, and verified."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from layercache.errors import UnsupportedModelError
from layercache.runtime.dataflow import Dataflow, Layer, Program
from layercache.runtime.tabulated import Projection, TabulatedLinear

TIMES = ("timestep", "timesteps", "t", "timestep_r", "sigma", "audio_timestep", "audio_sigma")
"""Arguments of transformers that hold the time."""

TOO_LARGE = "would take more memory as tables"
QUANTISED = "have quantised or sharded weights"
ADAPTED = "have a LoRA adapter"
REPEATED = "run more than once in a forward"
VARIES = "do not give the same bits twice"


@dataclass(eq=False)
class _Call:
    """A linear layer in the forward that was followed, with copies of what it was given and gave.

    Attributes:
        numbers: of its input and output in the program; ``None`` where that does not make it.
        sources: arguments that its input was made of.
        behind: layers of the time alone that its input was made by.
        is_adapted: it belongs to a LoRA adapter, or has one.
    """

    name: str
    layer: nn.Linear
    input: torch.Tensor
    output: torch.Tensor
    numbers: tuple[int | None, int | None]
    sources: frozenset[str]
    behind: frozenset[str]
    is_adapted: bool
    count: int = 1

    @property
    def key(self) -> Layer:
        given, made = self.numbers
        assert given is not None and made is not None
        return Layer(given, made)

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.input, self.output


@dataclass
class Found:
    """Projections of one kind of forward.

    Attributes:
        program: makes their inputs from the times.
        sizes: input and output of each.
        kept: how many others depend on the time and stay as they are, by the reason.
    """

    program: Program
    projections: list[Projection]
    sizes: list[tuple[torch.Tensor, torch.Tensor]]
    kept: Counter[str] = field(default_factory=Counter)


def find_projections(
    model: nn.Module,
    arguments: Mapping[str, Any],
    forward: Callable[[], Any],
    rows: int,
    among: Collection[nn.Module] | None = None,
) -> Found:
    """Which linear layers of a model make something of the time alone, and are smaller as tables.

    The first layer behind the time stays as it is, so that what follows can be checked by its input; so do those of an
    embedding that other arguments enter behind them.

    Args:
        model: the transformer.
        arguments: of its forward, by name.
        forward: runs it, in full.
        rows: distinct times that a table holds.
        among: only these layers; all by default, those whose tables would be larger left out.

    Raises:
        UnsupportedModelError: no argument holds the time, or the forward cannot be followed.
    """
    times = times_of(arguments)
    if not times:
        raise UnsupportedModelError(
            f"{type(model).__name__} was called without a tensor as its timestep (an argument called "
            f"{', '.join(TIMES[:3])}): there is nothing to make tables of"
        )
    flow, calls = _follow(model, arguments, tuple(times), forward)
    image = list(inspect.signature(type(model).forward).parameters)[1]
    count = sum(time.numel() for time in times.values())
    kept: Counter[str] = Counter()
    chosen: list[_Call] = []
    mixed: set[str] = set()  # layers whose outputs enter an embedding of something else too
    for call in calls:
        reason = _reason(call, frozenset(times), image, count)
        if reason is None and (among is None or call.layer in among):
            chosen.append(call)
        elif reason:
            kept[reason] += 1
            mixed |= call.behind if call.sources - frozenset(times) else set()
    chosen = [call for call in chosen if call.behind and (among is not None or call.name not in mixed)]
    chosen = _verified(flow, chosen, list(times.values()), kept)
    guarded = _guarded(chosen)
    if among is None:
        large = [call for call in chosen if call.layer.weight.nbytes <= _table_bytes(call, rows, call in guarded)]
        kept.update(TOO_LARGE for _ in large)
        chosen = [call for call in chosen if call not in large]
        guarded = _guarded(chosen)
    projections = [_projection(model, call, call in guarded) for call in chosen]
    return Found(flow.program([call.key for call in chosen]), projections, [call.places for call in chosen], kept)


def times_of(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments of a forward that hold the time."""
    return {name: arguments[name] for name in TIMES if isinstance(arguments.get(name), torch.Tensor)}


def _tensors(value: Any) -> list[torch.Tensor]:
    return [one for one in tree_flatten(value)[0] if isinstance(one, torch.Tensor)]


def _follow(
    model: nn.Module, arguments: Mapping[str, Any], times: tuple[str, ...], forward: Callable[[], Any]
) -> tuple[Dataflow, list[_Call]]:
    """Runs the forward once; its linear layers in the order in which they ran, each once."""
    given = [(name, tensor) for name, value in arguments.items() for tensor in _tensors(value)]
    flow = Dataflow(model, given, times)
    found: dict[nn.Linear, _Call] = {}

    def note(name: str, layer: nn.Linear, args: tuple[Any, ...], output: Any) -> None:
        if not args or not isinstance(args[0], torch.Tensor) or not isinstance(output, torch.Tensor):
            return
        if layer in found:
            found[layer].count += 1
            return
        sources = flow.sources(args[0])
        if not sources.isdisjoint(times):
            numbers, is_timed = (flow.number(args[0]), flow.number(output)), sources <= frozenset(times)
            copies = (args[0].clone(), output.clone()) if is_timed else (args[0], output[:0])
            behind = flow.layers(args[0])
            found[layer] = _Call(name, layer, *copies, numbers, sources, behind, _is_adapted(model, name))
            if is_timed:
                flow.mark(output, name)

    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                stack.enter_context(_Hooked(layer, functools.partial(note, name)))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(flow)
        try:
            forward()
        except NotImplementedError as error:  # of an operator that no dispatch mode is heard for
            raise UnsupportedModelError(
                f"the forward of {type(model).__name__} cannot be followed for timestep tables: {error}"
            ) from error
    return flow, list(found.values())


class _Hooked:
    """Context in which a layer's calls are heard of, outside of the dataflow that is being noted."""

    def __init__(self, layer: nn.Linear, note: Callable[[nn.Linear, tuple[Any, ...], Any], None]):
        self._layer, self._note = layer, note

    def __enter__(self) -> None:
        self._hook = self._layer.register_forward_hook(self._heard)

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()

    def _heard(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(layer, nn.Linear)
        self._note(layer, args, output)


def _reason(call: _Call, times: frozenset[str], image: str, count: int) -> str | None:
    """Why a layer that depends on the time is no candidate; empty where it does not belong to the embedding at all."""
    others = call.sources - times
    if others:
        is_embedding = image not in others and call.input.numel() <= count * call.layer.in_features
        return f"also depend on {', '.join(sorted(others))}" if is_embedding else ""
    if type(call.layer) not in (nn.Linear, TabulatedLinear) or type(call.layer.weight) is not nn.Parameter:
        return QUANTISED
    if call.is_adapted:
        return ADAPTED if call.name.endswith(".base_layer") else ""
    if call.count > 1:
        return REPEATED
    return "" if None in call.numbers else None


def _is_adapted(model: nn.Module, name: str) -> bool:
    """Whether a layer lies inside one of PEFT's, or is one."""
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1))
    return any(cls.__name__ == "BaseTunerLayer" for module in around for cls in type(module).__mro__)


def _verified(flow: Dataflow, chosen: list[_Call], times: list[torch.Tensor], kept: Counter[str]) -> list[_Call]:
    """Those whose inputs and outputs the program makes again, bit by bit."""
    differing: set[int] = set()
    if any(time.is_meta for time in times):
        return chosen

    def apply(index: int, given: torch.Tensor) -> torch.Tensor:
        call, made = chosen[index], linear(chosen[index].layer, given)
        if not (torch.equal(given, call.input) and torch.equal(made, call.output)):
            differing.add(index)
        return call.output.clone()

    flow.program([call.key for call in chosen]).run(times, apply)
    kept.update(VARIES for _ in differing)
    return [call for index, call in enumerate(chosen) if index not in differing]


def linear(layer: nn.Linear, given: torch.Tensor) -> torch.Tensor:
    """What a layer computes, with its weights where the input is."""
    return TabulatedLinear.compute(layer, given)  # type: ignore[arg-type]


def _guarded(chosen: Sequence[_Call]) -> list[_Call]:
    """Those whose inputs are compared: the first of all that are given the same, and the last of all."""
    found: list[_Call] = []
    for call in chosen:
        if not any(_is_same(call.input, other.input) for other in found):
            found.append(call)
    return found if not chosen or chosen[-1] in found else [*found, chosen[-1]]


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.is_meta or torch.equal(one, other)


def _table_bytes(call: _Call, rows: int, is_guarded: bool) -> int:
    return (rows + 1) * (call.output.nbytes + (call.input.nbytes if is_guarded else 0))


def _projection(model: nn.Module, call: _Call, is_guarded: bool) -> Projection:
    parent, _, leaf = call.name.rpartition(".")
    return Projection(call.name, call.layer, model.get_submodule(parent), leaf, is_guarded)
