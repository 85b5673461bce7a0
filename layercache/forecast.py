"""Coefficients of a forecast: how stored residuals combine into the residual of a cached step."""

from __future__ import annotations

from collections.abc import Sequence

from layercache.errors import ScheduleError

COEFFICIENT_LIMIT = 4.0


def secant_coefficients(
    sigmas: Sequence[float],
    step: int,
    anchor: int,
    base: int | None = None,
    eta: float = 1.0,
) -> dict[int, float]:
    """Coefficient of each stored residual in the prediction at ``step``, keyed by the step that stored it.

    Plain reuse (``base is None``) is ``{anchor: 1}``. With a second anchor ``base < anchor`` the residual
    is extended along the secant: ``{anchor: 1 + c, base: -c}`` with
    ``c = eta * (sigma[step] - sigma[anchor]) / (sigma[anchor] - sigma[base])``, limited to 4 because
    rounding noise of the stored residuals grows with it. Exact for residuals linear in sigma.
    Source: methods.md §1.3 (ours).

    Raises:
        ScheduleError: the steps are out of order, or two anchors share one sigma.
    """
    if not anchor < step or (base is not None and not 0 <= base < anchor):
        raise ScheduleError(f"anchors must be older than step {step}, newest first: got {anchor} and {base}")
    if base is None:
        return {anchor: 1.0}
    gap = sigmas[anchor] - sigmas[base]
    if gap == 0:
        raise ScheduleError(f"steps {anchor} and {base} have the same sigma {sigmas[anchor]}; no slope between them")
    c = min(eta * (sigmas[step] - sigmas[anchor]) / gap, COEFFICIENT_LIMIT)
    return {anchor: 1.0 + c, base: -c}
