"""The page of ``layercache ui``: full and cached pictures of one prompt side by side, in a browser."""

from __future__ import annotations

import html
import logging
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from layercache._utils.text import shown
from layercache.errors import LayerCacheError, MissingExtraError
from layercache.tools.cli.pipelines import is_demo
from layercache.tools.side_by_side import BUDGET, STEPS, Moment, Run, SideBySide, Wanted

if TYPE_CHECKING:
    from layercache.planning.front import Front
    from layercache.tools.cli.options import CallOptions

LARGEST_SEED = 2**31 - 1
MOST_STEPS = 100
MOST_WAITING = 16
SMALLEST_PICTURE = 384
GAIN = 4
KEPT_SECONDS = 3600  # of picture files that the page has shown
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
HOW = "Write what to draw and choose how much may be computed. The cached picture comes first, then the full one."
_log = logging.getLogger("layercache")

CSS = """
.lc-strip { display: flex; gap: 2px; height: 18px; margin: 2px 0 10px; }
.lc-strip span { flex: 1 1 0; min-width: 0; border-radius: 2px; }
.lc-strip span { background: color-mix(in srgb, currentColor 12%, transparent); }
.lc-strip span.done { background: color-mix(in srgb, #1b7837 var(--share), #9cc3e6); }
.lc-figures { width: 100%; border-collapse: collapse; }
.lc-figures th { text-align: left; font-weight: 400; }
.lc-figures td { text-align: right; font-variant-numeric: tabular-nums; }
.lc-figures th, .lc-figures td { padding: 3px 6px; }
.lc-figures tr { border-bottom: 1px solid color-mix(in srgb, currentColor 15%, transparent); }
"""


def check_installed() -> None:
    """Raises `MissingExtraError` where gradio is not installed, for callers with a model to load."""
    _gradio()


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError('the page needs gradio, not installed: pip install "layercache[ui]"') from error
    return gradio


def serve(
    pipe: Any,
    front: Front | None = None,
    call: CallOptions | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
) -> None:
    """Serves the page until it is interrupted.

    Args:
        pipe: a diffusers pipeline that makes pictures from prompts.
        front, call: see `SideBySide`.
        host, port: where; 0.0.0.0 for every interface of the machine.
        share: also through a public address of gradio's, which needs the network.

    Raises:
        MissingExtraError: gradio is not installed.
        LayerCacheError: the pipeline or the front does not fit.
        OSError: the port is taken.
    """
    check_installed()
    pipe.set_progress_bar_config(disable=True)
    runs = SideBySide(pipe, front, call)
    runs.warm_up()
    try:
        launch(build_page(runs), host=host, port=port, share=share)
    finally:
        runs.close()


def launch(page: Any, *, host: str, port: int, share: bool = False, wait: bool = True) -> None:
    """Serves a built page; asks nothing of the network but where it is shared."""
    gr = _gradio()
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        theme=gr.themes.Default(**FONTS),
        css=CSS,
    )
    print(f"page: {' and '.join(filter(None, (local, public)))} (Ctrl-C ends it)", flush=True)
    if wait:
        page.block_thread()


