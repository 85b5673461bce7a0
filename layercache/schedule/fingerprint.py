"""The fingerprint: what a schedule was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from layercache.errors import ScheduleError, ScheduleMismatchError

SIGMA_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Fingerprint:
    """What a profile was measured on and a schedule is valid for.

    Attributes:
        model_class: class name of the transformer.
        config_hash: hash of its configuration (`layercache.models.config_hash`).
        num_blocks: transformer blocks over all block lists.
        sigmas: noise levels of the steps plus the final one, ``num_steps + 1`` values.
        branches: names of the guidance branches seen, for example ``("cond", "uncond")``.
        package_version: version of layercache that wrote it.
        steps_run: the steps at which the pipeline runs this transformer, where it is not all of them (one of two
            experts, img2img); empty: all.

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

    def __post_init__(self) -> None:
        last = -1
        for step in self.steps_run:
            if not last < step < self.num_steps:
                raise ScheduleError(f"steps_run must ascend from 0 to below {self.num_steps}, got {self.steps_run}")
            last = step

    @property
    def num_steps(self) -> int:
        """Of the whole run, whoever computes them."""
        return len(self.sigmas) - 1

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which the transformer runs."""
        return self.steps_run or tuple(range(self.num_steps))

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"num_steps": self.num_steps}
        return data if self.steps_run else {name: value for name, value in data.items() if name != "steps_run"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        return cls(
            model_class=str(data["model_class"]),
            config_hash=str(data["config_hash"]),
            num_blocks=int(data["num_blocks"]),
            sigmas=tuple(float(s) for s in data["sigmas"]),
            branches=tuple(str(b) for b in data["branches"]),
            package_version=str(data["package_version"]),
            steps_run=tuple(int(step) for step in data.get("steps_run", ())),
        )

    def check_model(self, model_class: str, config_hash: str, num_blocks: int) -> None:
        """Raises `ScheduleMismatchError` when the transformer is not the one this was made for."""
        if model_class != self.model_class:
            raise ScheduleMismatchError(
                f"this was made for {self.model_class}, the transformer is a {model_class}; "
                "calibrate and plan on the model you want to speed up"
            )
        if num_blocks != self.num_blocks or config_hash != self.config_hash:
            raise ScheduleMismatchError(
                f"this was made for a {self.model_class} with {self.num_blocks} blocks and configuration "
                f"{self.config_hash}, the transformer has {num_blocks} blocks and configuration {config_hash}; "
                "calibrate and plan on this transformer"
            )

    def check_sigmas(self, sigmas: Sequence[float]) -> None:
        """Raises `ScheduleMismatchError` unless ``sigmas`` are the ones this was made for (max norm 1e-3)."""
        steps = len(sigmas) - 1
        if steps != self.num_steps:
            raise ScheduleMismatchError(
                f"the schedule has {self.num_steps} steps, this run has {steps}; run with "
                f"num_inference_steps={self.num_steps}, or calibrate and plan for {steps} steps",
                argument="num_inference_steps",
            )
        for step, (here, planned) in enumerate(zip(sigmas, self.sigmas, strict=True)):
            if not abs(here - planned) < SIGMA_TOLERANCE:
                raise ScheduleMismatchError(
                    f"the noise schedule differs: sigma[{step}] is {here:.5f} here and {planned:.5f} in the schedule "
                    "(resolution, shift or custom sigmas changed?); calibrate and plan with the settings of this run"
                )


def check_steps(fingerprint: Fingerprint) -> None:
    """Raises `ScheduleError` where there is no step to schedule."""
    if fingerprint.num_steps < 1:
        raise ScheduleError(f"a schedule needs a step at least, and its noise levels are {list(fingerprint.sigmas)}")
