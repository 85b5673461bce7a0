"""Plots for pages, as specifications of Vega-Lite made with Altair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layercache._utils.metrics import summarise
from layercache._utils.text import shown
from layercache.tools.report.pages import check_installed

# Ours stand out; the others are told apart by colour and mark together, which makes 64 pairs.
OURS = ("#1098ad", "#37b24d", "#7950f2")
OTHERS = ("#e8590c", "#4c6ef5", "#d6336c", "#868e96", "#f08c00", "#ae3ec9", "#a0522d", "#74b816")
MARKS = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
KINDS = {"computed": "#2b8a3e", "reused": "#74a9d8", "forecast": "#b197d6", "skipped": "#d8c48a", "not run": "#9aa0a6"}
DATA = "rows"  # name of a plot's figures in its specification
FIGURES = {"mean": "mean", "median": "median", "10 %": "tenth", "worst": "worst"}


@dataclass(frozen=True)
class CurvePoint:
    """One method at one budget, in a plot.

    Attributes:
        name: of the method; points of one name make a curve.
        used: share of the block time computed.
        psnr: per picture, in dB.
        speedup: ``None`` if unknown.
        note: how it was set, for people.
    """

    name: str
    used: float
    psnr: Sequence[float]
    speedup: float | None = None
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("layercache")

    def data(self) -> dict[str, Any]:
        summary = summarise(self.psnr)
        figures = {
            "mean": summary.mean,
            "median": summary.median,
            "tenth": summary.quantile10,
            "worst": min(self.psnr),
            "used": self.used,
            "speedup": self.speedup,
        }
        kind = "ours" if self.is_ours else "package" if ":" in self.name else "other"
        finite = {name: _finite(value) for name, value in figures.items()}
        return {"method": shown(self.name), "note": shown(self.note), "kind": kind, **finite}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a point without a place is not drawn."""
    return None if value is None or not math.isfinite(value) else round(value, 4)


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of every name, no two the same up to 64 others."""
    found, others = dict[str, tuple[str, str]](), 0
    for name in names:
        if name.startswith("layercache"):
            found[name] = (OURS[len(found) % len(OURS)], "circle")
        else:
            found[name] = (OTHERS[others % 8], MARKS[(others + others // 8) % 8])
            others += 1
    return found


def pareto_chart(points: Sequence[CurvePoint]) -> dict[str, Any]:
    """PSNR over the share of compute, a curve per method; the one under the pointer stands out."""
    alt = _altair()

    names = sorted(dict.fromkeys(point.name for point in points), key=lambda name: not name.startswith("layercache"))
    look = looks(names)
    labels = [shown(name) for name in names]
    figure = alt.param(
        name="figure",
        value="mean",
        bind=alt.binding_select(options=list(FIGURES.values()), labels=list(FIGURES), name="PSNR: "),
    )
    hover = alt.selection_point(name="hover", fields=["method"], on="pointerover", clear="pointerout")
    chosen = alt.selection_point(name="chosen", fields=["method"], bind="legend")
    legend = alt.Legend(title=None)
    colour = alt.Color("method:N", legend=legend, scale=alt.Scale(domain=labels, range=[look[n][0] for n in names]))
    axis, scale = alt.Axis(tickMinStep=0.05, format=".2f"), alt.Scale(zero=False, padding=12)
    base = (
        alt.Chart(alt.NamedData(DATA))
        .transform_calculate(quality="datum[figure]")
        .transform_filter("isValid(datum.quality) && isValid(datum.used)")
        .encode(
            x=alt.X("used:Q", title="share of the block time computed", axis=axis, scale=scale),
            y=alt.Y("quality:Q", title="PSNR against the full run (dB)", scale=alt.Scale(zero=False, padding=8)),
            color=colour,
            opacity=alt.when(hover & chosen).then(alt.value(1.0)).otherwise(alt.value(0.12)),
        )
    )
    line = base.mark_line().encode(
        strokeWidth=alt.when("datum.kind == 'ours'").then(alt.value(3.5)).otherwise(alt.value(1.5)),
        strokeDash=alt.when("datum.kind == 'package'").then(alt.value([5, 4])).otherwise(alt.value([1, 0])),
    )
    marks = base.mark_point(filled=True, size=70).encode(
        shape=alt.Shape("method:N", legend=legend, scale=alt.Scale(domain=labels, range=[look[n][1] for n in names])),
        tooltip=_tooltips(points),
    )
    return _specification((line + marks.add_params(hover, chosen)).add_params(figure), [p.data() for p in points], 420)


def _tooltips(points: Sequence[CurvePoint]) -> list[Any]:
    alt = _altair()

    figures = [alt.Tooltip(f"{field}:Q", title=f"PSNR, {name}", format=".2f") for name, field in FIGURES.items()]
    speedup = [alt.Tooltip("speedup:Q", title="speed-up", format=".2f")] * any(p.speedup for p in points)
    note = [alt.Tooltip("note:N", title="setting")] * any(p.note for p in points)
    return ["method:N", alt.Tooltip("used:Q", title="computed", format=".1%"), *speedup, *figures, *note]


def frames_chart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """PSNR or SSIM of every ``frame``, a line per ``entry``; the one under the pointer stands out."""
    alt = _altair()

    figure = alt.param(
        name="figure",
        value="psnr",
        bind=alt.binding_select(options=["psnr", "ssim"], labels=["PSNR", "SSIM"], name="figure: "),
    )
    hover = alt.selection_point(name="hover", fields=["entry"], on="pointerover", clear="pointerout")
    names = list(dict.fromkeys(row["entry"] for row in rows))
    look = looks(names)
    scale = alt.Scale(domain=names, range=[look[name][0] for name in names])
    chart = (
        alt.Chart(alt.NamedData(DATA))
        .transform_calculate(quality="datum[figure]")
        .transform_filter("isValid(datum.quality)")
        .mark_line(point=True)
        .encode(
            x=alt.X("frame:Q", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("quality:Q", title="against the full run", scale=alt.Scale(zero=False, padding=8)),
            color=alt.Color("entry:N", legend=alt.Legend(title=None), scale=scale),
            opacity=alt.when(hover).then(alt.value(1.0)).otherwise(alt.value(0.15)),
            tooltip=[
                "entry:N",
                "frame:Q",
                alt.Tooltip("psnr:Q", title="PSNR", format=".2f"),
                alt.Tooltip("ssim:Q", title="SSIM", format=".4f"),
            ],
        )
    )
    finite = [{**row, "psnr": _finite(row["psnr"]), "ssim": _finite(row["ssim"])} for row in rows]
    return _specification(chart.add_params(hover, figure), finite, 300)


def cells_chart(
    cells: Sequence[Mapping[str, Any]], groups: Sequence[str], choices: Sequence[str] = ()
) -> dict[str, Any]:
    """Steps by groups of layers, or by schedules: what each cell does, or how much its residual changes.

    Args:
        cells: ``step``, ``group`` and ``does`` (of `KINDS`) or ``change``, with what a tooltip says of them; with
            ``choices`` also ``choice``.
        groups: lines of the map from top to bottom.
        choices: of maps to choose from; none for a single one.
    """
    alt = _altair()

    by_change = "change" in cells[0]
    tooltip = [alt.Tooltip("step:O"), alt.Tooltip("sigma:Q", format=".3f"), alt.Tooltip("group:N", title=" ")]
    if by_change:
        values = sorted(cell["change"] for cell in cells if cell["change"] is not None)
        # one outlier, usual at the last step, must not make the rest look the same
        limit = values[int(0.97 * (len(values) - 1))] if values else 1.0
        scale = alt.Scale(scheme="viridis", domain=[0, limit or 1.0], clamp=True)
        colour = alt.Color("change:Q", title="relative change", scale=scale, legend=alt.Legend(format=".0%"))
        tooltip.append(alt.Tooltip("change:Q", title="relative change", format=".1%"))
    else:
        kinds = [kind for kind in KINDS if any(cell["does"] == kind for cell in cells)]
        scale = alt.Scale(domain=kinds, range=[KINDS[kind] for kind in kinds])
        colour = alt.Color("does:N", title=None, scale=scale)
        tooltip += [alt.Tooltip("does:N", title="the blocks are"), alt.Tooltip("how:N", title="from")]
    chart = (
        alt.Chart(alt.NamedData(DATA))
        .mark_rect(stroke="white", strokeOpacity=0.35, strokeWidth=1)
        .encode(
            x=alt.X("step:O", axis=alt.Axis(labelAngle=0, labelOverlap="parity", grid=False)),
            y=alt.Y("group:N", title=None, sort=list(groups), axis=alt.Axis(labelOverlap=True)),
            color=colour,
            tooltip=tooltip,
        )
    )
    if choices:
        bind = alt.binding_select(options=list(choices), name="schedule: ")
        choice = alt.param(name="choice", value=choices[0], bind=bind)
        chart = chart.add_params(choice).transform_filter("datum.choice == choice")
    return _specification(chart, cells, max(60, min(640, 26 * len(groups))))


def bars_chart(rows: Sequence[Mapping[str, Any]], measure: str, from_one: bool = False) -> dict[str, Any]:
    """Bars of a ``value`` per ``case``, one in each ``variant``; with a line at 1 where that is what to reach."""
    alt = _altair()

    cases = list(dict.fromkeys(row["case"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    others = iter(OTHERS)
    colours = [OURS[0] if "layercache" in name else next(others) for name in variants]
    bars = (
        alt.Chart(alt.NamedData(DATA))
        .mark_bar()
        .encode(
            x=alt.X("value:Q", title=measure),
            y=alt.Y("case:N", title=None, sort=cases),
            yOffset=alt.YOffset("variant:N", sort=variants),
            color=alt.Color("variant:N", title=None, scale=alt.Scale(domain=variants, range=colours)),
            tooltip=["case:N", "variant:N", alt.Tooltip("value:Q", title=measure, format=".3~f")],
        )
    )
    chart: Any = bars
    if from_one:
        line = alt.Chart(alt.InlineData(values=[{"one": 1}])).mark_rule(strokeDash=[4, 3], color="#868e96")
        chart = bars + line.encode(x="one:Q")
    return _specification(chart, rows, max(120, 13 * len(cases) * len(variants) + 20))


def _altair() -> Any:
    check_installed()
    import altair

    return altair


def _specification(chart: Any, rows: Sequence[Mapping[str, Any]], height: int) -> dict[str, Any]:
    """As plain data: as wide as the page, without the address of its schema, and with its rows.

    Altair would check every row, which takes seconds of some thousands.
    """
    data = chart.properties(width="container", height=height).to_dict()
    kept = {name: value for name, value in data.items() if name not in ("$schema", "config")}
    return kept | {"datasets": {**kept.get("datasets", {}), DATA: [dict(row) for row in rows]}}
