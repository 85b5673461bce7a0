"""Calibration, search and refitting by the processes of a crew, for test_sharing.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import layercache
from layercache.errors import LayerCacheError
from layercache.parallel.crew import Crew
from layercache.planning.profile import StabilityProfile
from layercache.planning.rollout import Rollouts, skipping
from layercache.planning.search import EFFORTS
from support.tiny import tiny_pipeline

PROMPTS = [["cat", "rocket"], "coffee", "temple"]
CALL = {"guidance_scale": 4.0, "progress": False}


def pipeline() -> Any:
    return tiny_pipeline(4)


def contents_of(profile: StabilityProfile) -> tuple:
    """All but the seconds."""
    tables = {name: (table.shape, table.tobytes()) for name, table in sorted(profile.tables.items())}
    return profile.groups, profile.samples, tables, profile.stream_bytes, profile.fingerprint.sigmas


def calibrated(crew: Crew, **settings: Any) -> tuple:
    call = {**CALL, "num_inference_steps": 4, "max_distance": 2, "max_span": 1, **settings}
    return contents_of(layercache.calibrate(pipeline(), PROMPTS, crew=crew, **call))


def without_seconds(front: layercache.Front) -> list:
    data = json.loads(front.to_bytes())
    for point in data["points"]:
        del point["schedule"]["group_seconds"]
    return [json.dumps(point, sort_keys=True) for point in data["points"]]


def searched(crew: Crew, folder: str | None = None, **settings: Any) -> list:
    call = {**CALL, "num_inference_steps": 6, "budgets": (0.5, 0.34), "effort": "quick", **settings}
    with mock.patch.dict(EFFORTS, quick=11):
        front = layercache.search(pipeline(), PROMPTS, crew=crew, resume=folder, **call)
    return [*without_seconds(front), *front.notes]


def journal(crew: Crew, folder: str) -> list:
    """A search's journal, made anew."""
    if crew.leads:
        shutil.rmtree(folder, ignore_errors=True)
    searched(crew, folder)
    data = json.loads((Path(folder) / "runs.json").read_text())
    return [data["search"], *(json.dumps(run) for run in data["runs"])]


def refitted(crew: Crew) -> list:
    pipe, steps = pipeline(), {"num_inference_steps": 6}
    rollouts = Rollouts(pipe, PROMPTS[:1], guidance_scale=4.0, **steps)
    schedule = skipping(rollouts.fingerprint, [0, 1, 3])
    point = layercache.refit(pipe, schedule, PROMPTS, crew=crew, **steps, **CALL)
    return [velocity and velocity.to_json() for velocity in point.schedule.velocities] + [point.psnr, point.expected]


def refused(crew: Crew) -> list[tuple[str, str]]:
    """Errors that all processes raise: a picture of NaN in a sample, a prompt that fails, too few samples."""
    pipe, found = pipeline(), []
    steps = {"num_inference_steps": 4}
    for run, prompts in (
        (layercache.calibrate, [*PROMPTS, "unicorn"]),
        (layercache.search, [*PROMPTS, "unicorn"]),
        (layercache.search, PROMPTS[:1]),
    ):
        try:
            run(pipe, prompts, crew=crew, **steps, **CALL)
        except (LayerCacheError, ValueError) as error:
            found.append((type(error).__name__, str(error)))
    return found
