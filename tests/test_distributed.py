"""Two processes: those that share a generation agree, those that do not never wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import layercache
from distributed_worker import METHOD, STEPS, model, run, shaped, static_schedule, whole
from layercache.methods.fbcache import FBCache


def both(folder: Path, task: str) -> list[dict]:
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(folder), task],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=180)
        assert job.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_shards_of_one_generation_decide_as_the_whole(tmp_path):
    outputs, decisions = whole()
    assert 1 < sum(decisions) < STEPS
    found = both(tmp_path, "together")
    assert all(tuple(part["decisions"]) == decisions for part in found)
    torch.testing.assert_close(torch.cat([part["outputs"] for part in found], dim=2), outputs, rtol=1e-5, atol=1e-5)
    assert all(part["collectives"] <= STEPS for part in found)


def test_without_a_group_each_shard_would_decide_for_itself(tmp_path):
    """Else the test above could not fail."""
    found = both(tmp_path, "apart")
    assert found[0]["decisions"] != found[1]["decisions"]
    assert [part["collectives"] for part in found] == [0, 0]


def test_replicas_never_wait_for_each_other(tmp_path):
    found = both(tmp_path, "replicas")
    for rank, part in enumerate(found):
        outputs, decisions = whole(rank)
        assert tuple(part["decisions"]) == decisions
        assert torch.equal(part["outputs"], outputs)


def test_schedules_need_no_communication(tmp_path):
    transformer = model()
    with layercache.enabled(transformer, static_schedule(transformer)):
        outputs = run(transformer, *shaped(0))
    found = both(tmp_path, "static")
    torch.testing.assert_close(torch.cat([part["outputs"] for part in found], dim=2), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sync", ["step", "lagged"])
def test_a_group_of_one_changes_nothing(tmp_path, sync):
    outputs, decisions = whole()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        transformer = model()
        method = FBCache(threshold=METHOD.threshold, sync=sync)
        with layercache.enabled(transformer, method, num_steps=STEPS, process_group=dist.group.WORLD) as cache:
            found = run(transformer, *shaped(0))
            if sync == "step":
                assert cache.decisions["all"] == decisions and torch.equal(found, outputs)
    finally:
        dist.destroy_process_group()
