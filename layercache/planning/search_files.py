"""The files of a search that can be stopped: full runs, and what every schedule that was run gave."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from layercache._utils.checksum import sealed_json
from layercache._utils.compat import unwrap_compiled
from layercache._utils.files import check_output_folder, write_atomically
from layercache._utils.formats import JOURNAL, going_on, read_json
from layercache._utils.text import shown
from layercache.errors import CalibrationError, FileFormatError, ScheduleMismatchError
from layercache.models.registry import config_hash, expert_settings, experts_of, settings_of
from layercache.parallel.crew import Crew
from layercache.planning.full_run import FullSample
from layercache.planning.sampler import LinearSampler
from layercache.planning.trace import Trace
from layercache.schedule.schedule import Velocity

if TYPE_CHECKING:
    from layercache.planning.rollout import Rollouts

VERSION = 4
RUNS = "runs.json"


@dataclass(frozen=True)
class KeptRun:
    """What a run of a schedule gave.

    Attributes:
        computed: steps.
        forecast: name of what was fitted.
        psnr: per picture, in dB.
        velocities: that were fitted, per step.
        answers: kappa and log eta that it showed, each ``[P, N]``; ``None`` where it did not drift.
        further: velocities of the model's outputs behind the first.
    """

    computed: tuple[int, ...]
    forecast: str
    psnr: tuple[float, ...]
    velocities: tuple[Velocity | None, ...]
    answers: tuple[np.ndarray, np.ndarray] | None
    further: tuple[tuple[Velocity | None, ...], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "computed": list(self.computed),
            "forecast": self.forecast,
            "psnr": list(self.psnr),
            "velocities": [velocity and velocity.to_json() for velocity in self.velocities],
            "answers": self.answers and [table.tolist() for table in self.answers],
            "further": [[velocity and velocity.to_json() for velocity in one] for one in self.further],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KeptRun:
        velocities, *further = (
            tuple(velocity and Velocity.from_json(velocity) for velocity in one)
            for one in (data["velocities"], *data.get("further", ()))
        )
        answers = data["answers"] and (np.array(data["answers"][0], float), np.array(data["answers"][1], float))
        steps, psnr = tuple(map(int, data["computed"])), tuple(data["psnr"])
        found = cls(steps, str(data["forecast"]), psnr, velocities, answers, tuple(further))
        if not all(math.isfinite(value) for value in found.psnr):
            raise CalibrationError("a PSNR is not finite")
        return found


def read_runs(path: str | os.PathLike[str]) -> tuple[str, list[KeptRun]]:
    """What identifies a search, and its runs so far, from its file.

    Raises:
        FileFormatError: it is damaged, changed, or something else.
    """
    with going_on(path, JOURNAL):
        data = read_json(path, JOURNAL, VERSION)
        if data["version"] < VERSION:
            raise FileFormatError(f"{shown(path)} is of an earlier version, which kept less of the full runs")
        return str(data["search"]), [KeptRun.from_json(run) for run in data["runs"]]


class SearchFiles:
    """A folder with the full run of every sample (safetensors), and the runs of schedules (runs.json).

    Everything is written whole as soon as it is there, so that a search that is killed at any moment goes on with the
    same results and repeats at most the sample or the schedule that was running.

    Of a crew's processes the leader writes the runs, and says which there are; each keeps the full runs of its own
    samples, those on another machine where the folder is there too.

    Args:
        folder: made if it is not there.
        crew: processes that search together.

    Raises:
        FileFormatError: a file in it is damaged.
        OutputError: no files can be made in it.
    """

    def __init__(self, folder: str | os.PathLike[str], crew: Crew | None = None):
        self.folder, self.crew = Path(folder), crew or Crew()
        self.search, self.runs = "", list[KeptRun]()
        with self.crew.together():
            if self.crew.leads:
                check_output_folder(folder, "resume")
                if (self.folder / RUNS).exists():
                    self.search, self.runs = read_runs(self.folder / RUNS)
        self.search, self.runs = self.crew.agree((self.search, self.runs))

    def check(self, rollouts: Rollouts) -> None:
        """Refuses files of another search, or begins.

        Raises:
            ScheduleMismatchError: they are of another model, other samples or settings.
        """
        with self.crew.together():
            if self.crew.leads:
                self._check(identity_of(rollouts))
        self.search = self.crew.agree(self.search)

    def _check(self, found: str) -> None:
        if self.search not in ("", found):
            raise ScheduleMismatchError(
                f"{self.folder} belongs to a search with another model, other samples or settings; name another "
                "folder, or remove it",
                argument="resume",
            )
        if not self.search:
            self.search = found
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()

    def add(self, run: KeptRun) -> None:
        self.runs.append(run)
        with self.crew.together():
            if self.crew.leads:
                self._write()

    def run(self, computed: tuple[int, ...], forecast: str) -> KeptRun | None:
        """What a run of these steps with this forecast gave, if it was made."""
        return next((run for run in self.runs if (run.computed, run.forecast) == (computed, forecast)), None)

    def _write(self) -> None:
        data = {"format": JOURNAL, "version": VERSION, "search": self.search, "runs": [r.to_json() for r in self.runs]}
        text = sealed_json(json.dumps(data, allow_nan=False) + "\n")
        write_atomically(self.folder / RUNS, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def sample(self, number: int) -> FullSample | None:
        """The full run of a sample, if it is there.

        Raises:
            FileFormatError: it is damaged.
        """
        path = self._path(number)
        if not path.exists():
            return None
        with going_on(path):
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                about = json.loads(file.metadata()["full run"])
            if about.get("search", self.search) != self.search:
                return None  # of an earlier search, on a machine that had other samples then
            trace, *further = (_trace_in(tensors, prefix) for prefix in about.get("outputs", [""]))
            branches = {name: (int(image), int(text)) for name, (image, text) in about["branches"].items()}
            blocks, rest = map(float, about["seconds"])
            sigmas = tuple(map(float, about["sigmas"]))
            steps_of = "keep" in tensors and LinearSampler(tensors["keep"].numpy(), tensors["weights"].numpy())
            pictures = tensors["pictures"].numpy()
            return FullSample(trace, pictures, branches, (blocks, rest), sigmas, steps_of or None, tuple(further))

    def keep_sample(self, number: int, found: FullSample) -> None:
        if not self.folder.exists():
            return  # on another machine than the leader's
        outputs = ["", *(f"output {k} " for k in range(1, len(found.traces)))]
        tensors: dict[str, torch.Tensor] = {}
        for prefix, trace in zip(outputs, found.traces, strict=True):
            tensors |= {f"{prefix}latents {step}": t.contiguous() for step, t in enumerate(trace.latents)}
            tensors |= {f"{prefix}velocity {step}": t.contiguous() for step, t in enumerate(trace.taken)}
        tensors["pictures"] = torch.from_numpy(np.ascontiguousarray(found.pictures))
        if found.sampler is not None:
            tensors |= {
                "keep": torch.from_numpy(found.sampler.keep),
                "weights": torch.from_numpy(found.sampler.weights),
            }
        about = {"branches": found.branches, "seconds": found.seconds, "sigmas": found.sigmas, "outputs": outputs}
        about["search"] = self.search
        # safetensors refuses tensors that share memory
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        write_atomically(self._path(number), lambda path: save_file(tensors, path, {"full run": json.dumps(about)}))

    def _path(self, number: int) -> Path:
        return self.folder / f"full-{number:03d}.safetensors"


def _trace_in(tensors: Mapping[str, torch.Tensor], prefix: str) -> Trace:
    steps = range(sum(name.startswith(f"{prefix}velocity ") for name in tensors))
    velocities = [tensors[f"{prefix}velocity {step}"] for step in steps]
    return Trace([tensors[f"{prefix}latents {step}"] for step in steps], list(velocities), velocities)


def identity_of(rollouts: Rollouts) -> str:
    """Digest of what a search is of: the model, its sampler, the samples, the arguments of every call."""
    model = model_identity(rollouts.pipeline)
    if rollouts.reference is not None:
        model += model_identity(rollouts.reference.pipeline)
    return digest_of([*model, rollouts.prompts, rollouts.seeds, dict(sorted(rollouts.call.items()))])


def model_identity(pipe: Any) -> list[Any]:
    """What `digest_of` is to take of a pipeline's transformers with their weights, and its sampler's settings."""
    scheduler, (first, *others) = (
        getattr(pipe, "scheduler", None),
        map(unwrap_compiled, experts_of(pipe).values() or [pipe]),
    )
    configured = getattr(scheduler, "config", {})  # one of the user's own may have none
    settings = {name: value for name, value in sorted(configured.items()) if not name.startswith("_")}
    turns = [*map(_weights_of, others), expert_settings(pipe)] if others else []
    return [_weights_of(first), [type(scheduler).__name__, settings], *turns]


def _weights_of(transformer: Any) -> list[Any]:
    return [type(transformer).__name__, str(config_hash(transformer)), settings_of(transformer), _firsts(transformer)]


@torch.no_grad()
def _firsts(transformer: Any) -> list[torch.Tensor]:
    """A number of each parameter: other weights, or an adapter fused into them, change some.

    They are read at every call: counters of versions do not see what is written through ``parameter.data``, as PEFT
    does where it fuses a LoRA. A device is asked once, by a few launches; which one a parameter is on changes nothing,
    since offloading and timestep tables move some.
    """
    count = 0
    found: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[torch.Tensor]]] = {}
    # by name, since other caches register blocks anew
    for _, parameter in sorted(transformer.named_parameters(), key=lambda named: named[0]):
        if parameter.is_meta or not parameter.numel():
            continue
        is_plain = type(parameter) is torch.nn.Parameter and parameter.element_size() > 1  # not quantised or sharded
        first = parameter.as_strided((1,), (1,)) if is_plain else parameter.detach().flatten()[:1].float()
        numbers, firsts = found.setdefault((parameter.device, first.dtype), ([], []))
        numbers.append(count)
        firsts.append(first)
        count += 1
    weights = torch.empty(count)
    for numbers, firsts in found.values():
        weights[numbers] = torch.cat(firsts).float().cpu()
    return [weights] if count else []


def digest_of(value: Any) -> str:
    """16 hex digits of everything that a value holds, tensors and pictures by their content."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):  # an array, a picture
        digest.update(f"{getattr(value, 'size', '')}".encode() + value.tobytes())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        digest.update(f"[{len(value)}".encode())
        for one in value:
            _feed(digest, one)
    else:
        digest.update(f"{type(value).__name__} {value!r};".encode())
