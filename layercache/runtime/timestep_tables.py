"""Timestep tables, as users get them: folding a pipeline, and the report of memory before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layercache._utils.compat import unwrap_compiled
from layercache._utils.summaries import Rows, Summarised, joined
from layercache.errors import ArgumentError
from layercache.models.registry import experts_of, find_transformer
from layercache.runtime.patches import MethodPatch, restore
from layercache.runtime.transformer_tables import FoundLayers, TransformerTables


def fold_timesteps(pipe: Any, steps: int, **call: Any) -> TimestepTables:
    """Tables in the place of what a transformer makes of the timestep alone; their weights leave the device.

    AdaLN projections of many models (Qwen-Image, AuraFlow, CogVideoX, Z-Image) get an embedding of the timestep and
    nothing else. For each of them the results of all timesteps of a run are kept, ``[steps + 1, outputs]`` in its own
    dtype, and the weights go to the host at the end of the pipeline's first call, or once ``steps`` timesteps were
    seen. Results are the same bits. Which layers these are is found in the first forward, by following what its tensors
    are made of. A timestep that is not in the tables is computed from the weights on the host, and kept.

    Examples:
        >>> with layercache.fold_timesteps(pipe, steps=50) as tables:
        ...     pipe(prompt, num_inference_steps=50)
        ...     print(tables)

    Args:
        pipe: a diffusers pipeline, or a transformer. Both transformers of a pipeline that has two are folded.
        steps: how many distinct timesteps the tables hold, those of one run or of several; where more are used, the one
            used longest ago makes room.
        call: arguments of a call of the pipeline, which is run up to its first forward. So the layers are found, or
            refused, at once, and weights of those found on a CPU stay there when the pipeline is moved elsewhere (of
            two transformers the first one's). Without arguments the next call finds them.

    Returns:
        The tables: ``report()`` (also their ``repr``), ``check()``, ``release()`` and ``undo()``; as a context manager
        they are undone at its end.

    Raises:
        ArgumentError: ``steps`` is no whole number from 1 on.
        UnsupportedModelError: there is no transformer, or none of its arguments holds a timestep. With ``call``, else
            by the first forward: no layer depends on the timestep alone (guidance, pooled text or sizes enter the
            embedding), or none gains by it. The model is as it was then.
        CacheStateError: tables are there already, or the model is offloaded. By a forward: it was offloaded later, or
            a result cannot be trusted.

    Warns:
        LayerCacheWarning: forwards are computed in full, or the model has changed so that nothing is left to fold.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ArgumentError(f"steps is a number of distinct timesteps from 1 on, got {steps!r}", argument="steps")
    pipeline = None if isinstance(pipe, nn.Module) else pipe
    modules = {"transformer": pipe} if pipeline is None else experts_of(pipe)
    modules = modules or {"transformer": find_transformer(pipe)}
    folds = [TransformerTables(unwrap_compiled(module), pipeline, name, steps) for name, module in modules.items()]
    for fold in folds:
        fold.check_model()
    tables = TimestepTables(folds, pipeline)
    tables.attach()
    if call:
        try:
            tables.find(pipe, call)
        except BaseException:
            tables.undo()
            raise
    return tables


@dataclass(frozen=True, repr=False)
class TimestepReport(Summarised):
    """Memory before and after, and what was looked up.

    Attributes:
        projections: linear layers that became tables.
        names: of these layers.
        kept: how many others depend on the timestep and stay as they are, by the reason.
        device: where the transformer runs.
        before: bytes of all weights and buffers of the transformers.
        weights: bytes of the projections' weights.
        tables: bytes of the tables that are there now.
        is_released: whether the weights have left the device.
        rows: timesteps in the tables, each counted once for every kind of forward.
        looked_up: forwards that took everything from the tables.
        computed: of these, those whose timestep had to be computed first.
        in_full: forwards that computed the projections, by the reason.
    """

    projections: int
    names: tuple[str, ...]
    kept: Mapping[str, int]
    device: str
    before: int
    weights: int
    tables: int
    is_released: bool
    rows: int
    looked_up: int
    computed: int
    in_full: Mapping[str, int] = field(default_factory=dict)

    @property
    def after(self) -> int:
        """Bytes on the device that runs the transformer, once the weights have left it."""
        return self.before - self.weights + self.tables

    def _summary(self) -> tuple[str, Rows]:
        if not self.projections:
            return "TimestepTables: nothing is folded now; the first forward finds what can be", []
        saved = f"{self.weights / 1e6:,.1f} MB of weights for {self.tables / 1e6:,.1f} MB of tables"
        place = "on the host" if self.is_released else "still on the device, until the first call has ended"
        if self.is_released and self.device == "cpu":
            place = "on the host, which is the device here: nothing is saved before the model moves to another"
        return f"TimestepTables: {self.projections} projections, {self.rows} timesteps, {saved}", [
            ("memory", f"{self.before / 1e6:,.1f} MB on {self.device} before, {self.after / 1e6:,.1f} MB after"),
            ("weights", place),
            ("forwards", f"{self.looked_up} by the tables, for {self.computed} of them a row was computed first"),
            (
                "not folded",
                joined([f"{count} layers that {reason}" for reason, count in self.kept.items()])
                + "".join(f"; {count} forwards computed in full because {why}" for why, count in self.in_full.items()),
            ),
        ]


class TimestepTables:
    """The tables of a pipeline's transformers, as `fold_timesteps` gives them.

    Attributes:
        parts: of each transformer.
    """

    def __init__(self, parts: Sequence[TransformerTables], pipeline: Any):
        self.parts, self._pipeline = tuple(parts), pipeline
        self._before: dict[str, Any] | None = None
        self._last: TimestepReport | None = None

    def attach(self) -> None:
        for part in self.parts:
            part.attach()
        if hasattr(self._pipeline, "maybe_free_model_hooks"):
            name = "maybe_free_model_hooks"
            patch = MethodPatch(self._pipeline, name, self._at_end(getattr(self._pipeline, name)))
            patch.before = {name: self._pipeline.__dict__[name]} if name in self._pipeline.__dict__ else {}
            self._before, self._pipeline.__dict__[name] = patch.before, patch

    def find(self, pipe: Any, call: Mapping[str, Any]) -> None:
        """Runs a pipeline up to its first forward, in which the layers are found."""
        for part in self.parts:
            part.only_finds = True
        try:
            with torch.no_grad():
                pipe(**call)
        except FoundLayers:
            pass
        finally:
            for part in self.parts:
                part.only_finds = False
        if all(part.device.type == "cpu" for part in self.parts):
            self.release()

    def _at_end(self, original: Any) -> Any:
        def maybe_free_model_hooks(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.check()
            self.release()
            return result

        return maybe_free_model_hooks

    def report(self) -> TimestepReport:
        """What was folded, memory before and after, and how many forwards the tables served.

        Once the tables are undone it is what was true before.
        """
        if self._last is not None:
            return self._last
        kept: Counter[str] = Counter()
        in_full: Counter[str] = Counter()
        for part in self.parts:
            kept.update(part.kept)
            in_full.update(part.in_full)
        names = tuple(projection.name for part in self.parts for projection in part.projections)
        return TimestepReport(
            projections=len(names),
            names=names,
            kept=kept,
            device=str(self.parts[0].device),
            before=sum(part.nbytes for part in self.parts),
            weights=sum(projection.nbytes for part in self.parts for projection in part.projections),
            tables=sum(tables.nbytes for part in self.parts for tables in part.kinds.values()),
            is_released=all(part.state.is_released for part in self.parts if part.projections),
            rows=sum(len(tables.rows) for part in self.parts for tables in part.kinds.values()),
            looked_up=sum(part.looked_up for part in self.parts),
            computed=sum(part.computed for part in self.parts),
            in_full=in_full,
        )

    def check(self) -> None:
        """Looks whether results since the last check can be trusted; the end of a pipeline's call does.

        Raises:
            CacheStateError: a row was taken for another timestep or another input than it was made of. The
                pictures are NaN.
        """
        for part in self.parts:
            part.check()

    def release(self) -> None:
        """The weights leave the device now, instead of at the end of the pipeline's first call."""
        for part in self.parts:
            part.release()

    def undo(self) -> None:
        """Puts the weights back where the rest of the model is, and drops the tables; a second time does nothing."""
        self._last = self.report()
        for part in self.parts:
            part.undo()
        if self._before is not None:
            restore(self._pipeline, "maybe_free_model_hooks", self._before)
            self._before = None

    def __enter__(self) -> TimestepTables:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return repr(self.report())

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()
