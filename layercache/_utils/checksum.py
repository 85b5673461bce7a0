"""Checksums of files: a byte that changed after a file was written is noticed when it is read.

A file holds ``"checksum": "sha256:..."``: the SHA-256 of all its bytes, with zeros in the place of the 64 digits.
"""

from __future__ import annotations

import hashlib
import re
import warnings

from layercache.errors import FileFormatError, LayerCacheWarning

KEY = "checksum"
UNSET = "sha256:" + "0" * 64
# In a file of tensors it stands in JSON within JSON.
_DIGITS = re.compile(rb'\\?"checksum\\?": \\?"sha256:([0-9a-f]{64})\\?"')
EDIT = "'layercache schedule edit'"


def sealed_json(text: str) -> str:
    """A JSON object with a checksum in its second line."""
    body = text.removeprefix("{").lstrip("\n")
    return sealed(f'{{\n  "{KEY}": "{UNSET}",\n{body}'.encode()).decode()


def sealed(content: bytes) -> bytes:
    """The content of a file with the digits of its checksum, which are zeros before, filled in."""
    place = _place(content)
    assert place is not None
    return content[: place[0]] + _digest(content, place) + content[place[1] :]


def check_sum(content: bytes, has_key: bool, is_expected: bool, name: str) -> None:
    """Checks what a file holds.

    Args:
        content: the whole file.
        has_key: whether it holds a checksum, as whoever parsed it found.
        is_expected: whether files of its version have one.
        name: for messages.

    Warns:
        LayerCacheWarning: the checksum was taken out.

    Raises:
        FileFormatError: a byte was changed.
    """
    if not has_key:
        if is_expected:
            told = f"{name} has no checksum, so nobody can tell whether it was changed; {EDIT} writes one"
            warnings.warn(told, LayerCacheWarning, stacklevel=5)
        return
    place = _place(content)
    if place is None or content[place[0] : place[1]] != _digest(content, place):
        raise FileFormatError(
            f"{name} was changed after it was written, its checksum is another: use another copy; edit schedules with "
            f"{EDIT}, or remove the line of the checksum to load the file as it is"
        )


def _place(content: bytes) -> tuple[int, int] | None:
    found = _DIGITS.search(content)
    return found.span(1) if found else None


def _digest(content: bytes, place: tuple[int, int]) -> bytes:
    digest = hashlib.sha256(content[: place[0]])
    digest.update(b"0" * 64)
    digest.update(content[place[1] :])
    return digest.hexdigest().encode()
