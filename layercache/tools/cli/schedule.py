"""``layercache schedule``: changing a schedule by hand."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercache._utils.text import shown
from layercache.errors import FileFormatError, LayerCacheError
from layercache.tools.cli.common import check_outputs

if TYPE_CHECKING:
    from layercache.planning.front import Front
    from layercache.schedule.module_schedule import ModuleSchedule
    from layercache.schedule.schedule import Schedule

    Edited = Schedule | ModuleSchedule | Front

app = typer.Typer(no_args_is_help=True, help="Change a schedule by hand, so that its checksum stays right.")

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A schedule, or a front of schedules.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set a field, such as made_by.note=mine; may be repeated."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write; the file itself if left out.")]


@app.command()
def edit(file: File, fields: Set = None, output: Output = None) -> None:
    """Set fields of a schedule, or open it in $EDITOR; what comes out is checked, and gets a new checksum.

    A field is named by the entries that lead to it, with dots between them: `cells.3.0` is the first group at step 3.
    Values are JSON (`{"1": 1.0}`, `"compute"`, `0.5`); what is no JSON is text.

    Example: `layercache schedule edit schedule.json --set made_by.note="checked by hand"`
    """
    target = output or file
    check_outputs({"output": target})
    kind, text = _content_of(file)
    if fields:
        data = json.loads(text)
        for assignment in fields:
            _assign(data, assignment)
        edited = _parsed(json.dumps(data), kind, file)
    else:
        edited = _edited(text, kind, file)
    edited.save(target)
    typer.echo(f"schedule: {shown(target)}")


def _content_of(path: Path) -> tuple[str, str]:
    """Kind and entries of a file, checked, without its checksum."""
    from layercache._utils.checksum import KEY
    from layercache._utils.formats import FRONT, MODULES, SCHEDULE, format_of
    from layercache.tools.cli.files import load

    load(path, SCHEDULE, MODULES, FRONT)
    lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(f'  "{KEY}": '))
    data = json.loads(text)
    if KEY in data:  # another editor has joined the lines
        del data[KEY]
        text = json.dumps(data, indent=2) + "\n"
    return str(format_of(path)), text


def _parsed(text: str, kind: str, file: Path) -> Edited:
    """What an edited text holds, if it is a file of its kind still."""
    from layercache import Front, Schedule
    from layercache._utils.formats import FRONT, MODULES, SCHEDULE
    from layercache.schedule.module_schedule import ModuleSchedule

    classes: dict[str, Any] = {SCHEDULE: Schedule, MODULES: ModuleSchedule, FRONT: Front}
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"what was edited is no JSON any more: {error}") from error
    return classes[kind].from_data(data, shown(file))


def _assign(data: Any, assignment: str) -> None:
    """Sets one field, ``a.0.b=value``."""
    path, sign, value = assignment.partition("=")
    *way, last = path.split(".")
    if not sign or not last:
        raise typer.BadParameter(f"{shown(assignment)!r} is not FIELD=VALUE.", param_hint="--set")
    place = data
    try:
        for name in way:
            place = place[int(name) if isinstance(place, list) else name]
        place[int(last) if isinstance(place, list) else last] = _value_of(value)
    except (LookupError, TypeError, ValueError):
        raise typer.BadParameter(f"the file has no field {shown(path)!r}.", param_hint="--set") from None


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _edited(text: str, kind: str, file: Path) -> Edited:
    """What the user made of a text in an editor; a text that cannot be used is kept."""
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    handle, name = tempfile.mkstemp(prefix="layercache-", suffix=".json")
    with os.fdopen(handle, "w", encoding="utf-8") as draft:
        draft.write(text)
    try:
        ended = subprocess.run([*command, name], check=False).returncode
    except OSError as error:
        os.unlink(name)
        raise LayerCacheError(f"{command[0]!r} cannot be run ({error.strerror}); set EDITOR, or use --set") from error
    if ended:
        os.unlink(name)
        raise LayerCacheError(f"{command[0]} ended with code {ended}; nothing was changed")
    try:
        found = _parsed(Path(name).read_text(encoding="utf-8-sig"), kind, file)
    except (FileFormatError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{error}; nothing was written, and what you edited is in {name}") from error
    os.unlink(name)
    return found
