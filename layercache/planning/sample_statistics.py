"""What calibration measured on one sample, and the files of a calibration that can be stopped."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from layercache._utils.checksum import KEY, UNSET, check_bytes, sealed
from layercache._utils.files import check_output_folder, write_atomically
from layercache._utils.formats import SAMPLE, check_header, going_on
from layercache._utils.text import shown
from layercache.errors import ScheduleMismatchError

VERSION = 1

_ARRAYS = (
    "image_errors",
    "image_norms",
    "text_errors",
    "text_norms",
    "responses",
    "seen",
    "grams",
    "reuse_seconds",
    "group_seconds",
    "fixed_seconds",
)


@dataclass(frozen=True, eq=False)
class SampleStatistics:
    """Sums over the elements of one sample: B branches, N steps, G groups, distances to M, spans to K, W residuals.

    Attributes:
        sigmas: N + 1 noise levels.
        branches: names.
        steps: at which a branch was called.
        stream_bytes: per branch, of the image and of the text stream.
        image_errors, text_errors: of forecasts, L1 and L2, ``[2, B, N, G, M+1, K+1]``.
        image_norms, text_norms: of the residuals, ``[2, B, N, G]``.
        responses: relative changes of velocity and residual, ``[B, 2, N, G]``.
        seen: forecasts that could be made, ``[B, N, M+1, K+1]``.
        grams: inner products of residuals, ``[B, N, G, W, W]``.
        reuse_seconds: ``[B, G]``.
        group_seconds: of computing, all branches together, ``[N, G]``.
        fixed_seconds: outside the blocks, ``[N]``.
    """

    sigmas: tuple[float, ...]
    branches: tuple[str, ...]
    steps: tuple[int, ...]
    stream_bytes: tuple[tuple[int, int], ...]
    image_errors: np.ndarray
    image_norms: np.ndarray
    text_errors: np.ndarray
    text_norms: np.ndarray
    responses: np.ndarray
    seen: np.ndarray
    grams: np.ndarray
    reuse_seconds: np.ndarray
    group_seconds: np.ndarray
    fixed_seconds: np.ndarray

    def to_bytes(self, calibration: str) -> bytes:
        """A file of tensors; ``calibration`` says what it is of."""
        header = {
            KEY: UNSET,
            "format": SAMPLE,
            "version": VERSION,
            "calibration": calibration,
            "sigmas": list(self.sigmas),
            "branches": list(self.branches),
            "steps": list(self.steps),
            "stream_bytes": [list(sizes) for sizes in self.stream_bytes],
        }
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        return sealed(save(arrays, {"header": json.dumps(header, allow_nan=False)}))


def read_sample(path: str | os.PathLike[str]) -> tuple[str, SampleStatistics]:
    """What identifies a calibration, and a sample's statistics, from its file.

    Raises:
        FileFormatError: it is damaged, changed, or something else.
    """
    name = os.fspath(path)
    with going_on(path, SAMPLE):
        with safe_open(name, "numpy") as file:
            header = json.loads((file.metadata() or {})["header"])
            check_header(header, SAMPLE, VERSION, name)
            arrays = {key: file.get_tensor(key) for key in _ARRAYS}
        check_bytes(Path(path).read_bytes(), KEY in header, True, shown(name))
        found = SampleStatistics(
            sigmas=tuple(map(float, header["sigmas"])),
            branches=tuple(map(str, header["branches"])),
            steps=tuple(map(int, header["steps"])),
            stream_bytes=tuple((int(image), int(text)) for image, text in header["stream_bytes"]),
            **arrays,
        )
        return str(header["calibration"]), found


class CalibrationFiles:
    """A folder with a file per sample of a calibration, each written whole as soon as the sample is done.

    Args:
        folder: made when the first file is written.
        calibration: digest of all that decides what is measured.

    Raises:
        OutputError: no files can be made in it.
    """

    def __init__(self, folder: str | os.PathLike[str], calibration: str):
        check_output_folder(folder, "resume")
        self.folder, self.calibration = Path(folder), calibration

    def sample(self, measured: str, number: int) -> SampleStatistics | None:
        """A sample's statistics, if they are there; ``measured`` says which pass over the samples.

        Raises:
            FileFormatError: the file is damaged, or of another kind.
            ScheduleMismatchError: it belongs to another calibration.
        """
        path = self._path(measured, number)
        if not path.exists():
            return None
        calibration, found = read_sample(path)
        if calibration != self.calibration:
            raise ScheduleMismatchError(
                f"{shown(str(self.folder))} belongs to a calibration of another model, other samples or settings; "
                "name another folder, or remove it",
                argument="resume",
            )
        return found

    def keep(self, measured: str, number: int, found: SampleStatistics) -> None:
        content = found.to_bytes(self.calibration)
        write_atomically(self._path(measured, number), lambda path: path.write_bytes(content))

    def _path(self, measured: str, number: int) -> Path:
        return self.folder / f"{measured}-{number:03d}.safetensors"
