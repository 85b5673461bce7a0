"""Prompts of a file, with the arguments and the seed of each one's call, and its category."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercache._utils.text import shown
from layercache.errors import ArgumentError, FileFormatError

JSON_LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
"""Endings of tables, and what is between their cells."""
LARGEST_SEED = 2**63 - 1
SLUG = 40  # characters of a prompt in the name of its file
SET_ELSEWHERE = {
    "num_inference_steps": "--steps sets it for all prompts, since a schedule is of one number of steps",
    "num_images_per_prompt": "give a line per picture, with a seed each",
    "num_videos_per_prompt": "give a line per video, with a seed each",
}
OWN = ("generator", "output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end")


@dataclass(frozen=True)
class Entry:
    """One call of the pipeline.

    Attributes:
        arguments: of the call, as JSON has them, beside those that all calls share; pictures by their files.
        seed: of the starting noise.
        folder: that names of picture files are relative to.
        category: of the prompt, by which figures are grouped; empty without one.
        has_own_seed: whether the file gave the seed.
    """

    arguments: Mapping[str, Any]
    seed: int
    folder: Path = field(default=Path(), compare=False)
    category: str = ""
    has_own_seed: bool = field(default=False, compare=False)

    @property
    def prompt(self) -> str:
        """The prompt; empty where the call has none."""
        return str(self.arguments.get("prompt", ""))

    @property
    def digest(self) -> str:
        """16 hex digits of the arguments and the seed."""
        text = json.dumps([self.arguments, self.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def name(self, number: int) -> str:
        """Name of the entry's file without its ending: its number and the beginning of its prompt."""
        return f"{number:05d}-{slug_of(self.prompt)}".rstrip("-")

    @property
    def sample(self) -> Any:
        """The prompt where the call has nothing else; or all arguments, as `call` gives them."""
        return self.arguments["prompt"] if set(self.arguments) == {"prompt"} else self.call()

    def inputs(self) -> dict[str, list[str]]:
        """Names of picture files among the arguments, by the argument."""
        found = {name: _names_in(value) for name, value in self.arguments.items() if takes_pictures(name)}
        return {name: files for name, files in found.items() if files}

    def call(self) -> dict[str, Any]:
        """The arguments, with pictures read from their files.

        Raises:
            OSError: a file is missing, or no picture.
        """
        from PIL import Image

        found = dict(self.arguments)
        for name, files in self.inputs().items():
            pictures = []
            for file in files:
                with Image.open(self.folder / file) as picture:
                    pictures.append(picture.convert("RGB"))
            found[name] = pictures if isinstance(self.arguments[name], list) else pictures[0]
        return found


def takes_pictures(name: str) -> bool:
    """Whether a text in the place of this argument is the name of a picture file."""
    return "image" in name or name in ("mask", "video")


def _names_in(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(one, str) for one in values) else []


def slug_of(prompt: str) -> str:
    """The beginning of a prompt in small letters, digits and hyphens; empty where it has none of them."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return words if len(words) <= SLUG else words[: SLUG + 1].rpartition("-")[0] or words[:SLUG]


def numbered(prompts: Sequence[str], seed: int = 0) -> list[Entry]:
    """Entries of prompts, whose seeds follow the first one's."""
    return [Entry({"prompt": prompt}, seed + k) for k, prompt in enumerate(prompts)]


def read_file(path: Path, seed: int = 0) -> list[Entry]:
    """Entries of a file of prompts: JSON lines (.jsonl), a table (.csv, .tsv), or text with one prompt per line.

    Args:
        path: of the file; names of pictures in it are relative to its folder.
        seed: of the first entry; those without a seed of their own have this one plus their number.

    Raises:
        FileFormatError: it holds no prompts, or a line of it is no call; the message says which.
    """
    ending = path.suffix.lower()
    if ending in JSON_LINES:
        return read_lines(path, seed)
    return read_table(path, seed) if ending in TABLES else numbered(read_text(path), seed)


