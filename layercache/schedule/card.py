"""The model card of a folder or repository of schedules: its README.md, written from the index.

Only the part between two marks is written; what people put around it, and metadata of their own, stay.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from layercache._utils.formats import FRONT, MODULES, PROFILE, SCHEDULE
from layercache._utils.text import shown
from layercache.errors import FileFormatError
from layercache.schedule.fingerprint import COMMAND, Fingerprint
from layercache.schedule.index_file import CLASSES, FOLDERS, Entry, Index

FILE = "README.md"
LIBRARY = "layercache"
BEGIN, END = "<!-- layercache: begin -->", "<!-- layercache: end -->"
_MARKED = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_RECORDED = re.compile(r"(guidance_scale|true_cfg_scale|height|width|num_frames) (\d+(?:\.\d+)?)")
_SPECIAL = re.compile(r"([\\`*_{}\[\]|#~])")


def card(before: str | None, index: Index, newest: Entry, fingerprint: Fingerprint, place: str) -> str:
    """The whole text of a card.

    Args:
        before: the card that is there, if one is.
        index: of the files it lists.
        newest: the entry that the example uses.
        fingerprint: of that one; what was measured is said from it.
        place: the repository, as `from_pretrained` takes it.

    Raises:
        FileFormatError: the metadata of the present card are not as YAML is written.
    """
    from huggingface_hub import ModelCard

    try:
        # the base class warns of a card without metadata
        made = ModelCard(before if before and before.startswith("---") else "---\n{}\n---\n" + (before or ""))
    except Exception as error:
        raise FileFormatError(
            f"the metadata of {FILE} in {shown(place)} cannot be read: mend what stands between its lines of ---, "
            "or remove the file"
        ) from error
    _mark(made.data, index)
    own = f"{BEGIN}\n{_body(index, newest, fingerprint, place)}\n{END}"
    if _MARKED.search(made.text):
        made.text = _MARKED.sub(lambda _: own, made.text, count=1)
    else:
        made.text = f"{made.text.rstrip()}\n\n{own}\n".lstrip("\n")
    return str(made)


def _mark(data: object, index: Index) -> None:
    """Library, base model and tags in the metadata; those that are there stay."""
    kinds = {FOLDERS[entry.kind].rstrip("s") for entry in index.entries if entry.kind in FOLDERS}
    tags = getattr(data, "tags", None)
    given = [str(tag) for tag in tags] if isinstance(tags, list) else []
    ours = [LIBRARY, "diffusers", *(f"{LIBRARY}-{kind}" for kind in sorted(kinds))]
    data.tags = list(dict.fromkeys([*given, *ours]))  # type: ignore[attr-defined]
    data.library_name = getattr(data, "library_name", None) or LIBRARY  # type: ignore[attr-defined]
    if index.base_model:
        data.base_model = index.base_model  # type: ignore[attr-defined]


def _body(index: Index, newest: Entry, fingerprint: Fingerprint, place: str) -> str:
    models = dict.fromkeys(entry.model_class for entry in index.entries)
    base = f" ({_link(index.base_model)})" if index.base_model else ""
    return "\n".join(
        [
            f"# Caching schedules for {', '.join(map(_plain, models))}",
            "",
            f"layercache computes the blocks of a diffusion transformer{base} at the steps that need it, and puts "
            "the others together from what is stored. These files say which; they are JSON and safetensors, and run "
            "no code.",
            "",
            "## Use",
            "",
            "```python",
            *_example(newest, index.base_model, fingerprint, place),
            "```",
            "",
            "A schedule belongs to a transformer's class and architecture and to the noise levels of its run; on "
            "others it is refused. With another size, guidance, number format or adapter it runs with a warning: "
            "the figures hold for what was measured.",
            "",
            "## Files",
            "",
            *_files(index.entries),
            "",
            "Computed: share of the blocks' time; of a front that of its cheapest schedule. PSNR against the full run "
            "of the same seed, expected of other pictures: mean, and what nine pictures of ten exceed.",
            "",
            f"## What the newest file, {_plain(newest.file)}, was made with",
            "",
            *_measured(fingerprint),
        ]
    )


def _example(entry: Entry, base_model: str | None, fingerprint: Fingerprint, place: str) -> list[str]:
    model = base_model or "the/model"
    name = shown(place).replace('"', "")
    arguments = [f"num_inference_steps={entry.num_steps}", *_arguments(fingerprint)]
    arguments += ["**schedule.call_arguments()"] if fingerprint.sigmas_given else []
    load = f'{CLASSES[entry.kind]}.from_pretrained("{name}", filename="{shown(entry.file)}")'
    lines = ["import layercache", "from diffusers import DiffusionPipeline", ""]
    if entry.kind == MODULES:
        lines[0] = "import layercache\nimport layercache.schedule"
    lines.append(f'pipe = DiffusionPipeline.from_pretrained("{model}")')
    if entry.kind in (FRONT, PROFILE):
        share = 0.6 if entry.used is None else max(0.6, entry.used)
        lines += [f"found = {load}", f"schedule = layercache.plan(found, budget={share:.3g})"]
    else:
        lines.append(f"schedule = {load}")
    return [
        *lines,
        f"settings = dict({', '.join(arguments)})",
        "with layercache.enabled(pipe, schedule):",
        '    result = pipe("a lighthouse in a storm", **settings)',
    ]


def _arguments(fingerprint: Fingerprint) -> list[str]:
    """Guidance and size that were recorded, as arguments of the pipeline's call."""
    texts = [text for name in ("guidance", "size") for text in fingerprint.settings.get(name) or ()]
    found = [_RECORDED.fullmatch(str(text)) for text in texts]
    arguments = [f"{match[1]}={match[2]}" for match in found if match]
    if any(argument.startswith("true_cfg_scale=") for argument in arguments) and len(fingerprint.branches) > 1:
        arguments.append('negative_prompt=" "')
    return arguments


