"""What the caches of other packages do between the blocks, as they are and on our ops: ``layercache bench peers``.

The transformer has blocks that return prepared tensors, so that nothing but the cache runs. Every mode is run with a
threshold that computes every step, and with one that reuses every step.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layercache import backend
from layercache.tools.bench.measure import keep_memory
from layercache.tools.bench.peer_table import Row
from layercache.tools.bench.peer_table import save_plot as save_plot
from layercache.tools.bench.peer_table import table as table
from layercache.tools.compare.run import Counter

WARM, STEPS = 5, 6
ALWAYS, NEVER = 0.99, 1e-9  # thresholds; cache-dit takes 1 for "without looking"


class Prepared(nn.Module):
    """A module that returns one of two prepared tensors, by turns."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        super().__init__()
        self.tensors, self.step = list(tensors), 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.tensors[self.step % len(self.tensors)]


class PreparedBlock(nn.Module):
    """A block whose attention gives what the block gives."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        super().__init__()
        self.attn = Prepared(tensors)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[Any, ...]:
        return encoder_hidden_states, self.attn(hidden_states)


class Carrier(nn.Module, CacheMixin):
    """Blocks and nothing else, the text stream a tenth of the image's."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: Any, blocks: int = 3):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(0)

        def tensor(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        batch, rows, channels = shape
        self.image, self.text = tensor(*shape), tensor(batch, max(1, rows // 10), channels)
        outputs = [[base := tensor(*shape), base * 1.01] for _ in range(blocks)]
        self.transformer_blocks = nn.ModuleList(PreparedBlock(pair) for pair in outputs)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text)
        return image

    def prepare(self, step: int) -> None:
        for block in self.transformer_blocks:
            block.attn.step = step  # type: ignore[union-attr]


@dataclass(frozen=True)
class Mode:
    """A cache of another package: ``enable(model, reuses)`` is a context, ``package`` what `accelerate` calls it."""

    name: str
    package: str
    blocks: int
    enable: Callable[[Carrier, bool], Any]


class Traffic(TorchDispatchMode):
    """Operators with full-size operands, and how many such tensors they read and write."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.operators, self.ours, self.passes = size, 0, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in function._schema.returns]
        if "empty" in str(function) or any(info is not None and not info.is_write for info in aliases):
            return result
        written, read = self._split(function, args, kwargs or {})
        new = sum(self._is_large(t) for t in tree_leaves(result) if all(t is not w for w in written))
        count = new + len(written) + len(read)
        if count:
            self.operators += 1
            self.ours += function.namespace == "layercache"
            self.passes += count
        return result

    def _is_large(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.numel() >= self.size

    def _split(self, function: Any, args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        written: list[Any] = []
        read: list[Any] = []
        names = function._schema.arguments
        for place, value in [*enumerate(args), *((None, value) for value in kwargs.values())]:
            info = names[place].alias_info if place is not None and place < len(names) else None
            own = [t for t in tree_leaves(value) if self._is_large(t)]
            (written if info is not None and info.is_write else read).extend(own)
        return written, read


def modes() -> list[Mode]:
    """Of the packages that are installed."""
    found = [
        Mode("diffusers FBC", "diffusers", 3, _first_block),
        Mode("diffusers Taylor", "diffusers", 1, _taylor),
    ]
    if importlib.util.find_spec("cache_dit") is not None:
        found += [
            Mode("cache-dit DBCache", "cache-dit", 3, functools.partial(_cache_dit, taylor=False)),
            Mode("cache-dit + Taylor", "cache-dit", 3, functools.partial(_cache_dit, taylor=True)),
        ]
    return found


@contextmanager
def _hooked(model: Carrier, config: Any) -> Iterator[None]:
    model.enable_cache(config)  # type: ignore[operator]
    try:
        yield
    finally:
        model.disable_cache()  # type: ignore[operator]


def _first_block(model: Carrier, reuses: bool) -> Any:
    metadata = TransformerBlockMetadata(return_hidden_states_index=1, return_encoder_hidden_states_index=0)
    TransformerBlockRegistry.register(PreparedBlock, metadata)
    return _hooked(model, FirstBlockCacheConfig(threshold=ALWAYS if reuses else NEVER))


def _taylor(model: Carrier, reuses: bool) -> Any:
    config = TaylorSeerCacheConfig(
        cache_interval=10**6 if reuses else 1,
        disable_cache_before_step=2,
        taylor_factors_dtype=model.image.dtype,
        cache_identifiers=[r"transformer_blocks\.\d+\.attn"],
    )
    return _hooked(model, config)


@contextmanager
def _cache_dit(model: Carrier, reuses: bool, taylor: bool) -> Iterator[None]:
    import cache_dit

    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=model.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_1,
        has_separate_cfg=False,
        check_forward_pattern=False,
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=ALWAYS if reuses else NEVER,
        max_warmup_steps=2,
        enable_separate_cfg=False,
        num_inference_steps=10**6,
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(adapter)


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: Any, rounds: int, on_step: Callable[[str], None]
) -> list[Row]:
    """Every mode, computing and reusing, as it is and accelerated; the two alternate."""
    keep_memory()
    rows = []
    for mode in modes():
        for reuses in (False, True):
            on_step(f"{mode.name}, {'reusing' if reuses else 'computing'}")
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                for fast in (False, True):
                    with _under(mode, fast):
                        seconds[fast] += _times(mode, reuses, shape, dtype, device)
            for fast in (False, True):
                with _under(mode, fast):
                    counted = _counts(mode, reuses, shape, dtype, device)
                rows.append(Row(mode.name, reuses, fast, *counted, median(seconds[fast])))
    return rows


def _under(mode: Mode, fast: bool) -> Any:
    return backend.accelerated(mode.package) if fast else nullcontext()


@contextmanager
def _warm(mode: Mode, reuses: bool, shape: Any, dtype: Any, device: Any) -> Iterator[Callable[[int], None]]:
    """The model with the cache on, behind its first steps; yields what runs a step."""
    model = Carrier(shape, dtype, device, mode.blocks)

    def step(number: int) -> None:
        model.prepare(number)
        with torch.no_grad(), model.cache_context("cond"):  # type: ignore[operator]
            model(model.image, model.text)

    with mode.enable(model, reuses):
        for number in range(WARM):
            step(number)
        yield step


def _times(mode: Mode, reuses: bool, shape: Any, dtype: Any, device: Any) -> list[float]:
    found = []
    with _warm(mode, reuses, shape, dtype, device) as step:
        for number in range(STEPS):
            _wait(device)
            start = time.perf_counter()
            step(WARM + number)
            _wait(device)
            found.append(time.perf_counter() - start)
    return found


def _wait(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _counts(mode: Mode, reuses: bool, shape: Any, dtype: Any, device: Any) -> tuple[int, int, int, int, int]:
    size = shape[0] * shape[1] * shape[2]
    with _warm(mode, reuses, shape, dtype, device) as step:
        with Traffic(size) as traffic:
            step(WARM)
        with Counter() as counter:
            step(WARM + 1)
    return traffic.operators, traffic.ours, traffic.passes, counter.reads, _breaks(mode, reuses, dtype, device)


def _breaks(mode: Mode, reuses: bool, dtype: Any, device: Any) -> int:
    """On a small model: the number does not depend on the size."""
    torch._dynamo.reset()
    counters.clear()
    model = Carrier((1, 16, 32), dtype, device, mode.blocks)
    with mode.enable(model, reuses), torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        for number in range(WARM):
            model.prepare(number)
            with model.cache_context("cond"):  # type: ignore[operator]
                compiled(model.image, model.text)
    found = sum(counters["graph_break"].values())
    torch._dynamo.reset()
    return found
