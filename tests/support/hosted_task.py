"""A command that shares six tasks out, for tests of what hosts its processes: ``FOLDER DEATHS EXIT_CODE``.

Process 1 dies in its second task as often as it is to; the leader writes what all have found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from layercache._utils.files import write_atomically
from layercache._utils.processes import AGAIN
from layercache.errors import CrewError
from layercache.parallel.crew import Crew, crew_of_environment


def share(crew: Crew, folder: str, deaths: int) -> list[int]:
    """Squares of six numbers, and in ``squares.json`` those and what was given in ``given.txt``."""
    attempt = int(os.environ.get("LAYERCACHE_ATTEMPT") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    found = crew.map(_square(crew, dies=attempt < deaths), range(6))
    print(f"process {crew.rank} has {found}")
    given = Path(folder, "given.txt")
    text = given.read_text() if given.exists() else None
    if crew.leads:
        content = json.dumps({"found": found, "attempt": attempt, "given": text, "folder": os.getcwd()})
        write_atomically(Path(folder, "squares.json"), lambda path: path.write_text(content))
    return found


def _square(crew: Crew, dies: bool) -> Callable[[int], int]:
    def square(number: int) -> int:
        if dies and number == 3 and crew.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number

    return square


def main() -> None:
    folder, deaths, code = sys.argv[1:]
    try:
        crew = crew_of_environment(timeout=60.0)
        share(crew, folder, int(deaths))
        crew.close()
    except CrewError:
        sys.exit(AGAIN)
    sys.exit(int(code))


if __name__ == "__main__":
    main()
