"""The fingerprint: what a schedule was made for."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from layercache.errors import LayerCacheWarning, ScheduleError, ScheduleMismatchError

SIGMA_TOLERANCE = 1e-3
MOST_NAMED = 4  # entries that a message lists
SETTINGS = {
    "dtype": "number format",
    "quantisation": "quantisation",
    "adapters": "LoRA adapters",
    "guidance": "guidance",
    "size": "size",
    "experts": "transformers in turns",
}
"""What a run is measured with besides the model, by what messages call it; it voids no schedule."""

COMMAND = "command"
"""Among the settings: the options of the command line that it was made with; not handed on to others."""


SCALES, SIZES = ("guidance_scale", "true_cfg_scale"), ("height", "width", "num_frames")
"""Arguments of a pipeline's call that are settings."""

GUIDANCE = (*SCALES, "guidance_start", "guidance_stop")
"""What is known of the guidance: its scale, and the share of the steps that a guider's begins and ends at."""

RANGE = re.compile(r"(\w+) (-?[\d.]+(?:e[+-]?\d+)?)(?: to (-?[\d.]+(?:e[+-]?\d+)?))?")
"""A setting with its number, or from the least to the largest."""


class ConfigHash(str):
    """Twelve hex digits of a transformer's architecture, with what they stand for.

    Attributes:
        entries: configuration entries that the class takes, as JSON holds them.
        defaults: what the class takes where an entry is not given.
        older: hashes that version 0.1 may have written for the same transformer.
        settings: what it is run with, by the names of `SETTINGS`.
    """

    entries: Mapping[str, Any]
    defaults: Mapping[str, Any]
    older: frozenset[str]
    settings: Mapping[str, Any]

    def __new__(
        cls,
        digits: str,
        entries: Mapping[str, Any],
        defaults: Mapping[str, Any],
        older: frozenset[str],
        settings: Mapping[str, Any],
    ) -> ConfigHash:
        made = super().__new__(cls, digits)
        made.entries, made.defaults, made.older, made.settings = entries, defaults, older, settings
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.entries, self.defaults, self.older, self.settings


