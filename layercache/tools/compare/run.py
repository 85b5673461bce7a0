"""Every method on one model, the same seeds and budgets: `layercache compare`."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layercache._utils import metrics
from layercache._utils.checksum import sealed_json
from layercache._utils.files import check_output_folder, write_atomically
from layercache._utils.formats import COMPARISON, going_on, parse_json
from layercache._utils.text import shown
from layercache.errors import FileFormatError, LayerCacheError, ScheduleMismatchError
from layercache.tools.compare.entries import CalibratedModel, Entry, block_calls, entries
from layercache.tools.report import machine

FORMAT, VERSION = COMPARISON, 2
SHOWN = 8  # pictures of every entry that are kept for the page
_NUMBERS = ("used", "seconds", "speedup", "operators", "reads")
_READS = ("item", "tolist", "__bool__", "__float__", "__int__")


@dataclass(frozen=True)
class Outcome:
    """What one entry did.

    Attributes:
        method, setting, budget: see `layercache.tools.compare.entries.Entry`.
        used: share of the block time computed; of another package's cache the share of block calls.
        seconds: of all pictures.
        speedup: against full runs of the first batch right before and after.
        psnr, ssim, lpips: per picture against the full run; ``lpips`` is empty where it is not available.
        cache_bytes: memory of what is stored, ``None`` of another package's cache.
        operators: PyTorch operators per step, model included.
        reads: times per step that the host read a value of a tensor, which waits for a GPU.
        error: why there is nothing else.
    """

    method: str
    setting: str
    budget: float
    used: float = float("nan")
    seconds: float = float("nan")
    speedup: float = float("nan")
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    lpips: tuple[float, ...] = ()
    cache_bytes: int | None = None
    operators: float = float("nan")
    reads: float = float("nan")
    error: str = ""

    @property
    def key(self) -> str:
        return f"{self.method} {self.budget:g}"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        read: dict[str, Any] = {k: float("nan") if data[k] is None else float(data[k]) for k in _NUMBERS}
        read |= {k: tuple(float(v) for v in data[k]) for k in ("psnr", "ssim", "lpips")}
        read |= {k: str(data[k]) for k in ("method", "setting", "error")}
        stored = data["cache_bytes"]
        made = cls(**read, budget=float(data["budget"]), cache_bytes=None if stored is None else int(stored))
        if not made.error and not (made.psnr and made.ssim):
            raise ValueError("no figures and no error")
        return made


class Counter(TorchDispatchMode):
    """Counts operators, and the host's looks at values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0
        self._originals: dict[str, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Counter:
        for name in _READS:
            self._originals[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counted(self._originals[name]))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor) -> Any:
            self.reads += 1
            return original(tensor)

        return read


