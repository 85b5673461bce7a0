"""Two processes: those that share a generation agree, those that do not never wait for each other."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import layercache
from layercache import ops
from layercache.methods.fbcache import FBCache
from layercache.ops.pending import Pending
from layercache.planning.search import EFFORTS
from support import planning_tasks, zoo
from support.distributed_worker import (
    CALIBRATED,
    DIM,
    IMAGE,
    METHOD,
    PARALLEL,
    PROBES,
    REUSED,
    STEPS,
    denoise,
    generated,
    model,
    profile_of,
    run,
    shaped,
    static_schedule,
    thirds,
    whole,
)

pytestmark = pytest.mark.slow


def both(folder: Path, *tasks: str, world: int = 2) -> dict[str, list[dict]]:
    """What each of two processes gives, or of so many, by task."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "support.distributed_worker", str(world), str(folder), *tasks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {
        task: [torch.load(folder / f"{task}-{rank}.pt", weights_only=False) for rank in range(world)] for task in tasks
    }


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    return both(tmp_path_factory.mktemp("two"), "together", "apart", "replicas", "static")


def test_shards_of_one_generation_decide_as_the_whole(in_two):
    outputs, decisions = whole()
    assert 1 < sum(decisions) < STEPS
    found = in_two["together"]
    assert all(tuple(part["decisions"]) == decisions for part in found)
    torch.testing.assert_close(torch.cat([part["outputs"] for part in found], dim=2), outputs, rtol=1e-5, atol=1e-5)
    assert all(part["collectives"] <= STEPS for part in found)


def test_without_a_group_each_shard_would_decide_for_itself(in_two):
    """Else the test above could not fail."""
    found = in_two["apart"]
    assert found[0]["decisions"] != found[1]["decisions"]
    assert [part["collectives"] for part in found] == [0, 0]


def test_replicas_never_wait_for_each_other(in_two):
    for rank, part in enumerate(in_two["replicas"]):
        outputs, decisions = whole(rank)
        assert tuple(part["decisions"]) == decisions
        assert torch.equal(part["outputs"], outputs)


def test_schedules_need_no_communication(in_two):
    transformer = model()
    with layercache.enabled(transformer, static_schedule(transformer)):
        outputs = run(transformer, *shaped(0))
    found = in_two["static"]
    torch.testing.assert_close(torch.cat([part["outputs"] for part in found], dim=2), outputs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("sync", ["step", "lagged"])
def test_a_group_of_one_changes_nothing(group_of_one, monkeypatch, sync):
    """Nor does it matter whether a lagged number has arrived: in another process of the group it may have."""
    outputs = []
    for group, arrived in ((None, True), (group_of_one, True), (group_of_one, False)):
        monkeypatch.setattr(Pending, "ready", lambda self, arrived=arrived: arrived)
        transformer, method = model(), FBCache(threshold=METHOD.threshold, sync=sync)
        with layercache.enabled(transformer, method, num_steps=STEPS, process_group=group) as cache:
            outputs.append(run(transformer, *shaped(0)))
            assert 1 < sum(next(iter(cache.decisions.values()))) < STEPS
        assert torch.equal(outputs[-1], outputs[0])


@pytest.mark.parametrize("late", ["input", "output"])
def test_a_stream_may_still_be_on_its_way(group_of_one, late):
    """What a collective of torch returns is no plain tensor, and not there yet."""
    streams = {name: torch.randn(1, IMAGE, DIM) for name in ("input", "output")}
    given = streams | {late: funcol.all_reduce(streams[late], "sum", group_of_one)}
    assert type(given[late]) is not torch.Tensor
    residual, flag = torch.empty(1, IMAGE, DIM), torch.zeros(1, dtype=torch.int32)
    ops.store([given["output"]], [given["input"]], [residual], flag)
    assert torch.equal(residual, streams["output"] - streams["input"])
    (restored,) = ops.restore([given["input"]], [[residual]], (1.0,), None)
    assert torch.equal(restored, streams["input"] + residual)


@pytest.fixture(scope="module")
def in_parallel(tmp_path_factory):
    return both(tmp_path_factory.mktemp("parallel"), "parallel")["parallel"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in PARALLEL.items() for name in names])
