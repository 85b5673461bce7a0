"""What `layercache compare` compares: methods, schedules, figures and other settings, as they are typed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.tools.cli.common import read_prompts
from layercache.tools.cli.pipelines import guidance_arguments, parameters_of

if TYPE_CHECKING:
    from layercache.tools.batch.entries import Entry
    from layercache.tools.compare.scores import Scorer
    from layercache.tools.compare.transfer import Setting

PLANS, FIGURES = "Plans", "Figures"
LPIPS = {"auto": None, "on": True, "off": False}
SHORT = {"steps": "num_inference_steps"}
"""Names of options that a setting may have for arguments of the call."""


@dataclass(frozen=True)
class PlanOptions:
    """What is compared."""

    methods: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PLANS,
            help="Names with commas between them; 'ours', 'peers' or 'all' for all of a kind. All if left out and no "
            "--schedule is given.",
        ),
    ] = None
    schedule: Annotated[
        list[Path] | None,
        typer.Option(
            rich_help_panel=PLANS,
            exists=True,
            dir_okay=False,
            help="A schedule, or a front or profile that gives one for every budget; may be repeated.",
        ),
    ] = None
    transfer: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=PLANS,
            metavar="NAME=VALUE,...",
            help="Run the same plans, as they are, with other settings too: arguments of the call, steps, guidance, "
            "prompts=FILE, lora=PATH[:WEIGHT], such as height=48,width=48; may be repeated.",
        ),
    ] = None


@dataclass(frozen=True)
class FigureOptions:
    """Which figures are computed beside PSNR and SSIM."""

    lpips: Annotated[
        str,
        typer.Option(
            rich_help_panel=FIGURES,
            metavar="auto|on|off|PATH",
            help="LPIPS: where the package lpips and AlexNet's weights are here; refuse without them; leave it out; or "
            "where the weights are. Nothing is downloaded.",
        ),
    ] = "auto"
    clip: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=FIGURES,
            metavar="FOLDER",
            help="CLIP score of full and cached pictures: a folder with a CLIP model, or the name of one in the Hub's "
            "cache. Nothing is downloaded.",
        ),
    ] = None


def scorer_for(figures: FigureOptions) -> Scorer:
    """What computes the figures; what is missing for one that was asked for is refused before anything is loaded."""
    from layercache.tools.compare.scores import scorer_of

    return scorer_of(LPIPS.get(figures.lpips, figures.lpips), figures.clip)


def methods_for(plans: PlanOptions) -> dict[str, Any]:
    """The methods by their names in the table; what is missing or unknown is refused before anything is loaded."""
    from layercache.tools.cli.files import load
    from layercache.tools.compare.entries import GROUPS, check_methods
    from layercache.tools.report import pages, plots

    plots.check_installed()
    pages.check_installed()
    text = plans.methods if plans.methods is not None else "" if plans.schedule else "all"
    names = list(GROUPS.get(text) or [name.strip() for name in text.split(",") if name.strip()])
    if names or not plans.schedule:
        check_methods(names)
    found: dict[str, Any] = {name: name for name in names}
    for path in plans.schedule or ():
        name = path.stem if path.stem not in found else path.name
        if name in found:
            raise typer.BadParameter(f"{shown(name)} is compared twice; rename one.", param_hint="--schedule")
        found[name] = load(path)
    return found


# --- other settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A setting as it was typed.

    Attributes:
        text: as it was typed, which is its name.
        values: JSON or text, by the names that were typed.
        entries: of its prompts file; none for the same prompts.
    """

    text: str
    values: Mapping[str, Any]
    entries: Sequence[Entry] = field(default=())


def wanted_of(texts: Sequence[str]) -> list[Wanted]:
    """The settings that were typed; what is none is refused before anything is loaded.

    Raises:
        typer.BadParameter: one is not NAME=VALUE, empty, or given twice.
        ArgumentError: a LoRA is not here.
        FileFormatError: a file of prompts holds none.
    """
    from layercache.tools.compare.transfer import settings_of

    found = [_wanted(text) for text in texts]
    settings_of([_mapping(one, one.values) for one in found])
    return found


def _wanted(text: str) -> Wanted:
    values: dict[str, Any] = {}
    # a comma is part of a value unless a name and = follow it
    for part in re.split(r",(?=\s*[A-Za-z_]\w*=)", text):
        name, sign, value = part.strip().partition("=")
        if not sign or not name.isidentifier():
            raise typer.BadParameter(
                f"{shown(part)!r} is not NAME=VALUE, such as height=48,width=48 or lora=PATH.", param_hint="--transfer"
            )
        values[name] = value if name in ("prompts", "lora") else _value(value)
    file = values.get("prompts")
    if file is not None and not Path(file).is_file():
        raise typer.BadParameter(f"there is no file of prompts at {shown(file)}.", param_hint="--transfer")
    return Wanted(text.strip(), values, read_prompts(None, Path(file)) if file is not None else ())


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def settings_for(pipe: Any, wanted: Sequence[Wanted]) -> list[Setting]:
    """The settings with the names that this pipeline has for the arguments.

    Raises:
        ArgumentError: the pipeline takes no such argument.
    """
    from layercache.tools.compare.transfer import settings_of

    found = []
    for one in wanted:
        call = {SHORT.get(name, name): value for name, value in one.values.items() if name != "guidance"}
        if "guidance" in one.values:
            call |= guidance_arguments(pipe, parameters_of(pipe), one.values["guidance"])
        found.append(_mapping(one, call))
    return settings_of(found, pipe)


def _mapping(wanted: Wanted, call: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in call.items() if name != "prompts"} | {"name": wanted.text}
    return found | ({"prompts": samples_of(wanted.entries)} if wanted.entries else {})


def samples_of(entries: Sequence[Entry]) -> list[Any]:
    """Prompts with their categories, for `layercache.tools.compare.transfer.settings_of`."""
    found = []
    for entry in entries:
        sample = entry.sample
        if entry.category:
            sample = {**(sample if isinstance(sample, Mapping) else {"prompt": sample}), "category": entry.category}
        found.append(sample)
    return found


def request_for(entries: Sequence[Entry], wanted: Sequence[Wanted], figures: FigureOptions) -> dict[str, Any]:
    """Of what was asked for, what is not among the options of a model's call, as JSON can hold it."""

    def plain(entry: Entry) -> list[Any]:
        return [dict(entry.arguments), entry.seed if entry.has_own_seed else None, entry.category]

    return {
        "prompts": [plain(entry) for entry in entries],
        "lpips": figures.lpips,
        "clip": figures.clip,
        "transfer": [[one.text, [plain(entry) for entry in one.entries]] for one in wanted],
    }
