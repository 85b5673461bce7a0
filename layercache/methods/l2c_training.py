"""Training of a Learning-to-Cache router: what happens in every forward, the optimiser, and its checkpoint."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layercache import ops
from layercache._utils.files import write_atomically
from layercache._utils.formats import going_on
from layercache._utils.timer import Timer
from layercache.errors import MethodError, ScheduleMismatchError
from layercache.models.registry import velocities
from layercache.parallel.crew import Crew
from layercache.runtime.modules import ModuleRouter, Output, as_rows, copy_of, sigmas_of
from layercache.schedule.memory_plan import COMPUTE, GroupAction

if TYPE_CHECKING:
    from layercache.methods.l2c import LearningToCache

CLAMP = 5.0
FORMAT = "layercache router"


class Training(ModuleRouter):
    """Records at full steps; at cache steps runs the frozen model, then once more with the router, and updates it.

    The parameters and the optimiser are on the CPU, whatever device the model is on: they are a few numbers, and their
    updates are then the same bits in every process of a crew.

    Args:
        transformer, spec, scheduler: of the pipeline.
        settings: of the method.
        crew: processes that train together: the gradients of an update are averaged over them.

    Attributes:
        theta: per cache step, in their order, one number for every unit.
        steps_run: steps at which the transformer was seen to run.
        seconds: of every unit, measured in the first forwards; empty where they do not count.
    """

    needs_gradients = True

    def __init__(
        self, transformer: nn.Module, spec: Any, scheduler: Any, settings: LearningToCache, crew: Crew | None = None
    ):
        super().__init__(transformer, spec, scheduler)
        self.settings, self.crew = settings, crew or Crew()
        self.theta: list[nn.Parameter] = []
        self.optimizer: torch.optim.AdamW | None = None
        self.sigmas: tuple[float, ...] = ()
        self.branches: list[str] = []
        self.steps_run: set[int] = set()
        self.recorded: dict[str, dict[int, Output]] = {}
        self.sums = [0.0, 0.0, 0]
        self.device = next(transformer.parameters()).device
        self.clock = Timer(self.device)
        self.seconds: tuple[float, ...] = ()
        self._rows: dict[int, int] = {}
        self._mode = "record"
        self._betas: list[torch.Tensor] = []
        self._mixed: dict[int, Output] = {}

    def prepare(self, num_steps: int) -> None:
        """Parameters of every cache step, apart, so that an update moves those of its step alone."""
        self._rows = {place: row for row, place in enumerate(self.settings.cache_places(num_steps))}
        if not self._rows:
            raise MethodError(too_few(self.settings), argument="num_inference_steps")
        generator = torch.Generator("cpu").manual_seed(self.settings.seed)
        starts = torch.randn(len(self._rows), len(self.units), generator=generator)
        self.theta = [nn.Parameter(row.clone()) for row in starts]
        self.optimizer = torch.optim.AdamW(self.theta, lr=self.settings.learning_rate, weight_decay=0.0)

    def announce(self, arguments: Mapping[str, Any]) -> None:
        self.require_one_shape(arguments)
        if self.branch not in self.branches:
            self.branches.append(self.branch)
        if self.starts:
            self.sigmas = sigmas_of(self.identity.scheduler)
            self.recorded.pop(self.branch, None)
        if not self.theta:
            self.prepare(len(self.sigmas) - 1)
        self.steps_run.add(self.step_index)
        self._mode = "teach" if self._place in self._rows else "record"
        self.open((GroupAction(COMPUTE),))

    @property
    def _place(self) -> int:
        """The number of the step among those at which the transformer runs."""
        return self.step_index - self.first_step

    def through(self, number: int, compute: Callable[[], Output]) -> Output:
        if self._mode == "record":
            return self._record(number, compute)
        output, stored = compute(), self.recorded.get(self.branch, {})
        if self._mode == "teach" or number not in stored:  # some branches leave a module out (LTX-2)
            return output
        mixed = interpolated(output, stored[number], self._betas[number])
        if self._place + 1 in self._rows and number not in self._mixed:
            self._mixed[number] = _detached(mixed)
        return mixed

    def _record(self, number: int, compute: Callable[[], Output]) -> Output:
        is_timed = self.settings.by_cost and not self.seconds
        if is_timed:
            self.clock.mark(number)
        output = compute()
        if is_timed:
            self.clock.mark(None)
        stored = self.recorded.setdefault(self.branch, {})
        stored[number] = copy_of(output, stored.get(number))
        return output

    def after(self, output: Any, rerun: Callable[[], Any]) -> None:
        if self._mode != "teach" or self.branch not in self.recorded:
            return
        theta = self.theta[self._rows[self._place]]
        teacher = [velocity.detach() for velocity in velocities(output, self.spec)]
        with torch.enable_grad():
            betas = torch.sigmoid(theta)
            self._mode, self._mixed = "learn", {}
            self._betas = list(self._applied(betas).to(self.device).unbind())
            self.open((GroupAction(COMPUTE),))
            student = velocities(rerun(), self.spec)
            pairs = zip(teacher, student, strict=True)
            error = torch.stack([(a.float() - b.float()).pow(2).mean() for a, b in pairs]).sum().cpu()
            used = (betas * self._cost()).sum()
            self._ran.clear()  # gradient checkpointing runs the modules of a block once more
            (error + self.settings.penalty * used).backward()
        self._update(theta, float(error.detach()), float(betas.detach().sum()))
        # what a schedule would find at the next step: of each module what it gave here, computed or not
        stored = self.recorded[self.branch]
        for number, mixed in self._mixed.items():
            stored[number] = copy_of(mixed, stored[number])
        self._mode, self._mixed, self._betas = "record", {}, []

    def _update(self, theta: nn.Parameter, error: float, used: float) -> None:
        """A step of the optimiser with the mean gradient of all processes."""
        assert self.optimizer is not None and theta.grad is not None
        found = self.crew.gather([(theta.grad, error, used)])
        theta.grad = torch.stack([gradient for gradient, _, _ in found]).mean(dim=0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            theta.clamp_(-CLAMP, CLAMP)
        self.sums[0] += sum(one[1] for one in found)
        self.sums[1] += sum(one[2] for one in found)
        self.sums[2] += len(found)

    def _applied(self, betas: torch.Tensor) -> torch.Tensor:
        limit = self.settings.straight_through
        return betas if limit is None else (betas > limit).float() + betas - betas.detach()

    def _cost(self) -> torch.Tensor | float:
        """Of every module, mean 1, as the first process measured it in the first forwards."""
        if not self.settings.by_cost:
            return 1.0
        if not self.seconds:
            totals = self.clock.totals()
            own = tuple(max(totals.get(unit, 0.0), 1e-9) for unit in range(len(self.units)))
            self.seconds = self.crew.agree(own)
        seconds = torch.tensor(self.seconds, dtype=torch.float32)
        return seconds / seconds.mean()

    def take_sums(self) -> tuple[float, float]:
        """Means over the updates since the last call: squared error, and sum of betas."""
        error, used, count = self.sums
        self.sums = [0.0, 0.0, 0]
        return error / max(1, count), used / max(1, count)


def too_few(settings: LearningToCache) -> str:
    return f"a router needs at least {2 + settings.shifted} steps, so that one of them can be a cache step"


def interpolated(fresh: Output, cached: Output, beta: torch.Tensor) -> Output:
    """Both outputs of joint attention share one beta."""
    if isinstance(fresh, torch.Tensor):
        share = beta.reshape(1).to(fresh.device)
        return ops.router_lerp(as_rows(fresh), as_rows(cached), share).view_as(fresh)
    return tuple(interpolated(a, b, beta) for a, b in zip(fresh, cached, strict=True))


def _detached(output: Output) -> Output:
    return output.detach() if isinstance(output, torch.Tensor) else tuple(map(_detached, output))


@contextmanager
def frozen(transformer: nn.Module) -> Iterator[None]:
    """Context in which no parameter of the model takes a gradient."""
    learning = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which whatever draws numbers without a generator of its own draws those of a seed.

    So a round depends on its number alone, and one that is begun again after a stop gives the same.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# --- checkpoints ---------------------------------------------------------------------------------------------------


def save(training: Training, path: str | os.PathLike[str] | None, digest: str, losses: list[Any]) -> None:
    """Writes the whole state behind a round, if this process leads: the number of rounds is that of the losses."""
    if path is None or not training.crew.leads:
        return
    assert training.optimizer is not None
    data = {
        "format": FORMAT,
        "digest": digest,
        "theta": [row.detach() for row in training.theta],
        "optimizer": training.optimizer.state_dict(),
        "losses": losses,
        "seconds": training.seconds,
        "sigmas": training.sigmas,
        "branches": training.branches,
        "steps_run": sorted(training.steps_run),
    }
    buffer = io.BytesIO()
    torch.save(data, buffer)  # into a file, torch would write the file's name too
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def resume(training: Training, path: str | os.PathLike[str] | None, digest: str) -> list[tuple[float, float]]:
    """Puts a checkpoint's state in place, on every process; the losses so far.

    Raises:
        FileFormatError: it is damaged, or of another kind.
        ScheduleMismatchError: it belongs to another training.
    """
    data = _loaded(path, digest, len(training.units)) if path is not None and training.crew.leads else None
    data = training.crew.agree(data)
    if data is None:
        return []
    training.prepare(len(data["sigmas"]) - 1)
    with torch.no_grad():
        for row, stored in zip(training.theta, data["theta"], strict=True):
            row.copy_(stored)
    assert training.optimizer is not None
    training.optimizer.load_state_dict(data["optimizer"])
    training.seconds, training.sigmas = tuple(data["seconds"]), tuple(data["sigmas"])
    training.branches, training.steps_run = list(data["branches"]), set(data["steps_run"])
    return [tuple(entry) for entry in data["losses"]]


def _loaded(path: str | os.PathLike[str], digest: str, units: int) -> dict[str, Any] | None:
    if not Path(path).exists():
        return None
    with going_on(path):
        data: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if data["format"] != FORMAT:
            raise ValueError("a checkpoint of something else")
        width = len(data["theta"][0])
    if data["digest"] != digest or width != units:
        raise ScheduleMismatchError(
            f"{path} belongs to a training with other settings, or by another number of processes; name another file"
        )
    return data
