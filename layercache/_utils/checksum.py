"""Checksums of files: what changed after a file was written is noticed when it is read.

A JSON file holds ``"checksum": "sha256:..."``, the SHA-256 of its other entries: of their values, not of the spaces and
the order that another editor gives them. A file of tensors holds the same in its header, of all its bytes, with zeros
in the place of the 64 digits.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from layercache.errors import FileFormatError, LayerCacheWarning

KEY = "checksum"
UNSET = "sha256:" + "0" * 64
# In a file of tensors it stands in JSON within JSON.
_DIGITS = re.compile(rb'\\"checksum\\": \\"sha256:([0-9a-f]{64})\\"')
EDIT = "'layercache schedule edit'"


def sealed_json(text: str) -> str:
    """The text of a JSON object with a checksum in its second line."""
    body = text.removeprefix("{").lstrip("\n")
    return f'{{\n  "{KEY}": "{_digest_of(json.loads(text))}",\n{body}'


def sealed_line(data: Mapping[str, Any]) -> str:
    """Entries as a line of JSON that ends with their checksum, for files that grow."""
    return json.dumps({**data, KEY: _digest_of(data)}, ensure_ascii=False, allow_nan=False) + "\n"


def parsed_line(line: bytes) -> dict[str, Any] | None:
    """The entries of a line of `sealed_line`; ``None`` where it was cut off or changed."""
    try:
        data = json.loads(line)
        is_whole = isinstance(data, dict) and data.pop(KEY, None) == _digest_of(data)
    except (ValueError, RecursionError):
        return None
    return data if is_whole else None


def check_json(data: Mapping[str, Any], is_expected: bool, name: str) -> None:
    """Checks the entries of a JSON file.

    Args:
        data: the whole file.
        is_expected: whether files of its version have a checksum.
        name: for messages.

    Warns:
        LayerCacheWarning: the checksum was removed.

    Raises:
        FileFormatError: an entry was changed.
    """
    if KEY not in data:
        _warn_without(is_expected, name)
    elif data[KEY] != _digest_of(data):
        raise _changed(name)


def _digest_of(data: Mapping[str, Any]) -> str:
    entries = {name: value for name, value in data.items() if name != KEY}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def sealed(content: bytes) -> bytes:
    """A file of tensors whose header holds `UNSET`, with the digits filled in."""
    place = _place(content)
    assert place is not None
    return content[: place[0]] + _digits_of(content, place) + content[place[1] :]


def check_bytes(content: bytes, has_key: bool, is_expected: bool, name: str) -> None:
    """As `check_json`, of a file of tensors; ``has_key`` says whether its header holds a checksum."""
    if not has_key:
        _warn_without(is_expected, name)
        return
    place = _place(content)
    if place is None or content[place[0] : place[1]] != _digits_of(content, place):
        raise _changed(name)


def _place(content: bytes) -> tuple[int, int] | None:
    found = _DIGITS.search(content)
    return found.span(1) if found else None


def _digits_of(content: bytes, place: tuple[int, int]) -> bytes:
    digest = hashlib.sha256(content[: place[0]])
    digest.update(b"0" * 64)
    digest.update(content[place[1] :])
    return digest.hexdigest().encode()


def _warn_without(is_expected: bool, name: str) -> None:
    if is_expected:
        message = f"{name} has no checksum, so whether it was changed is not known; saving it again writes one"
        warnings.warn(message, LayerCacheWarning, stacklevel=5)


def _changed(name: str) -> FileFormatError:
    return FileFormatError(
        f"{name} was changed after it was written, its checksum is another: use another copy; edit schedules with "
        f"{EDIT}, or remove the line of the checksum to load the file as it is"
    )
