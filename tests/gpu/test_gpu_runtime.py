"""The runtime on a GPU, and on the CPU where there is none: tiny models of diffusers, cached and compared."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import layercache
from layercache._utils.compat import scheduler_sigmas
from layercache.demo.pipeline import load_demo_pipeline
from layercache.errors import NonFiniteResidualError, NonFiniteWarning
from layercache.methods import fbcache
from layercache.methods.fbcache import FBCache
from layercache.models.registry import count_blocks, fingerprint_of
from layercache.ops.dispatch import Kernels
from layercache.ops.plans import ignored
from layercache.planning.sampler import LinearSampler
from layercache.schedule.schedule import Schedule
from support.plain_reuse import PlainReuse, as_fp8
from support.tiny import tiny_pipeline
from support.zoo import build
from support.zoo_pipelines import PIPELINES, make, noise

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
}


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors in a call's arguments, elsewhere."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return [moved(one, device, dtype) for one in value] if isinstance(value, list) else value


def slow_on_cpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Marks what takes long without a GPU."""
    return test if ON_GPU else pytest.mark.slow(test)


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


SIGMAS = tuple(1 - step / STEPS for step in range(STEPS + 1))


class Loop:
    """Generations of a bare FLUX transformer, whose own forward never waits for the GPU."""

    def __init__(self, seed: int, tokens: int = 0, **config: Any):
        self.model, inputs = build("FluxTransformer2DModel", seed, **config)
        if tokens:
            inputs |= {"img_ids": torch.rand(tokens, 3), "hidden_states": torch.randn(2, tokens, 4)}
        self.model.to(DEVICE)
        self.inputs = {name: value.to(DEVICE) for name, value in inputs.items()}
        self.schedule = schedule_of(self.model, SIGMAS)
        self.cache: Any = None  # that is told the step, which it would wait for the GPU to read
        self.start(seed)

    def start(self, seed: int) -> None:
        shape = self.inputs["hidden_states"].shape
        self.latents, self.at = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE), 0

    @torch.no_grad()
    def step(self) -> None:
        sigma = SIGMAS[self.at]
        here = {"hidden_states": self.latents, "timestep": torch.full((2,), sigma, device=DEVICE)}
        with nullcontext() if self.cache is None else self.cache.step(self.at):
            velocity = self.model(**self.inputs | here, return_dict=False)[0]
        self.at += 1
        self.latents = self.latents + (SIGMAS[self.at] - sigma) * velocity

    def finish(self) -> Tensor:
        while self.at < STEPS:
            self.step()
        return self.latents

    def run(self, seed: int = 0) -> Tensor:
        self.start(seed)
        return self.finish()


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
    """Memory of all tensors on the device."""
    gc.collect()
    synchronise()
    if ON_GPU:
        return torch.cuda.memory_allocated()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        # torch.compile leaves tensors of other classes behind, and wrapped ones, which have no memory
        if type(one) in (Tensor, torch.nn.Parameter) and one.layout == torch.strided:
            with suppress(RuntimeError):
                storage = one.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


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
def _settings() -> Iterator[None]:
    """Full precision; one thread, because several would wait for each other in models this small."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, threads = (matmul.allow_tf32, cudnn.allow_tf32), torch.get_num_threads()
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=sorted(MAKERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# --- whole generations ---------------------------------------------------------------------------------------


def followed(runs: Runs) -> list[Tensor]:
    """Latents behind every step."""
    seen: list[Tensor] = []

    def note(pipe: Any, step: int, time: Any, tensors: Call) -> Call:
        seen.append(tensors["latents"].clone())
        return tensors

    runs(callback_on_step_end=note)
    return seen


@slow_on_cpu
def test_storing_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """Everything is computed and half of it stored up to the last step, which reuses it."""
    runs = Runs(MAKERS[name], dtype=dtype)
    expected = followed(runs)
    with layercache.enabled(runs.pipe, runs.schedule(("cc",) * (STEPS - 1) + ("rr",))) as cache:
        found = followed(runs)
        report = cache.report()
    assert report.cache_bytes > 0 and report.fallback_rows == 0
    assert report.cached_cells == 2 * len(report.branches)
    assert all(map(torch.equal, found[:-1], expected[:-1]))
    if dtype == torch.float32:  # bf16 may hide what one short step changes
        assert not torch.equal(found[-1], expected[-1])
    assert all(map(torch.equal, followed(runs), expected))


def test_reuse_is_that_of_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    """The same bits on the same device."""
    runs = Runs(MAKERS[name], dtype=dtype)
    full, schedule = runs(), runs.schedule()
    expected, plain = runs.plainly(schedule)
    with layercache.enabled(runs.pipe, schedule) as cache:
        first, found = runs(1), runs()
        report = cache.report()
    assert torch.equal(found, expected), f"differ by {distance(found, expected)} of {distance(found, full)}"
    assert not torch.equal(found, full) and not torch.equal(found, first) and torch.equal(runs(), full)
    assert report.cached_cells == 2 * reused(schedule) * len(report.branches) and report.fallback_rows == 0
    assert set(plain.computed.values()) == {4 * len(report.branches)}


@slow_on_cpu
def test_a_gpu_gives_what_the_cpu_gives(name: str, dtype: torch.dtype) -> None:
    """Cached runs differ by no more than uncached ones, times four, and a floor; reuse itself changes far more."""
    found = {}
    for device in {torch.device("cpu"), DEVICE}:
        runs = Runs(MAKERS[name], device, dtype)
        full = runs()
        with layercache.enabled(runs.pipe, runs.schedule()):
            found[device] = full, runs()
    (full, cached), (full_here, cached_here) = found[torch.device("cpu")], found[DEVICE]
    floor = rounding_error(name, dtype, full)
    allowed = 4 * distance(full_here, full) + floor
    assert distance(cached_here, cached) <= allowed
    if dtype == torch.float32:
        assert distance(cached, full) > 2 * allowed


def rounding_error(name: str, dtype: torch.dtype, full: Tensor) -> float:
    """Some roundings of every number, or what the dtype costs an uncached run on the CPU."""
    if dtype == torch.float32:
        return 16 * torch.finfo(dtype).eps * full.double().norm().item()
    return distance(full, Runs(MAKERS[name], torch.device("cpu"))())


@slow_on_cpu
def test_the_bundled_model() -> None:
    """Trained weights instead of random ones."""
    runs = Runs(_demo)
    full, schedule = runs(), runs.schedule()
    expected, _ = runs.plainly(schedule)
    with layercache.enabled(runs.pipe, schedule) as cache:
        found = runs()
        assert cache.report().cached_cells == 2 * reused(schedule)
    assert torch.equal(found, expected) and not torch.equal(found, full)


# --- storage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen-image", "flux 2"])
def test_compact_storage(name: str, dtype: torch.dtype) -> None:
    """Reuses what fp8 codes leave of each residual, in a quarter or half of the memory and some."""
    runs = Runs(MAKERS[name], dtype=dtype)
    full, schedule = runs(), runs.schedule()
    with layercache.enabled(runs.pipe, schedule) as cache:
        exact, memory = runs(), cache.report().cache_bytes
    expected, plain = runs.plainly(schedule, stored=as_fp8)
    with layercache.enabled(runs.pipe, schedule, storage="compact") as cache:
        found = runs()
        errors = [compact_error(state, branch, plain) for branch, state in enumerate(cache.states.values())]
        share = cache.report().cache_bytes / memory
    assert torch.equal(found, expected), f"differ by {distance(found, expected)} of {distance(found, exact)}"
    assert not torch.equal(found, full)
    assert dtype != torch.float32 or not torch.equal(found, exact)  # bf16 may hide what the codes leave out
    assert 0 < max(errors) <= 1
    size = full.element_size() if dtype == torch.float32 else 2
    assert 1 / size < share < 1 / size + 0.25


def compact_error(state: Any, branch: int, plain: PlainReuse) -> float:
    """The largest error of a stored number, as a share of what is documented: 2^-4 of it, or 2^-10 of the scale."""
    worst = 0.0
    for buffer, held in zip(state.images, state.held, strict=True):
        residual = plain.residuals[(branch, *held)][0][:, -buffer.tensor.shape[1] :]  # behind the text, where joined
        scale = buffer.scales[..., None]
        error = (buffer.tensor.view(torch.float8_e4m3fn).float() * scale - residual).abs()
        worst = max(worst, (error / torch.maximum(residual.abs() * 2**-4, scale * 2**-10)).max().item())
    return worst


def test_wider_storage() -> None:
    """Residuals of a bf16 model in fp32 are not rounded."""
    runs = Runs(MAKERS["wan"], dtype=torch.bfloat16)
    full, schedule = runs(), runs.schedule()
    expected, _ = runs.plainly(schedule, stored=lambda residual: residual)
    rounded, _ = runs.plainly(schedule)
    with layercache.enabled(runs.pipe, schedule, storage="float32"):
        found = runs()
    assert torch.equal(found, expected)
    assert not torch.equal(expected, rounded) and not torch.equal(found, full)


# --- methods that decide as they run -------------------------------------------------------------------------


@slow_on_cpu
def test_fbcache_decides_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same changes, none of them near the threshold; replayed, the decisions give the same bits."""
    threshold, noted = 0.645, []
    monkeypatch.setattr(fbcache, "ratio", lambda a, b: noted.append(a / b) or a / b)
    here, there = Runs(MAKERS["qwen-image"]), Runs(MAKERS["qwen-image"], torch.device("cpu"))
    full = there()
    (cached, decisions, _), (found, decisions_here, schedule) = decided(there, threshold), decided(here, threshold)
    looks = 2 * (STEPS - 1)  # of both branches, the first step apart
    changes, changes_here = noted[:looks], noted[looks:]
    assert changes_here == pytest.approx(changes, rel=1e-3)
    assert min(abs(change / threshold - 1) for change in changes) > 0.05
    assert decisions_here == decisions
    assert all(True in row[1:] and False in row for row in decisions.values())
    with layercache.enabled(here.pipe, schedule):
        assert torch.equal(here(), found)
    allowed = 4 * distance(here(), full) + rounding_error("qwen-image", torch.float32, full)
    assert distance(found, cached) <= allowed < distance(cached, full)


