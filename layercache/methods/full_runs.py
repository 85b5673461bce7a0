"""Full runs looked at for the calibration of published methods."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from layercache import ops
from layercache.errors import MethodError, UnsupportedModelError
from layercache.models.positions import one_tensor
from layercache.models.registry import find_transformer, spec_for
from layercache.models.spec import named_arguments
from layercache.planning.samples import arguments_of
from layercache.runtime.attachment import attach
from layercache.runtime.blocks import BlockPass, CapturedBlock, Place
from layercache.runtime.forward import Forward
from layercache.runtime.identity import Place as ForwardPlace
from layercache.runtime.recording import RecordingRouter


class _FirstBlock(CapturedBlock):
    """Notes the block and its arguments before it runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        router = self.block_pass.router
        assert isinstance(router, _Changes)
        router.block_call = self.block, named_arguments(self.block, args, kwargs)
        return super().__call__(*args, **kwargs)


class _Changes(RecordingRouter):
    """Relative L1 changes of the modulated input and of the last block's output, per branch."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.block_call: tuple[Any, Mapping[str, Any]] = (None, {})
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._before: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}

    def item(self, block_pass: BlockPass, block: Any, place: Place) -> Any:
        return _FirstBlock(block_pass, block, place) if place.opens else super().item(block_pass, block, place)

    def look(self, group: int, before: Any, after: Any) -> None:
        start, end = before[0], after[0]
        assert self.spec.modulation is not None
        scale, shift, eps = self.spec.modulation(*self.block_call)
        step, modulated, output = self._before.get(self.branch, (-1, None, None))
        follows = step == self.step_index - 1 and output is not None and output.shape == end.shape
        fresh, inputs = ops.modulate(start, scale, shift, eps=eps, previous=modulated if follows else None)
        if follows and inputs is not None:
            self.pairs.append((inputs, ops.pair_statistics([end], [output])))  # type: ignore[list-item]
        self._before[self.branch] = (self.step_index, fresh, end.clone())


class _Magnitudes(RecordingRouter):
    """Mean ratio of the row norms of the residual of all blocks to those of the step before, per branch and step."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.ratios: dict[str, list[torch.Tensor | None]] = {}
        self._before: dict[str, torch.Tensor] = {}

    def look(self, group: int, before: Any, after: Any) -> None:
        start, end = before[0], after[0]
        residual = torch.empty_like(end, memory_format=torch.contiguous_format)
        ops.capture([end], [start], [residual])
        row = self.ratios.setdefault(self.branch, [])
        if self.step_index == 0:
            row.clear()
            self._before.pop(self.branch, None)
        older = self._before.get(self.branch)
        row.append(None if older is None else ops.row_statistics(residual, older))
        self._before[self.branch] = residual


