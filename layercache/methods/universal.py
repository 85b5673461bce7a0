"""Universal schedules (ours): made from other models' full runs, with nothing measured on the model."""

from __future__ import annotations

from layercache.planning.universal import Universal

__all__ = ["Universal"]
