"""The journal of a search: what was tried, to go on after a stop."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layercache._utils.checksum import sealed_json
from layercache._utils.files import write_atomically
from layercache._utils.formats import JOURNAL, going_on, parse_json
from layercache.errors import CalibrationError, ScheduleMismatchError
from layercache.models.registry import config_hash
from layercache.planning.rollout import Rollouts

JOURNAL_VERSION = 2


@dataclass(frozen=True)
class Remembered:
    """What the file of a journal holds.

    Attributes:
        samples: digest of what its runs were of.
        results: PSNR per picture of every run, by its key.
    """

    samples: str
    results: dict[str, list[float]]


def read_journal(path: str | os.PathLike[str] | None) -> Remembered | None:
    """The content of a journal, before anything runs; ``None`` where there is none yet.

    Raises:
        FileFormatError: it is damaged, changed, or something else.
    """
    if path is None or not Path(path).exists():
        return None
    with going_on(path, JOURNAL):
        data = parse_json(Path(path).read_bytes(), JOURNAL, JOURNAL_VERSION, str(path))
        results = {str(key): [float(v) for v in psnr] for key, psnr in data["results"].items()}
        if not all(math.isfinite(value) for psnr in results.values() for value in psnr):
            raise CalibrationError("a PSNR is not finite")
        return Remembered(str(data["samples"]), results)


class Journal:
    """What every run gave, in a file if there is one, so that a search can be stopped and gone on with.

    Args:
        path: of the file, or ``None``.
        rollouts: what the runs are of.
        remembered: what the file holds, from `read_journal`.

    Raises:
        ScheduleMismatchError: the file is of other samples.
    """

    def __init__(self, path: str | os.PathLike[str] | None, rollouts: Rollouts, remembered: Remembered | None = None):
        self.path = None if path is None else Path(path)
        digests = [_samples_of(rollouts, prints) for prints in _fingerprints(rollouts)]
        self.samples = digests[0]
        if remembered is not None and remembered.samples not in digests:
            raise ScheduleMismatchError(f"{path} belongs to a search with other samples or settings; name another file")
        self.results = {} if remembered is None else remembered.results

    def add(self, key: str, psnr: Sequence[float]) -> None:
        self.results[key] = list(psnr)
        if self.path is None:
            return
        data = {"format": JOURNAL, "version": JOURNAL_VERSION, "samples": self.samples, "results": self.results}
        text = sealed_json(json.dumps(data, allow_nan=False) + "\n")
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _fingerprints(rollouts: Rollouts) -> list[dict[str, Any]]:
    """That of the samples, and those that 0.1 may have written for them."""
    now = rollouts.fingerprint
    older = replace(now, architecture={}, settings={})
    hashes = sorted(config_hash(rollouts.transformer).older)
    return [now.to_json(), *(replace(older, config_hash=digits).to_json() for digits in hashes)]


def _samples_of(rollouts: Rollouts, fingerprint: dict[str, Any]) -> str:
    call = {name: repr(value) for name, value in sorted(rollouts.call.items())}
    identity = [fingerprint, repr(rollouts.prompts), rollouts.seeds, call]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
