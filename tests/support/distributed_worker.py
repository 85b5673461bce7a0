"""What the processes of test_distributed.py do; ``python -m support.distributed_worker world folder task``."""

from __future__ import annotations

import datetime
import os
import pickle
import sys
import traceback
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import layercache
from layercache import register_model
from layercache.errors import CacheStateError
from layercache.methods.fbcache import FBCache
from layercache.models.spec import ModelSpec
from layercache.parallel.crew import Crew
from layercache.planning.search import EFFORTS
from layercache.schedule.schedule import Schedule
from support import planning_tasks, zoo
from support.operators import Operator, Operators
from support.tiny import LAYERS, SlopeTransformer, fingerprint

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
        return outputs, next(iter(cache.decisions.values()))


def shaped(seed: int):
    image, text = streams(seed)
    image[:, IMAGE // 2 :] *= 30.0
    return image, text


def work(rank: int, world: int, folder: str, *tasks: str) -> None:
    """Each task in a process group of its own; what it gives goes to ``folder/task-rank.pt``."""
    torch.set_num_threads(1)
    for task in tasks:
        store = dist.FileStore(f"{folder}/{task}-store", world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
        )
        try:
            torch.save(globals()[task](rank), f"{folder}/{task}-{rank}.pt")
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
            return {"outputs": outputs, "decisions": next(iter(cache.decisions.values())), "collectives": len(reduced)}
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
            decisions = next(iter(cache.decisions.values()))
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


PARALLEL = {
    "ulysses": ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"),
    "ring": ("FluxTransformer2DModel", "WanTransformer3DModel"),
    "own plan": ("FluxTransformer2DModel", "ChromaTransformer2DModel"),
    "tensor": ("FluxTransformer2DModel", "QwenImageTransformer2DModel"),
}
CONFIGS = {
    "ulysses": lambda: ContextParallelConfig(ulysses_degree=2),
    "ring": lambda: ContextParallelConfig(ring_degree=2),
    "own plan": lambda: ContextParallelConfig(ulysses_degree=2),
    "tensor": lambda: TensorParallelConfig(tp_degree=2),
}
SIGMAS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.0)
# Flux's plan with the streams split where Wan's and Qwen-Image's are, in front of two lists of blocks
AT_FIRST_BLOCK = {
    "": {name: ContextParallelInput(split_dim=0, expected_dims=2) for name in ("img_ids", "txt_ids")},
    "transformer_blocks.0": {
        name: ContextParallelInput(split_dim=1, expected_dims=3) for name in ("hidden_states", "encoder_hidden_states")
    },
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}
REUSED = ("ccc", "ccc", "rcc", "crc", "ccr", "rrr", "ccc")
PROBES = {  # thresholds between the changes that each model shows
    "FluxTransformer2DModel": FBCache(threshold=0.58),
    "ChromaTransformer2DModel": FBCache(threshold=0.7),
    "QwenImageTransformer2DModel": FBCache(threshold=0.72),
    "WanTransformer3DModel": FBCache(threshold=0.025),
}


def thirds(transformer) -> Schedule:
    """A cell reuses the last two steps that computed its group."""
    rows: list[tuple] = []
    for row in REUSED:
        anchors = [[i for i, earlier in enumerate(rows) if earlier[g] is None] for g in range(3)]
        rows.append(tuple(None if row[g] == "c" else {a[-1]: 1.5, a[-2]: -0.5} for g, a in enumerate(anchors)))
    prints = fingerprint(transformer, SIGMAS, ("all",))
    return Schedule(prints, ((0, 2), (2, 3), (3, 4)), tuple(rows), (1.0,) * 3)


def denoise(transformer, inputs) -> torch.Tensor:
    outputs = []
    with torch.no_grad():
        for sigma in SIGMAS[:-1]:
            now = {"hidden_states": inputs["hidden_states"] * sigma, "timestep": inputs["timestep"] * 2 * sigma}
            outputs.append(transformer(**inputs | now, return_dict=False)[0])
    return torch.stack(outputs)


def is_sending(operator: Operator) -> bool:
    namespace, _, name = operator.name.partition("::")
    return namespace in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name


def counted(transformer, inputs) -> list[int]:
    """How often processes send each other something in each step, whoever asks for it."""
    counts = []
    hook = transformer.register_forward_hook(lambda *_: counts.append(sum(map(is_sending, mode.seen))))
    with Operators() as mode:
        denoise(transformer, inputs)
    hook.remove()
    return [after - before for before, after in zip([0, *counts], counts, strict=False)]


def generated(transformer, inputs, plan, group=None, counts=False) -> dict:
    with layercache.enabled(transformer, plan, process_group=group) as cache:
        found = {"outputs": denoise(transformer, inputs), "bytes": cache.report().cache_bytes}
        found["decisions"] = next(iter(getattr(cache, "decisions", {}).values()), None)
        if counts:
            cache.reset()
            found["counts"] = counted(transformer, inputs)
    return found


