"""Pipelines for tests of many prompts, and what the processes of those tests do."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from layercache.demo import pipeline as demo
from layercache.errors import ScheduleMismatchError
from layercache.parallel.crew import Crew
from layercache.tools.batch.entries import numbered
from layercache.tools.batch.manifest import NAME, parsed_line
from layercache.tools.batch.run import Batch, generate_all
from layercache.tools.cli import generate_many
from support import tiny
from support.commands import run

PROMPTS = ["a fox", "Füchse: zwei, im Schnee!", "東京", "one", "two", "three", "four"]
STEPS = 8
QUICK = {"num_inference_steps": STEPS}


class NoisePipeline:
    """Gives noise of its generator, brighter by the picture it is given; ``before`` is called with every prompt."""

    def __init__(self, before: Callable[[str], object] = lambda prompt: None):
        self.before, self.seen = before, list[str]()

    def __call__(
        self, prompt, num_inference_steps=2, image=None, strength=0.5, generator=None, output_type="pil"
    ) -> SimpleNamespace:
        self.seen.append(prompt)
        self.before(prompt)
        noise = torch.rand(1, 8, 8, 3, generator=generator).numpy()
        given = 0.0 if image is None else float(np.asarray(image).mean()) / 255
        return SimpleNamespace(images=strength * noise + (1 - strength) * given)


def noise(folder: Path, before: Callable[[str], object] = lambda prompt: None, crew: Crew | None = None) -> list[str]:
    """Makes all of `PROMPTS`; gives those for which the pipeline of this process was called."""
    pipe = NoisePipeline(before)
    generate_all(pipe, numbered(PROMPTS, seed=3), folder, QUICK, crew=crew, progress=False)
    return pipe.seen


def at(prompt: str, act: Callable[[], object]) -> Callable[[str], object]:
    """Does something before one of the prompts."""
    return lambda now: act() if now == prompt else None


def interrupt() -> None:
    raise KeyboardInterrupt


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cached(crew: Crew, folder: Path) -> Batch:
    """Five prompts, one of them unknown to the model, with a schedule, compared."""
    pipe = tiny.tiny_pipeline()
    schedule = tiny.schedule_for(pipe, tiny.mixed_cells(STEPS))
    entries = numbered(["cat", "coffee", "unicorn", "rocket", "flower"])
    place = folder / f"cached-{crew.world}"
    return generate_all(pipe, entries, place, QUICK, schedule=schedule, compare=True, crew=crew, progress=False)


def others(crew: Crew, folder: Path) -> str:
    """Each process has prompts of its own."""
    try:
        make = generate_all(NoisePipeline(), numbered(PROMPTS, seed=crew.rank), folder / "others", QUICK, crew=crew)
    except ScheduleMismatchError as error:
        return str(error)
    return repr(make)


def stopped(crew: Crew, folder: Path) -> str:
    """Ctrl-C at the fourth prompt, which the second of two processes has."""
    try:
        noise(folder / "stopped", at(PROMPTS[3], interrupt), crew)
    except KeyboardInterrupt:
        return "stopped"
    return "went on"


def command(crew: Crew, folder: Path) -> tuple[int, str, str]:
    """The command line in all processes, with a prompt that fails; its exit code and what it prints."""
    (folder / "prompts.txt").write_text("cat\nunicorn\ncoffee\n")
    demo.load_demo_pipeline = lambda device=None: tiny.tiny_pipeline(2)
    generate_many.crew_for = lambda options, samples, files: crew  # which these processes have already
    found = run("generate", "--prompts-file", folder / "prompts.txt", "--steps", 2, "-o", folder / "command")
    return found.exit_code, found.stdout, found.stderr


def leader_killed(crew: Crew, folder: Path) -> Any:
    """The last task: the leader is killed in the fifth prompt."""
    return noise(folder / "killed", at(PROMPTS[4], killed), crew)


def content_of(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The bytes of all pictures in a folder, and the lines of its manifest without seconds."""
    pictures = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != NAME}
    lines = [parsed_line(line) for line in (folder / NAME).read_bytes().splitlines()]
    assert None not in lines
    timed = ("seconds", "full_seconds")
    return pictures, [{name: value for name, value in line.items() if name not in timed} for line in lines if line]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Of a manifest, with everything."""
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()[1:]]
