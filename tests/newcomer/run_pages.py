"""Runs what the README and the guides show, as a newcomer would: in a new home, at 80 columns, page by page.

    python tests/newcomer/run_pages.py                 # all pages
    python tests/newcomer/run_pages.py docs/guides/hub.md

The Python blocks of a page run as one program, its ``console`` blocks as commands, in the order of the page. Nothing is
downloaded: the hub's models that a page names are tiny ones in a cache of their own, and calls without a size give
pictures of 32 pixels. Blocks behind the comment ``<!-- not run: why -->`` are left out.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/guide.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs/guides").glob("*.md")))
MODELS = {
    "Qwen/Qwen-Image": "qwen",
    "black-forest-labs/FLUX.1-dev": "flux",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan",
}
BLOCK = re.compile(r"(<!-- not run:[^>]*-->\s*)?^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COLUMNS = 80
LIMIT = 900  # seconds for a command


@dataclass(frozen=True)
class Block:
    """A program, or commands, of a page."""

    kind: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """What a page shows to be run; neighbouring programs are one."""
    found: list[Block] = []
    for left_out, kind, text in BLOCK.findall(page.read_text()):
        if left_out:
            continue
        if kind == "python" and found and found[-1].kind == "python":
            found[-1] = Block(kind, found[-1].text + text)
        else:
            found.append(Block(kind, text))
    return found


def environment(home: Path) -> dict[str, str]:
    """A new user's, without a network."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    paths = [str(home / "startup"), str(ROOT)]
    hub = {"HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | hub | {"HOME": str(home), "TERM": "xterm", "PYTHONPATH": os.pathsep.join(paths)}


def prepare(home: Path, page: str) -> Path:
    """Fills a home with what a page names, the models in the hub's cache; gives the folder in which it runs."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from support.saved_pipelines import beside_in, saved_in

    place, named = home / "work", (ROOT / page).read_text()
    place.mkdir(parents=True)
    for name, kind in MODELS.items():
        if name in named:
            folder = home / "hub" / "hub" / f"models--{name.replace('/', '--')}"
            shutil.copytree(saved_in(home / "models", kind), folder / "snapshots" / ("0" * 40))
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text("0" * 40)
    if "first.png" in named:
        beside_in(place)
        for name in ("first.png", "second.png"):
            shutil.copy(next(place.glob("*.png")), place / name)
    if "style.safetensors" in named:
        save_lora(place / "style.safetensors")
        save_gguf(home / "models" / "flux", place / "flux.gguf")
    (home / "startup").mkdir()
    (home / "startup" / "sitecustomize.py").write_text(STARTUP)
    return place


def save_lora(path: Path) -> None:
    """An adapter of the tiny FLUX model's first block."""
    import torch
    from safetensors.torch import save_file

    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_A.weight": torch.randn(4, 32), f"{name}.lora_B.weight": torch.randn(32, 4) * 0.1}, path)


def save_gguf(pipeline: Path, path: Path) -> None:
    """The tiny FLUX model's weights as a GGUF file."""
    import gguf
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(str(path), "flux")
    for file in (pipeline / "transformer").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


STARTUP = '''
"""Pictures of 32 pixels where a call says no size."""
import functools
import inspect

from layercache._utils.imports import after_import


def shrink(module):
    original = module.DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        pipe = original(cls, *args, **kwargs)
        kind = type(pipe)
        names = inspect.signature(kind.__call__).parameters

        @functools.wraps(kind.__call__)
        def call(self, *args, **kwargs):
            small = {name: size for name, size in {"height": 32, "width": 32}.items() if name in names}
            small |= {"num_frames": 5} if "num_frames" in names else {}
            return kind.__call__(self, *args, **{**kwargs, **small})

        pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
        return pipe

    module.DiffusionPipeline.from_pretrained = classmethod(from_pretrained)


after_import("diffusers.pipelines.pipeline_utils", shrink)
'''


@dataclass(frozen=True)
class Done:
    """What a block did: exit status, and what it printed to a terminal."""

    status: int
    output: str


def run(block: Block, place: Path, variables: dict[str, str]) -> Done:
    """Runs a block in a terminal; of commands, up to the first that fails."""
    if block.kind == "python":
        program = block.text.replace('.to("cuda")', "").replace("torch.bfloat16", "torch.float32")
        return in_terminal([sys.executable, "-c", program], place, variables)
    done = Done(0, "")
    for line in block.text.splitlines():
        words = shlex.split(line)
        if words[:1] == ["layercache"]:
            words = [sys.executable, "-m", *words, *(["--dtype", "float32"] if "--model" in words else [])]
        one = in_terminal(words, place, variables)
        done = Done(one.status, done.output + one.output)
        if one.status:
            break
    return done


def in_terminal(words: list[str], place: Path, variables: dict[str, str]) -> Done:
    """Runs a command in a terminal of `COLUMNS` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    process = subprocess.Popen(words, cwd=place, env=variables, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    pieces: list[bytes] = []
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if select.select([ours], [], [], 1.0)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # it has ended
                break
            pieces.append(piece)
    process.kill()
    os.close(ours)
    return Done(process.wait(), b"".join(pieces).decode(errors="replace"))


def lines_of(output: str) -> list[str]:
    """The lines that stay on the screen: without colours, and of a bar that is drawn again its last state."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    return [line.rstrip("\r").rsplit("\r", 1)[-1] for line in plain.split("\n")]


def run_page(page: str, home: Path) -> list[str]:
    """What was wrong with a page: blocks that failed, lines that are wider than the terminal."""
    problems = []
    place, variables = prepare(home, page), environment(home)
    for number, block in enumerate(blocks_of(ROOT / page), 1):
        start = time.perf_counter()
        done = run(block, place, variables)
        print(f"{page}, block {number} ({block.kind}): {time.perf_counter() - start:.1f} s", flush=True)
        lines = lines_of(done.output)
        if done.status:
            problems.append(f"{page}, block {number}:\n{block.text}\n" + "\n".join(lines[-40:]))
        # commands to give next stand on a line each, however long, to be copied
        others = ("[transformers]", "front:", "next: ", "or: ")
        own = [line for line in lines if "Warning: " not in line and not line.startswith(others)]
        wide = [line for line in own if len(line) > COLUMNS]
        if block.kind == "console" and wide:
            problems.append(f"{page}, block {number} prints lines of more than {COLUMNS} columns: {wide[0]!r}")
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=list(PAGES))
    problems: list[str] = []
    for page in parser.parse_args(argv).pages:
        with tempfile.TemporaryDirectory() as home:
            problems += run_page(page, Path(home))
    print("\n\n".join(problems) or "every block ran")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
