"""Formats of layercache's files: reading them, and what another file is in the place of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layercache._utils.checksum import check_json
from layercache._utils.text import shown
from layercache.errors import FileFormatError, LayerCacheError, ScheduleMismatchError

SCHEDULE, MODULES = "layercache schedule", "layercache module schedule"
PROFILE, FRONT = "layercache profile", "layercache front"
JOURNAL, COMPARISON = "layercache search", "layercache comparison"
INDEX = "layercache index"
SAMPLE = "layercache sample"
# What writes files of each kind, and what reads them (where users do).
KINDS = {
    SCHEDULE: ("'layercache plan' or Schedule.save", "layercache.Schedule.load"),
    MODULES: ("'layercache train-router' or ModuleSchedule.save", "layercache.schedule.ModuleSchedule.load"),
    PROFILE: ("'layercache calibrate' or StabilityProfile.save", "layercache.StabilityProfile.load"),
    FRONT: ("'layercache search' or Front.save", "layercache.Front.load"),
    JOURNAL: ("layercache.search(resume=...)", ""),
    COMPARISON: ("'layercache compare'", ""),
    INDEX: ("save_pretrained or push_to_hub", ""),
    SAMPLE: ("layercache.calibrate(resume=...)", ""),
}
# The first version of each format whose files have a checksum; an index is edited by hand.
CHECKED_SINCE = {SCHEDULE: 3, MODULES: 2, PROFILE: 2, FRONT: 2, JOURNAL: 3, COMPARISON: 2, INDEX: 1000, SAMPLE: 1}
# What the code that reads entries raises where a whole file was edited.
DAMAGE = (LayerCacheError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
NEITHER = "is neither JSON nor a file of tensors (safetensors)"
CUT_OFF = "is not whole (was it cut off or edited?)"


def read_json(path: str | os.PathLike[str], expected: str, version: int) -> Any:
    """The content of a JSON file, whose entries are as they were written.

    Args:
        path: of the file.
        expected: its kind.
        version: the newest version of the format that is known.

    Raises:
        FileFormatError: it is missing, damaged, changed, of another kind or of a newer version.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise unexpected(path, what_is(path), expected) from error
    return parse_json(content, expected, version, os.fspath(path))


def parse_json(content: str | bytes, expected: str, version: int, name: str) -> Any:
    """As `read_json`, of what a file holds; ``name`` is used in messages."""
    content = content.removeprefix("\ufeff").encode(errors="replace") if isinstance(content, str) else content
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unexpected(name, _described(content), expected) from error
    check_header(data, expected, version, name)
    try:
        check_json(data, data["version"] >= CHECKED_SINCE[expected], shown(name))
    except RecursionError as error:
        raise unexpected(name, CUT_OFF, expected) from error
    return data


@contextmanager
def entries(data: Any, expected: str, version: int, name: str) -> Iterator[None]:
    """Context that reads entries of a file: what they raise becomes a `FileFormatError` that names the file.

    ``data`` must be of the ``expected`` kind, and of this version of the format or an older one.
    """
    check_header(data, expected, version, name)
    try:
        yield
    except FileFormatError:
        raise
    except DAMAGE as error:
        reason = str(error) if isinstance(error, LayerCacheError) else "an entry is not as layercache writes it"
        if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
            reason = f"it has no entry {error.args[0]!r}"
        raise FileFormatError(f"{shown(name)} is damaged: {reason}; {_again(expected)}") from error


def check_header(data: Any, expected: str, version: int, name: str) -> None:
    """Refuses data of another kind or of a newer version of the format."""
    if not isinstance(data, Mapping) or data.get("format") != expected:
        raise unexpected(name, _described_json(data), expected)
    found = data.get("version")
    name = shown(name)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise FileFormatError(f"{name} has no usable format version ({found!r}); {_again(expected)}")
    if found > version:
        raise FileFormatError(f"{name} has format version {found}, this layercache reads up to {version}; upgrade it")


def _again(expected: str) -> str:
    return f"use another copy, or write it again with {KINDS[expected][0]}"


@contextmanager
def going_on(path: str | os.PathLike[str], expected: str = "") -> Iterator[None]:
    """Context that reads the file of a run that was stopped, of the ``expected`` kind or a checkpoint of torch."""
    more = "name another file, or remove it to start again"
    try:
        yield
    except ScheduleMismatchError:
        raise
    except FileFormatError as error:
        raise FileFormatError(f"cannot go on: {error}; {more}") from error
    except Exception as error:  # unpickling raises whatever the file makes it
        found = what_is(path)
        if found == (f"is a {expected} file" if expected else NEITHER):
            found = "is damaged, or of another kind"
        raise FileFormatError(f"cannot go on from {shown(path)}: it {found}; {more}") from error


def unexpected(name: str | os.PathLike[str], found: str, *expected: str) -> FileFormatError:
    """The error for a file that is none of the ``expected`` kinds; ``found`` is from `what_is`."""
    kind = _kind(found)
    if kind in expected:
        found = CUT_OFF
    elif kind and KINDS[kind][1]:
        found += f", which {KINDS[kind][1]} reads"
    wanted = " or ".join(f"a {one} file, as {KINDS[one][0]} writes it" for one in expected)
    return FileFormatError(f"{shown(os.fspath(name))} {found}; expected {wanted}")


def format_of(path: str | os.PathLike[str]) -> str | None:
    """Which of `KINDS` a file is; ``None`` where it is none, or cannot be read."""
    return _kind(what_is(path))


def _kind(found: str) -> str | None:
    return next((kind for kind in KINDS if found == f"is a {kind} file"), None)


def what_is(path: str | os.PathLike[str]) -> str:
    """What a file is, as the end of a sentence: ``is empty``, ``is a layercache profile file``."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(4096)
            if _begins_as_json(content) or _header_length(content):
                content += file.read(_header_length(content) or -1)
    except FileNotFoundError:
        return "does not exist"
    except IsADirectoryError:
        return "is a folder"
    except (OSError, ValueError) as error:  # a ValueError for a null character in the name
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return _described(content)


def _described(content: bytes) -> str:
    """As `what_is`, of what a file holds, or of the beginning that tells."""
    length = _header_length(content)
    if not length and not _begins_as_json(content):
        return NEITHER if content.strip() else "is empty"
    try:
        if not length:
            return _described_json(json.loads(content))
        header = json.loads(json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("header", "null"))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return CUT_OFF
    found = _described_json(header)
    return found if _kind(found) else "is a file of tensors that is not layercache's, such as a model's weights"


def _described_json(data: Any) -> str:
    found = data.get("format") if isinstance(data, Mapping) else None
    return f"is a {found} file" if isinstance(found, str) and found in KINDS else "is JSON of another kind"


def _header_length(content: bytes) -> int:
    """Of a file of safetensors, which begins with the length of its header; 0 of any other."""
    length = int.from_bytes(content[:8], "little")
    return length if content[8:9] == b"{" and length < 2**27 else 0


def _begins_as_json(content: bytes) -> bool:
    return content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
