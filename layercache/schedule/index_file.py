"""The index of a folder or repository that holds many files of layercache: what each is, and which one is meant."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from layercache._utils.formats import FRONT, INDEX, MODULES, PROFILE, SCHEDULE, entries, parse_json
from layercache._utils.hub import REPOSITORY, checked_name
from layercache._utils.text import shown
from layercache._utils.validate import described
from layercache.errors import ArgumentError, FileFormatError, HubError
from layercache.schedule.fingerprint import Fingerprint

VERSION = 1
FILE = "index.json"
MOST_NAMED = 8
FOLDERS = {SCHEDULE: "schedules", MODULES: "modules", FRONT: "fronts", PROFILE: "profiles"}
SUFFIX = {PROFILE: ".safetensors"}
CLASSES = {
    SCHEDULE: "layercache.Schedule",
    MODULES: "layercache.schedule.ModuleSchedule",
    FRONT: "layercache.Front",
    PROFILE: "layercache.StabilityProfile",
}
_SLACK = 1e-9


@dataclass(frozen=True)
class Entry:
    """What an index says of a file.

    Attributes:
        kind: its format (`layercache._utils.formats.KINDS`).
        file: its name, folders divided by ``/``.
        key: of all it is valid for: two files with one key differ in their budget only.
        model_class: of the transformer.
        num_steps: of a generation.
        guidance: scale, where one was recorded.
        size: pixels and frames, where they were recorded.
        used: share of the compute; of a front that of its cheapest schedule; ``None`` of a profile.
        psnr, psnr_p10: expected, in dB: mean and lower 10 % quantile; of a front those of its best schedule.
    """

    kind: str
    file: str
    key: str
    model_class: str
    num_steps: int
    guidance: float | None = None
    size: str | None = None
    used: float | None = None
    psnr: float | None = None
    psnr_p10: float | None = None

    def __str__(self) -> str:
        facts = [self.kind.removeprefix("layercache "), f"{self.num_steps} steps"]
        facts += [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        facts += [self.size] if self.size else []
        facts += [] if self.used is None else [f"{self.used:.1%} computed"]
        facts += [] if self.psnr is None else [f"{self.psnr:.1f} dB"]
        return shown(f"{self.file} ({', '.join(facts)})")


@dataclass(frozen=True)
class Index:
    """All entries, the newest last, and the model on the Hub that they are for."""

    entries: tuple[Entry, ...] = ()
    base_model: str | None = None

    def of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind == kind]

    def with_entry(self, entry: Entry, base_model: str | None = None) -> Index:
        """The index with one more, which takes the place of another with its file name."""
        others = tuple(one for one in self.entries if one.file != entry.file)
        return Index((*others, entry), checked_base_model(base_model) or self.base_model)

    def to_json(self) -> str:
        head = {"format": INDEX, "version": VERSION}
        if self.base_model:
            head["base_model"] = self.base_model
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        files = []
        for entry in self.entries:
            known = {name: value for name, value in asdict(entry).items() if value is not None}
            files.append("    " + json.dumps(known, allow_nan=False))
        return "{\n" + "\n".join(lines) + '\n  "files": [\n' + ",\n".join(files) + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, content: bytes | str, name: str) -> Index:
        """Parses what `to_json` wrote; ``name`` is used in messages.

        Raises:
            FileFormatError: damaged, of another kind, or written by a newer version.
        """
        data = parse_json(content, INDEX, VERSION, name)
        with entries(data, INDEX, VERSION, name):
            found = tuple(_entry(item, name) for item in data["files"])
            return cls(found, checked_base_model(data.get("base_model")))


def checked_base_model(name: str | None) -> str | None:
    """The name of a model on the Hub, or none.

    Raises:
        ArgumentError: it is no such name.
    """
    if name is not None and not (isinstance(name, str) and REPOSITORY.fullmatch(name)):
        raise ArgumentError(
            f"base_model is a name on the Hub such as 'Qwen/Qwen-Image', got {described(name)}", argument="base_model"
        )
    return name


def _entry(item: Mapping[str, Any], name: str) -> Entry:
    known = {field.name for field in fields(Entry)}
    found = Entry(**{key: value for key, value in item.items() if key in known})
    texts, numbers = (found.kind, found.file, found.key, found.model_class), (found.guidance, found.used, found.psnr)
    if not all(isinstance(text, str) for text in texts) or not isinstance(found.num_steps, int):
        raise FileFormatError(f"{shown(name)} is damaged: an entry is not as layercache writes it")
    if not all(value is None or isinstance(value, (int, float)) for value in (*numbers, found.psnr_p10)):
        raise FileFormatError(f"{shown(name)} is damaged: {shown(found.file)} has a figure that is no number")
    checked_name(found.file)
    return replace(found, size=None if found.size is None else str(found.size))


def entry_of(kind: str, fingerprint: Fingerprint, used: float | None, psnr: Sequence[float | None]) -> Entry:
    """The entry of a file that has no name yet; ``psnr``: the expected mean and 10 % quantile."""
    mean, quantile10 = (None if value is None or not math.isfinite(value) else round(value, 2) for value in psnr)
    return Entry(
        kind=kind,
        file="",
        key=_key(fingerprint),
        model_class=fingerprint.model_class,
        num_steps=fingerprint.num_steps,
        guidance=_guidance(fingerprint.settings),
        size=_size(fingerprint.settings),
        used=None if used is None else round(used, 4),
        psnr=mean,
        psnr_p10=quantile10,
    )


def named(entry: Entry, index: Index, name: str | None = None) -> Entry:
    """The entry with its file name: the one given, or one made of steps, guidance and share computed.

    A name that stands for something valid for other sizes, noise levels or settings gets some digits of the key.

    Raises:
        HubError: the name leads outside, or ends otherwise than files of this kind.
    """
    suffix = SUFFIX.get(entry.kind, ".json")
    if name is not None:
        if not checked_name(name).endswith(suffix) or checked_name(name) == FILE:
            raise HubError(f"{shown(name)} cannot name a {entry.kind} file; one that ends in {suffix} can")
        return replace(entry, file=checked_name(name))
    parts = [f"{entry.num_steps}-steps"]
    parts += [] if entry.guidance is None else [f"cfg{entry.guidance:g}"]
    parts += [] if entry.used is None or entry.kind == FRONT else [f"b{entry.used:.3g}"]
    stem = f"{FOLDERS[entry.kind]}/{'-'.join(parts)}"
    taken = next((one for one in index.entries if one.file == stem + suffix), entry)
    return replace(entry, file=stem + ("" if taken.key == entry.key else f"-{entry.key[:6]}") + suffix)


def chosen(index: Index, kind: str, place: str, **wanted: float | None) -> Entry:
    """The one entry of a kind that is wanted: of these steps and guidance, the most computed within the budget.

    Raises:
        ArgumentError: a budget of what has none.
        HubError: there is none such, or more than one; the message lists what there is.
    """
    num_steps, guidance, budget = (wanted.get(name) for name in ("num_steps", "guidance", "budget"))
    if budget is not None and kind not in (SCHEDULE, MODULES):
        raise ArgumentError(f"a {kind} has no budget; leave it out, and plan with it", argument="budget")
    found = [
        entry
        for entry in index.of(kind)
        if (num_steps is None or entry.num_steps == num_steps)
        and (guidance is None or (entry.guidance is not None and math.isclose(entry.guidance, guidance)))
        and (budget is None or (entry.used is not None and entry.used <= budget + _SLACK))
    ]
    if budget is not None and found:
        most = max(entry.used or 0.0 for entry in found)
        found = [entry for entry in found if entry.used == most]
    if len(found) == 1:
        return found[0]
    asked = ", ".join(f"{name}={value:g}" for name, value in wanted.items() if value is not None)
    what = f"{kind} file" + (f" with {asked}" if asked else "")
    listed = found or index.of(kind) or list(index.entries)
    problem = f"more than one {what}" if found else f"no {what}"
    raise HubError(f"{shown(place)} holds {problem}; " + (_choice(listed, kind) if listed else "its index is empty"))


def _choice(listed: Sequence[Entry], kind: str) -> str:
    names = "; ".join(str(entry) for entry in listed[-MOST_NAMED:])
    more = f"; and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    if not any(entry.kind == kind for entry in listed):
        others = dict.fromkeys(CLASSES[entry.kind] for entry in listed if entry.kind in CLASSES)
        return f"{' and '.join(others)}.from_pretrained read what there is: {names}{more}"
    return f"choose with filename=, num_steps=, guidance= or budget=: {names}{more}"


def _key(fingerprint: Fingerprint) -> str:
    """Digits of what a file is valid for, and was measured with."""
    said = fingerprint.to_json()
    kept = {name: said.get(name) for name in ("model_class", "config_hash", "branches", "steps_run", "settings")}
    kept["sigmas"] = [round(sigma, 4) for sigma in fingerprint.sigmas]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _guidance(settings: Mapping[str, Any]) -> float | None:
    """The scale of guidance: of two forwards where there are two (``true_cfg_scale``), else the one embedded."""
    found = {}
    for text in _texts(settings.get("guidance")):
        if match := re.fullmatch(r"(\w+) (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text):
            found[match[1]] = float(match[2])
    return found.get("true_cfg_scale", next(iter(found.values()), None))


def _size(settings: Mapping[str, Any]) -> str | None:
    """``1024x768``, or ``832x480, 81 frames``: width, height and frames, as far as they were recorded."""
    found = dict(text.split(" ", 1) for text in _texts(settings.get("size")) if " " in text)
    sides = "x".join(found[name] for name in ("width", "height") if name in found)
    frames = f"{found['num_frames']} frames" if "num_frames" in found else ""
    return ", ".join(part for part in (sides, frames) if part) or None


def _texts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else []
