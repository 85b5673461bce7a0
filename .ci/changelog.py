"""The notes of a version from CHANGELOG.md, in Markdown: `python .ci/changelog.py 0.2.0`.

The file's form is that of keepachangelog.com, with a heading `## VERSION - DATE` per version, newest first. The first
is the version that is being prepared, `unreleased` until its release. Notes are refused of a version that has no date,
or is not the first.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
UNRELEASED, UNPUBLISHED = "unreleased", "not published"


def versions(text: str) -> list[tuple[str, str, str]]:
    """Version, date or what stands in its place, and notes of each heading."""
    parts = re.split(r"^## +(.+)$", text, flags=re.MULTILINE)[1:]
    headings = [heading.partition(" - ") for heading in parts[::2]]
    return [(name, date, notes.strip()) for (name, _, date), notes in zip(headings, parts[1::2], strict=True)]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def faults(text: str) -> list[str]:
    """What is wrong with the file, in sentences."""
    found = versions(text)
    wrong = [
        f"{name!r} is no version of three numbers" for name, _, _ in found if not re.fullmatch(r"\d+\.\d+\.\d+", name)
    ]
    if wrong or not found:
        return wrong or ["there is no version"]
    for place, (name, date, notes) in enumerate(found):
        if not (is_date(date) or (date == UNPUBLISHED if place else date == UNRELEASED)):
            wrong.append(f"{name} has no date but {date!r}")
        kinds = re.findall(r"^### +(.+)$", notes, flags=re.MULTILINE)
        wrong += [
            f"{name} has a section {kind!r}, which is none of {', '.join(KINDS)}" for kind in set(kinds) - set(KINDS)
        ]
        if len(kinds) != len(set(kinds)) or not notes.startswith("### "):
            wrong.append(f"{name} does not begin with a section, or has one twice")
        if re.search(r"^### .*\s*(?:^###|\Z)", notes, flags=re.MULTILINE):
            wrong.append(f"{name} has an empty section")
    wrong += [f"{b[0]} stands below {a[0]}" for a, b in pairwise(found) if numbers(b[0]) >= numbers(a[0])]
    dated = [entry for entry in found if is_date(entry[1])]
    wrong += [f"{b[0]} is dated after {a[0]}" for a, b in pairwise(dated) if b[1] > a[1]]
    return wrong


def notes_of(version: str, text: str, home: str = "") -> str:
    """The notes, with links that lead to the repository at the version's tag where its address is given."""
    if wrong := faults(text):
        raise SystemExit("CHANGELOG.md: " + "; ".join(wrong))
    name, date, notes = versions(text)[0]
    if name != version or not is_date(date):
        raise SystemExit(f"CHANGELOG.md begins with {name} ({date}), and not with {version} and a date")
    return re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", rf"]({home}/blob/v{version}/\1)", notes) if home else notes


if __name__ == "__main__":
    repository = os.environ.get("GITHUB_REPOSITORY")
    address = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}" if repository else ""
    print(notes_of(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), address))