NATIVE_ATTENTION = attention_dispatch._native_attention_forward_op


def attention_with_lse(ctx, query, key, value, *args, **kwargs):
    """What diffusers' ring needs and has on no backend for the CPU; torch has the kernel."""
    if not args[5]:
        return NATIVE_ATTENTION(ctx, query, key, value, *args, **kwargs)
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first)
    return out.transpose(1, 2), lse.transpose(1, 2)


def parallelise(transformer, kind: str) -> None:
    """By diffusers itself, which asks for an accelerator in three places; none of them is about what is computed."""
    torch.accelerator.device_count = lambda: 1  # else it divides by the number of devices, zero
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    attention_dispatch._native_attention_forward_op = attention_with_lse
    transformer.enable_parallelism(config=CONFIGS[kind](), cp_plan=AT_FIRST_BLOCK if kind == "own plan" else None)


def parallel(rank: int) -> dict:
    return {(kind, name): parallel_runs(name, kind) for kind, names in PARALLEL.items() for name in names}


def parallel_runs(name: str, kind: str) -> dict:
    transformer, inputs = zoo.build(name)
    parallelise(transformer, kind)
    found = {"plain": denoise(transformer, inputs), "counts": counted(transformer, inputs)}
    found["static"] = generated(transformer, inputs, thirds(transformer), counts=True)
    found["dynamic"] = generated(transformer, inputs, PROBES[name], dist.group.WORLD, counts=True)
    found["disabled"] = denoise(transformer, inputs)
    transformer, inputs = zoo.build(name)
    with layercache.enabled(transformer, thirds(transformer)):
        denoise(transformer, inputs)
        parallelise(transformer, kind)
        found["cache first"] = denoise(transformer, inputs)
    return found


CALIBRATED = {
    "ulysses": ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"),
    "own plan": ("FluxTransformer2DModel",),
    "tensor": ("FluxTransformer2DModel",),
}


def profile_of(transformer, inputs, **options):
    """Of two generations with other latents; the groups are cut by what is measured."""

    def run(k: int) -> None:
        denoise(transformer, inputs | {"hidden_states": inputs["hidden_states"] * (1 + k)})

    settings = {"sigmas": SIGMAS, "max_distance": 3, "max_span": 2, "sensitivity": "substitution", "progress": False}
    cut = {"partition": "measured", "num_groups": 2}
    return layercache.calibrate(transformer, run=run, samples=2, **settings, **cut, **options)


def calibrated(rank: int) -> dict:
    return {(kind, name): calibrated_runs(name, kind) for kind, names in CALIBRATED.items() for name in names}


def calibrated_runs(name: str, kind: str) -> dict:
    transformer, inputs = zoo.build(name)
    parallelise(transformer, kind)
    refusal, reduced, original = "", [], dist.all_reduce
    try:
        profile_of(transformer, inputs)
    except CacheStateError as error:
        refusal = str(error)
    dist.all_reduce = lambda tensor, **options: reduced.append(tensor.numel()) or original(tensor, **options)
    try:
        profile = profile_of(transformer, inputs, process_group=dist.group.WORLD)
    finally:
        dist.all_reduce = original
    return {"refusal": refusal, "collectives": len(reduced), "profile": pickle.dumps(profile)}


def sharing(rank: int) -> dict:
    """Samples are shared by two pairs of processes, each of which splits the tokens of its own; the search of one."""
    torch.accelerator.device_count = lambda: 1
    pipe, settings = planning_tasks.pipeline(), {"num_inference_steps": 5, **planning_tasks.CALL}
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("samples", "ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=2, mesh=mesh)
    pipe.transformer.enable_parallelism(config=config)
    crew, tokens = Crew(mesh["samples"].get_group()), mesh["ulysses"].get_group()
    found: dict = {"crew": repr(crew)}
    search = {"budgets": (0.4,), "effort": "quick", "crew": crew, **settings}
    with mock.patch.dict(EFFORTS, quick=8):
        found["front"] = planning_tasks.without_seconds(layercache.search(pipe, planning_tasks.PROMPTS, **search))
    try:
        layercache.search(pipe, planning_tasks.PROMPTS, time_limit=5.0, **search)
    except CacheStateError as error:
        found["refusal"] = str(error)
    profile = layercache.calibrate(pipe, planning_tasks.PROMPTS, crew=crew, process_group=tokens, **settings)
    return found | {"profile": planning_tasks.contents_of(profile), "errors": profile.relative_errors()}


def work_in(world: int, folder: str, *tasks: str) -> int:
    """The tasks in so many processes, which share what is imported; how many of them failed."""
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            try:
                work(rank, world, folder, *tasks)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(work_in(int(sys.argv[1]), *sys.argv[2:]))
