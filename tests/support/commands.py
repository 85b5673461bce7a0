"""The command line in the process of the tests: what it prints, refuses and writes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from layercache.tools.cli import app


def run(*words: object, width: int = 100) -> Any:
    """The result of a command; what it did not expect is raised."""
    environment = {"COLUMNS": str(width), "LAYERCACHE_DEBUG": ""}
    return CliRunner().invoke(app.app, [str(word) for word in words], env=environment, catch_exceptions=False)


def done(*words: object, width: int = 100) -> str:
    """What a command that succeeds prints."""
    result = run(*words, width=width)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    """What a command says that is refused, on one line."""
    result = run(*words)
    assert result.exit_code in (1, 2), result.output
    return " ".join(result.stderr.replace("│", " ").split())


def printed(output: str) -> list[list[str]]:
    """The commands to give next, as they stand on their lines."""
    lines = [line.split(": ", 1)[1] for line in output.splitlines() if line.startswith(("next: ", "or: "))]
    assert all(line.startswith("layercache ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def frames_of(path: Path) -> list[np.ndarray]:
    """The frames of a video, ``uint8 [H, W, 3]``."""
    import imageio

    with imageio.get_reader(str(path), format="FFMPEG") as reader:
        return [np.asarray(frame) for frame in reader.iter_data()]
