"""What plug-ins write to a server's log."""

from __future__ import annotations

import logging

_log = logging.getLogger("layercache")
_warned: set[str] = set()


def warn_once(text: str) -> None:
    """Writes it to the log, once in a process; servers do not show Python's warnings."""
    if text not in _warned:
        _warned.add(text)
        _log.warning("layercache: %s", text)
