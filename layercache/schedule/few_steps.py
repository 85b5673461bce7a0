"""Advice for runs of few steps, each of which changes much."""

from __future__ import annotations

import warnings

from layercache.errors import LayerCacheWarning
from layercache.schedule.fingerprint import Fingerprint

FEWEST_STEPS = 8
"""Of a run that nothing warns of: below, single skipped steps are seen (docs/guides/few-steps.md)."""


def warn_of_few_steps(fingerprint: Fingerprint, stacklevel: int = 3) -> None:
    """Warns of a schedule for fewer than `FEWEST_STEPS` steps that computes some of them only.

    Warns:
        LayerCacheWarning: it has so few.
    """
    if len(fingerprint.steps) < FEWEST_STEPS:
        warnings.warn(
            f"in a run of {len(fingerprint.steps)} steps each changes much, and one that is skipped is seen in one "
            "picture of ten, or hardly where the model was distilled for so few: look at the 10 % quantile "
            "(percentile=10), not at the mean, before you cache it (docs/guides/few-steps.md)",
            LayerCacheWarning,
            stacklevel=stacklevel,
        )
