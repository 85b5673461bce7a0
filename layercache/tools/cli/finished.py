"""Whether a comparison in a folder is the one that was asked for, found out without loading the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercache._version import __version__
from layercache.tools.cli.loading import split_name, split_weight
from layercache.tools.cli.options import CallOptions, ModelOptions, words_of

if TYPE_CHECKING:
    from layercache.tools.compare.run import Outcome


@dataclass(frozen=True)
class Command:
    """The command of a comparison, kept beside its results.

    Attributes:
        file: where it is kept.
        given: everything that its results depend on, with the times at which the files it names were changed.
    """

    file: Path
    given: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, model: ModelOptions, call: CallOptions, more: Mapping[str, Any]) -> Command:
        paths = [model.model, *(split_name(text, "")[1] for text in (*(model.transformer or ()), *(call.image or ())))]
        paths += [split_weight(text)[0] for text in model.lora or ()]
        changed = {path: _changed(Path(path)) for path in (*paths, model.controlnet or "demo")}
        options = [*words_of(model), *words_of(call)]
        return cls(folder / "command.json", {"version": __version__, "options": options, "files": changed, **more})

    def outcomes(self, names: Sequence[str], budgets: Sequence[float]) -> list[Outcome] | None:
        """What these methods gave at these budgets; ``None`` where another command made it, or it is not all there."""
        try:
            before = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if before != json.loads(json.dumps(dict(self.given))):
            return None
        from layercache.errors import LayerCacheError
        from layercache.tools.compare.run import read_comparison

        try:
            found = {(one.method, one.budget): one for one in read_comparison(self.file.with_name("compare.json"))[1]}
        except LayerCacheError:
            return None
        wanted = [(name, budget) for name in names for budget in sorted(budgets, reverse=True)]
        return [found[key] for key in wanted] if all(key in found for key in wanted) else None

    def save(self) -> None:
        """Notes that what the folder holds was made by this command."""
        from layercache._utils.files import write_atomically

        text = json.dumps(dict(self.given), indent=2) + "\n"
        write_atomically(self.file, lambda path: path.write_text(text, encoding="utf-8"))


def _changed(path: Path) -> int | None:
    """When a file, or the newest file of a folder, was changed; ``None`` where there is none."""
    if path.is_dir():
        return max((one.stat().st_mtime_ns for one in path.rglob("*") if one.is_file()), default=None)
    return path.stat().st_mtime_ns if path.is_file() else None
