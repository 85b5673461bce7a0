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


@pytest.mark.slow
def test_a_demo_model_is_trained(tmp_path):
    pytest.importorskip("sklearn")
    from diffusers import QwenImageTransformer2DModel

    command = [sys.executable, str(EXAMPLES / "train_demo.py"), "--steps", "2", "--batch", "2", "--layers", "2"]
    command += ["--heads", "1", "--device", "cpu", "--out", str(tmp_path / "model")]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    transformer = QwenImageTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer")
    assert len(transformer.transformer_blocks) == 2
    assert (tmp_path / "model" / "class_encoder").is_dir() and (tmp_path / "model" / "MODEL_CARD.md").exists()


@pytest.mark.slow
def test_the_demo_model_is_distilled(tmp_path):
    command = [sys.executable, str(EXAMPLES / "distil_demo.py"), "--for-steps", "2", "--paths", "2", "--steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [*command, "--batch", "2"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 steps, distilled: \d+\.\d dB", done.stdout), done.stdout
    folder = tmp_path / "few-step-models" / "2-steps"
    assert (folder / "transformer").is_dir() and (folder / "class_encoder").is_dir()


def test_every_example_is_run_by_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    left_out = {"uvit"}  # imported by train_uvit
    assert {path.stem for path in EXAMPLES.iterdir() if path.stem not in tests} <= left_out | {"README"}


def test_the_short_cache_is_short():
    lines = (EXAMPLES / "teacache_in_40_lines.py").read_text().split("class TeaStyleCache")[1].split("def main")[0]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 40
