"""`StabilityProfile`: what calibration measured, and its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from layercache._utils.checksum import KEY, UNSET, check_bytes, sealed
from layercache._utils.formats import CHECKED_SINCE, PROFILE, check_header, entries, unexpected, what_is
from layercache._utils.summaries import Rows, Summarised, joined
from layercache._utils.text import shown
from layercache.errors import CalibrationError, FileFormatError
from layercache.models.registry import text_leaves_of
from layercache.schedule.fingerprint import Fingerprint, settings_line
from layercache.schedule.memory_plan import stored_bytes
from layercache.schedule.pretrained import Pretrained
from layercache.schedule.schedule import LONGEST_SECONDS, Schedule, check_groups

FORMAT = PROFILE
VERSION = 2

_TINY = 1e-12
_LARGEST = 1e38  # of what is summed up in float32
_RESPONSE = "velocity_response"
_SUBSTITUTE = "substitute_error"
_GRAM = "image_gram"
_SEEN = "forecast_seen"
_OPTIONAL = (_RESPONSE, _SUBSTITUTE, _GRAM, _SEEN)
_ERRORS = ("image_error_l1", "image_error_l2", "text_error_l1")
_NORMS = ("image_norm_l1", "image_norm_l2", "text_norm_l1")


def readable(num_steps: int, max_distance: int, max_span: int) -> np.ndarray:
    """Which (step, distance, span) entries exist, ``bool [N, M+1, K+1]``: both anchors must be steps of the run."""
    step = np.arange(num_steps)[:, None, None]
    distance = np.arange(max_distance + 1)[None, :, None]
    span = np.arange(max_span + 1)[None, None, :]
    return (distance >= 1) & (step - distance - span >= 0)


def _moments(values: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over samples and branches of what counts; 0 where nothing does."""
    counted = np.broadcast_to(counted, values.shape)
    number = np.maximum(counted.sum(axis=(0, 1)), 1)
    mean = np.where(counted, values, 0.0).sum(axis=(0, 1)) / number
    with np.errstate(invalid="ignore"):  # infinity less infinity
        squares = np.where(counted, (values - mean) ** 2, 0.0)
    return mean, np.sqrt(squares.sum(axis=(0, 1)) / number)


