"""The plans of a comparison with other settings than they were made for: `layercache compare --transfer`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from layercache.errors import ArgumentError, CrewError, MethodError
from layercache.planning.search_files import digest_of
from layercache.tools.compare.calls import batched, check_call, quiet
from layercache.tools.compare.categories import in_turn, split_categories
from layercache.tools.compare.entries import Job, Method, jobs_of, key_of
from layercache.tools.compare.files import Outcome
from layercache.tools.compare.model import CalibratedModel, Entry
from layercache.tools.compare.own import contents_of
from layercache.tools.compare.run import Comparison
from layercache.tools.compare.transfer_table import SettingRun, TransferTable
from layercache.tools.lora import split_weight, with_lora

FOLDER = "transfer"
LONGEST_NAME = 60
OWN = ("prompts", "lora", "name")
"""What a setting may have beside arguments of the call."""


@dataclass(frozen=True)
class Setting:
    """Other settings that plans are run with.

    Attributes:
        name: in the table.
        call: arguments that take the place of the call's.
        prompts: samples in the place of the others, see `layercache.tools.compare.calls.samples_of`; ``None`` for the
            same.
        lora: an adapter, ``PATH`` or ``PATH:WEIGHT``; empty for none.
    """

    name: str
    call: Mapping[str, Any] = field(default_factory=dict)
    prompts: Sequence[Any] | None = None
    lora: str = ""

    @property
    def folder(self) -> str:
        """Name of the folder that its outcomes are kept in."""
        plain = re.sub(r"[^\w.=-]+", "-", self.name)[:40].strip("-.")
        return f"{plain}-{digest_of(contents_of(self))[:8]}"


def settings_of(transfer: Sequence[Mapping[str, Any]], pipe: Any = None) -> list[Setting]:
    """The settings that were asked for.

    Args:
        transfer: mappings of the call's arguments, such as ``{"height": 1328, "width": 800}``; beside them
            ``"prompts"``, ``"lora"`` (``PATH`` or ``PATH:WEIGHT``), and ``"name"`` for the table.
        pipe: a pipeline, whose call takes these arguments.

    Raises:
        ArgumentError: one is empty, comes twice, has an argument that the call lacks, or names a LoRA that is not here.
    """
    if isinstance(transfer, (str, Mapping)) or not all(isinstance(one, Mapping) for one in transfer):
        raise ArgumentError(
            'transfer is a list of mappings such as {"height": 64, "width": 64}, {"lora": PATH}',
            argument="transfer",
        )
    found = [_setting_of(one) for one in transfer]
    names = [one.name for one in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ArgumentError(f"the setting {twice[0]!r} is given twice", argument="transfer")
    for one in found:
        if pipe is not None:
            try:
                check_call(pipe, one.call)
            except ArgumentError as error:
                raise ArgumentError(f"{one.name}: {error}", argument="transfer") from None
    return found


def _setting_of(given: Mapping[str, Any]) -> Setting:
    call = {str(name): value for name, value in given.items() if name not in OWN}
    prompts, lora = given.get("prompts"), str(given.get("lora", "") or "")
    prompts = [prompts] if isinstance(prompts, (str, Mapping)) else prompts
    if not call and not lora and not prompts:
        raise ArgumentError("a setting is empty: give arguments of the call, prompts or a lora", argument="transfer")
    if lora and not Path(split_weight(lora)[0]).exists():
        raise ArgumentError(f"there is no LoRA at {split_weight(lora)[0]!r}", argument="transfer")
    return Setting(str(given.get("name", "") or name_of(call, prompts, lora)), call, prompts, lora)


def name_of(call: Mapping[str, Any], prompts: Sequence[Any] | None, lora: str) -> str:
    """What a setting is called where it has no name of its own."""
    parts = [f"{name}={value}" if _is_plain(value) else name for name, value in call.items()]
    parts += [f"{len(prompts)} other prompts"] if prompts else []
    parts += [f"lora={Path(lora).name}"] if lora else []
    name = ", ".join(parts)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


class Transfer:
    """Runs the plans of a comparison with other settings, each setting in a folder of its own beside it.

    Plans are made and tuned with the comparison's settings alone; nothing is measured or fitted anew.

    Args:
        base: the comparison, which has run.
        methods: of it.
        settings: see `settings_of`.
    """

    def __init__(
        self,
        base: Comparison,
        methods: Sequence[Method],
        settings: Sequence[Setting],
    ):
        self.base, self.methods, self.settings = base, list(methods), list(settings)
        self.jobs = list(jobs_of(self.methods, base.model.budgets))
        self._made: dict[str, Entry | Exception] = dict(base.entries)

    def run(
        self,
        say: Callable[[str], None] = lambda text: None,
        done: Callable[[], object] = lambda: None,
        retry: bool = False,
        title: str = "",
    ) -> TransferTable:
        """All methods with all settings; a setting that the pipeline refuses leaves its reason.

        Args:
            say, done, retry: see `Comparison.run`.
            title: of the table.

        Raises:
            CrewError: one of the processes is gone; the same command again goes on.
        """
        base = SettingRun("", self.base.of(self.jobs), self.base.folder)
        return TransferTable.of_runs([base, *(self._run(one, say, done, retry) for one in self.settings)], title)

    def _run(self, setting: Setting, say: Callable[[str], None], done: Callable[[], object], retry: bool) -> SettingRun:
        folder = self.base.folder / FOLDER / setting.folder
        methods = [replace(one, make=partial(self._entry, one, setting), tuned_as="") for one in self.methods]
        try:
            with self._with_lora(setting):
                comparison = self._comparison(setting, folder)
                is_complete = comparison.is_complete(methods, retry)
            if not is_complete:
                self._make_all(say)  # without the LoRA
            with self._with_lora(setting):
                outcomes = comparison.run(methods, lambda text: say(f"{setting.name}: {text}"), done, retry)
        except CrewError:
            raise
        except Exception as error:  # of the pipeline, which may refuse a size, or of a LoRA for another model
            reason = f"{type(error).__name__}: {error}"
            return SettingRun(setting.name, [_failed(job, reason) for job in self.jobs], folder)
        return SettingRun(setting.name, outcomes, folder)

    def _comparison(self, setting: Setting, folder: Path) -> Comparison:
        base = self.base
        call = {**base.model.call, **setting.call}
        seeds, prompts, categories = base.calls.seeds, base.prompts, base.categories
        if setting.prompts is not None:
            given, names = split_categories(setting.prompts)
            each = [one for part in given for one in (part if isinstance(part, list) else [part])]
            behind = max(*seeds, *base.model.seeds) + 1  # a picture of every prompt, and none that was calibrated on
            seeds = [*seeds, *range(behind, behind + len(each) - len(seeds))]
            prompts = batched(each, 0, len(seeds), max(map(len, prompts)))
            categories = in_turn(names, len(seeds))
        return Comparison(
            replace(base.model, call=call),
            [_changed(part, setting.call) for part in prompts],
            seeds,
            folder,
            repeats=base.repeats,
            crew=base.crew,
            categories=categories,
            scorer=base.scorer,
            about={"setting": setting.name, "base": base.digest},
        )

    @contextmanager
    def _with_lora(self, setting: Setting) -> Iterator[None]:
        with ExitStack() as stack:
            with self.base.crew.together():
                stack.enter_context(with_lora(self.base.model.pipeline, setting.lora))
            yield

    def _entry(self, method: Method, setting: Setting, model: CalibratedModel, budget: float) -> Entry:
        """The plan that was made for the base; what could not be made, or would undo the setting, is raised."""
        found = self._made[key_of(method.name, budget, method.is_fixed)]
        if isinstance(found, Exception):
            raise found
        if undone := sorted(set(found.call) & set(setting.call)):
            raise MethodError(f"the plan gives {', '.join(undone)} itself, which this setting changes")
        return found

    def _make_all(self, say: Callable[[str], None]) -> None:
        """Makes all plans, once; after a comparison in the same process they are there."""
        todo, base = [job for job in self.jobs if job.key not in self._made], self.base
        for number, job in enumerate(todo):
            say(f"{job.method.name}: its plan, with the settings of the comparison")
            if number % base.crew.world == 0:
                base.tune(todo[number : number + base.crew.world])
            self._made[job.key] = self._made_by(job)

    def _made_by(self, job: Job) -> Entry | Exception:
        try:
            with quiet(self.base.model.pipeline), self.base.crew.together():
                return job.method.make(self.base.model, job.budget)
        except CrewError:
            raise
        except Exception as error:  # of another package, or of a method of one's own, it may be any
            return error


def _failed(job: Job, reason: str) -> Outcome:
    return Outcome(job.method.name, "", job.budget, error=reason, is_fixed=job.method.is_fixed)


def _changed(prompts: Sequence[Any], call: Mapping[str, Any]) -> list[Any]:
    """Prompts whose own arguments give way to those of a setting."""
    return [
        {name: call.get(name, value) for name, value in one.items()} if isinstance(one, Mapping) else one
        for one in prompts
    ]
