"""Whether a pipeline can run at the noise levels of a schedule."""

from __future__ import annotations

from typing import Any

from torch import nn

from layercache._utils.compat import call_parameters
from layercache.errors import ScheduleMismatchError
from layercache.schedule.fingerprint import Fingerprint


def check_levels(pipe: Any, fingerprint: Fingerprint) -> None:
    """Raises `ScheduleMismatchError` where a schedule has noise levels of its own and the pipeline takes none.

    Whether the call then gives them is seen when it begins (`Fingerprint.check_sigmas`).
    """
    if not fingerprint.sigmas_given or isinstance(pipe, nn.Module):
        return
    if "sigmas" not in call_parameters(pipe):
        raise ScheduleMismatchError(
            f"this schedule has noise levels of its own, and {type(pipe).__name__} takes no `sigmas` to be called "
            'with them; search on this pipeline without sigmas="free"'
        )
