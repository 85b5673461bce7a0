"""Learning-to-Cache: one learned number per module and cache step says whether its last output will do.

Every second step is a cache step: 1, 3, 5, or shifted 2, 4, 6. While a router is trained, a module gives
``beta * fresh + (1 - beta) * cached`` there, ``beta = sigmoid(theta)``, and theta is moved so that the frozen model's
output changes little while few betas stay large. Afterwards a module is computed where beta is above a threshold, and
its last output is taken elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm

from layercache import ops
from layercache._utils.files import write_atomically
from layercache._utils.formats import going_on
from layercache._utils.timer import Timer
from layercache._utils.validate import expect
from layercache.errors import MethodError, ScheduleMismatchError
from layercache.methods.full_runs import generate_once, transformer_of
from layercache.models.registry import fingerprint_of, spec_for, velocities
from layercache.runtime.attachment import attach
from layercache.runtime.modules import ModuleRouter, Output, as_rows, copy_of, sigmas_of
from layercache.runtime.policy import check_range
from layercache.schedule.fingerprint import Fingerprint
from layercache.schedule.memory_plan import COMPUTE, GroupAction
from layercache.schedule.module_schedule import ModuleSchedule, alternating

CLAMP = 5.0
FORMAT = "layercache router"


@dataclass(frozen=True)
class LearningToCache:
    """Learns by gradient descent which modules to cache at every second step.

    Source: docs/methods.md, Learning-to-Cache.

    The published rates (1e-3 to 1e-2, over tens of thousands of updates) and penalties (1e-6 to 5e-6)
    are for data sets of noised pictures; these are for a few dozen generations.

    Attributes:
        penalty: lambda, weight of the sum of all betas of a step beside the mean squared error.
        learning_rate: of AdamW, without weight decay.
        rounds: generations that are learned from; each has an update per cache step and branch.
        seed: of theta and of the first generation, the others follow.
        by_cost: betas count by the measured cost of their module (mean 1); otherwise all the same, as published.
        shifted: for single-step DPM-Solver-2 (KDPM2), whose steps are a point of the outer grid and a midpoint in turn:
            the outer points but the first are cache steps and take what the midpoint before them gave.
        straight_through: betas above it count as 1 and the others as 0 in training too, with the gradient of beta
            itself (published code, off by default); ``None`` interpolates.
    """

    SOURCE: ClassVar[str] = "the class is in the same module"

    penalty: float = 1e-4
    learning_rate: float = 0.1
    rounds: int = 24
    seed: int = 0
    by_cost: bool = True
    shifted: bool = False
    straight_through: float | None = None

    name: ClassVar[str] = "l2c"

    def __post_init__(self) -> None:
        check_range("penalty", self.penalty, 0)
        check_range("rounds", self.rounds, 1)
        check_range("seed", self.seed, 0)
        if self.straight_through is not None:
            check_range("straight_through", self.straight_through, 0, 1)
        if not 0 < self.learning_rate < math.inf:
            raise MethodError(
                f"learning_rate must be a number above 0, got {self.learning_rate}", argument="learning_rate"
            )
        if self.penalty == math.inf:
            raise MethodError("penalty must be a finite number, got inf", argument="penalty")

    def train(
        self,
        pipe: Any,
        prompts: Sequence[Any],
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
        **call: Any,
    ) -> LearnedRouter:
        """Learns which modules can be cached at every second step, from the pipeline's own generations.

        Instead of noised pictures of a data set the model's own trajectories are learned from, every cache step of
        every generation in turn; nothing but a pipeline is needed, with flow matching or with DDIM (DiT). The model's
        weights are not touched. Where sound leaves the model too, its mean squared error is added to the picture's.

        Args:
            pipe: a diffusers pipeline whose model is called once per step and branch.
            prompts: one per round, in turn; a list is a batch.
            checkpoint: a file that is written after every round; a training that was killed goes on from it to the same
                result.
            progress: show a progress bar with the losses.
            call: arguments of every call, such as ``num_inference_steps``.

        Raises:
            MethodError: no prompts, or no cache step among so few steps.
            UnsupportedModelError: no pipeline, or no gradient passes through the model.
            ScheduleMismatchError: the checkpoint belongs to another training.
        """
        if not prompts:
            raise MethodError("a router is trained on at least one prompt")
        transformer = transformer_of(pipe)
        training = _Training(transformer, spec_for(transformer), getattr(pipe, "scheduler", None), self)
        identity = {
            "settings": asdict(self) | {"rounds": None},
            "prompts": [repr(p) for p in prompts],
            "call": repr(call),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
        losses = _resume(training, checkpoint, digest)
        attachment = attach(pipe, training)
        try:
            with _frozen(transformer), tqdm(total=self.rounds, desc="training", disable=not progress) as bar:
                bar.update(len(losses))
                for number in range(len(losses), self.rounds):
                    generate_once(pipe, prompts[number % len(prompts)], self.seed + number, call)
                    losses.append(training.take_sums())
                    bar.set_postfix_str(
                        f"error {losses[-1][0]:.2e}, {losses[-1][1]:.1f} of {len(training.units)} modules"
                    )
                    bar.update()
                    _save(training, checkpoint, digest, losses)
        finally:
            attachment.detach()
        if not training.theta:
            raise MethodError(_too_few(self))
        return LearnedRouter(
            fingerprint_of(transformer, training.sigmas, training.branches),
            tuple(unit.name for unit in training.units),
            torch.stack([row.detach().cpu() for row in training.theta]),
            training.seconds,
            losses,
            self.shifted,
        )


@dataclass
class LearnedRouter:
    """What a training found.

    Attributes:
        fingerprint: of the model and run.
        units: names of the modules.
        theta: ``[cache steps, units]``, fp32.
        seconds: measured seconds of every module.
        losses: per round, means over its updates: squared error, and sum of betas.
        shifted: see `LearningToCache`.
    """

    SOURCE: ClassVar[str] = "LearningToCache().train(pipe, prompts) gives one"

    fingerprint: Fingerprint
    units: tuple[str, ...]
    theta: torch.Tensor
    seconds: tuple[float, ...]
    losses: list[tuple[float, float]] = field(default_factory=list)
    shifted: bool = False

    @property
    def beta(self) -> torch.Tensor:
        return torch.sigmoid(self.theta)

    def schedule(self, threshold: float | None = None, budget: float | None = None) -> ModuleSchedule:
        """The hard decisions: computed where beta is above ``threshold`` (0.1 if nothing is given).

        Args:
            threshold: published ones are 0.1 and 0.9.
            budget: instead of a threshold, share of the modules' time: the smallest betas are cached until it is kept.

        Raises:
            MethodError: both are given, or the budget is below half, which no cache of every second step reaches.
        """
        if threshold is not None and budget is not None:
            raise MethodError("give a threshold or a budget, not both")
        limit = 0.1 if threshold is None else threshold
        if budget is not None:
            limit = self._limit_for(budget)
        cached = [
            [unit for unit, b in zip(self.units, row, strict=True) if not b > limit] for row in self.beta.tolist()
        ]
        found = alternating(self.fingerprint, self.units, cached, self.seconds, first=2 if self.shifted else 1)
        return replace(found, made_by={"method": "learning-to-cache", "threshold": limit})

    def _limit_for(self, budget: float) -> float:
        """The least threshold whose schedule keeps to the budget."""
        for limit in [-1.0, *sorted(set(self.beta.flatten().tolist()))]:
            if self.schedule(threshold=limit).used <= budget + 1e-9:
                return limit
        least = self.schedule(threshold=1.0).used
        raise MethodError(
            f"a budget of {budget:g} cannot be met: caching every second step needs {least:.3f} at least",
            argument="budget",
        )


def _too_few(settings: LearningToCache) -> str:
    return f"a router needs at least {2 + settings.shifted} steps, so that one of them can be a cache step"


class _Training(ModuleRouter):
    """Records at full steps; at cache steps runs the frozen model, then once more with the router, and updates it."""

    needs_gradients = True

    def __init__(self, transformer: nn.Module, spec: Any, scheduler: Any, settings: LearningToCache):
        super().__init__(transformer, spec, scheduler)
        self.settings = settings
        self.theta: list[nn.Parameter] = []
        self.optimizer: torch.optim.AdamW | None = None
        self.sigmas: tuple[float, ...] = ()
        self.branches: list[str] = []
        self.recorded: dict[str, dict[int, Output]] = {}
        self.sums = [0.0, 0.0, 0]
        self.device = next(transformer.parameters()).device
        self.clock = Timer(self.device)
        self.seconds: tuple[float, ...] = ()
        self._weights: torch.Tensor | None = None
        self._mode = "record"
        self._betas: list[torch.Tensor] = []

    def prepare(self, cache_steps: int) -> None:
        """Parameters of every cache step, apart, so that an update moves those of its step alone."""
        generator = torch.Generator("cpu").manual_seed(self.settings.seed)
        starts = torch.randn(cache_steps, len(self.units), generator=generator)
        self.theta = [nn.Parameter(row.clone().to(self.device)) for row in starts]
        self.optimizer = torch.optim.AdamW(self.theta, lr=self.settings.learning_rate, weight_decay=0.0)

    def announce(self, arguments: Mapping[str, Any]) -> None:
        self.require_one_shape(arguments)
        if self.branch not in self.branches:
            self.branches.append(self.branch)
        if self.starts:
            self.sigmas = sigmas_of(self.identity.scheduler)
            self.recorded.pop(self.branch, None)
        if not self.theta:
            cache_steps = (len(self.sigmas) - 1 - self.settings.shifted) // 2
            if cache_steps < 1:
                raise MethodError(_too_few(self.settings), argument="num_inference_steps")
            self.prepare(cache_steps)
        self._mode = "record" if self._cache_step is None else "teach"
        self.open((GroupAction(COMPUTE),))

    @property
    def _cache_step(self) -> int | None:
        """The number of the cache step that the present one is."""
        number, rest = divmod(self.step_index - self.settings.shifted, 2)
        return number if rest and number >= 0 else None

    def through(self, number: int, compute: Callable[[], Output]) -> Output:
        if self._mode == "record":
            stored = self.recorded.setdefault(self.branch, {})
            self.clock.mark(number)
            output = compute()
            self.clock.mark(None)
            stored[number] = copy_of(output, stored.get(number))
            return output
        output = compute()
        if self._mode == "teach":
            return output
        return _interpolated(output, self.recorded[self.branch][number], self._betas[number])

    def after(self, output: Any, rerun: Callable[[], Any]) -> None:
        if self._mode != "teach" or self.branch not in self.recorded:
            return
        assert self._cache_step is not None
        theta = self.theta[self._cache_step]
        teacher = [velocity.detach() for velocity in velocities(output, self.spec)]
        with torch.enable_grad():
            betas = torch.sigmoid(theta)
            self._mode, self._betas = "learn", list(self._applied(betas).unbind())
            self.open((GroupAction(COMPUTE),))
            student = velocities(rerun(), self.spec)
            pairs = zip(teacher, student, strict=True)
            error = torch.stack([(a.float() - b.float()).pow(2).mean() for a, b in pairs]).sum()
            used = (betas * self._cost()).sum()
            loss = error + self.settings.penalty * used
            assert self.optimizer is not None
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            theta.clamp_(-CLAMP, CLAMP)
        self._mode = "record"
        self.sums[0] += float(error.detach())
        self.sums[1] += float(betas.detach().sum())
        self.sums[2] += 1

    def _applied(self, betas: torch.Tensor) -> torch.Tensor:
        limit = self.settings.straight_through
        return betas if limit is None else (betas > limit).float() + betas - betas.detach()

    def _cost(self) -> torch.Tensor | float:
        """Of every module, mean 1, as measured in the first round."""
        if not self.settings.by_cost:
            return 1.0
        if self._weights is None:
            self._read_clock()
            seconds = torch.tensor(self.seconds, dtype=torch.float32, device=self.device)
            self._weights = seconds / seconds.mean()
        return self._weights

    def _read_clock(self) -> None:
        if not self.seconds:
            totals = self.clock.totals()
            self.seconds = tuple(max(totals.get(unit, 0.0), 1e-9) for unit in range(len(self.units)))

    def take_sums(self) -> tuple[float, float]:
        error, used, count = self.sums
        self.sums = [0.0, 0.0, 0]
        return error / max(1, count), used / max(1, count)


def _interpolated(fresh: Output, cached: Output, beta: torch.Tensor) -> Output:
    """Both outputs of joint attention share one beta."""
    if isinstance(fresh, torch.Tensor):
        return ops.router_lerp(as_rows(fresh), as_rows(cached), beta.reshape(1)).view_as(fresh)
    return tuple(_interpolated(a, b, beta) for a, b in zip(fresh, cached, strict=True))


@contextmanager
def _frozen(transformer: nn.Module) -> Iterator[None]:
    """No parameter of the model takes a gradient."""
    learning = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _save(
    training: _Training, path: str | os.PathLike[str] | None, digest: str, losses: list[tuple[float, float]]
) -> None:
    if path is None:
        return
    assert training.optimizer is not None
    data = {
        "format": FORMAT,
        "digest": digest,
        "theta": [row.detach().cpu() for row in training.theta],
        "optimizer": training.optimizer.state_dict(),
        "losses": losses,
        "seconds": training.seconds,
        "sigmas": training.sigmas,
        "branches": training.branches,
    }
    write_atomically(path, lambda temporary: torch.save(data, temporary))


def _resume(training: _Training, path: str | os.PathLike[str] | None, digest: str) -> list[tuple[float, float]]:
    """Puts a checkpoint's state in place; the losses so far."""
    if path is None or not Path(path).exists():
        return []
    with going_on(path):
        data = torch.load(path, map_location="cpu", weights_only=True)
        if data["format"] != FORMAT:
            raise ValueError("a checkpoint of something else")
        theta = data["theta"]
        steps, units = len(theta), len(theta[0])
    if data["digest"] != digest or units != len(training.units):
        raise ScheduleMismatchError(f"{path} belongs to a training with other settings; name another file")
    training.prepare(steps)
    with torch.no_grad():
        for row, stored in zip(training.theta, theta, strict=True):
            row.copy_(stored)
    assert training.optimizer is not None
    training.optimizer.load_state_dict(data["optimizer"])
    training.seconds = tuple(data["seconds"])
    training.sigmas, training.branches = tuple(data["sigmas"]), list(data["branches"])
    return [tuple(entry) for entry in data["losses"]]


def random_router(router: LearnedRouter, seed: int = 0) -> LearnedRouter:
    """The same betas in another order within every cache step: as many modules cached, but not the learned ones.

    Raises:
        ArgumentError: no learned router.
    """
    expect("l2c.random_router", router, LearnedRouter)
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = [row[torch.randperm(len(row), generator=generator)] for row in router.theta]
    return replace(router, theta=torch.stack(rows), losses=[])


# Names of version 0.1, which the class took the place of.
Settings = LearningToCache


def train(
    pipe: Any,
    prompts: Sequence[Any],
    settings: LearningToCache | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> LearnedRouter:
    """`LearningToCache.train` of these settings."""
    return (settings or LearningToCache()).train(pipe, prompts, checkpoint, progress, **call)