def decided(runs: Runs, threshold: float, **options: Any) -> tuple[Tensor, dict[str, tuple[bool, ...]], Schedule]:
    with layercache.enabled(runs.pipe, FBCache(threshold=threshold, **options)) as cache:
        return runs(), cache.decisions, cache.export_schedule()


def test_a_decision_without_waiting() -> None:
    """By the numbers of the step before; when they arrive is left to the device."""
    runs = Runs(MAKERS["qwen-image"])
    found, decisions, schedule = decided(runs, 100.0, sync="lagged")
    with layercache.enabled(runs.pipe, schedule):
        assert torch.equal(runs(), found)
    assert ON_GPU or any(False in row for row in decisions.values())
    loop = Loop(seed=0)
    with layercache.enabled(loop.model, FBCache(threshold=100.0, sync="lagged")) as cache:
        loop.cache = cache
        loop.run()
        cache.reset()
        loop.start(1)
        loop.step()
        while loop.at < STEPS:
            with no_waiting():
                loop.step()
            synchronise()  # what was seen arrives before the next step
        assert all(True in row and False in row for row in cache.decisions.values())


@pytest.mark.filterwarnings("ignore:every call of the transformer waits")
def test_generations_of_a_bare_transformer() -> None:
    """The timestep's value, read from the device, says where the next generation begins."""
    loop = Loop(seed=0)
    with layercache.enabled(loop.model, FBCache(threshold=100.0), num_steps=STEPS) as cache:
        first = loop.run(1)
        assert cache.report().generations == 1
        other = loop.run(2)
        assert cache.report().generations == 2
        assert torch.equal(loop.run(1), first) and not torch.equal(first, other)