def _files(entries: Sequence[Entry]) -> list[str]:
    rows = [
        "| file | what | steps | guidance | size | computed | PSNR, dB | 10 %, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = (SCHEDULE, MODULES, FRONT, PROFILE)
    known = [entry for entry in entries if entry.kind in order]
    for entry in sorted(known, key=lambda e: (order.index(e.kind), e.num_steps, e.used or 0.0, e.file)):
        cells = [
            _plain(entry.file),
            entry.kind.removeprefix("layercache "),
            str(entry.num_steps),
            "" if entry.guidance is None else f"{entry.guidance:g}",
            _plain(entry.size or ""),
            "" if entry.used is None else f"{entry.used:.3f}",
            "" if entry.psnr is None else f"{entry.psnr:.1f}",
            "" if entry.psnr_p10 is None else f"{entry.psnr_p10:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _measured(fingerprint: Fingerprint) -> list[str]:
    sigmas = fingerprint.sigmas
    facts = {
        "transformer": f"{fingerprint.model_class}, {fingerprint.num_blocks} blocks",
        "architecture": f"configuration {fingerprint.config_hash}",
        "steps": f"{fingerprint.num_steps}, noise levels {sigmas[0]:.4g} to {sigmas[-1]:.4g}",
        "branches": ", ".join(fingerprint.branches),
        **{
            name: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            for name, value in fingerprint.settings.items()
            if value and name != COMMAND
        },
        "layercache": fingerprint.package_version,
    }
    return [f"* {_plain(name)}: {_plain(value)}" for name, value in facts.items() if value]


def _link(base_model: str) -> str:
    return f"[{_plain(base_model)}](https://huggingface.co/{base_model})"


def _plain(text: str) -> str:
    """Text of files as text: nothing of it is markup."""
    return html.escape(_SPECIAL.sub(r"\\\1", shown(text)), quote=False)
