"""Comparisons by the processes of a crew, for test_sharing.py."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import layercache
from layercache.methods import DBCache, Uniform
from layercache.parallel.crew import Crew
from layercache.planning.search import EFFORTS
from layercache.tools.compare.model import CalibratedModel
from layercache.tools.compare.peers import PEERS
from support.planning_tasks import pipeline

CALLS = [["cat", "rocket"], ["coffee"], ["temple"], ["retina"]]
TIMES = ("seconds", "speedup", "speedups")


@contextmanager
def without_temples(pipe: Any) -> Iterator[None]:
    """A cache with which one of the pictures cannot be made."""
    original = pipe.class_ids

    def class_ids(prompt: Any) -> list[int]:
        if "temple" in prompt:
            raise RuntimeError("no temples")
        found: list[int] = original(prompt)
        return found

    with mock.patch.object(pipe, "class_ids", class_ids):
        yield


def fails_in_one(model: Any, budget: float) -> Any:
    """Fails in the last process, while the others wait for its samples."""
    if model.crew.rank == model.crew.world - 1:
        raise ZeroDivisionError("in one of them")
    return model.rollouts.run(Uniform(interval=2).schedule(model.fingerprint)).schedule


METHODS = {"meancache": "meancache", "fbcache": "fbcache", "no temples": without_temples, "in one": fails_in_one}
MORE = {"uniform": "uniform", "layercache": "layercache", "hooks": "diffusers:fbcache", "fewer": "fewer-steps-sigmas"}


def compared(crew: Crew, folder: str, methods: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Outcomes but their times, and digests of the files, which the process that leads writes alone."""
    place = Path(folder) / f"process {crew.rank} of {crew.world}"
    shutil.rmtree(place, ignore_errors=True)
    settings = {"seeds": range(5), "calibration": 2, "calibration_prompts": ["cat", "coffee"], "effort": "quick"}
    call = {"num_inference_steps": 6, "guidance_scale": 4.0}
    with mock.patch.dict(EFFORTS, quick=11):
        table = layercache.compare(
            pipeline(),
            methods,
            CALLS,
            (0.5,),
            **settings,
            **call,
            crew=crew,
            folder=place,
            progress=False,
            transfer=[{"guidance_scale": 1.0}],
        )
    found = [outcome for run in table.transfer.runs for outcome in run.outcomes]  # the first are those compared
    outcomes = [{k: v for k, v in vars(outcome).items() if k not in TIMES} for outcome in found]
    files = {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*.npy"))
    }
    assert place.exists() == crew.leads
    return [json.dumps(outcome) for outcome in outcomes], files


def cached_by_cache_dit(crew: Crew) -> list[str]:
    """Digests of three pictures; the processes are at different ones, and do not run equally many."""
    call = {"num_inference_steps": 8, "guidance_scale": 4.0}
    model = CalibratedModel(pipeline(), CALLS[0], [0, 1], call, (0.5,), crew=crew)
    model._made["dbcache", 0.5] = DBCache(threshold=0.2, front=1, warmup=2), "a threshold"
    entry = PEERS["cache-dit:dbcache"](model, 0.5)

    def generate(seed: int) -> str:
        noise = torch.Generator().manual_seed(seed)
        with entry.attach():
            latents = model.pipeline("cat", generator=noise, output_type="latent", **model.call).images
        return hashlib.sha256(latents.numpy().tobytes()).hexdigest()

    found = [generate(seed) for seed in range(3) if seed % crew.world == crew.rank]
    with crew.together():
        return crew.gather(found)
