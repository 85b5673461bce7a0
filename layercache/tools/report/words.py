"""Words for people in the place of short names that files keep."""

from __future__ import annotations

import re

# As `layercache.planning.fit.Forecast.name` writes them.
_FORECAST = re.compile(r"\b(open|teacher|steer)(-all)? n=(\d+)(\+x)?(?:\+b)?(?: q=[\d.]+)?")
_AIMS = {"open": ", fitted on full runs alone", "teacher": ", fitted to the velocity"}


def origin_words(origin: str) -> str:
    """How a schedule was found, with the names of forecasts in words."""
    return re.sub(r"(^|, )hold$", r"\1the last velocity held", _FORECAST.sub(_forecast, origin))


def _forecast(found: re.Match[str]) -> str:
    aim, everywhere, terms, latents = found.groups()
    return (
        f"{terms} {'velocity' if terms == '1' else 'velocities'}{' and latents' if latents else ''}"
        f"{' at every step' if everywhere else ''}{_AIMS.get(aim, '')}"
    )
