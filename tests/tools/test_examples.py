"""The examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, printed",
    [
        ("teacache_in_40_lines", r"(\d+) of 60 forwards skipped, PSNR 3\d\.\d dB"),
        ("method_as_policy", r"computed: ##[#.]{27}#"),
        ("plain_pytorch", r"relative error: \d\.\d\de-0[3-9]"),
    ],
)
def test_example(name, printed, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(printed, done.stdout), done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_uvit_is_trained_and_cached(tmp_path):
    pytest.importorskip("skimage")
    command = [sys.executable, str(EXAMPLES / "train_uvit.py"), "--steps", "2", "--rounds", "1", "--batch", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"budget 0\.6: 0\.\d\d of the modules' time, \d+\.\d dB", done.stdout), done.stdout
    assert {"checkpoint.pt", "router.pt", "router-0.6.json"} <= {path.name for path in (tmp_path / "uvit").iterdir()}


def test_the_short_cache_is_short():
    lines = (EXAMPLES / "teacache_in_40_lines.py").read_text().split("class TeaStyleCache")[1].split("def main")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 40
