"""Messages for people who typed options: the library's own name the arguments of its functions."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping

Span = tuple[int, int]

# What an argument is called where the option that sets it has another name.
ALIASES = {
    "guidance_scale": "guidance",
    "max_cache_bytes": "max_cache_mb",
    "num_groups": "groups",
    "num_inference_steps": "steps",
    "true_cfg_scale": "guidance",
}
COMMANDS = {
    "layercache.calibrate": "'layercache calibrate'",
    "layercache.plan": "'layercache plan'",
    "layercache.search": "'layercache plan --pareto'",
}
_REMARK = re.compile(r" \(([a-z_]+(?:, [a-z_]+)*)\)")
_COMMANDS = re.compile(r"(?<![\w.'\"/])(layercache\.(?:calibrate|plan|search))(?!\w|\.\w|[('\"/])")


def in_options(
    text: str, options: Mapping[str, str], typed: Iterable[str] = (), others: Container[str] = frozenset()
) -> str:
    """The message with options in the place of the arguments that they set.

    ``name=value`` becomes ``--name value``. A name alone is taken for the argument where it can be nothing else: one
    with an underscore, or the subject of ``... must be``; "budget" in a sentence is a word. Names inside quotes, paths,
    calls such as ``plan(profile, budget=0.6)``, and in what was typed stay as they are. A remark that names nothing but
    arguments which this command does not set, such as `` (max_run)``, is left out.

    Args:
        text: the message.
        options: by the name of the parameter; `ALIASES` are added.
        typed: what the user gave, such as names of files.
        others: arguments that options of other commands set.
    """
    known = {**{name: options[own] for name, own in ALIASES.items() if own in options}, **options}
    if not known:
        return text
    words = list(typed)
    text = _without_remarks(text, known, words, others)
    kept = [*_calls(text), *_occurrences(text, [word for word in words if any(name in word for name in known)])]

    def worded(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        clear = value is not None or "_" in name or (found.start() == 0 and text[found.end() :].startswith(" must "))
        if not clear or any(found.start() < end and start < found.end() for start, end in kept):
            return found[0]
        return known[name] if value in (None, "True") else f"{known[name]} {value.strip(chr(39))}"

    return _COMMANDS.sub(lambda found: COMMANDS[found[1]], _pattern(known).sub(worded, text))


def _without_remarks(text: str, known: Container[str], typed: Iterable[str], others: Container[str]) -> str:
    kept = list(_occurrences(text, typed))

    def left(found: re.Match[str]) -> str:
        names = found[1].split(", ")
        useless = all("_" in name and name in others and name not in known for name in names)
        inside = any(start <= found.start() and found.end() <= end for start, end in kept)
        return "" if useless and not inside else found[0]

    return _REMARK.sub(left, text)


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """A name that is not a part of another word or of a path, with the value behind it, if there is one."""
    alternatives = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    value = r"=(?P<value>'[^']*'|(?!=)[^\s,;()\[\]{}'\"]*[^\s,;()\[\]{}'\".:])"
    return re.compile(rf"(?<![\w.'\"=/\\-])(?P<name>{alternatives})(?:{value}|(?!\w|\.\w|[=(\[/\\'\"-]))")


def _calls(text: str) -> Iterator[Span]:
    """Where the arguments of calls are; the bracket of a remark has a space in front."""
    for bracket in re.finditer(r"(?<=\w)\(", text):
        depth = 0
        for at in range(bracket.start(), len(text)):
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            if not depth:
                break
        yield bracket.start(), at + 1


def _occurrences(text: str, words: Iterable[str]) -> Iterator[Span]:
    for word in words:
        for found in re.finditer(re.escape(word), text):
            yield found.span()
