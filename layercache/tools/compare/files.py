"""A comparison's folder: outcomes, the pictures they were measured on, and the settings they hold for."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from layercache import errors
from layercache._utils.checksum import sealed_json
from layercache._utils.files import write_atomically
from layercache._utils.formats import COMPARISON, going_on, parse_json
from layercache._utils.metrics import stills
from layercache._utils.text import shown
from layercache.errors import FileFormatError, LayerCacheError
from layercache.tools.compare.calls import Pictures
from layercache.tools.compare.entries import Job, jobs_of, key_of, methods_of
from layercache.tools.compare.scores import Curves
from layercache.tools.report import machine

FORMAT, VERSION = COMPARISON, 3
SHOWN = 8  # pictures of every entry that are kept for the page
MOST_BYTES = 2**27  # of them together, but one is always kept
PACKAGES = {"cache-dit": "cache_dit"}  # by what the names of methods begin with
_NUMBERS = ("used", "seconds", "speedup", "operators", "reads")
_PLAIN_NAME = re.compile(r"[a-z0-9.-]+(:[a-z0-9.-]+)? [0-9.e-]+")


@dataclass(frozen=True)
class Outcome:
    """What one entry did.

    Attributes:
        method, setting, budget: see `layercache.tools.compare.model.Entry`; the budget of a method that ran as it is
            is the share that it used.
        used: share of the block time computed; of another package's cache the share of block calls.
        seconds: of all pictures.
        speedup: median of ``speedups``.
        psnr, ssim, lpips: per picture against the full run; ``lpips`` is empty where it is not available.
        cache_bytes: memory of what is stored, ``None`` of another package's cache.
        operators: PyTorch operators per step, model included.
        reads: times per step that the host read a value of a tensor, which waits for a GPU.
        error: why there is nothing else.
        speedups: of every repeat, a full run and a cached run side by side; empty in files of 0.1.
        is_fixed: whether it ran as it is, whatever the budgets.
        identity: what the method is: its name and way of tuning, or a digest of one's own.
        clip, frame_psnr, frame_ssim, temporal_psnr: see `layercache.tools.compare.scores.Fidelity`.
        forwards: of the transformer, in a cached run of every picture; 0 of another package's cache.
        in_full: those that computed everything although more was to be reused, by the reason.
        warnings: of the library, while it ran.
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
    speedups: tuple[float, ...] = ()
    is_fixed: bool = False
    identity: str = ""
    clip: tuple[float, ...] = ()
    frame_psnr: Curves = ()
    frame_ssim: Curves = ()
    temporal_psnr: tuple[float, ...] = ()
    forwards: int = 0
    in_full: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return key_of(self.method, self.budget, self.is_fixed)

    @property
    def at(self) -> str:
        """The budget, for people."""
        return "as it is" if self.is_fixed else f"{self.budget:g}"

    @property
    def speedup_range(self) -> tuple[float, float]:
        """The lowest and the highest of the repeats."""
        return (min(self.speedups), max(self.speedups)) if self.speedups else (self.speedup, self.speedup)

    @property
    def fails_again(self) -> bool:
        """Whether it failed for a reason that another try would not change."""
        name = self.error.partition(":")[0]
        if name == "MissingExtraError":
            package = PACKAGES.get(self.method.partition(":")[0])
            return package is not None and importlib.util.find_spec(package) is None
        kind = getattr(errors, name, None)
        return isinstance(kind, type) and issubclass(kind, LayerCacheError)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        read: dict[str, Any] = {k: float("nan") if data[k] is None else float(data[k]) for k in _NUMBERS}
        read |= {k: tuple(float(v) for v in data[k]) for k in ("psnr", "ssim", "lpips")}
        read |= {k: str(data[k]) for k in ("method", "setting", "error")}
        read["speedups"] = tuple(float(v) for v in data.get("speedups", ()))
        read |= {"is_fixed": bool(data.get("is_fixed", False)), "identity": str(data.get("identity", ""))}
        # files of earlier versions have none of these
        read |= {k: tuple(float(v) for v in data.get(k, ())) for k in ("clip", "temporal_psnr")}
        for name in ("frame_psnr", "frame_ssim"):
            read[name] = tuple(tuple(float(v) for v in curve) for curve in data.get(name, ()))
        read |= {"forwards": int(data.get("forwards", 0)), "warnings": tuple(map(str, data.get("warnings", ())))}
        read["in_full"] = {str(reason): int(count) for reason, count in dict(data.get("in_full", {})).items()}
        stored = data["cache_bytes"]
        made = cls(**read, budget=float(data["budget"]), cache_bytes=None if stored is None else int(stored))
        if not made.error and not (made.psnr and made.ssim):
            raise ValueError("no figures and no error")
        return made