def read_text(path: Path) -> list[str]:
    """Prompts of a text file, one per line; empty lines and those that begin with # are left out.

    Raises:
        FileFormatError: it holds none, or is no text in UTF-8.
    """
    try:
        # editors on Windows begin a file with a byte order mark
        lines = [line.strip().strip("\ufeff").strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        lines = []
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise FileFormatError(
            f"{shown(path)} holds no prompts; a text file (UTF-8) with one prompt per line is expected",
            argument="prompts_file",
        )
    return found


def read_table(path: Path, seed: int = 0) -> list[Entry]:
    """Entries of a table whose first line names the columns: ``prompt``, ``category``, ``seed``, arguments of the call.

    Cells of other columns are JSON, or else text; empty ones are left out.

    Args:
        path, seed: as of `read_file`.

    Raises:
        FileFormatError: no column is called prompt, or a line is no call; the message says which.
    """
    text = _decoded(path)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=TABLES[path.suffix.lower()], strict=True)
    found: list[Entry] = []
    try:
        header = [name.strip() for name in rows.fieldnames or ()]
        if "prompt" not in header or len(set(header)) != len(header):
            raise FileFormatError(
                f"{shown(path)}: the first line of a table names its columns, each once and one of them prompt, such "
                f"as prompt,category,seed; got {shown(','.join(header)) or 'nothing'}",
                argument="prompts_file",
            )
        rows.fieldnames = header
        for row in rows:
            cells = {
                name: _cell(name, value) for name, value in row.items() if name is not None and (value or "").strip()
            }
            if None in row:
                raise _LineError(f"it has more cells than the {len(header)} columns")
            if cells:
                found.append(_entry(cells, seed + len(found), path.parent))
    except (_LineError, csv.Error) as error:
        raise FileFormatError(f"{shown(path)}, line {rows.line_num}: {error}", argument="prompts_file") from None
    if not found:
        raise FileFormatError(f"{shown(path)} holds no prompts", argument="prompts_file")
    return found


def _cell(name: str, text: str) -> Any:
    """A cell of a table: texts as they are, others as JSON where they are."""
    if name == "category" or "prompt" in name or takes_pictures(name):
        return text.strip()
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return text.strip()


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileFormatError(f"{shown(path)} is not text in UTF-8", argument="prompts_file") from None


def read_lines(path: Path, seed: int = 0) -> list[Entry]:
    """Entries of a file of JSON lines: an object of the call's arguments each.

    Args:
        path: of the file; names of pictures in it are relative to its folder.
        seed: of the first entry; those without a seed of their own have this one plus their number.

    Raises:
        FileFormatError: a line is not such an object; the message says which.
    """
    # not splitlines: JSON may hold separators of lines that Unicode has
    lines = _decoded(path).split("\n")
    found: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_entry_of(line, seed + len(found), path.parent))
            except (ValueError, RecursionError) as error:
                reason = str(error) if isinstance(error, ArgumentError) else "it is no JSON object"
                raise FileFormatError(f"{shown(path)}, line {number}: {reason}", argument="prompts_file") from None
    if not found:
        raise FileFormatError(f"{shown(path)} holds no prompts", argument="prompts_file")
    return found


class _LineError(ArgumentError, ValueError):
    """A line is JSON, and not the arguments of a call."""


def _entry_of(line: str, seed: int, folder: Path) -> Entry:
    arguments = json.loads(line, parse_constant=_no_number)
    if not isinstance(arguments, dict):
        raise _LineError('expected an object such as {"prompt": "a fox", "seed": 1}')
    return _entry(arguments, seed, folder)


def _entry(arguments: dict[str, Any], seed: int, folder: Path) -> Entry:
    has_own_seed, category = "seed" in arguments, arguments.pop("category", "")
    seed = arguments.pop("seed", seed)
    if not isinstance(category, str) or not category.isprintable():
        raise _LineError(f"the category is a text on one line, got {category!r}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
        raise _LineError(f"the seed is a whole number of at least 0, got {seed!r}")
    if not arguments:
        raise _LineError("it has no prompt")
    if not isinstance(arguments.get("prompt", ""), str):
        raise _LineError("the prompt is one text; give a line per picture")
    for name in arguments:
        if name in OWN:
            raise _LineError(f"{name} is set by the command; leave it out")
        if name in SET_ELSEWHERE:
            raise _LineError(f"{name} is not of one line; {SET_ELSEWHERE[name]}")
    json.dumps(arguments, ensure_ascii=False).encode()  # half a character, which no file can hold, is a ValueError
    return Entry(arguments, seed, folder, category.strip(), has_own_seed)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def check_arguments(pipe: Any, entries: Sequence[Entry]) -> None:
    """Refuses arguments that a pipeline's call lacks, before anything runs.

    Raises:
        ArgumentError: says which, of which entry, and what there is.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values()):
        return
    for number, entry in enumerate(entries):
        unknown = [name for name in entry.arguments if name not in accepted]
        if unknown:
            own = [name for name in accepted if name not in (*OWN, *SET_ELSEWHERE, "self") and "callback" not in name]
            raise ArgumentError(
                f"{type(pipe).__name__} takes no {', '.join(map(shown, unknown))} (prompt {number}); its arguments are "
                f"{', '.join(own)}",
                argument="prompts_file",
            )
