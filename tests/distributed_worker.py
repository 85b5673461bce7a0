"""What one of the two processes of test_distributed.py does; ``python distributed_worker.py rank folder task``."""

from __future__ import annotations

import datetime
import sys

import torch
import torch.distributed as dist
from torch import nn

import layercache
from layercache import register_model
from layercache.methods.fbcache import FBCache
from layercache.model_spec import ModelSpec
from layercache.schedule import Schedule
from tiny import LAYERS, SlopeTransformer, fingerprint

STEPS, DIM, IMAGE, TEXT = 10, 16, 8, 3
TIMES = [1.0, 0.7, 0.69, 0.68, 0.5, 0.3, 0.29, 0.1, 0.09, 0.08]
METHOD = FBCache(threshold=0.1)


class Saturating(nn.Module):
    """Adds what hardly changes where numbers are large: shards see other relative changes."""

    def forward(self, hidden_states, encoder_hidden_states, temb):
        return encoder_hidden_states, hidden_states + torch.tanh(hidden_states)


def model() -> nn.Module:
    register_model(ModelSpec("SlopeTransformer", timestep=None))
    transformer = SlopeTransformer(LAYERS, DIM)
    transformer.transformer_blocks[0] = Saturating()
    return transformer


def streams(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, IMAGE, DIM, generator=generator), torch.randn(1, TEXT, DIM, generator=generator)


def run(transformer, image, text, steps=STEPS) -> torch.Tensor:
    outputs = []
    with torch.no_grad():
        for time in TIMES[:steps]:
            outputs.append(transformer(image * time, text, torch.tensor(time)))
    return torch.stack(outputs)


def whole(seed: int = 0):
    transformer = model()
    with layercache.enabled(transformer, METHOD, num_steps=STEPS) as cache:
        outputs = run(transformer, *shaped(seed))
        return outputs, cache.decisions["all"]


def shaped(seed: int):
    image, text = streams(seed)
    image[:, IMAGE // 2 :] *= 30.0
    return image, text


def work(rank: int, folder: str, task: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    try:
        torch.save(globals()[task](rank), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def shard(rank: int, group) -> dict:
    transformer = model()
    image, text = shaped(0)
    part = image[:, rank * IMAGE // 2 : (rank + 1) * IMAGE // 2]
    reduced, original = [], dist.all_reduce
    dist.all_reduce = lambda tensor, **options: reduced.append(tensor.numel()) or original(tensor, **options)
    try:
        with layercache.enabled(transformer, METHOD, num_steps=STEPS, process_group=group) as cache:
            outputs = run(transformer, part, text)
            return {"outputs": outputs, "decisions": cache.decisions["all"], "collectives": len(reduced)}
    finally:
        dist.all_reduce = original


def together(rank: int) -> dict:
    return shard(rank, dist.group.WORLD)


def apart(rank: int) -> dict:
    return shard(rank, None)


def replicas(rank: int) -> dict:
    """Data parallel: other prompts, and one of the two generates more."""
    transformer = model()
    image, text = shaped(rank)
    with layercache.enabled(transformer, METHOD, num_steps=STEPS) as cache:
        for _ in range(1 + 3 * rank):
            outputs = run(transformer, image, text)
            decisions = cache.decisions["all"]
            cache.reset()
    return {"outputs": outputs, "decisions": decisions}


def static(rank: int) -> dict:
    """A schedule needs no communication at all."""
    transformer = model()
    image, text = shaped(0)
    part = image[:, rank * IMAGE // 2 : (rank + 1) * IMAGE // 2]
    silent = ("all_reduce", "all_gather", "broadcast", "all_to_all", "send", "recv")
    originals = {name: getattr(dist, name) for name in silent}

    def forbidden(*args, **options):
        raise AssertionError("a collective")

    for name in silent:
        setattr(dist, name, forbidden)
    try:
        with layercache.enabled(transformer, static_schedule(transformer)):
            return {"outputs": run(transformer, part, text)}
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def static_schedule(transformer) -> Schedule:
    groups = ((0, LAYERS // 2), (LAYERS // 2, LAYERS))
    rows = [(None, None), (None, None), ({1: 1.5, 0: -0.5}, None), ({1: 1.0}, {2: 1.0}), (None, None)]
    rows += [({4: 1.0}, {4: 1.0}), (None, None), ({6: 1.0}, None), (None, None), (None, None)]
    return Schedule(fingerprint(transformer, (*TIMES, 0.0), ("all",)), groups, tuple(rows), (1.0, 1.0))


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], sys.argv[3])