@dataclass(frozen=True, repr=False)
class StabilityProfile(Summarised, Pretrained):
    """Errors of forecasts of every group's residual on full-compute runs, and what the groups cost.

    Tables hold sums over elements, one entry per sample, branch, step, group, distance to the anchor and
    span between the two anchors (0 = plain reuse); ``float64 [P, B, N, G, M+1, K+1]``:

    * ``image_error_l1``: ``sum |prediction - residual|``, ``image_error_l2``: the root of the sum of squares,
      ``text_error_l1``: as the first, of the text stream (zeros for models without one);
    * ``image_norm_l1``, ``image_norm_l2``, ``text_norm_l1`` ``[P, B, N, G]``: the same sums of the residual itself.

    * ``velocity_response`` and ``substitute_error`` ``[P, B, N, G]``, only where sensitivity was measured: relative L1
      change of the velocity, and of the group's residual that was changed for it (0 at step 0).

    * ``image_gram`` ``[P, B, N, G, W, W]``, missing in old files: inner products of the image residuals of a step and
      of the ``W - 1`` steps before it, newest first; for fits.

    * ``forecast_seen`` ``[P, B, N, M+1, K+1]``, missing where every branch was called at every step with one shape: 1
      where a branch had the step and both anchors of the forecast, else 0; other entries count for nothing. Steps at
      which no branch was called are those that the fingerprint's ``steps`` lack.

    Entries whose anchors would lie before step 0 are 0, never read (`readable`).
    Source: docs/methods.md, Errors of a forecast.

    Attributes:
        group_seconds: seconds of computing each group once in every branch, ``[G]``.
        reuse_seconds: seconds of reusing it instead, ``[G]``.
        fixed_seconds: seconds of a step outside the blocks (embedders, head, guidance, sampler).
        eta: damping of the secant the tables were measured with.
        stream_bytes: per branch, bytes of the image and of the text stream in the largest sample, of all processes
            together where several were measured; empty in old files.
        samples: what was run, one line per sample.

    Raises:
        CalibrationError: on construction, when an entry is not finite or negative, or a table has another shape; names
            the cell.
    """

    KIND: ClassVar[str] = FORMAT
    SOURCE: ClassVar[str] = (
        "layercache.calibrate(pipe, prompts) measures one, layercache.StabilityProfile.load(path) reads one"
    )

    fingerprint: Fingerprint
    groups: tuple[tuple[int, int], ...]
    group_seconds: tuple[float, ...]
    reuse_seconds: tuple[float, ...]
    fixed_seconds: float
    samples: tuple[str, ...]
    tables: Mapping[str, np.ndarray]
    eta: float = 1.0
    stream_bytes: tuple[tuple[int, int], ...] = ()

    def _summary(self) -> tuple[str, Rows]:
        prints, blocks = self.fingerprint, sum(self.group_seconds)
        whole = (blocks + self.fixed_seconds) * 1e3
        return (
            f"StabilityProfile of {prints.num_steps} steps of {prints.model_class}, {prints.num_blocks} blocks in "
            f"{len(self.groups)} group{'s' if len(self.groups) > 1 else ''}",
            [
                ("samples", f"{len(self.samples)}: {joined(self.samples)}"),
                ("a step", f"{whole:.3g} ms, of which {blocks * 1e3:.3g} ms in the blocks"),
                ("measured with", settings_line(prints)),
                ("made by", f"layercache {prints.package_version}"),
            ],
        )

    def _fingerprint(self) -> Fingerprint:
        return self.fingerprint

    def _listed(self) -> tuple[float | None, Sequence[float | None]]:
        return None, (None, None)

    def __post_init__(self) -> None:
        check_groups(self.groups, self.fingerprint.num_blocks)
        shape = (len(self.samples), len(self.fingerprint.branches), self.fingerprint.num_steps, len(self.groups))
        for name in _NORMS:
            self._check_table(name, shape)
        if self.has_sensitivity:
            self._check_table(_RESPONSE, shape)
            self._check_table(_SUBSTITUTE, shape)
        for name in _ERRORS:
            self._check_table(name, (*shape, self.max_distance + 1, self.max_span + 1))
        if _SEEN in self.tables:
            self._check_table(_SEEN, (*shape[:3], self.max_distance + 1, self.max_span + 1))
        self._check_gram(shape)
        self._check_numbers()

    def _check_gram(self, shape: tuple[int, ...]) -> None:
        if _GRAM not in self.tables:
            return
        table, width = self.tables[_GRAM], self.max_distance + self.max_span + 1
        if table.shape != (*shape, width, width):
            raise CalibrationError(f"table {_GRAM} has shape {table.shape}, expected {(*shape, width, width)}")
        if not _is_bounded(table):
            raise CalibrationError(
                f"{_GRAM} is not finite; the model gave NaN or infinity, or its squares overflow fp32"
            )
        if (np.diagonal(table, axis1=-2, axis2=-1) < 0).any():
            raise CalibrationError(f"{_GRAM} holds a negative square")

    def _check_numbers(self) -> None:
        seconds = (*self.group_seconds, *self.reuse_seconds, self.fixed_seconds)
        usable = all(math.isfinite(s) and 0 <= s <= LONGEST_SECONDS for s in seconds)
        counts = len(self.group_seconds) == len(self.reuse_seconds) == len(self.groups)
        if not (usable and counts) or min(self.group_seconds) <= 0:
            raise CalibrationError(f"the measured seconds are not usable: {seconds}")
        if not all(map(math.isfinite, self.fingerprint.sigmas)):
            raise CalibrationError(f"a noise level is not finite: {self.fingerprint.sigmas}")
        if not math.isfinite(self.eta):
            raise CalibrationError(f"eta, the damping of the secant, is {self.eta}")
        sizes = self.stream_bytes
        if sizes and (len(sizes) != len(self.fingerprint.branches) or min(map(min, sizes)) < 0):
            raise CalibrationError(f"stream_bytes must hold two sizes for every branch, got {sizes}")

    @property
    def has_sensitivity(self) -> bool:
        return _RESPONSE in self.tables

    def sensitivity(self) -> np.ndarray:
        """Relative change of the velocity per relative error of a group's residual, ``w [N, G]``.

        ``(S1(dv) / S1(v)) / (S1(error) / S1(residual))``, mean over samples and branches; 1 at step 0, and where no
        branch was called at the step before.
        Source: docs/methods.md, Effect on the velocity.

        Raises:
            CalibrationError: it was not measured.
        """
        if not self.has_sensitivity:
            raise CalibrationError("this profile has no sensitivity; calibrate with sensitivity='substitution'")
        response, change = self.tables[_RESPONSE], self.tables[_SUBSTITUTE]
        weights = np.divide(response, change, out=np.ones_like(response), where=np.isfinite(change) & (change > _TINY))
        followed = self._seen()[:, :, :, :, 1, 0]
        return np.where(followed.any(axis=(0, 1)), _moments(weights, followed)[0], 1.0)

    @property
    def max_distance(self) -> int:
        return self.tables["image_error_l1"].shape[-2] - 1

    @property
    def max_span(self) -> int:
        return self.tables["image_error_l1"].shape[-1] - 1

    def _check_table(self, name: str, shape: tuple[int, ...]) -> None:
        table = self.tables[name]
        if table.shape != shape:
            raise CalibrationError(f"table {name} has shape {table.shape}, expected {shape}")
        if table.dtype.kind != "f":
            raise CalibrationError(f"table {name} holds {table.dtype}, expected float64")
        bad = ~np.isfinite(table) | (table < 0) | (table > _LARGEST)
        if not bad.any():
            return
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        labels = ("sample", "branch", "step", "group", "distance", "span")
        place = ", ".join(f"{label} {i}" for label, i in zip(labels, where, strict=False))
        raise CalibrationError(
            f"{name} is {table[where]} at {place} (branch {self.fingerprint.branches[where[1]]}); the model gave NaN "
            "or infinity there, so no schedule can be planned from this run: use bfloat16 or float32, or other inputs"
        )

    def relative_errors(self, text_weight: float = 0.1, kappa: float = 0.0, branch: int | None = None) -> np.ndarray:
        """Relative L1 error of every forecast, ``float64 [N, G, M+1, K+1]``.

        ``image + text_weight * text``, the text left out for the last group (its text is discarded);
        mean over samples and branches (or over the samples of one branch) plus ``kappa`` standard deviations. A
        residual of norm 0 and an entry that does not exist give infinity.
        Source: docs/methods.md, Errors of a forecast.
        """
        error = self._relative("image")
        if text_weight:
            text = self._relative("text")
            has_text = self.tables["text_norm_l1"] > _TINY
            text[~has_text] = 0.0
            text[..., -1, :, :] = 0.0
            error = error + text_weight * text
        own = slice(None) if branch is None else slice(branch, branch + 1)
        seen = self._seen()[:, own]
        combined, deviation = _moments(error[:, own], seen)
        if kappa:
            combined = combined + kappa * deviation
        exists = readable(self.fingerprint.num_steps, self.max_distance, self.max_span)
        return np.where(exists[:, None] & seen.any(axis=(0, 1)), combined, np.inf)

    def _seen(self) -> np.ndarray:
        """Which forecasts count, ``bool [P, B, N, 1, M+1, K+1]``."""
        if _SEEN in self.tables:
            return self.tables[_SEEN][:, :, :, None] > 0
        return np.ones((*self.tables["image_norm_l1"].shape[:3], 1, self.max_distance + 1, self.max_span + 1), bool)

    def _relative(self, stream: str) -> np.ndarray:
        norm = self.tables[f"{stream}_norm_l1"][..., None, None]
        error = self.tables[f"{stream}_error_l1"]
        return np.divide(error, norm, out=np.full_like(error, np.inf), where=norm > _TINY)

    @property
    def has_gram(self) -> bool:
        """Whether forecasts of residuals can be fitted to this profile."""
        return _GRAM in self.tables

    def gram(self, step: int, group: int, branch: int | None = None) -> np.ndarray:
        """Inner products of the residuals of ``step, step - 1, ...`` summed over samples (and branches), ``[W, W]``.

        Raises:
            CalibrationError: the profile was written before they were kept.
        """
        if not self.has_gram:
            raise CalibrationError("this profile has no inner products to fit forecasts to; calibrate again")
        table = self.tables[_GRAM][:, :, step, group]
        return (table if branch is None else table[:, branch : branch + 1]).sum(axis=(0, 1))

    @property
    def text_leaves(self) -> bool:
        """Whether the model's head reads the second stream too."""
        return text_leaves_of(self.fingerprint.model_class)

    def cache_bytes(self, schedule: Schedule) -> int:
        """Memory of the residuals a schedule stores, all branches together, at the batch of the largest sample.

        Exactly what is allocated. Source: docs/methods.md, Stored residuals.

        Raises:
            CalibrationError: the profile was written before sizes were kept.
        """
        if not self.stream_bytes:
            raise CalibrationError("this profile does not say how large the streams are; calibrate again")
        streams = dict(zip(self.fingerprint.branches, self.stream_bytes, strict=True))
        return stored_bytes(schedule, streams, text_leaves=self.text_leaves)

    def stability(self) -> np.ndarray:
        """Relative L1 change of each group's image residual from the step before, ``[N, G]``.

        Rows are NaN where there is none: step 0, and steps of which no branch had that step and the one before.
        """
        followed = self._seen()[..., 1, 0]
        change = _moments(self._relative("image")[..., 1, 0], followed)[0]
        change[0] = np.nan
        return np.where(followed.any(axis=(0, 1)), change, np.nan)

    def to_bytes(self) -> bytes:
        header = {
            KEY: UNSET,
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint.to_json(),
            "groups": [list(g) for g in self.groups],
            "group_seconds": list(self.group_seconds),
            "reuse_seconds": list(self.reuse_seconds),
            "fixed_seconds": self.fixed_seconds,
            "samples": list(self.samples),
            "eta": self.eta,
            "stream_bytes": [list(sizes) for sizes in self.stream_bytes],
        }
        names = [*_ERRORS, *_NORMS, *(name for name in _OPTIONAL if name in self.tables)]
        tables = {name: np.ascontiguousarray(self.tables[name]) for name in names}
        return sealed(save(tables, {"header": json.dumps(header, allow_nan=False)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a profile file.

        Warns:
            LayerCacheWarning: its checksum was removed.

        Raises:
            FileFormatError: missing, damaged, changed, of another kind, or written by a newer version.
        """
        name = os.fspath(path)
        try:
            content = Path(path).read_bytes()
            with safe_open(name, framework="numpy") as file:
                header = _header(file)
                check_header(header, FORMAT, VERSION, name)
                check_bytes(content, KEY in header, header["version"] >= CHECKED_SINCE[FORMAT], shown(name))
                names = [*_ERRORS, *_NORMS, *(name for name in file.keys() if name in _OPTIONAL)]
                with entries(header, FORMAT, VERSION, name):
                    return cls._from_header(header, {name: _table(file, name) for name in names})
        except FileFormatError:
            raise
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise unexpected(path, what_is(path), FORMAT) from error

    @classmethod
    def _from_header(cls, header: Mapping[str, Any], tables: Mapping[str, np.ndarray]) -> Self:
        return cls(
            fingerprint=Fingerprint.from_json(header["fingerprint"]),
            groups=tuple((int(lo), int(hi)) for lo, hi in header["groups"]),
            group_seconds=tuple(float(value) for value in header["group_seconds"]),
            reuse_seconds=tuple(float(value) for value in header["reuse_seconds"]),
            fixed_seconds=float(header["fixed_seconds"]),
            samples=tuple(str(sample) for sample in header["samples"]),
            tables=tables,
            eta=float(header["eta"]),
            stream_bytes=tuple((int(image), int(text)) for image, text in header.get("stream_bytes", ())),
        )


def _header(file: Any) -> dict[str, Any]:
    """What a profile says of itself; a ``ValueError`` where it is other tensors."""
    header = json.loads((file.metadata() or {}).get("header", "null"))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError("no profile")
    return header


def _table(file: Any, name: str) -> np.ndarray:
    if name not in file.keys():
        raise CalibrationError(f"the table {name} is missing")
    return file.get_tensor(name)


def _is_bounded(table: np.ndarray) -> bool:
    return table.dtype.kind == "f" and bool((np.abs(table) <= _LARGEST).all())
