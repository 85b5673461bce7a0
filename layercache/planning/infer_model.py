"""Finding out how an unknown transformer runs through its blocks, by watching one forward, and proving it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from layercache.errors import LayerCacheError, UnsupportedModelError
from layercache.models.registry import find_transformer, first_tensor, register_model, temporarily_known
from layercache.models.spec import MIRRORED, ModelSpec, Streams
from layercache.runtime.attachment import attach
from layercache.runtime.forward import Forward
from layercache.runtime.identity import Identity
from layercache.runtime.router import Router
from layercache.schedule.memory_plan import CAPTURE, COMPUTE, REUSE, GroupAction
from layercache.schedule.partition import cut, cut_behind_skips

TOLERANCE = 1e-2  # of the output's size; a residual added in bfloat16 is rounded


def infer_model(target: Any, run: Callable[[], object], register: bool = True) -> ModelSpec:
    """The description of a transformer of a class that is not known, and a proof that it holds.

    One forward is watched: which lists of blocks it runs through, which of a block's arguments its results become. Then
    a second one is routed by what was found: every block's residual is stored, and, each group in its turn and all
    together, taken instead of computing; the output has to stay what it was. Models are understood whose blocks hand on
    one or two tensors ``[batch, tokens, channels]``, or join two of them for their last lists.

    Args:
        target: a pipeline, or a transformer.
        run: does at least one forward of it with typical arguments, such as
            ``lambda: pipe("a fox", num_inference_steps=1)``.
        register: also make it known, as `layercache.register_model` does.

    Raises:
        UnsupportedModelError: what was seen is not understood, or the proof failed; says what is missing.
    """
    transformer = find_transformer(target)
    with _watched(transformer) as seen, torch.no_grad():
        run()
    if seen.call is None:
        raise UnsupportedModelError(f"run() did not call {type(transformer).__name__}; it must do at least one forward")
    spec = _describe(transformer, seen)
    spec = _prove(transformer, spec, *seen.call)
    if register:
        register_model(spec)
    return spec


@dataclass
class _Step:
    """A call of a block: list, arguments by name or position, and what it returned."""

    list: str
    arguments: dict[str, torch.Tensor]
    results: tuple[torch.Tensor, ...]


@dataclass
class _Seen:
    steps: list[_Step] = field(default_factory=list)
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None


@contextmanager
def _watched(transformer: nn.Module) -> Any:
    """Notes the calls of all blocks of the first forward, and the forward's own arguments."""
    seen = _Seen()
    done: list[bool] = []

    def note_block(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if done:
                return
            names = list(inspect.signature(module.forward).parameters)
            given = dict(zip(names, args, strict=False)) | dict(kwargs)
            tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and v.dim() == 3}
            results = output if isinstance(output, tuple) else (output,)
            kept = tuple(r for r in results if isinstance(r, torch.Tensor))
            seen.steps.append(_Step(name, tensors, kept))

        return note

    def note_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if seen.call is None:
            seen.call = args, kwargs

    hooks = [transformer.register_forward_pre_hook(note_call, with_kwargs=True)]
    hooks.append(transformer.register_forward_hook(lambda *_: done.append(True)))
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            hooks += [block.register_forward_hook(note_block(name), with_kwargs=True) for block in child]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _describe(transformer: nn.Module, seen: _Seen) -> ModelSpec:
    name = type(transformer).__name__
    lists = [n for n in dict.fromkeys(step.list for step in seen.steps) if _is_whole(transformer, n, seen)]
    if not lists:
        raise UnsupportedModelError(f"{name} has no list of blocks that its forward runs through once, in order")
    main = _connected(lists, seen)
    steps = [step for step in seen.steps if step.list in main]
    streams, arguments = _streams(name, steps)
    skips = _skips(steps, arguments)
    joint = {}
    for index, one in enumerate(main):
        step = next(step for step in steps if step.list == one)
        if index and len(streams) == 2 and len(step.results) == 1:
            joint[one] = _order(name, steps, step, streams)
    return ModelSpec(name, tuple(main), streams, arguments, joint=joint, skips=skips, timestep=None)


