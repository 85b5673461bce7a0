"""Learning-to-Cache's training written out with plain hooks, and tasks that train in the processes of a crew."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch

from layercache.methods.l2c import LearnedRouter, LearningToCache
from layercache.parallel.crew import Crew
from support.tiny import generators, tiny_pipeline

STEPS = 5
CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
PROMPTS = ["cat", "rocket", "coffee"]
SETTINGS = LearningToCache(rounds=2, learning_rate=0.05, penalty=1e-3, by_cost=False, period=3)
BRANCHES = 2


def pipeline() -> Any:
    return tiny_pipeline(2)


def units_of(pipe: Any) -> list[str]:
    count = len(pipe.transformer.transformer_blocks)
    return [f"transformer_blocks.{k}.{kind}" for k in range(count) for kind in ("attn", "img_mlp", "txt_mlp")]


def trained(crew: Crew, checkpoint: str | None = None, settings: LearningToCache = SETTINGS) -> LearnedRouter:
    return settings.train(pipeline(), PROMPTS, checkpoint, progress=False, crew=crew, **CALL)


def calls_of(pipe: Any, prompt: str, seed: int) -> list[dict[str, Any]]:
    """The arguments of every call of the model in a full run."""
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(dict(k)), with_kwargs=True)
    pipe(prompt, generator=generators(1, seed)[0], **CALL)
    hook.remove()
    return seen


def run(pipe: Any, given: dict[str, Any], change: Any) -> torch.Tensor:
    """A call of the model whose modules give what ``change(name, output)`` says."""
    hooks = [
        pipe.transformer.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: change(name, out))
        for name in units_of(pipe)
    ]
    try:
        return pipe.transformer(**given)[0]
    finally:
        for hook in hooks:
            hook.remove()


def mixed(fresh: Any, cached: Any, beta: torch.Tensor) -> Any:
    if isinstance(fresh, tuple):
        return tuple(mixed(a, b, beta) for a, b in zip(fresh, cached, strict=True))
    return beta * fresh + (1 - beta) * cached


def detached(value: Any) -> Any:
    return tuple(map(detached, value)) if isinstance(value, tuple) else value.detach().clone()


def gradient(pipe: Any, settings: LearningToCache, theta: torch.Tensor, given: Any, kept: dict) -> torch.Tensor:
    """Of one update; ``kept`` then holds what every module gave."""
    with torch.no_grad():
        teacher = pipe.transformer(**given)[0]
    values, learned = theta.detach().clone().requires_grad_(), {}
    betas = torch.sigmoid(values)
    limit = settings.straight_through
    applied = betas if limit is None else (betas > limit).float() + betas - betas.detach()
    of_unit = dict(zip(units_of(pipe), applied, strict=True))

    def change(name: str, output: Any) -> Any:
        learned[name] = mixed(output, kept[name], of_unit[name])
        return learned[name]

    student = run(pipe, given, change)
    loss = (teacher - student).pow(2).mean() + settings.penalty * betas.sum()
    (found,) = torch.autograd.grad(loss, values)
    kept |= {name: detached(output) for name, output in learned.items()}
    return found


def reference(settings: LearningToCache, world: int = 1) -> torch.Tensor:
    """The thetas of a training whose updates are those of ``world`` generations."""
    pipe = pipeline()
    pipe.transformer.requires_grad_(False)
    places = [step for step in range(STEPS) if step % settings.period]
    starts = torch.randn(len(places), len(units_of(pipe)), generator=torch.Generator().manual_seed(settings.seed))
    theta = [torch.nn.Parameter(row.clone()) for row in starts]
    optimizer = torch.optim.AdamW(theta, lr=settings.learning_rate, weight_decay=0.0)
    for number in range(settings.rounds):
        samples = [number * world + rank for rank in range(world)]
        runs = [calls_of(pipe, PROMPTS[k % len(PROMPTS)], settings.seed + k) for k in samples]
        kept: list[dict[int, dict]] = [defaultdict(dict) for _ in samples]
        for call in range(BRANCHES * STEPS):
            step, branch = divmod(call, BRANCHES)
            if step not in places:
                for given, own in zip(runs, kept, strict=True):
                    with torch.no_grad():
                        run(pipe, given[call], partial(own[branch].__setitem__))
                continue
            row = theta[places.index(step)]
            found = [
                gradient(pipe, settings, row, given[call], own[branch]) for given, own in zip(runs, kept, strict=True)
            ]
            row.grad = torch.stack(found).mean(dim=0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                row.clamp_(-5.0, 5.0)
    return torch.stack([row.detach() for row in theta])