# --- one step after the other: streams, waiting, memory --------------------------------------------------------


def test_a_static_schedule_never_waits() -> None:
    """All but a generation's first step, which looks whether the last one stored numbers only."""
    loop = Loop(seed=0)
    full = loop.run()
    loop.start(0)
    with no_waiting():
        loop.finish()
    with layercache.enabled(loop.model, loop.schedule) as cache:
        loop.cache = cache
        expected = loop.run()
        loop.start(0)
        loop.step()
        with no_waiting():
            loop.finish()
        assert cache.report().cached_cells == 2 * reused(loop.schedule)
    assert torch.equal(loop.latents, expected) and not torch.equal(expected, full)


def streams(count: int) -> list[Any]:
    """Contexts of other streams than the current one, for which they wait."""
    if not ON_GPU:
        return [nullcontext()] * count
    made = [torch.cuda.Stream() for _ in range(count)]
    for stream in made:
        stream.wait_stream(torch.cuda.current_stream())
    return [torch.cuda.stream(stream) for stream in made]


def keep_busy() -> None:
    """The current stream has something else to do for some 10 ms."""
    if ON_GPU:
        torch.cuda._sleep(20_000_000)


def test_two_streams() -> None:
    """Two models by turns, one on a stream that lags behind: what were on another stream would come too early."""
    loops = [Loop(seed) for seed in range(2)]
    fulls = [loop.run(7) for loop in loops]
    caches = [layercache.enable(loop.model, loop.schedule) for loop in loops]
    for loop in loops:
        loop.run(5)  # kernels are compiled
        loop.start(7)
    synchronise()
    both = streams(2)
    for step in range(STEPS):
        for lags, (loop, stream) in enumerate(zip(loops, both, strict=True)):
            with stream:
                keep_busy() if lags and step else None
                loop.step()
    synchronise()
    found = [loop.latents for loop in loops]
    for loop, result, full, cache in zip(loops, found, fulls, caches, strict=True):
        assert torch.equal(result, loop.run(7)) and not torch.equal(result, full)
        assert cache.report().cached_cells == 3 * reused(loop.schedule)
        layercache.disable(loop.model)