def _skips(steps: list[_Step], arguments: tuple[str, ...]) -> str | tuple[tuple[int, int], ...]:
    """Long skip connections: blocks whose further arguments are what an earlier one gave."""
    found = []
    for number, step in enumerate(steps):
        others = [tensor for name, tensor in step.arguments.items() if name not in arguments]
        for before, earlier in enumerate(steps[:number]):
            if any(_same(result, tensor) for result in earlier.results for tensor in others):
                found.append((before, number))
    mirrored = ModelSpec("", skips=MIRRORED).skip_pairs(len(steps))
    return MIRRORED if found and set(found) <= set(mirrored) else tuple(found)


def _is_whole(transformer: nn.Module, name: str, seen: _Seen) -> bool:
    """Whether every block of a list ran once, and hands on tensors of one shape."""
    steps = [step for step in seen.steps if step.list == name]
    # the last block may drop the stream that nobody reads any more
    shapes = {tuple(r.shape for r in step.results) for step in steps[:-1] or steps}
    return len(steps) == len(getattr(transformer, name)) and len(shapes) == 1 and bool(steps[0].results)


def _connected(lists: list[str], seen: _Seen) -> list[str]:
    """The lists that work on the picture: the last one, and those before it as long as they hand on to each other."""
    sizes = {name: max(s.results[0].shape[1] for s in seen.steps if s.list == name) for name in lists}
    widest = max(sizes.values())
    last = max(k for k, name in enumerate(lists) if sizes[name] == widest)
    first = last
    while first > 0 and _feeds(lists[first - 1], lists[first], seen):
        first -= 1
    return lists[first : last + 1]


def _feeds(before: str, after: str, seen: _Seen) -> bool:
    """Whether the results of one list's last block are, apart or joined, arguments of the next one's first."""
    end = [s for s in seen.steps if s.list == before][-1]
    start = next(s for s in seen.steps if s.list == after)
    given = [_sizes(t) for t in start.arguments.values()]
    if all(any(_same(r, t) for t in start.arguments.values()) for r in end.results):
        return {r.shape for r in end.results} == {r.shape for r in start.results}
    total = sum(r.shape[1] for r in end.results)
    return len(end.results) == 2 and any(size[1] == total and size[2] == end.results[0].shape[2] for size in given)