@dataclass(frozen=True)
class Fingerprint:
    """What a profile was measured on and a schedule is valid for.

    Attributes:
        model_class: class name of the transformer.
        config_hash: hash of its architecture (`layercache.models.registry.config_hash`).
        num_blocks: transformer blocks over all block lists.
        sigmas: noise levels of the steps plus the final one, ``num_steps + 1`` values.
        branches: names of the guidance branches seen, for example ``("cond", "uncond")``.
        package_version: version of layercache that wrote it.
        steps_run: the steps at which the pipeline runs this transformer, where it is not all of them (one of two
            experts, img2img); empty: all.
        architecture: the configuration entries that the hash is of; empty in files of version 0.1.
        settings: what was measured with besides, by the names of `SETTINGS`; a run with others is warned of.
        sigma_range: lowest and highest noise levels where what was measured had several (sizes whose shift differs), of
            which ``sigmas`` are the means; empty: they were all the same.
        sigmas_given: the ``sigmas=`` of the pipeline's call that give these noise levels, one per step; empty: they are
            those of a call without.

    Raises:
        ScheduleError: on construction, when ``steps_run`` are no ascending steps of the run.
    """

    SOURCE: ClassVar[str] = "profiles and schedules have one, such as profile.fingerprint"

    model_class: str
    config_hash: str
    num_blocks: int
    sigmas: tuple[float, ...]
    branches: tuple[str, ...]
    package_version: str
    steps_run: tuple[int, ...] = ()
    architecture: Mapping[str, Any] = field(default_factory=dict, repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sigma_range: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    sigmas_given: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        last = -1
        for step in self.steps_run:
            if not last < step < self.num_steps:
                raise ScheduleError(f"steps_run must ascend from 0 to below {self.num_steps}, got {self.steps_run}")
            last = step
        if self.sigma_range and len(self.sigma_range) != len(self.sigmas):
            raise ScheduleError(f"{len(self.sigma_range)} ranges for {len(self.sigmas)} noise levels")
        if self.sigmas_given and len(self.sigmas_given) != self.num_steps:
            raise ScheduleError(f"{len(self.sigmas_given)} noise levels are given for {self.num_steps} steps")

    @property
    def num_steps(self) -> int:
        """Of the whole run, whoever computes them."""
        return len(self.sigmas) - 1

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which the transformer runs."""
        return self.steps_run or tuple(range(self.num_steps))

    @property
    def turns(self) -> tuple[tuple[int, ...], ...]:
        """`steps`, cut where a pipeline with two transformers goes on with the second one (Wan 2.2)."""
        known = [RANGE.fullmatch(str(value)) for value in self.settings.get("experts", ())]
        boundary = next((float(found[2]) for found in known if found and found[1] == "boundary_ratio"), 0.0)
        first = tuple(step for step in self.steps if self.sigmas[step] >= boundary)
        return tuple(turn for turn in (first, self.steps[len(first) :]) if turn)

    def starting_at(self, first: int) -> Fingerprint:
        """Of a run that begins with this step (img2img), if it is not the first one."""
        return replace(self, steps_run=tuple(range(first, self.num_steps))) if first else self

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "model_class": self.model_class,
            "config_hash": str(self.config_hash),
            "num_blocks": self.num_blocks,
            "sigmas": self.sigmas,
            "branches": self.branches,
            "package_version": self.package_version,
            "num_steps": self.num_steps,
        }
        more = {"steps_run": self.steps_run, "architecture": self.architecture, "settings": self.settings}
        more |= {"sigma_range": self.sigma_range, "sigmas_given": self.sigmas_given}
        return data | {name: value for name, value in more.items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        sigmas = tuple(float(s) for s in data["sigmas"])
        if not all(math.isfinite(sigma) and sigma >= 0 for sigma in sigmas):
            raise ScheduleError(f"noise levels are finite and not negative, got {list(sigmas)}")
        return cls(
            model_class=str(data["model_class"]),
            config_hash=str(data["config_hash"]),
            num_blocks=int(data["num_blocks"]),
            sigmas=sigmas,
            branches=tuple(str(b) for b in data["branches"]),
            package_version=str(data["package_version"]),
            steps_run=tuple(int(step) for step in data.get("steps_run", ())),
            architecture=dict(data.get("architecture", {})),
            settings=dict(data.get("settings", {})),
            sigma_range=tuple((float(low), float(high)) for low, high in data.get("sigma_range", ())),
            sigmas_given=tuple(float(sigma) for sigma in data.get("sigmas_given", ())),
        )

    def check_model(self, model_class: str, config_hash: str, num_blocks: int) -> None:
        """Refuses a transformer that is not the one this was made for.

        Args:
            model_class: its class name.
            config_hash: from `layercache.models.registry.config_hash`.
            num_blocks: its blocks, over all block lists.

        Warns:
            LayerCacheWarning: it runs with another number format, quantisation or LoRA adapter.

        Raises:
            ScheduleMismatchError: its class, its architecture or its number of blocks differs.
        """
        if model_class != self.model_class:
            raise ScheduleMismatchError(
                f"this was made for {self.model_class}, the transformer is a {model_class}; "
                "calibrate and plan on the model you want to speed up"
            )
        differences = self._differences(config_hash)
        if num_blocks != self.num_blocks or differences:
            raise ScheduleMismatchError(
                f"this was made for a {self.model_class} with {self.num_blocks} blocks and configuration "
                f"{self.config_hash}, the transformer has {num_blocks} blocks and configuration {config_hash}"
                f"{_listed(differences)}; calibrate and plan on this transformer"
            )
        if isinstance(config_hash, ConfigHash):
            self.warn_of(config_hash.settings)

    def _differences(self, config_hash: str) -> list[str]:
        """What differs in the architecture; an entry that is new is as it was where it has its default."""
        if config_hash == self.config_hash:
            return []
        if not isinstance(config_hash, ConfigHash):
            return [""]
        if not self.architecture:
            return [] if self.config_hash in config_hash.older else [""]
        found = []
        for name, here in config_hash.entries.items():
            before = self.architecture.get(name, config_hash.defaults.get(name, here))
            if here != before:
                found.append(f"{name} was {before!r} and is {here!r}")
        return found

    def warn_of(self, settings: Mapping[str, Any]) -> None:
        """Warns of settings that differ from those that were measured, or lie outside of what they went from and to.

        What either side does not know is left out.

        Warns:
            LayerCacheWarning: one sentence for all of them.
        """
        differing = [
            f"{name} {_said(self.settings[key])}, not {_said(settings[key])}"
            for key, name in SETTINGS.items()
            if key in self.settings and key in settings and not _covers(self.settings[key], settings[key])
        ]
        if differing:
            warnings.warn(
                f"the figures of this schedule were measured with {'; '.join(differing)} as here: it runs, but its "
                "PSNR and its times hold for what was measured; calibrate again to know those of this run",
                LayerCacheWarning,
                stacklevel=3,
            )

    def check_sigmas(self, sigmas: Sequence[float]) -> None:
        """Raises `ScheduleMismatchError` unless ``sigmas`` are what this was made for, or in their range (1e-3)."""
        steps = len(sigmas) - 1
        way = (
            "its noise levels are its own: call the pipeline with them, "
            f"pipe(..., num_inference_steps={self.num_steps}, **schedule.call_arguments())"
            if self.sigmas_given
            else ""
        )
        if steps != self.num_steps:
            raise ScheduleMismatchError(
                f"the schedule has {self.num_steps} steps, this run has {steps}; "
                + (way or f"run with num_inference_steps={self.num_steps}, or calibrate and plan for {steps} steps"),
                argument="num_inference_steps",
            )
        ranges = self.sigma_range or [(sigma, sigma) for sigma in self.sigmas]
        for step, (here, planned, (low, high)) in enumerate(zip(sigmas, self.sigmas, ranges, strict=True)):
            if not low - SIGMA_TOLERANCE < here < high + SIGMA_TOLERANCE:
                raise ScheduleMismatchError(
                    f"the noise schedule differs: sigma[{step}] is {here:.5f} here and {planned:.5f} in the schedule "
                    "(resolution, shift or custom sigmas changed?); "
                    + (way or "calibrate and plan with the settings of this run")
                )


def call_settings(*calls: Mapping[str, Any]) -> dict[str, Any]:
    """Guidance and size among the arguments of a pipeline's calls, as `Fingerprint.settings` holds them.

    Where calls differ, from the least to the largest.
    """
    guidance, sizes = (
        [_range(name, [call.get(name) for call in calls]) for name in names] for names in (GUIDANCE, SIZES)
    )
    found = {"guidance": [text for text in guidance if text], "size": [text for text in sizes if text]}
    return {name: texts for name, texts in found.items() if texts}


def _range(name: str, values: Sequence[Any]) -> str:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values):  # some call does not say
        return ""
    low, high = min(numbers), max(numbers)
    return f"{name} {low:.6g}" if low == high else f"{name} {low:.6g} to {high:.6g}"


def check_steps(fingerprint: Fingerprint) -> None:
    """Raises `ScheduleError` where there is no step to schedule."""
    if fingerprint.num_steps < 1:
        raise ScheduleError(f"a schedule needs a step at least, and its noise levels are {list(fingerprint.sigmas)}")


def settings_line(fingerprint: Fingerprint) -> str:
    """What was measured with and which branches there were, in a line; what is not known is left out."""
    given, known = fingerprint.settings, list[str]()
    for key, name in SETTINGS.items():
        if isinstance(given.get(key), (list, tuple)) and key != "adapters":
            known += map(str, given[key])  # each names itself, such as guidance_scale 4
        elif given.get(key):
            known.append(f"{name} {_said(given[key])}")
    known += [f"branches {_said(fingerprint.branches)}"] if fingerprint.branches else []
    return ", ".join([*known, *(["sigmas= of schedule.call_arguments()"] if fingerprint.sigmas_given else [])])


def _listed(differences: Sequence[str]) -> str:
    named = [difference for difference in differences if difference]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return f" ({', '.join(named[:MOST_NAMED])}{more})" if named else ""


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " and ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _covers(measured: Any, here: Any) -> bool:
    """Whether a setting is what was measured with, or those of its numbers that both sides know lie in its ranges."""
    if _json(measured) == _json(here):
        return True
    before, now = _ranges(measured), _ranges(here)
    both = set(before) & set(now)
    return bool(both) and all(before[name][0] <= now[name][0] and now[name][1] <= before[name][1] for name in both)


def _ranges(setting: Any) -> dict[str, tuple[float, float]]:
    """Of ``["height 512 to 768", "width 512"]``; empty where it is something else."""
    texts = setting if isinstance(setting, (list, tuple)) else []
    found = [RANGE.fullmatch(str(text)) for text in texts]
    return {m[1]: (float(m[2]), float(m[3] or m[2])) for m in found if m} if all(found) else {}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