class Comparison:
    """Runs entries one after the other; keeps what they gave, so that a run that was stopped goes on.

    Args:
        model: the model and its calibration samples.
        prompts: one call per entry, an entry being a list of as many prompts as the call has pictures.
        seeds: one per picture.
        folder: where results and pictures are kept.
    """

    def __init__(self, model: CalibratedModel, prompts: Sequence[Sequence[str]], seeds: Sequence[int], folder: Path):
        metrics.check_installed()
        self.model, self.prompts, self.seeds, self.folder = model, [list(p) for p in prompts], list(seeds), Path(folder)
        edges = np.cumsum([0, *map(len, self.prompts)]).tolist()
        if edges[-1] != len(self.seeds):
            raise LayerCacheError(f"give one seed per picture: {edges[-1]} pictures, {len(self.seeds)} seeds")
        self._batches = list(pairwise(edges))
        check_output_folder(self.folder, "output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outcomes: dict[str, Outcome] = {}
        self._digests: dict[str, str] = {}
        self._settings = {
            "call": {name: repr(value) for name, value in sorted(model.call.items())},
            "model": f"{type(model.pipeline).__name__} {type(model.pipeline.transformer).__name__}",
            "prompts": self.prompts,
            "seeds": self.seeds,
            "calibration_seeds": list(model.seeds),
            "effort": model.effort,
        }
        self._digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()[:16]
        self._read()

    @property
    def file(self) -> Path:
        return self.folder / "compare.json"

    def run(self, methods: Sequence[str], say: Callable[[str], None] = lambda text: None) -> list[Outcome]:
        """All methods at all budgets; one that fails leaves its reason and does not stop the others."""
        pending = [entry for entry in entries(self.model, methods) if not self._has(entry[0], entry[1])]
        if pending or self._stored(self._full_file) is None:
            say("generating the full pictures")
            self.full, self.full_seconds = self._generate(nullcontext(), range(len(self._batches)))
            self._keep(self.full, self._full_file)
            self.save()
        for number, (name, budget, make) in enumerate(pending, 1):
            say(f"{name} at {budget:g} ({number} of {len(pending)})")
            try:
                outcome = self._judge(make())
            except (LayerCacheError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
                outcome = Outcome(name, "", budget, error=f"{type(error).__name__}: {error}")
            self.outcomes[outcome.key] = outcome
            self.save()
        wanted = [f"{name} {budget:g}" for name, budget, _ in entries(self.model, methods)]
        return [self.outcomes[key] for key in wanted]

    def pictures(self, outcome: Outcome) -> np.ndarray | None:
        """The first pictures of an entry, ``[n, H, W, C]`` in 0..1; ``None`` where their file is missing or damaged."""
        return self._stored(self._picture_file(outcome))

    def full_pictures(self) -> np.ndarray:
        """Those of the full run.

        Raises:
            FileFormatError: their file is missing or damaged; `run` makes it again.
        """
        pictures = self._stored(self._full_file)
        if pictures is None:
            raise FileFormatError(f"{shown(self._full_file)} is missing or damaged; compare again, which makes it")
        return pictures

    @property
    def _full_file(self) -> Path:
        return self.folder / "full.npy"

    def _stored(self, path: Path) -> np.ndarray | None:
        """Pictures from a file; ``None`` where it does not hold those that were kept there."""
        try:
            content = path.read_bytes()
            pictures = metrics.as_pictures(np.load(io.BytesIO(content)))
        except (OSError, ValueError, EOFError, MemoryError):
            return None
        digest = self._digests.get(path.name)  # files of 0.1 have none
        same = digest is None or digest == hashlib.sha256(content).hexdigest()
        return pictures if same and len(pictures) == min(SHOWN, len(self.seeds)) else None

    def _keep(self, pictures: np.ndarray, path: Path) -> None:
        """Writes the first pictures as a NumPy file, and notes its digest."""
        content = io.BytesIO()
        np.save(content, pictures[:SHOWN])
        self._digests[path.name] = hashlib.sha256(content.getvalue()).hexdigest()
        write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))

    def save(self) -> Path:
        data = {
            "format": FORMAT,
            "version": VERSION,
            "digest": self._digest,
            "settings": self._settings,
            "machine": machine.machine_info(),
            "pictures": self._digests,
            "outcomes": [asdict(outcome) for outcome in self.outcomes.values()],
        }
        text = sealed_json(machine.json_text(data))
        return write_atomically(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _read(self) -> None:
        if not self.file.exists():
            return
        digest, found, digests = read_comparison(self.file)
        if digest != self._digest:
            raise ScheduleMismatchError(
                f"{self.file} compares another model, other seeds or other settings; name another folder"
            )
        self.outcomes = {outcome.key: outcome for outcome in found}
        self._digests = digests

    def _has(self, name: str, budget: float) -> bool:
        before = self.outcomes.get(f"{name} {budget:g}")
        return before is not None and not before.error and self.pictures(before) is not None

    def _judge(self, entry: Entry) -> Outcome:
        counted = self._count(entry)
        first = [0]
        before = self._generate(nullcontext(), first)[1][0]
        with entry.attach() as cache, block_calls(self.model.pipeline.transformer) as calls:
            pictures, seconds = self._generate(nullcontext(), range(len(self._batches)))
            report = cache.report() if cache else None
        used = report.used if report else calls[0] / (len(self._batches) * self._blocks_per_batch)
        stored = report.cache_bytes if report else None
        after = self._generate(nullcontext(), first)[1][0]
        outcome = Outcome(
            entry.method,
            entry.setting,
            entry.budget,
            used=float(used),
            seconds=sum(seconds),
            speedup=(before + after) / 2 / seconds[0],
            psnr=tuple(metrics.psnr(self.full, pictures)),
            ssim=tuple(metrics.ssim(self.full, pictures)),
            lpips=tuple(metrics.lpips(self.full, pictures)[0] or ()),
            cache_bytes=stored,
            operators=counted["operators"],
            reads=counted["reads"],
        )
        self._keep(pictures, self._picture_file(outcome))
        return outcome

    def _count(self, entry: Entry) -> dict[str, float]:
        """Operators and reads per step of one batch; also warms up."""
        steps = self.model.fingerprint.num_steps
        with entry.attach(), Counter() as counter:
            self._generate(nullcontext(), [0])
        return {"operators": counter.operators / steps, "reads": counter.reads / steps}

    @property
    def _blocks_per_batch(self) -> int:
        prints = self.model.fingerprint
        return prints.num_blocks * len(prints.branches) * prints.num_steps

    def _generate(self, context: Any, batches: Sequence[int]) -> tuple[np.ndarray, list[float]]:
        pictures, seconds = [], []
        pipeline, device = self.model.pipeline, self.model.pipeline.device
        with context:
            for number in batches:
                lo, hi = self._batches[number]
                generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds[lo:hi]]
                call = {**self.model.call, "generator": generators, "output_type": "np"}
                _synchronise(device)
                start = time.perf_counter()
                images = pipeline(prompt=self.prompts[number], return_dict=False, **call)[0]
                _synchronise(device)
                seconds.append(time.perf_counter() - start)
                pictures.append(metrics.as_pictures(images))
        return np.concatenate(pictures), seconds

    def _picture_file(self, outcome: Outcome) -> Path:
        name = outcome.key.replace(":", "-").replace(" ", "-")
        return self.folder / "pictures" / f"{name}.npy"


def read_comparison(path: Path) -> tuple[str, list[Outcome], dict[str, str]]:
    """What the file of a comparison holds: the digest of its settings, its outcomes, and the digests of its pictures.

    Raises:
        FileFormatError: it is damaged, changed, or something else.
    """
    with going_on(path, COMPARISON):
        data = parse_json(path.read_bytes(), COMPARISON, VERSION, str(path))
        digests = {str(name): str(value) for name, value in data.get("pictures", {}).items()}
        return str(data["digest"]), [Outcome.from_json(entry) for entry in data["outcomes"]], digests


def _synchronise(device: torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