def _sizes(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.shape[0], tensor.shape[1], tensor.shape[2]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _streams(name: str, steps: list[_Step]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Order of a block's results, and the arguments that they become in the next block of the list."""
    first = steps[0]
    following = next((s for s in steps[1:] if s.list == first.list), None)
    if following is None:
        raise UnsupportedModelError(
            f"the first list of blocks of {name} has one block; two are needed to see a pattern"
        )
    became = [next((a for a, t in following.arguments.items() if _same(result, t)), None) for result in first.results]
    if len(became) > 2 or None in became:
        raise UnsupportedModelError(
            f"the blocks of {name} hand on {len(became)} tensors, of which {became.count(None)} are not arguments of "
            "the next block as they are; describe it with layercache.register_model(layercache.ModelSpec(...))"
        )
    if len(became) == 1:
        return ("image",), (str(became[0]), "")
    arguments = [a for a in first.arguments if a in became]
    image = str(arguments[0])  # the picture comes first among the arguments
    other = str(next(a for a in became if a != image))
    return tuple("image" if a == image else "text" for a in became), (image, other)


def _order(name: str, steps: list[_Step], joined: _Step, streams: tuple[str, ...]) -> tuple[str, str]:
    """In which order the two streams in front of a list are joined in its argument."""
    before = [s for s in steps if len(s.results) == 2][-1]
    image = before.results[streams.index("image")]
    whole = next(t for t in joined.arguments.values() if t.shape[1] > image.shape[1])
    if torch.equal(whole[:, : image.shape[1]], image):
        return "image", "text"
    if torch.equal(whole[:, -image.shape[1] :], image):
        return "text", "image"
    raise UnsupportedModelError(f"{name} joins its streams for {joined.list} in a way that is not understood")


class _Proof(Router):
    """Stores every group's residual, then puts some of them in the groups' places."""

    def __init__(self, transformer: nn.Module, spec: ModelSpec, groups: Sequence[tuple[int, int]]):
        super().__init__(transformer, spec, groups)
        self.identity = Identity(spec)
        self.count = len(groups)
        self.reused: frozenset[int] | None = None
        self.keeps_text = True
        self.residuals: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def begin(self, forward: Forward) -> None:
        if self.reused is None:
            self.open((GroupAction(CAPTURE, text=True),) * self.count)
            return
        reuse, compute = GroupAction(REUSE, text=True, ends_run=True), GroupAction(COMPUTE)
        self.open(tuple(reuse if k in self.reused else compute for k in range(self.count)))

    def capture(self, group: int, image_in: Any, text_in: Any, image_out: Any, text_out: Any) -> None:
        text = None if text_in is None or text_out is None else text_out - text_in
        self.residuals[group] = image_out - image_in, text

    def reuse(self, group: int, image: Any, text: Any, results: Streams | None = None) -> Streams:
        image_residual, text_residual = self.residuals[group]
        if text is None or text_residual is None or not self.keeps_text:
            return image + image_residual, text
        return image + image_residual, text + text_residual


def _prove(transformer: nn.Module, spec: ModelSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelSpec:
    """The description, with the streams that the head reads; raises `UnsupportedModelError` unless it holds."""
    description = f"what was found of {spec.model_class} ({', '.join(spec.block_lists)}; {', '.join(spec.streams)})"

    def outputs() -> list[torch.Tensor]:
        output = transformer(*args, **kwargs)
        parts = output if isinstance(output, tuple) else (output,) if isinstance(output, torch.Tensor) else output[:]
        return [first_tensor((part,)) for part in parts if isinstance(part, (torch.Tensor, list))]

    lengths = [len(blocks) for blocks in spec.block_modules(transformer)]
    reads_both = False
    with temporarily_known(spec), torch.no_grad():
        expected = outputs()
        for groups in _groups_to_prove(lengths, spec):
            proof = _Proof(transformer, spec, groups)
            attachment = attach(transformer, proof)
            try:
                _prove_groups(proof, outputs, expected, description)
                if proof.count == sum(lengths):
                    proof.reused, proof.keeps_text = frozenset({proof.count - 1}), False
                    reads_both = spec.has_text and _largest_error(outputs(), expected) > TOLERANCE
            except (RuntimeError, IndexError, KeyError, AttributeError, TypeError) as error:
                if isinstance(error, LayerCacheError):
                    raise
                raise UnsupportedModelError(f"{description} does not hold: {str(error).splitlines()[0]}") from error
            finally:
                attachment.detach()
    return replace(spec, leaves=("image", "text")) if reads_both else spec


def _groups_to_prove(lengths: list[int], spec: ModelSpec) -> list[tuple[tuple[int, int], ...]]:
    """Every block alone, and groups as they are cached: what a block inside one gives may be read elsewhere."""
    total = sum(lengths)
    larger = [cut_behind_skips(cut(name, lengths), spec.skip_pairs(total)) for name in ("thirds", "sixth")]
    return list(dict.fromkeys([tuple((k, k + 1) for k in range(total)), *larger]))


def _prove_groups(
    proof: _Proof, outputs: Callable[[], list[torch.Tensor]], expected: list[torch.Tensor], description: str
) -> None:
    """Stores the groups' residuals, and takes each instead, and all together; raises where the output changes."""
    stored = outputs()
    if len(proof.residuals) != proof.count or _largest_error(stored, expected):
        raise UnsupportedModelError(f"{description} does not hold: looking at the blocks changes the output")
    for reused in [*(frozenset({k}) for k in range(proof.count)), frozenset(range(proof.count))]:
        proof.reused = reused
        error = _largest_error(outputs(), expected)
        if not error <= TOLERANCE:
            lo, hi = proof.groups[min(reused)]
            places = "all blocks" if len(reused) > 1 else f"block {lo}" if hi - lo == 1 else f"blocks {lo} to {hi - 1}"
            raise UnsupportedModelError(
                f"{description} does not hold: with {places} replaced by the stored residual the output is off "
                f"by {error:.1%}; describe the class with layercache.register_model(layercache.ModelSpec(...))"
            )


def _largest_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest deviation of an element, relative to the largest of its tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-20)) for a, b in zip(found, expected, strict=True)
    )
