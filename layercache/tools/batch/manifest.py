"""The manifest of a folder of pictures: a line of JSON for each, written as soon as its files are there.

The first line says what the pictures are of. Every line has a checksum of its own. A line that was cut off, as when the
machine was switched off, or changed is left out, so that its picture is made again. Of several lines of one picture the
last one holds; a run that ends leaves one of each, in their order.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercache._utils.checksum import parsed_line, sealed_line
from layercache._utils.files import append_line, check_output_folder, write_atomically
from layercache._utils.text import shown
from layercache.errors import FileFormatError, LayerCacheWarning, OutputError, ScheduleMismatchError
from layercache.tools.batch.entries import Entry

NAME, FORMAT, VERSION = "manifest.jsonl", "layercache pictures", 1
READERS = 4  # threads that read files to check them
ELSE = "name another folder, or remove this one"
OTHERS = {
    "model": "another model or sampler",
    "schedule": "another schedule",
    "call": "another number of steps or other arguments",
    "format": "files of another format",
}
"""Parts of what every picture depends on, and how a folder is described in which they differ."""


@dataclass(frozen=True)
class Made:
    """What a call gave.

    Attributes:
        contents: of the files by their endings, the picture or video first; empty where the call failed.
        seconds, full_seconds: of the call, and of the same without a cache.
        used: share of the block time computed.
        psnr: against the picture without a cache, in dB.
        inputs: SHA-256 of the picture files that the call was given, by their names.
        error: why there is no picture.
    """

    contents: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    seconds: float | None = None
    used: float | None = None
    psnr: float | None = None
    full_seconds: float | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


class Manifest:
    """A folder with a file per picture, and what is known of them.

    Args:
        folder: made if it is not there.
        identity: digests of what every picture depends on, by the names of `OTHERS`; a folder with others is refused.
        about: the same to read; it is kept, and not compared.
        entries: all prompts, in the order of their numbers.

    Attributes:
        head: the first line.
        lines: the newest line of every picture, by its number.

    Raises:
        FileFormatError: the manifest has no usable first line.
        OutputError: nothing can be written into the folder.
        ScheduleMismatchError: the folder holds pictures of another model, schedule, call or prompt.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str], about: Mapping[str, Any], entries: Sequence[Entry]):
        check_output_folder(folder, "output")
        self.folder, self.path, self.entries = Path(folder), Path(folder) / NAME, list(entries)
        self.head = {"format": FORMAT, "version": VERSION, "identity": dict(identity), **about}
        self.lines: dict[int, dict[str, Any]] = {}
        self._is_tidy = False
        if self.path.exists():
            self._read(identity)
        if not self._is_tidy:
            self._write()

    def _read(self, identity: Mapping[str, str]) -> None:
        head, lines, _, self._is_tidy = read_manifest(self.path)
        others = [OTHERS[name] for name, digest in identity.items() if head["identity"].get(name) != digest]
        if others:
            raise ScheduleMismatchError(
                f"{shown(self.folder)} holds pictures that were made with {', '.join(others)}; {ELSE}",
                argument="output",
            )
        for number, line in lines.items():
            is_other = number < len(self.entries) and line.get("entry") != self.entries[number].digest
            if is_other and not line.get("error"):  # the prompt of one that failed may have been corrected
                raise ScheduleMismatchError(
                    f"{shown(self.folder)} holds a picture of prompt {number} with another text, seed or argument; "
                    f"{ELSE} (prompts may be added behind the last one)",
                    argument="output",
                )
        self.head, self.lines = head, lines

    def note(self, name: str, found: Sequence[str]) -> None:
        """Adds sentences to a list in the first line."""
        known = list(self.head.get(name, ()))
        if set(found) - set(known):
            self.head[name] = known + [one for one in found if one not in known]
            self._write()

    def left(self, compare: bool) -> list[int]:
        """Numbers of what is to be made: not there, failed, or without a PSNR where one is wanted."""
        lines = [self.lines.get(number, {}) for number in range(len(self.entries))]
        is_there = [bool(line.get("files")) and (not compare or line.get("psnr") is not None) for line in lines]
        return [number for number, there in enumerate(is_there) if not there]

    def keep(self, number: int, made: Made) -> None:
        """Writes the files of a picture, each whole, then its line.

        Raises:
            OutputError: they cannot be written.
        """
        entry = self.entries[number]
        files = {entry.name(number) + ending: content for ending, content in made.contents.items()}
        for name, content in files.items():
            write_atomically(self.folder / name, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
        others = {name: value for name, value in entry.arguments.items() if name != "prompt"}
        # strict JSON has no infinity, which the PSNR of equal pictures is
        figures = {"seconds": made.seconds, "used": made.used, "psnr": "inf" if made.psnr == math.inf else made.psnr}
        line = {
            "number": number,
            "prompt": entry.prompt,
            "seed": entry.seed,
            "category": entry.category or None,
            "arguments": others,
            "file": next(iter(files), None),
            **figures,
            "full_seconds": made.full_seconds,
            "error": made.error,
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
            "inputs": dict(made.inputs),
            "entry": entry.digest,
        }
        line = {name: value for name, value in line.items() if value not in (None, {})}
        append_line(self.path, sealed_line(line))
        self._is_tidy &= number > next(reversed(self.lines), -1)
        self.lines[number] = line

    def finish(self) -> None:
        """Leaves one line of each picture, in their order."""
        if not self._is_tidy:
            self._write()

    def _write(self) -> None:
        _write(self.path, self.head, self.lines)
        self._is_tidy = True


def forget_changed(folder: Path, entries: Sequence[Entry]) -> None:
    """Leaves out of a folder's manifest the pictures whose files are missing or were changed, or their inputs were.

    Warns:
        LayerCacheWarning: lines of the manifest were changed.

    Raises:
        FileFormatError: the manifest has no usable first line.
    """
    path = folder / NAME
    if not path.exists():
        return
    head, lines, changed, _ = read_manifest(path)
    if changed:
        warnings.warn(
            f"{changed} line{'s' if changed > 1 else ''} of {shown(path)} changed after being written; what they are "
            "of is made again",
            LayerCacheWarning,
            stacklevel=3,
        )

    def is_as_noted(number: int) -> bool:
        files = {folder / name: digest for name, digest in lines[number].get("files", {}).items()}
        if any(sha256_of(file) != digest for file, digest in files.items()):
            return False
        inputs = lines[number].get("inputs", {}) if number < len(entries) else {}
        # an input that is not here any more, or never was on this machine, is none to make the picture from again
        return all(sha256_of(entries[number].folder / name) in (None, digest) for name, digest in inputs.items())

    with ThreadPoolExecutor(READERS) as threads:
        kept = {number for number, is_kept in zip(lines, threads.map(is_as_noted, lines), strict=True) if is_kept}
    if changed or len(kept) < len(lines):
        _write(path, head, {number: line for number, line in lines.items() if number in kept})


def _write(path: Path, head: Mapping[str, Any], lines: Mapping[int, Mapping[str, Any]]) -> None:
    text = "".join(map(sealed_line, (head, *(lines[number] for number in sorted(lines)))))
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int, bool]:
    """The first line of a manifest, the newest line of every picture by its number, and what is wrong with the rest.

    Returns:
        Both, how many lines were changed after they were written (a last one that was cut off is none of them), and
        whether the file holds one whole line of every picture in their order, and nothing else.

    Raises:
        FileFormatError: the first line is not one of this format, or of a newer version.
    """
    try:
        *whole, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise OutputError(f"{shown(path)} cannot be read: {error.strerror}", argument="output") from error
    head = parsed_line(whole[0]) if whole else None
    if head is None or head.get("format") != FORMAT or not isinstance(head.get("identity"), dict):
        raise FileFormatError(
            f"{shown(path)} is no manifest of pictures, or its first line was changed; {ELSE}", argument="output"
        )
    if head.get("version") != VERSION:
        raise FileFormatError(
            f"{shown(path)} has format version {head.get('version')!r}, this layercache reads {VERSION}; {ELSE}",
            argument="output",
        )
    found = [parsed_line(line) for line in whole[1:]]
    lines = [line for line in found if line is not None and isinstance(line.get("number"), int)]
    numbers = [line["number"] for line in lines]
    changed = len(found) - len(lines)
    is_tidy = not rest and not changed and all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    return head, dict(zip(numbers, lines, strict=True)), changed, is_tidy


def sha256_of(path: Path) -> str | None:
    """Of a file's content, in hex digits; ``None`` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