def test_two_requests_on_two_streams() -> None:
    """One model, two generations at different steps."""
    loop = Loop(seed=0)
    full = loop.run(7)
    with layercache.enabled(loop.model, loop.schedule) as cache:
        alone = [loop.run(seed) for seed in (7, 8)]
        places = {}
        for name, seed in (("a", 7), ("b", 8)):
            loop.start(seed)
            places[name] = loop.latents
        turns = dict(zip(places, streams(2), strict=True))
        for turn in range(2 * STEPS + 1):
            for name, at in (("a", turn), ("b", turn - 3)):
                if 0 <= at < STEPS:
                    with turns[name], cache.request(name):
                        keep_busy() if name == "b" and at else None
                        loop.latents, loop.at = places[name], at
                        loop.step()
                        places[name] = loop.latents
        synchronise()
        assert cache.metrics()["hits"] == 4 * reused(loop.schedule) and not cache.metrics()["fallback_rows"]
    assert all(map(torch.equal, places.values(), alone)) and not torch.equal(alone[0], full)


def test_two_requests_in_one_batch() -> None:
    """Each with residuals of its own, gathered sample by sample."""
    loop = Loop(seed=0)
    full = loop.run(7)
    with layercache.enabled(loop.model, loop.schedule) as cache:
        expected = loop.run(7)
        loop.start(7)
        while loop.at < STEPS:
            with cache.batch({"a": 1, "b": 1}):
                loop.step()
        assert cache.metrics()["hits"] == 3 * reused(loop.schedule) and not cache.metrics()["fallback_rows"]
    assert torch.equal(loop.latents, expected) and not torch.equal(expected, full)


