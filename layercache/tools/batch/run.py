"""Pictures or videos of many prompts, shared out over processes, in a folder that goes on where it was stopped."""

from __future__ import annotations

import errno
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import layercache
from layercache._utils import metrics
from layercache._utils.text import shown
from layercache._version import __version__
from layercache.errors import (
    CrewError,
    LayerCacheError,
    MissingExtraError,
    NonFiniteWarning,
)
from layercache.models.registry import experts_of
from layercache.parallel.crew import Crew
from layercache.planning.search_files import digest_of, model_identity
from layercache.schedule.schedule import call_arguments
from layercache.tools.batch.entries import Entry, check_arguments
from layercache.tools.batch.manifest import Made, Manifest, forget_changed, sha256_of
from layercache.tools.cli import results
from layercache.tools.cli.pipelines import gives_video, refused_arguments
from layercache.tools.compare.calls import quiet

BAR = "{desc}: {n} of {total} |{bar}| {rate_noinv_fmt}, {elapsed}, {remaining} left{postfix}"
LONGEST_ERROR = 500  # characters in the manifest
DISK_IS_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS") if hasattr(errno, name)}


@dataclass(frozen=True)
class Batch:
    """What is in the folder after a run.

    Attributes:
        folder, manifest: of the pictures, and its file that says what is known of each.
        count: how many prompts there are.
        made: how many pictures this run made.
        failures: why there is no picture, by the number of the prompt.
        psnr: of all pictures, in dB, where they were compared.
        used: mean share of the block time computed; ``None`` without a schedule.
        seconds: of this run, from the first picture on.
        by_category: the PSNR of the pictures of every category of prompts; empty where these have none.
    """

    folder: Path
    manifest: Path
    count: int
    made: int
    failures: Mapping[int, str]
    psnr: tuple[float, ...]
    used: float | None
    seconds: float
    by_category: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def generate_all(
    pipe: Any,
    entries: Sequence[Entry],
    folder: str | os.PathLike[str],
    call: Mapping[str, Any] | None = None,
    *,
    schedule: Any = None,
    compare: bool = False,
    frame_rate: float | None = None,
    about: Mapping[str, Any] | None = None,
    crew: Crew | None = None,
    progress: bool = True,
    look: bool = True,
) -> Batch:
    """A picture or video of every prompt, each in a file of its own, with a manifest.

    Every prompt is a call of its own, with a cache of its own, so that its picture is the same whatever was made before
    it, and however many processes there are. Given again, it makes what is not there yet, what failed, and what was
    changed since. A prompt that fails is noted in the manifest; a full disk, a lost process, Ctrl-C, and what would
    fail for every prompt, stop the run.

    Args:
        pipe: the pipeline.
        entries: the prompts, with arguments and seeds.
        folder: made if it is not there; one with other pictures of this function is refused.
        call: arguments of every call; those of an entry go before them.
        schedule: what to cache by; nothing is cached without.
        compare: also makes every picture without a cache, and notes the PSNR and the seconds.
        frame_rate: of videos, per second; the model's own if left out.
        about: settings that are kept in the manifest for people to read.
        crew: processes that share the prompts; only the leader writes files.
        progress: whether to show a bar.
        look: whether to look for files in the folder that are missing or were changed, as `forget_changed` does.

    Raises:
        CrewError: a process was lost.
        LayerCacheError: an argument or the schedule does not fit the pipeline.
        OutputError: a file cannot be written.
        ScheduleMismatchError: the folder holds other pictures, or a process has another model or other prompts.
    """
    crew = crew or Crew()
    maker = _Maker(pipe, entries, dict(call or {}), schedule, compare, frame_rate)
    with crew.together():
        maker.check()
        identity = maker.identity()
    own = [identity, digest_of([entry.digest for entry in entries]), compare]
    crew.check_same(own, "another model, schedule, or other prompts or arguments")
    differences, about = crew.differences(), {**(about or {}), "layercache": __version__}
    with crew.together():
        if look and crew.leads:
            forget_changed(Path(folder), entries)
        manifest = Manifest(Path(folder), identity, about, entries) if crew.leads else None
        todo = manifest.left(compare) if manifest is not None else []
        if manifest is not None:
            manifest.note("differences", differences)
    todo = crew.agree(todo)
    start = time.perf_counter()
    with quiet(pipe), _warnings_once(), _bar(len(entries), len(todo), progress and crew.leads) as bar:
        crew.map(maker, todo, None if manifest is None else _Keeper(manifest, bar), keep=False)
    with crew.together():
        found = _batch_of(manifest, len(todo), time.perf_counter() - start) if manifest is not None else None
    agreed = crew.agree(found)
    assert agreed is not None
    return agreed


