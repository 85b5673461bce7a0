"""The journal of a search: what was tried, to go on after a stop."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from layercache._utils.files import write_atomically
from layercache._utils.formats import JOURNAL, check_header, going_on
from layercache.errors import ScheduleMismatchError
from layercache.planning.rollout import Rollouts

JOURNAL_VERSION = 1


class Journal:
    """What every run gave, in a file if there is one, so that a search can be stopped and gone on with."""

    def __init__(self, path: str | os.PathLike[str] | None, rollouts: Rollouts):
        self.path = None if path is None else Path(path)
        call = {name: repr(value) for name, value in sorted(rollouts.call.items())}
        identity = [rollouts.fingerprint.to_json(), repr(rollouts.prompts), rollouts.seeds, call]
        self.samples = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.results: dict[str, list[float]] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        with going_on(path, JOURNAL):
            data = json.loads(path.read_bytes())
            check_header(data, JOURNAL, JOURNAL_VERSION, str(path))
            results = {str(key): [float(v) for v in psnr] for key, psnr in data["results"].items()}
        if data.get("samples") != self.samples:
            raise ScheduleMismatchError(f"{path} belongs to a search with other samples or settings; name another file")
        self.results = results

    def add(self, key: str, psnr: Sequence[float]) -> None:
        self.results[key] = list(psnr)
        if self.path is None:
            return
        data = {"format": JOURNAL, "version": JOURNAL_VERSION, "samples": self.samples, "results": self.results}
        text = json.dumps(data)
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