class _Sensitivities(RecordingRouter):
    """How the output answers to the latents, and to the timestep, of the step after; of the branch that is run first.

    Attributes:
        rows: per run and step ``(t, |f(x', t) - f(x, t)| / |x' - x|, |f(x, t') - f(x, t)| / |t' - t|)``, the last
            one per square root of the number of latents.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.rows: list[list[torch.Tensor]] = []
        self._stream = tuple(inspect.signature(type(self.transformer).forward).parameters)[1]
        self._first = ""
        self._before: tuple[int, Mapping[str, Any], torch.Tensor] | None = None
        self._present: Mapping[str, Any] = {}

    def begin_generation(self, place: ForwardPlace) -> None:
        self._first, self._before = place.key, None
        self.rows.append([])

    def begin(self, forward: Forward) -> None:
        place, time = self.place_of(forward), forward.timestep_name(self.spec)
        if time is None:
            raise MethodError(f"{self.spec.model_class} is given no timestep, and SenCache asks how it answers to that")
        self.branch, self.step_index, self._present = place.key, place.step, forward.arguments
        if place.key == self._first:
            if self._before is not None and self._before[0] == place.step - 1:
                self.rows[-1].append(self._rates(time, *self._before[1:]))
            self._before = None
        self.open(self._recorded)

    def _rates(self, time: str, before: Mapping[str, Any], output: torch.Tensor) -> torch.Tensor:
        now, name = self._present, self._stream
        moved = self._output({**before, name: now[name]}) - output
        later = self._output({**before, time: now[time]}) - output
        change = one_tensor(now[name]).float() - one_tensor(before[name]).float()
        times = [torch.as_tensor(arguments[time], device=output.device).float().max() for arguments in (before, now)]
        rates = moved.norm(), later.norm() / change.numel() ** 0.5
        gaps = change.norm(), (times[1] - times[0]).abs()
        found = [torch.where(gap > 0, rate / gap, 0.0) for rate, gap in zip(rates, gaps, strict=True)]
        return torch.stack([times[0], *found]).cpu()

    def _output(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return _output_of(self.transformer.forward(**arguments))

    def after(self, output: Any, rerun: Any) -> None:
        if self.branch == self._first:
            self._before = self.step_index, dict(self._present), _output_of(output).clone()

    def look(self, group: int, before: Any, after: Any) -> None:
        """The output is looked at instead."""


def _output_of(output: Any) -> torch.Tensor:
    """What a transformer gives, the first of several, in fp32."""
    return one_tensor(output if isinstance(output, torch.Tensor) else output[0]).float()


def _run(
    pipe: Any, router: RecordingRouter, prompts: Sequence[Any], seeds: Sequence[int] | None, call: dict[str, Any]
) -> None:
    if not prompts:
        raise MethodError("give at least one prompt to run in full")
    given = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(given) != len(prompts):
        raise MethodError(f"give one seed per prompt: {len(prompts)} prompts, {len(given)} seeds")
    attachment = attach(pipe, router)
    try:
        for prompt, seed in zip(prompts, given, strict=True):
            generate_once(pipe, prompt, seed, call)
    finally:
        attachment.detach()


def transformer_of(pipe: Any, name: str = "transformer") -> nn.Module:
    """The transformer of a pipeline that is about to be called for whole generations.

    Args:
        pipe: the pipeline.
        name: of the component, where it has several transformers.

    Raises:
        UnsupportedModelError: there is none, or the bare transformer was given.
    """
    transformer = find_transformer(pipe, name)
    if isinstance(pipe, nn.Module):
        raise UnsupportedModelError(
            f"whole generations are run here: give the pipeline, not its bare {type(transformer).__name__}"
        )
    return transformer


def generate_once(pipe: Any, prompt: Any, seed: int, call: Mapping[str, Any]) -> Any:
    """One call of the pipeline; a list of prompts is a batch that shares one generator."""
    return pipe(**{**call, **arguments_of(prompt), "generator": torch.Generator("cpu").manual_seed(seed)})


def input_output_changes(
    pipe: Any, prompts: Sequence[Any], seeds: Sequence[int] | None = None, **call: Any
) -> np.ndarray:
    """Relative L1 changes from step to step, ``[n, 2]``: of the modulated input, and of the last block's output."""
    transformer = transformer_of(pipe)
    spec = spec_for(transformer)
    if spec.modulation is None:
        raise MethodError(f"the description of {spec.model_class} does not say how to get its modulated input")
    router = _Changes(transformer, spec, getattr(pipe, "scheduler", None))
    _run(pipe, router, prompts, seeds, call)
    flat = [[float(t[0, 0] / t[0, 2]) for t in pair] for pair in router.pairs]
    return np.array(flat).reshape(-1, 2)


def magnitude_ratios(pipe: Any, prompt: Any, seed: int = 0, **call: Any) -> dict[str, tuple[float, ...]]:
    """MagCache's ratios of one full run, per branch and step; 1 at step 0. Source: docs/methods.md, MagCache."""
    transformer = transformer_of(pipe)
    router = _Magnitudes(transformer, spec_for(transformer), getattr(pipe, "scheduler", None))
    _run(pipe, router, [prompt], [seed], call)
    return {branch: tuple(1.0 if t is None else float(t[0, 0]) for t in row) for branch, row in router.ratios.items()}


def input_sensitivities(
    pipe: Any, prompts: Sequence[Any], seeds: Sequence[int] | None = None, **call: Any
) -> np.ndarray:
    """SenCache's sensitivities, ``[steps - 1, 3]``: t, J_x and J_t, means over full runs.

    Source: docs/methods.md, SenCache.
    """
    transformer = transformer_of(pipe)
    router = _Sensitivities(transformer, spec_for(transformer), getattr(pipe, "scheduler", None))
    _run(pipe, router, prompts, seeds, call)
    runs = [torch.stack(row) for row in router.rows if row]
    return torch.stack(runs).mean(dim=0).numpy() if runs else np.empty((0, 3))
