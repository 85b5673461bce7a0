"""Random sequences of forwards: a stored residual is only ever added for the loop, branch and part that stored it."""

from __future__ import annotations

import random
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import layercache
from layercache.errors import LayerCacheWarning
from layercache.methods.easycache import EasyCache
from layercache.methods.fbcache import DBCache, FBCache
from layercache.models.registry import fingerprint_of, temporarily_known
from layercache.schedule.schedule import Schedule

DIM, BLOCKS, STEPS = 4, 3, 5
SPEC = layercache.ModelSpec(
    "LoopModel", ("blocks",), ("image",), ("x", "unused"), timestep="timestep", adds=("control",)
)
_SAMPLER = FlowMatchEulerDiscreteScheduler(shift=3.0)
_SAMPLER.set_timesteps(STEPS)
SIGMAS = tuple(_SAMPLER.sigmas.tolist())
METHODS = {
    "fbcache": FBCache(threshold=1e9, warmup=1),
    "dbcache": DBCache(threshold=1e9, front=1, back=1, warmup=1),
    "easycache": EasyCache(threshold=1e9, warmup=2),
}


class LoopBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.weight + condition)


class LoopModel(nn.Module):
    """Three blocks, whose residuals depend on the stream, the prompt and the time; ``control`` is added behind each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(LoopBlock() for _ in range(BLOCKS))

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, control: Any = None
    ) -> torch.Tensor:
        condition = encoder_hidden_states + timestep.reshape(-1, 1, 1)
        for block in self.blocks:
            x = block(x, condition)
            if control is not None:
                x = x + control
        return x

    def by_hand(self, x: torch.Tensor, condition: torch.Tensor, control: Any, first: int = 0) -> list[torch.Tensor]:
        """The stream in front of each block from ``first`` on, and behind the last; nothing reused."""
        found = [x]
        for block in self.blocks[first:]:
            found.append(found[-1] + torch.tanh(found[-1] @ block.weight + condition) + control)
        return found


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with temporarily_known(SPEC), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCacheWarning)
        yield


def schedule(rng: random.Random, model: nn.Module) -> Schedule:
    """Of one group of all blocks: a step is computed, or takes the residual of an earlier computed one."""
    computed, rows = [0], [(None,)]
    for step in range(1, STEPS):
        if rng.random() < 0.4:
            computed.append(step)
            rows.append((None,))
        else:
            rows.append(({rng.choice(computed): 1.0},))
    return Schedule(fingerprint_of(model, SIGMAS, ()), ((0, BLOCKS),), tuple(rows), (1.0,))


@dataclass
class Case:
    """One cache and what is done with it."""

    seed: int
    rng: random.Random = field(init=False)
    wrong: list[str] = field(default_factory=list)
    stored: dict[Any, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    is_ordinary: bool = True
    mixes: bool = False
    expected: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.model = LoopModel()
        self.kind = self.rng.choice(["fbcache", "dbcache", "schedule", "easycache"])
        self.source = self.rng.choice(["timestep", "caller", "scheduler"])
        if self.kind == "easycache":
            self.source = "scheduler"
        self.plan = schedule(self.rng, self.model) if self.kind == "schedule" else METHODS[self.kind]
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if self.source == "scheduler" else None
        self.controlled = self.kind != "easycache" and self.rng.random() < 0.3
        self.fails: type[BaseException] | None = None
        self.model.blocks[1].register_forward_pre_hook(self._fail)

    def _fail(self, *_: Any) -> None:
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error

    def mischief(self, chance: float) -> bool:
        found = self.rng.random() < chance
        self.is_ordinary &= not found
        return found

    def run(self) -> None:
        plain = self.rng.random() < 0.25
        self.chance = 0.0 if plain else 1.0
        self.cache = layercache.enable(self.model, self.plan, self.scheduler)
        for generation in range(self.rng.randint(1, 4)):
            if self.source != "scheduler" and self.mischief(0.3 * self.chance):
                self.interleaved(generation)
            elif self.mischief(0.2 * self.chance):
                thread = threading.Thread(target=self._guarded, args=(generation,))
                thread.start()
                thread.join()
            else:
                self.whole(generation)
            if self.mischief(0.1 * self.chance):
                self.cache.reset()
        report = self.cache.report()
        if self.is_ordinary and report.cached_cells != self.expected:
            self.wrong.append(f"{report.cached_cells} reused, {self.expected} expected")
        layercache.disable(self.model)

    def _guarded(self, generation: int) -> None:
        with torch.no_grad():
            self.whole(generation)

    def whole(self, number: int) -> None:
        for _ in self.generation(number):
            pass

    def interleaved(self, number: int) -> None:
        """Two loops whose forwards come in any order, as requests or without a word."""
        requests = self.kind == "schedule" and self.rng.random() < 0.5
        names = [f"{number} {k}" if requests else None for k in range(2)]
        runs = [self.generation((number, k), name) for k, name in enumerate(names)]
        self.mixes = True  # of tiles without a name nothing tells, where another loop comes between them
        while runs:
            run = self.rng.choice(runs)
            if next(run, "over") == "over":
                runs.remove(run)
        self.mixes = False
        for name in names:
            if name is not None and name in self.cache.requests.routers:
                self.cache.forget(name)

    def generation(self, number: Any, request: str | None = None) -> Iterator[None]:
        rng = self.rng
        branches = rng.choice([("cond",), ("cond", "uncond"), (None,), (None, None)])
        texts = [torch.randn(1, 1, DIM, generator=torch.Generator().manual_seed(rng.getrandbits(30))) for _ in branches]
        tiles = 2 if self.mischief(0.25 * self.chance) else 1
        names_parts = tiles > 1 and (rng.random() < 0.5 or self.mixes)
        self.may_fail = tiles == 1 or names_parts
        if self.scheduler is not None:
            self.scheduler.set_timesteps(STEPS)
        stops = rng.randint(1, STEPS) if self.mischief(0.3 * self.chance) else STEPS
        tokens = rng.randint(2, 4)
        self.velocities: list[torch.Tensor] = []
        for step in range(stops):
            if self.mischief(0.05 * self.chance):
                tokens += 1
            forwards = [(k, tile) for k in range(len(branches)) for tile in range(tiles)]
            if self.mischief(0.2 * self.chance):
                rng.shuffle(forwards)
            # of tiles without a name that never come together nothing tells
            if (tiles == 1 or names_parts) and self.kind != "easycache":
                forwards = [f for f in forwards if not self.mischief(0.1 * self.chance)]
            forwards += [f for f in forwards if self.mischief(0.07 * self.chance)]
            self.outputs: list[tuple[torch.Tensor, bool]] = []
            self.failed = False
            for k, tile in forwards:
                owner = number, k, tile
                with self.cache.request(request) if request is not None else nullcontext():
                    self.forward(owner, step, branches[k], texts[k], tokens, tile if names_parts else None)
                yield
            if self.scheduler is not None and not self.sampled(step, tokens):
                return
        if self.kind == "schedule":
            reused = sum(row[0] is not None for row in self.plan.cells)
        else:
            reused = STEPS - (3 if self.kind == "easycache" else 1)
        self.expected += reused * len(branches)

    def sampled(self, step: int, tokens: int) -> bool:
        """Takes the sampler's step; a method that replaces velocities gives it multiples of this generation's own."""
        if self.kind != "easycache":
            self.scheduler.step(torch.zeros(1), self.scheduler.timesteps[step], torch.zeros(1))
            return True
        if self.failed or not self.outputs:  # the loop ends with the forward
            return False
        sample = torch.randn(1, tokens, DIM)
        velocity = torch.stack([output for output, _ in self.outputs]).mean(dim=0)
        after = self.scheduler.step(velocity, self.scheduler.timesteps[step], sample).prev_sample
        used = (after - sample) / (SIGMAS[step + 1] - SIGMAS[step])
        is_full = all(full for _, full in self.outputs)
        own = [velocity] if is_full else []
        own += [v for v in self.velocities if v.shape == used.shape]
        if not any(torch.allclose(used, v * ((used * v).sum() / (v * v).sum()), atol=1e-3) for v in own):
            self.wrong.append(f"velocity of step {step}")
        if is_full:
            self.velocities.append(velocity)
        return True

    def naming(self, step: int, branch: str | None, part: int | None) -> AbstractContextManager[Any]:
        contexts = ExitStack()
        if self.source == "caller":
            contexts.enter_context(self.cache.step(step))
        if branch is not None or part is not None:
            contexts.enter_context(self.cache.step(branch=branch, part=part))
        return contexts

    def forward(self, owner: Any, step: int, branch: str | None, text: Any, tokens: int, part: int | None) -> None:
        x = torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(self.rng.getrandbits(30)))
        time = torch.full((1,), SIGMAS[step])
        control = torch.randn(1, 1, DIM) if self.controlled else None
        if self.may_fail and self.mischief(0.04 * self.chance):
            self.fails = self.rng.choice([RuntimeError, KeyboardInterrupt, SystemExit])
        try:
            with self.naming(step, branch, part):
                found = self.model(x, timestep=time, encoder_hidden_states=text, control=control)
        except (RuntimeError, KeyboardInterrupt, SystemExit) as error:
            if isinstance(error, layercache.LayerCacheError):
                raise
            self.failed = True
            return
        finally:
            self.fails = None
        self.judge(owner, step, found, x, text + time.reshape(-1, 1, 1), 0.0 if control is None else control)

    def judge(self, owner: Any, step: int, found: torch.Tensor, x: torch.Tensor, condition: Any, control: Any) -> None:
        """The output is the full one, or has in the place of the skipped blocks a residual of the owner's own."""
        states = self.model.by_hand(x, condition, control)
        if self.kind == "easycache":
            is_full = torch.allclose(found, states[-1], atol=1e-5)
            self.outputs.append((found, is_full))
            if not is_full and not torch.equal(found, x):
                self.wrong.append(f"step {step} of {owner}")
            return
        first = 0 if self.kind == "schedule" else 1
        last = BLOCKS - 1 if self.kind == "dbcache" else BLOCKS
        own = [residual for residual in self.stored[owner] if residual.shape == x.shape]
        candidates = [self.model.by_hand(states[first] + r + control, condition, control, last)[-1] for r in own]
        if not any(torch.allclose(found, candidate, atol=1e-4) for candidate in (states[-1], *candidates)):
            self.wrong.append(f"step {step} of {owner}")
        self.stored[owner].append(states[last] - control - states[first])


def check(seed: int) -> Case:
    case = Case(seed)
    case.run()
    assert not case.wrong, f"seed {seed}, {case.kind} by {case.source}: {case.wrong[:3]}"
    return case


@pytest.mark.parametrize("first", range(0, 600, 150))
def test_random_sequences(first):
    ordinary = [check(seed) for seed in range(first, first + 150)]
    assert sum(case.is_ordinary for case in ordinary) > 24, "their reuse is counted"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(600, 10600, 1000))
def test_many_random_sequences(first):
    for seed in range(first, first + 1000):
        check(seed)