@contextmanager
def _warnings_once() -> Iterator[None]:
    """Context in which a warning of every prompt is shown for the first; one of NaN is an error of its prompt."""
    seen: set[tuple[type[Warning], str]] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        show = warnings.showwarning

        def show_once(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if (category, str(message)) not in seen:
                seen.add((category, str(message)))
                show(message, category, *where, **more)

        warnings.showwarning = show_once
        yield


def _bar(count: int, left: int, shows: bool) -> tqdm[Any]:
    return tqdm(total=count, initial=count - left, desc="pictures", unit=" pictures", bar_format=BAR, disable=not shows)


class _Keeper:
    """Writes what was made, on the leader."""

    def __init__(self, manifest: Manifest, bar: tqdm[Any]):
        self.manifest, self.bar, self.failed = manifest, bar, 0

    def __call__(self, number: int, made: Made) -> None:
        self.manifest.keep(number, made)
        if made.error is not None:
            self.failed += 1
            self.bar.set_postfix_str(f"{self.failed} failed", refresh=False)
        self.bar.update()


def _batch_of(manifest: Manifest, tried: int, seconds: float) -> Batch:
    manifest.finish()
    lines = [manifest.lines[number] for number in range(len(manifest.entries))]
    failures = {line["number"]: str(line["error"]) for line in lines if line.get("error")}
    used = [line["used"] for line in lines if line.get("used") is not None]
    psnr = tuple(float(line["psnr"]) for line in lines if line.get("psnr") is not None)
    mean = math.fsum(used) / len(used) if used else None
    compared = [line for line in lines if line.get("psnr") is not None]
    names = dict.fromkeys(str(line["category"]) for line in compared if line.get("category"))
    by_category = {name: tuple(float(one["psnr"]) for one in compared if one.get("category") == name) for name in names}
    made = tried - len(failures)
    return Batch(manifest.folder, manifest.path, len(lines), made, failures, psnr, mean, seconds, by_category)


# --- one prompt --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """One picture ``[H, W, C]`` or video ``[F, H, W, C]`` in 0..1."""

    pixels: Any
    sound: Any
    seconds: float
    used: float | None


@dataclass(frozen=True)
class _Maker:
    """Makes the picture of a number, with the arguments of `generate_all`."""

    pipe: Any
    entries: Sequence[Entry]
    call: dict[str, Any]
    schedule: Any
    compare: bool
    frame_rate: float | None

    def check(self) -> None:
        """Refuses what would fail for every prompt."""
        check_arguments(self.pipe, self.entries)
        if self.compare:
            metrics.check_installed()
        if self.schedule is not None:
            with layercache.enabled(self.pipe, self.schedule):
                pass

    def identity(self) -> dict[str, str]:
        """Digests of what every picture depends on."""
        return {
            "model": digest_of(_model_of(self.pipe)),
            "schedule": digest_of(_plan_of(self.schedule)),
            "call": digest_of(sorted(self.call.items())),
            "format": f"{self._ending} at {self._rate:g}" if gives_video(self.pipe) else self._ending,
        }

    @property
    def _ending(self) -> str:
        if not gives_video(self.pipe):
            return ".png"
        return ".mp4" if results.has_ffmpeg() else results.GIF

    @property
    def _rate(self) -> float:
        return results.frame_rate_of(self.pipe, self.frame_rate)

    def __call__(self, number: int) -> Made:
        """The files of a picture, or why there are none."""
        inputs: dict[str, str] = {}
        try:
            return self._made(self.entries[number], inputs)
        except Exception as error:
            if _stops(error):
                raise
            text = str(error) if type(error) is LayerCacheError else f"{type(error).__name__}: {error}"
            return Made(inputs=inputs, error=shown(text[:LONGEST_ERROR]))

    def _made(self, entry: Entry, inputs: dict[str, str]) -> Made:
        for name in (name for names in entry.inputs().values() for name in names):
            inputs[name] = sha256_of(entry.folder / name) or ""
        call = {**self.call, **entry.call()}
        drawn = self._draw(call, entry.seed, self.schedule)
        full = self._draw(call, entry.seed, None) if self.compare else None
        contents = {self._ending: results.encoded_pixels(drawn.pixels, self._ending, self._rate)}
        if drawn.sound is not None:
            contents[".wav"] = results.encoded_sound(drawn.sound, results.sampling_rate_of(self.pipe))
        psnr = None if full is None else metrics.psnr(full.pixels[None], drawn.pixels[None])[0]
        return Made(contents, drawn.seconds, drawn.used, psnr, None if full is None else full.seconds, inputs)

    def _draw(self, call: dict[str, Any], seed: int, plan: Any) -> _Drawn:
        call = {**call, **call_arguments(plan)}
        with layercache.enabled(self.pipe, plan) if plan is not None else nullcontext() as cache:
            # twice with a cache, which stores what overflowed float16 in float32 from then on
            for _ in range(1 if cache is None else 2):
                generator = torch.Generator("cpu").manual_seed(seed)
                start = time.perf_counter()
                # pictures arrive in host memory, so nothing is left running when the call returns
                with refused_arguments():
                    result = self.pipe(generator=generator, output_type="np", **call)
                seconds = time.perf_counter() - start
                pixels = results.pixels_of(result)
                if np.isfinite(pixels).all():
                    used = None if cache is None else float(cache.report().used)
                    return _Drawn(pixels, results.sound_of(result), seconds, used)
            if cache is not None:
                cache.check()
        raise LayerCacheError("the pipeline gave a picture with NaN or infinity in it")


def _stops(error: Exception) -> bool:
    """Whether an error is not of one prompt: the ones behind it would fail too."""
    lost: Any = getattr(torch, "AcceleratorError", CrewError)  # a GPU whose context is broken takes no more work
    if isinstance(error, (CrewError, MissingExtraError, lost)):
        return True
    return isinstance(error, OSError) and error.errno in DISK_IS_FULL


def _model_of(pipe: Any) -> list[Any]:
    if experts_of(pipe):
        return [type(pipe).__name__, *model_identity(pipe)]
    # not a transformer: a number of every parameter, as `model_identity` takes them
    parts = [getattr(pipe, name, None) for name in sorted(getattr(pipe, "components", {}))]
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    firsts = [[one.detach().flatten()[:1].float() for one in part.parameters() if not one.is_meta] for part in modules]
    return [type(pipe).__name__, *firsts]


def _plan_of(schedule: Any) -> Any:
    """What a schedule does, without what is said of it."""
    if not hasattr(schedule, "to_json"):
        return repr(schedule)
    data = json.loads(schedule.to_json())
    return {name: value for name, value in sorted(data.items()) if name not in ("made_by", "checksum")}