class ComparisonFiles:
    """A comparison's folder as it stands; nothing of the model is needed to read it.

    Args:
        folder: with ``compare.json``, ``full.npy`` and ``pictures``.

    Attributes:
        outcomes: by their keys.
        settings: that they hold for.
        digest: of the settings.
        request: what was asked for, in the words of whoever asked (`finished`).
        full_seconds: of a picture of the full run; NaN where it is not known.
        clip_model: that the CLIP scores are of; empty where there are none.
        full_clip: the CLIP scores of the full run's pictures.
        machine: that the times are of.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.outcomes: dict[str, Outcome] = {}
        self.settings: dict[str, Any] = {}
        self.digest = ""
        self.request: dict[str, Any] = {}
        self.full_seconds = float("nan")
        self.clip_model, self.full_clip = "", tuple[float, ...]()
        self.machine: dict[str, Any] = machine.machine_info()
        self._digests: dict[str, str] = {}

    @classmethod
    def read(cls, folder: Path | str) -> ComparisonFiles:
        """What a folder holds.

        Raises:
            FileFormatError: its ``compare.json`` is missing, damaged, changed, or something else.
        """
        files = cls(folder)
        files.take(parsed_file(files.file))
        return files

    def take(self, data: Mapping[str, Any]) -> None:
        """Takes over what `parsed_file` gave.

        Raises:
            FileFormatError: an entry is damaged.
        """
        with going_on(self.file, COMPARISON):
            self.digest, self.outcomes = str(data["digest"]), _outcomes_in(data)
            self.settings, self.request = dict(data.get("settings", {})), dict(data.get("request", {}))
            self.full_seconds = float(data.get("full_seconds", "nan"))
            self.clip_model = str(data.get("clip_model", ""))
            self.full_clip = tuple(float(v) for v in data.get("full_clip", ()))
            self.machine = dict(data.get("machine", {}))
            self._digests = {str(name): str(value) for name, value in data.get("pictures", {}).items()}

    @property
    def file(self) -> Path:
        return self.folder / "compare.json"

    @property
    def captions(self) -> list[str]:
        """The prompts of the first pictures, shortened, for the columns of a page."""
        prompts = [prompt for batch in self.settings.get("prompts", []) for prompt in batch][:SHOWN]
        texts = [prompt.get("prompt", "") if isinstance(prompt, Mapping) else prompt for prompt in prompts]
        return [textwrap.shorten(str(text), 16, placeholder="…") for text in texts]

    @property
    def categories(self) -> list[str]:
        """The category of every picture; empty where the prompts have none."""
        return [str(category) for category in self.settings.get("categories", [])]

    def of(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes of jobs, all of which are there."""
        return [self.outcomes[job.key] for job in jobs]

    def is_done(self, job: Job) -> bool:
        """Whether there is an outcome, and its pictures, or a reason why there cannot be."""
        found = self.outcomes.get(job.key)
        if found is None or self.is_of_another(job):
            return False
        return found.fails_again if found.error else self.pictures(found) is not None

    def is_of_another(self, job: Job) -> bool:
        """Whether what was kept under the job's key is of another method, or of an earlier way to tune it."""
        found = self.outcomes.get(job.key)
        return found is not None and found.identity != job.method.identity

    @property
    def has_full_pictures(self) -> bool:
        return self._stored(self._full_file) is not None

    def pictures(self, outcome: Outcome) -> Pictures | None:
        """The first pictures of an entry, ``[n, H, W, C]`` in 0..1; ``None`` where their file is missing or damaged.

        Of a video, the frame in its middle.
        """
        return self._stored(self._picture_file(outcome))

    def full_pictures(self) -> Pictures:
        """Those of the full run.

        Raises:
            FileFormatError: their file is missing or damaged; `Comparison.run` makes it again.
        """
        pictures = self._stored(self._full_file)
        if pictures is None:
            raise FileFormatError(f"{shown(self._full_file)} is missing or damaged; compare again, which makes it")
        return pictures

    @property
    def _full_file(self) -> Path:
        return self.folder / "full.npy"

    def _picture_file(self, outcome: Outcome) -> Path:
        name = re.sub(r"[^\w.-]", "-", outcome.key)[:100]
        if not _PLAIN_NAME.fullmatch(outcome.key):  # names of one's own may differ in what a file's name cannot say
            name += f"-{hashlib.sha256(outcome.key.encode()).hexdigest()[:8]}"
        return self.folder / "pictures" / f"{name}.npy"

    def _stored(self, path: Path) -> Pictures | None:
        """Pictures from a file; ``None`` where it does not hold those that were kept there."""
        try:
            content = path.read_bytes()
            pictures: Pictures = np.load(io.BytesIO(content)).astype(np.float32)
        except (OSError, ValueError, EOFError, MemoryError):
            return None
        digest = self._digests.get(path.name)  # files of 0.1 have none
        same = digest is None or digest == hashlib.sha256(content).hexdigest()
        return pictures if same and pictures.ndim == 4 and len(pictures) else None

    def keep_full(self, pictures: Pictures, seconds: float) -> None:
        """Keeps the first pictures of the full run, and the seconds that each took."""
        self._keep(pictures, self._full_file)
        self.full_seconds = seconds

    def keep(self, outcome: Outcome, pictures: Pictures) -> None:
        """Keeps the first pictures of an entry."""
        self._keep(pictures, self._picture_file(outcome))

    def _keep(self, pictures: Pictures, path: Path) -> None:
        """Writes the first pictures as a NumPy file, and notes its digest."""
        content = io.BytesIO()
        np.save(content, first_stills(pictures))
        self._digests[path.name] = hashlib.sha256(content.getvalue()).hexdigest()
        write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))

    def save(self) -> Path:
        """Writes ``compare.json``."""
        return self.save_as(self.file, list(self.outcomes.values()))

    def save_as(self, path: Path, outcomes: Sequence[Outcome], title: str = "") -> Path:
        """Writes outcomes and settings, without pictures; the file appears whole or not at all."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "digest": self.digest,
            "settings": self.settings,
            "request": self.request,
            "full_seconds": self.full_seconds,
            "clip_model": self.clip_model,
            "full_clip": self.full_clip,
            "machine": self.machine,
            "pictures": self._digests,
            "title": title,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        text = sealed_json(machine.json_text(data))
        return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def first_stills(pictures: Pictures, number: int = 0) -> Pictures:
    """What is kept of a call's pictures: those among the first of all, or the frames in the middle of such videos.

    Args:
        pictures: of the call, ``[n, H, W, C]`` or ``[n, frames, H, W, C]``.
        number: of the first of them.
    """
    frames = stills(pictures)
    most = min(SHOWN, max(1, MOST_BYTES // frames[0].nbytes))
    return np.ascontiguousarray(frames[: max(0, most - number)])


def finished(
    folder: Path | str, methods: Any, budgets: Sequence[float], request: Mapping[str, Any]
) -> ComparisonFiles | None:
    """A comparison that has nothing left to run, without the pipeline; ``None`` of any other folder.

    Args:
        folder: of the comparison.
        methods, budgets: as for `layercache.tools.compare.api.compare`; the outcomes of ``files.of(jobs)`` are theirs.
        request: everything else that was asked for, as JSON can hold it (the model's name, steps, prompts, ...): equal
            to what `Comparison` was given when it ran.

    Raises:
        MethodError: as for `methods_of`.
    """
    try:
        files = ComparisonFiles.read(folder)
    except FileFormatError:
        return None
    is_same = files.request == json.loads(machine.json_text(dict(request)))
    jobs = list(jobs_of(methods_of(methods), budgets))
    return files if is_same and files.has_full_pictures and all(map(files.is_done, jobs)) else None


def read_comparison(path: Path) -> tuple[str, list[Outcome], dict[str, str]]:
    """What the file of a comparison holds: the digest of its settings, its outcomes, and the digests of its pictures.

    Raises:
        FileFormatError: it is damaged, changed, or something else.
    """
    with going_on(path, COMPARISON):
        data = parsed_file(path)
        digests = {str(name): str(value) for name, value in data.get("pictures", {}).items()}
        return str(data["digest"]), list(_outcomes_in(data).values()), digests


def parsed_file(path: Path) -> Mapping[str, Any]:
    """The entries of a comparison's file.

    Raises:
        FileFormatError: it is missing, damaged, changed, or something else.
    """
    with going_on(path, COMPARISON):
        data: Mapping[str, Any] = parse_json(path.read_bytes(), COMPARISON, VERSION, str(path))
        return data


def _outcomes_in(data: Mapping[str, Any]) -> dict[str, Outcome]:
    found = [Outcome.from_json(entry) for entry in data["outcomes"]]
    return {outcome.key: outcome for outcome in found}