def build_page(runs: SideBySide) -> Any:
    """The page, as gradio's ``Blocks``."""
    gr = _gradio()
    name = shown(type(runs.pipe.transformer).__name__)
    with gr.Blocks(title="layercache", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(f"## layercache: {name}, full and cached\n{HOW}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                prompt = gr.Textbox(label="Prompt", lines=1, max_lines=4, elem_id="lc-prompt")
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=100)
                    stop = gr.Button("Stop", min_width=100)
                inputs = [prompt, *_settings(gr, runs, prompt)]
            with gr.Column(scale=2, min_width=280):
                steps = gr.HTML(_strips(None), elem_id="lc-steps")
                slider = gr.ImageSlider(label="full | cached", interactive=False, format="png", elem_id="lc-pictures")
                figures = gr.HTML(elem_id="lc-figures")
                difference = gr.Image(
                    label=f"difference x{GAIN}",
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id="lc-difference",
                )

        def run(*values: Any) -> Iterator[Any]:
            yield from page_updates(gr, runs, *values)

        outputs = [steps, slider, difference, figures]
        under_way = gr.on(
            [generate.click, prompt.submit],
            run,
            inputs,
            outputs,
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=steps,
            api_name="generate",
        )
        stop.click(None, cancels=[under_way])
    return page


def budget_range(runs: SideBySide) -> tuple[float, float]:
    """Lowest and highest budget, with two digits, since the page writes them out."""
    low, high = math.floor(runs.budgets[0] * 100) / 100, math.ceil(runs.budgets[1] * 100) / 100
    return low, max(high, low + 0.01)


def _settings(gr: Any, runs: SideBySide, prompt: Any) -> list[Any]:
    """Seed, steps, budget, and guidance where the pipeline has it."""
    if is_demo(runs.pipe):
        from layercache.demo.model import CLASS_NAMES

        words = [[name] for name in CLASS_NAMES]
        gr.Examples(words, prompt, label="Words that the bundled model knows", examples_per_page=len(words))
    low, high = budget_range(runs)
    fixed = runs.fixed_steps
    budget = gr.Slider(
        low,
        high,
        value=min(max(BUDGET, low), high),
        step=0.01,
        label="Budget: share of the blocks' time that may be computed",
        info="" if runs.front is None else "the schedule of the front that is nearest",
    )
    steps = gr.Slider(
        2,
        max(MOST_STEPS, fixed or 0),
        value=fixed or STEPS,
        step=1,
        label="Steps" if fixed is None else "Steps (those of the front)",
        interactive=fixed is None,
    )
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
    found = [seed, steps, budget]
    if runs.guidance is not None:
        found.append(gr.Slider(0, 20, value=runs.guidance, step=0.1, label="Guidance"))
    return found


def page_updates(
    gr: Any, runs: SideBySide, prompt: str, seed: float, steps: float, budget: float, guidance: float | None = None
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """What the page shows while a generation runs: steps, both pictures, their difference, figures."""
    if not (prompt or "").strip():
        raise gr.Error("Write what to draw first.", print_exception=False)
    wanted = Wanted(prompt.strip(), int(seed or 0), runs.fixed_steps or int(steps), guidance, budget)
    yield _strips(Moment(wanted)), None, None, ""
    try:
        for moment in runs.run(wanted):
            if moment.is_complete:
                yield _strips(moment), _pair(moment), _difference(moment), _figures(runs, moment)
            else:
                yield _strips(moment), gr.skip(), gr.skip(), gr.skip()
    except LayerCacheError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
    except Exception as error:
        _log.exception("a generation of the page failed")
        first = (str(error).strip().splitlines() or [""])[0]
        raise gr.Error(html.escape(f"{type(error).__name__}: {first}", quote=False), print_exception=False) from error


def _strips(moment: Moment | None) -> str:
    """The steps of both runs, filled as they happen; green computed, blue reused."""
    if moment is None:
        return "<div>Steps fill as they happen: green computed, blue reused.</div>"
    total = moment.wanted.steps
    return _strip("cached", moment.cached, total, "its schedule is being made") + _strip("full", moment.full, total)


def _strip(name: str, run: Run, total: int, before: str = "not begun") -> str:
    done = len(run.steps)
    cells = "".join(f"<span class='done' style='--share:{share:.0%}'></span>" for share in run.steps)
    cells += "<span></span>" * (total - done)
    if run.picture is None:
        state = f"step {done} of {total}" if done else before
    else:
        state = (
            f"{run.seconds:.2f} s, {sum(run.steps):.3g} of {done} steps computed" if done else f"{run.seconds:.2f} s"
        )
    return f"<div>{name}: {state}</div><div class='lc-strip' role='img' aria-label='{name}: {state}'>{cells}</div>"


def _figures(runs: SideBySide, moment: Moment) -> str:
    cached, full, wanted = moment.cached, moment.full, moment.wanted
    rows = {
        "PSNR": "equal" if math.isinf(moment.psnr) else f"{moment.psnr:.1f} dB",
        "time, full": f"{full.seconds:.2f} s",
        "time, cached": f"{cached.seconds:.2f} s ({full.seconds / cached.seconds:.2f}x as fast)",
        "share computed": f"{cached.used:.3f}",
    }
    point = runs.point_for(wanted.budget)
    if point is not None:
        rows["schedule"] = point.origin
        rows["PSNR expected"] = f"{float(np.mean(point.likely)):.1f} dB"
    cells = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table class='lc-figures'>{cells}</table>"


def _pair(moment: Moment) -> tuple[np.ndarray, np.ndarray]:
    assert moment.full.picture is not None and moment.cached.picture is not None
    return _shown(moment.full.picture), _shown(moment.cached.picture)


def _difference(moment: Moment) -> np.ndarray:
    assert moment.full.picture is not None and moment.cached.picture is not None
    return _shown(np.abs(moment.full.picture - moment.cached.picture) * GAIN)


def _shown(picture: np.ndarray) -> np.ndarray:
    """In 8 bit; a small picture enlarged by a whole factor, so that every pixel stays a square."""
    pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    factor = max(1, SMALLEST_PICTURE // min(pixels.shape[:2]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
