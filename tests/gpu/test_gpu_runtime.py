"""The runtime on a GPU, and on the CPU where there is none: tiny models of diffusers, cached and compared."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import layercache
from gpu.plain_reuse import PlainReuse, as_fp8
from layercache.compat import scheduler_sigmas
from layercache.demo.pipeline import load_demo_pipeline
from layercache.methods.fbcache import FBCache
from layercache.models import count_blocks, fingerprint_of
from layercache.ops import repeating
from layercache.ops.dispatch import Kernels
from layercache.schedule import Schedule
from tiny import tiny_pipeline
from zoo import build
from zoo_pipelines import PIPELINES, make, noise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
STEPS = 8
ROWS = ("cc", "cc", "rr", "rc", "cr", "rr", "cc", "rr")
"""Per step a letter for the first and the second half of the blocks: c computes and stores, r reuses."""

Call = dict[str, Any]


def _flux() -> tuple[Any, Call]:
    pipe = make("FluxPipeline", "FluxTransformer2DModel")
    call = {"prompt_embeds": noise(1, 6, 32), "pooled_prompt_embeds": noise(1, 32), "num_inference_steps": STEPS}
    return pipe, call | {"height": 32, "width": 32, "output_type": "latent"}


def _lumina() -> tuple[Any, Call]:
    pipe, call = PIPELINES["lumina 2"]()
    return pipe, call | {"cfg_trunc_ratio": 1.0}


def _tiny() -> tuple[Any, Call]:
    return tiny_pipeline(layers=4), {"prompt": ["cat", "coffee"], "num_inference_steps": STEPS, "output_type": "latent"}


def _demo() -> tuple[Any, Call]:
    pipe = load_demo_pipeline("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt": "cat", "num_inference_steps": STEPS, "output_type": "latent"}


MAKERS: dict[str, Callable[[], tuple[Any, Call]]] = {
    "qwen-image": PIPELINES["qwen-image"],
    "flux": _flux,
    "flux 2": PIPELINES["flux 2"],  # joins its streams on the way
    "lumina 2": _lumina,  # one stream
    "wan": PIPELINES["wan"],  # video
    "demo": _demo,
}


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors in a call's arguments, elsewhere."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return [moved(one, device, dtype) for one in value] if isinstance(value, list) else value


class Runs:
    """A pipeline on a device, and its generations.

    The noise comes from a generator on the CPU and is the same everywhere.
    """

    def __init__(
        self,
        make_pipe: Callable[[], tuple[Any, Call]],
        device: torch.device = DEVICE,
        dtype: torch.dtype = torch.float32,
    ):
        self.pipe, call = make_pipe()
        self.pipe.to(device, dtype)
        self.call = {name: moved(value, device, dtype) for name, value in call.items()}

    def __call__(self, seed: int = 0, **more: Any) -> Tensor:
        output = self.pipe(**self.call | more, generator=torch.Generator().manual_seed(seed))
        return output[0] if not hasattr(output, "images") else output.images

    def schedule(self, rows: tuple[str, ...] = ROWS) -> Schedule:
        """Needs a generation before, which sets the noise levels."""
        transformer = self.pipe.transformer
        return schedule_of(transformer, scheduler_sigmas(self.pipe.scheduler), rows)

    def plainly(self, schedule: Schedule, seed: int = 0, **options: Any) -> tuple[Tensor, PlainReuse]:
        with PlainReuse(self.pipe, schedule.groups, schedule.cells, **options) as plain:
            return self(seed), plain


def schedule_of(transformer: nn.Module, sigmas: Any, rows: tuple[str, ...] = ROWS) -> Schedule:
    """The rows as a schedule of two groups; where two anchors are stored, steps with an odd number take both."""
    blocks = count_blocks(transformer)
    groups, cells = ((0, blocks // 2), (blocks // 2, blocks)), []
    for step, row in enumerate(rows):
        anchors = [[s for s in range(step - 1, -1, -1) if rows[s][g] == "c"] for g in range(2)]
        cells.append(tuple(_cell(row[g] == "c", step, anchors[g]) for g in range(2)))
    return Schedule(fingerprint_of(transformer, sigmas, ("all",)), groups, tuple(cells), (1.0, 1.0))


def _cell(computes: bool, step: int, anchors: list[int]) -> dict[int, float] | None:
    if computes:
        return None
    return {anchors[0]: 1.3, anchors[1]: -0.3} if step % 2 and len(anchors) > 1 else {anchors[0]: 1.0}


def reused(schedule: Schedule) -> int:
    return sum(cell is not None for row in schedule.cells for cell in row)


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double().cpu() - b.double().cpu()).norm().item()


def synchronise() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def allocated() -> int:
    """Memory of all tensors on the GPU."""
    gc.collect()
    synchronise()
    return torch.cuda.memory_allocated() if ON_GPU else 0


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operation for which the host would wait for the GPU is an error."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=sorted(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# --- whole generations ---------------------------------------------------------------------------------------


def test_nothing_reused_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """Everything is computed, and the first half stored at every step for a last one that is never reached by it."""
    runs = Runs(MAKERS[name], dtype=dtype)
    full = runs()
    schedule = runs.schedule(("cc",) * (STEPS - 1) + ("rr",))
    with layercache.enabled(runs.pipe, schedule) as cache:
        seen = []
        runs(callback_on_step_end=lambda pipe, step, t, tensors: seen.append(tensors["latents"].clone()) or tensors)
        assert cache.report().fallback_rows == 0 and cache.report().cache_bytes > 0
    wanted = []
    again = runs(callback_on_step_end=lambda pipe, step, t, tensors: wanted.append(tensors["latents"].clone()) or tensors)
    assert torch.equal(again, full)
    assert all(map(torch.equal, seen[:-1], wanted[:-1])) and not torch.equal(seen[-1], wanted[-1])


def test_reuse_is_that_of_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    """The same bits on the same device, and blocks that are not needed do not run."""
    runs = Runs(MAKERS[name], dtype=dtype)
    full = runs()
    schedule = runs.schedule()
    expected, plain = runs.plainly(schedule)
    with layercache.enabled(runs.pipe, schedule) as cache:
        found = runs()
        report = cache.report()
    print(distance(found, expected), distance(found, full))
    assert torch.equal(found, expected)
    assert not torch.equal(found, full) and torch.equal(runs(), full)
    assert report.cached_cells == reused(schedule) * len(report.branches) and report.fallback_rows == 0
    assert max(plain.computed.values()) == STEPS // 2 * len(report.branches)


def test_a_gpu_gives_what_the_cpu_gives(name: str, dtype: torch.dtype) -> None:
    """Cached runs differ by no more than uncached ones do, times four and a floor; reuse itself changes far more."""
    found = {}
    for device in (torch.device("cpu"), DEVICE):
        runs = Runs(MAKERS[name], device, dtype)
        full = runs()
        with layercache.enabled(runs.pipe, runs.schedule()):
            found[device] = full, runs()
    (full, cached), (full_here, cached_here) = found[torch.device("cpu")], found[DEVICE]
    floor = 16 * torch.finfo(dtype).eps * full.double().norm().item()
    allowed = 4 * distance(full_here, full) + floor
    print(distance(full_here, full), floor, distance(cached_here, cached), distance(cached, full))
    assert distance(cached_here, cached) <= allowed
    if dtype == torch.float32:
        assert distance(cached, full) > 4 * allowed