@slow_on_cpu
def test_two_threads() -> None:
    """Each with a pipeline of its own, on a stream of its own, from the first launch on."""
    both = [Runs(MAKERS[name]) for name in ("qwen-image", "wan")]
    for runs in both:
        runs()
    schedules = [runs.schedule() for runs in both]
    found: list[Any] = [None, None]
    together = threading.Barrier(2, timeout=60)

    def work(k: int, stream: Any) -> None:
        try:
            with stream, layercache.enabled(both[k].pipe, schedules[k]):
                together.wait()
                found[k] = [both[k](seed) for seed in range(3)]
                synchronise()
        except BaseException as error:  # noqa: B036, raised again in the main thread
            found[k] = error

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(streams(2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runs, schedule, results in zip(both, schedules, found, strict=True):
        assert isinstance(results, list), repr(results)
        with layercache.enabled(runs.pipe, schedule):
            assert all(torch.equal(result, runs(seed)) for seed, result in enumerate(results))
        assert not torch.equal(results[0], runs())


class Fault(Exception):
    """What a block raises in the middle of a forward."""


def fails(runs: Runs, at: int) -> None:
    """A generation in which the last block raises at a step."""

    def fail(module: nn.Module, inputs: Any) -> None:
        if (runs.pipe.scheduler.step_index or 0) == at:
            raise Fault

    hook = list(runs.pipe.transformer.transformer_blocks)[-1].register_forward_pre_hook(fail)
    with pytest.raises(Fault):
        runs()
    hook.remove()


@slow_on_cpu
@pytest.mark.parametrize("at", [1, 3], ids=["while storing", "while reusing"])
def test_an_exception_in_the_middle_of_a_generation(at: int) -> None:
    """The next generation is right, and no memory is lost."""
    runs = Runs(MAKERS["qwen-image"])
    full, schedule = runs(), runs.schedule()
    with layercache.enabled(runs.pipe, schedule):
        runs()
    before = allocated()
    with layercache.enabled(runs.pipe, schedule) as cache:
        expected = runs()
        steady = allocated()
        fails(runs, at)
        assert torch.equal(runs(), expected)
        assert allocated() == steady and cache.report().fallback_rows == 0
    del cache
    assert torch.equal(runs(), full) and not torch.equal(full, expected)
    del expected
    assert allocated() == before


@pytest.mark.parametrize("method", ["schedule", "fbcache"])
@pytest.mark.parametrize("ends", ["well", "by an exception"])
def test_no_stream_outlives_a_generation(method: str, ends: str) -> None:
    """Of the tensors that go through the blocks none is kept, only what is stored."""
    runs = Runs(MAKERS["qwen-image"])
    runs()
    seen: list[Any] = []
    for block in runs.pipe.transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda module, args, call: note_streams(seen, call), with_kwargs=True)
    with layercache.enabled(runs.pipe, FBCache(threshold=0.645) if method == "fbcache" else runs.schedule()) as cache:
        runs() if ends == "well" else fails(runs, 1)
        gc.collect()
        assert seen and cache.report().computed_cells
        assert not [stream().shape for stream in seen if stream() is not None]


def note_streams(seen: list[Any], call: Call) -> None:
    seen += [weakref.ref(call[name]) for name in ("hidden_states", "encoder_hidden_states")]


@pytest.mark.parametrize("storage", ["same", "float32", "compact"])
def test_a_residual_that_is_no_number(storage: str) -> None:
    """Is reported when the generation ends, and nothing of it is left in the next one."""
    runs = Runs(MAKERS["wan"], dtype=torch.bfloat16)
    full = runs()
    first = next(iter(runs.pipe.transformer.blocks))

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if (runs.pipe.scheduler.step_index or 0) == 1:
            output = output.clone()
            output[0, -1, -1] = float("inf")
        return output

    with layercache.enabled(runs.pipe, runs.schedule(), storage=storage) as cache:
        expected = runs()
        hook = first.register_forward_hook(spoil)
        with pytest.warns(NonFiniteWarning):
            runs()
        with pytest.raises(NonFiniteResidualError):
            cache.check()
        hook.remove()
        assert torch.equal(runs(), expected) and cache.report().fallback_rows == 0
    assert torch.equal(runs(), full) and not torch.equal(full, expected)


@slow_on_cpu
@pytest.mark.parametrize("storage", ["same", "compact"])
def test_memory_is_what_was_planned(storage: str) -> None:
    """Slots of the schedule, and the input of the group that is open."""
    sizes = {"num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]} if ON_GPU else {}
    tokens = 4096 if ON_GPU else 64
    loop = Loop(seed=0, tokens=tokens, **sizes)
    width = sizes.get("num_attention_heads", 2) * sizes.get("attention_head_dim", 16)
    image, text = 2 * tokens * width, 2 * loop.inputs["encoder_hidden_states"].shape[1] * width
    loop.run()
    full, uncached = loop.run(), peak(loop)
    with layercache.enabled(loop.model, loop.schedule, storage=storage) as cache:
        loop.run()
        cached, found = peak(loop), loop.latents
        layout, taken = cache.layout, cache.report().cache_bytes
    size = 4 if storage == "same" else 1
    planned = size * (layout.image_slots * image + layout.text_slots * text)
    scales = 0 if storage == "same" else 4 * planned // width
    assert taken == planned + scales and not torch.equal(found, full)
    assert cached - uncached <= taken + 4 * (image + text) + 2**16
    assert not ON_GPU or cached - uncached >= planned


def peak(loop: Loop) -> int:
    """Most memory that was asked for during a generation; that of whole blocks depends on how they are split."""
    allocated()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    loop.run()
    synchronise()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] if ON_GPU else 0


# --- how kernels are launched, compiled models ---------------------------------------------------------------


def test_every_launch_path_gives_the_same_bits(dtype: torch.dtype) -> None:
    """By Triton's JIT function, as planned, and without plans; on the CPU also in Python."""
    before = [(kernels, kernels.native) for kernels in Kernels.every]
    runs = Runs(MAKERS["flux"], dtype=dtype)
    full = runs()
    found = []
    try:
        with layercache.enabled(runs.pipe, runs.schedule()):
            found += [runs(), runs()]
            with ignored():
                found.append(runs())
                for kernels, _ in before:
                    kernels.native = None
                found.append(runs())
            found.append(runs())
    finally:
        for kernels, native in before:
            kernels.native = native
    assert all(torch.equal(one, found[0]) for one in found) and not torch.equal(found[0], full)


COMPILED_ROWS = ("cc", "rc", "rr")


@slow_on_cpu
@pytest.mark.parametrize(
    ("how", "backend"),
    [("blocks", "inductor"), ("whole", "cudagraphs" if ON_GPU else "eager")],
    ids=["blocks", "whole"],
)
def test_a_compiled_model(how: str, backend: str) -> None:
    """Differs from the model as it is no more than an uncached one does, times four, and a floor."""
    torch._dynamo.reset()
    runs = Runs(lambda: (tiny_pipeline(layers=2), {"prompt": "cat", "output_type": "latent"}))
    runs.call |= {"num_inference_steps": len(COMPILED_ROWS), "guidance_scale": 1.0}
    full, schedule = runs(), runs.schedule(COMPILED_ROWS)
    with layercache.enabled(runs.pipe, schedule):
        cached = runs()
    compiles = runs.pipe.transformer.compile if how == "whole" else runs.pipe.transformer.compile_repeated_blocks
    compiles(backend=backend, fullgraph=True)
    full_here = runs()
    with layercache.enabled(runs.pipe, schedule) as cache:
        found = [runs() for _ in range(3)]
        assert cache.report().cached_cells == 3 * reused(schedule) and cache.report().fallback_rows == 0
    floor = 16 * torch.finfo(torch.float32).eps * full.double().norm().item()
    allowed = 0.0 if backend == "eager" else 4 * distance(full_here, full) + floor
    assert max(distance(one, cached) for one in found) <= allowed
    assert distance(cached, full) > 4 * allowed
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_what_a_sampler_does_is_found_wherever_its_noise_levels_are(name: str) -> None:
    import diffusers

    scheduler = getattr(diffusers, name)(shift=3.0)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        scheduler.set_timesteps(6, device=device)
        sampler = LinearSampler.of(scheduler, len(scheduler.timesteps))
        assert sampler is not None and scheduler.sigmas.device.type == device.type
        found.append(sampler.weights)
    torch.testing.assert_close(*map(torch.as_tensor, found))