def test_under_diffusers_own_parallelism(in_parallel, kind, name):
    """Split, computed and gathered by diffusers: as one process alone, and nothing of ours is sent for a schedule."""
    transformer, inputs = zoo.build(name)
    plain = denoise(transformer, inputs)
    static = generated(transformer, inputs, thirds(transformer))
    dynamic = generated(transformer, inputs, PROBES[name])
    assert 1 < sum(dynamic["decisions"]) < len(REUSED)
    shards = 1 if kind == "tensor" else 2
    for part in (rank[kind, name] for rank in in_parallel):
        for expected, outputs in (
            (plain, part["plain"]),
            (static["outputs"], part["static"]["outputs"]),
            (static["outputs"], part["cache first"]),
            (dynamic["outputs"], part["dynamic"]["outputs"]),
            (plain, part["disabled"]),
        ):
            torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
        assert part["static"]["bytes"] * shards == static["bytes"]
        assert part["dynamic"]["bytes"] * shards == dynamic["bytes"]
        assert part["dynamic"]["decisions"] == dynamic["decisions"]
        check_collectives(part, at_the_end=0 if kind == "tensor" else 1)


@pytest.fixture(scope="module")
def profiles_in_parallel(tmp_path_factory):
    return both(tmp_path_factory.mktemp("calibrated"), "calibrated")["calibrated"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CALIBRATED.items() for name in names])
def test_calibrated_under_diffusers_own_parallelism(profiles_in_parallel, kind, name):
    """All processes get the profile of one process alone, which sees all tokens."""
    alone = profile_of(*zoo.build(name))
    found = [rank[kind, name] for rank in profiles_in_parallel]
    first, second = (pickle.loads(part["profile"]) for part in found)
    assert first.fingerprint == second.fingerprint == alone.fingerprint
    assert first.groups == second.groups == alone.groups
    assert first.group_seconds == second.group_seconds and first.reuse_seconds == second.reuse_seconds
    assert first.fixed_seconds == second.fixed_seconds and min(first.group_seconds) > 0
    assert first.tables.keys() == second.tables.keys() == alone.tables.keys()
    assert all(np.array_equal(first.tables[key], second.tables[key]) for key in first.tables)
    # both runs of two samples, and what is put together at the end of each
    assert [part["collectives"] for part in found] == [6, 6]
    splits = kind != "tensor"
    assert all(("process_group=" in part["refusal"]) is splits for part in found)
    np.testing.assert_allclose(first.relative_errors(), alone.relative_errors(), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(first.sensitivity(), alone.sensitivity(), rtol=2e-3)
    if not splits:  # each has all tokens
        assert first.stream_bytes == tuple((2 * image, 2 * text) for image, text in alone.stream_bytes)
        return
    assert first.stream_bytes == alone.stream_bytes
    for key, table in alone.tables.items():
        np.testing.assert_allclose(first.tables[key], table, rtol=2e-3, atol=1e-6 * np.abs(table).max(), err_msg=key)


def test_samples_are_shared_beside_split_tokens(tmp_path):
    """Two pairs of processes: a crew is the processes with the same place in a pair."""
    found = both(tmp_path, "sharing", world=4)["sharing"]
    assert [part["crew"] for part in found] == [f"Crew(rank {rank} of 2)" for rank in (0, 0, 1, 1)]
    assert all(part[key] == found[0][key] for part in found for key in ("front", "profile"))
    assert all("clocks" in part["refusal"] for part in found)
    settings = {"num_inference_steps": 5, **planning_tasks.CALL}
    alone = layercache.calibrate(planning_tasks.pipeline(), planning_tasks.PROMPTS, **settings)
    np.testing.assert_allclose(found[0]["errors"], alone.relative_errors(), rtol=2e-3, atol=1e-6)
    with mock.patch.dict(EFFORTS, quick=8):
        front = layercache.search(
            planning_tasks.pipeline(), planning_tasks.PROMPTS, budgets=(0.4,), effort="quick", **settings
        )
    here, there = (json.loads(points[0]) for points in (planning_tasks.without_seconds(front), found[0]["front"]))
    assert here["schedule"]["cells"] == there["schedule"]["cells"]
    np.testing.assert_allclose(there["psnr"], here["psnr"], atol=0.05)


def check_collectives(part: dict, at_the_end: int) -> None:
    """Reused blocks send nothing; a decision is one collective, in steps where there is something to decide."""
    for row, alone, cached in zip(REUSED, part["counts"], part["static"]["counts"], strict=True):
        if row == "ccc":
            assert cached == alone
        elif row == "rrr":
            assert cached == at_the_end
        else:
            assert at_the_end < cached < alone
    steps = zip(part["dynamic"]["decisions"], part["counts"], part["dynamic"]["counts"], strict=True)
    for step, (computed, alone, cached) in enumerate(steps):
        asked = step > 0
        assert cached == alone + asked if computed else cached < alone
