"""Files that are read: what one is, as far as can be told, and what was expected in its place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercache.errors import FileFormatError, LayerCacheError, ScheduleMismatchError


@dataclass(frozen=True)
class Kind:
    """Of files that layercache writes.

    Attributes:
        title: with its article.
        command: what writes them.
        saver: the method that does so; empty where there is none for users.
        reader: the function that reads them; empty where only what wrote one does.
    """

    title: str
    command: str
    saver: str = ""
    reader: str = ""

    @property
    def writers(self) -> str:
        return f"{self.command} and {self.saver} write" if self.saver else f"{self.command} writes"


SCHEDULE, MODULES = "layercache schedule", "layercache module schedule"
PROFILE, FRONT = "layercache profile", "layercache front"
JOURNAL, COMPARISON = "layercache search", "layercache comparison"
KINDS = {
    SCHEDULE: Kind("a layercache schedule", "'layercache plan'", "Schedule.save", "layercache.Schedule.load"),
    MODULES: Kind(
        "a layercache module schedule",
        "'layercache train-router'",
        "ModuleSchedule.save",
        "layercache.schedule.ModuleSchedule.load",
    ),
    PROFILE: Kind(
        "a layercache profile", "'layercache calibrate'", "StabilityProfile.save", "layercache.StabilityProfile.load"
    ),
    FRONT: Kind("a layercache front", "'layercache plan --pareto'", "Front.save", "layercache.Front.load"),
    JOURNAL: Kind("the journal of a layercache search", "layercache.search(resume=...)"),
    COMPARISON: Kind("the results of a comparison", "'layercache compare'"),
}

# How files of other kinds begin.
MAGIC = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a WebP picture, a sound or a video"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a ZIP archive or a torch checkpoint"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"version https://git-lfs", "a pointer of Git LFS, whose file was not fetched"),
)
CHECKPOINT = "is a ZIP archive or a torch checkpoint"

# What a file that is whole JSON, or a whole table, and still not as it was written makes of its reader.
DAMAGE = (LayerCacheError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)

_HEAD = 4096
_LONGEST_HEADER = 2**27
_FORMAT = re.compile(rb'\A\s*\{\s*"format":\s*"(layercache [a-z ]+)"')


def read_json(path: str | os.PathLike[str], expected: str) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        expected: the format it is to have, one of `KINDS`; `entries` looks whether it has.

    Raises:
        FileFormatError: missing, cut off, or no JSON.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise unexpected(path, what_is(path), expected) from error
    return parse_json(content, expected, str(path))


def parse_json(content: str | bytes, expected: str, name: str) -> Any:
    """As `read_json`, of what a file holds; ``name`` is used in messages."""
    try:
        return json.loads(content.removeprefix("\ufeff") if isinstance(content, str) else content)
    except (ValueError, RecursionError) as error:
        raise unexpected(name, what_holds(content), expected) from error


@contextmanager
def entries(data: Any, expected: str, version: int, name: str) -> Iterator[None]:
    """Around what makes an object of a file's entries.

    Args:
        data: what the file holds.
        expected: its format, one of `KINDS`.
        version: the newest version of the format that can be read.
        name: of the file, for messages.

    Raises:
        FileFormatError: it is of another kind or of a newer version; an entry is missing, of another form, or
            contradicts another.
    """
    check_header(data, expected, version, name)
    try:
        yield
    except FileFormatError:
        raise
    except DAMAGE as error:
        raise FileFormatError(f"{name} is damaged: {_damage(error)}; {_again(expected)}") from error


def check_header(data: Any, expected: str, version: int, name: str) -> None:
    """Refuses data of another kind or of a newer version of the format, as `entries` does."""
    if not isinstance(data, Mapping) or data.get("format") != expected:
        raise unexpected(name, _what_says(data), expected)
    if not isinstance(data.get("version"), int) or data["version"] < 1:
        raise FileFormatError(f"{name} has no usable format version ({data.get('version')!r}); {_again(expected)}")
    if data["version"] > version:
        raise FileFormatError(
            f"{name} has format version {data['version']}, this layercache reads up to {version}; upgrade layercache"
        )


@contextmanager
def going_on(path: str | os.PathLike[str], expected: str = "") -> Iterator[None]:
    """Around what reads how far a run had come that was stopped.

    Args:
        path: the file.
        expected: its format, one of `KINDS`; by default a checkpoint of torch.

    Raises:
        FileFormatError: it cannot be gone on with.
    """
    try:
        yield
    except (FileFormatError, ScheduleMismatchError):
        raise
    except Exception as error:  # unpickling raises whatever the file makes it
        found = what_is(path)
        own = f"is {KINDS[expected].title}" if expected else CHECKPOINT
        told = "is damaged, or of another kind" if found == own else found
        told = f"cannot go on from {path}: it {told}; name another file, or remove it to start again"
        raise FileFormatError(told) from error


def unexpected(name: str | os.PathLike[str], found: str, *expected: str) -> FileFormatError:
    """The error of a file that is none of the `KINDS` expected; ``found`` is from `what_is` and the like."""
    kind = _kind_said(found)
    if kind in expected:
        found = "is not whole (was it cut off or edited?)"
    elif kind and KINDS[kind].reader:
        found += f", which {KINDS[kind].reader} reads"
    *others, last = [KINDS[one].title for one in expected]
    wanted = f"{', '.join(others)} or {last}" if others else last
    return FileFormatError(f"{os.fspath(name)} {found}; {wanted} is expected, {_way(kind, expected)}")


def _kind_said(found: str) -> str:
    return next((kind for kind, told in KINDS.items() if found == f"is {told.title}"), "")


def _way(found: str, expected: Sequence[str]) -> str:
    if SCHEDULE in expected and found in (PROFILE, FRONT) and found not in expected:
        return "plan one from it with layercache.plan"
    if len(expected) > 1:
        return f"as {', '.join(KINDS[one].command for one in expected)} write them"
    return f"as {KINDS[expected[0]].writers} it"


def _again(expected: str) -> str:
    return f"take another copy, or what {KINDS[expected].writers} anew"


def _damage(error: Exception) -> str:
    if isinstance(error, LayerCacheError):
        return str(error)
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return f"it has no entry {error.args[0]!r}"
    return "an entry is not as layercache writes it"


def format_of(path: str | os.PathLike[str]) -> str | None:
    """Which of `KINDS` a file is or was, also where it is cut off; ``None`` where it is none, or cannot be read."""
    try:
        head = _FORMAT.match(_start(Path(path), _HEAD))
    except (OSError, ValueError):
        return None
    kind = head.group(1).decode() if head else _kind_said(what_is(path))
    return kind if kind in KINDS else None


def what_is(path: str | os.PathLike[str]) -> str:
    """What a file is, as the end of a sentence: ``is a PNG picture``, ``is empty``, ``is a layercache profile``."""
    try:
        return what_holds(_telling(Path(path)))
    except FileNotFoundError:
        return "does not exist"
    except IsADirectoryError:
        return "is a folder"
    except OSError as error:
        return f"cannot be read ({error.strerror or type(error).__name__})"
    except ValueError:  # a null character
        return "is not the name of a file"


def _start(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _telling(path: Path) -> bytes:
    """As much of a file as tells its kind: all of what begins as JSON, the header of safetensors, else the start."""
    head = _start(path, _HEAD)
    if _header_length(head):
        return _start(path, 8 + _header_length(head))
    return path.read_bytes() if _begins_as_json(head) else head


def what_holds(content: str | bytes) -> str:
    """As `what_is`, of what a file holds, or of its beginning."""
    content = content.encode(errors="replace") if isinstance(content, str) else content
    if not content.strip():
        return "is empty"
    if _header_length(content):
        return _what_tensors(content)
    for begin, kind in MAGIC:
        if content[: len(begin)].lower() == begin.lower():
            return f"is {kind}"
    if _begins_as_json(content):
        try:
            return _what_says(json.loads(content))
        except (ValueError, RecursionError):
            return "is not a whole JSON file (was it cut off or edited?)"
    return "is a text file" if _is_text(content[:_HEAD]) else "is a binary file of an unknown kind"


def _what_says(data: Any) -> str:
    """What whole JSON is."""
    found = data.get("format") if isinstance(data, Mapping) else None
    if isinstance(found, str) and found in KINDS:
        return f"is {KINDS[found].title}"
    if isinstance(data, Mapping) and isinstance(data.get("kind"), str):
        return "holds figures, as --json writes them"
    return "is JSON of another kind"


def _header_length(content: bytes) -> int:
    """Of a file of safetensors, which begins with the length of its header; 0 of any other."""
    length = int.from_bytes(content[:8], "little")
    return length if content[8:9] == b"{" and 0 < length < _LONGEST_HEADER else 0


def _what_tensors(content: bytes) -> str:
    length = _header_length(content)
    header = content[8 : 8 + length]
    if len(header) < length:
        return "is a file of tensors (safetensors) that is not whole (was it cut off?)"
    try:
        told = json.loads(json.loads(header)["__metadata__"]["header"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return "is a file of tensors (safetensors) that is not layercache's, such as a model's weights"
    found = _what_says(told)
    return found if _kind_said(found) else "is a file of tensors (safetensors) of another kind"


def _begins_as_json(content: bytes) -> bool:
    return content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")


def _is_text(content: bytes) -> bool:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        # only the last character may be cut in two
        if error.start < len(content) - 3:
            return False
        text = content[: error.start].decode()
    return all(c.isprintable() or c.isspace() for c in text)
