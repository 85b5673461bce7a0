"""Every method on one model, the same seeds and budgets: `layercache compare` and `layercache.compare`."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from layercache._utils import metrics
from layercache._utils.files import check_output_folder
from layercache.errors import BudgetError, CrewError, LayerCacheWarning, ScheduleMismatchError
from layercache.models.registry import find_transformer
from layercache.parallel.crew import Crew
from layercache.planning.search_files import digest_of, model_identity
from layercache.runtime.attachment import attachment_of
from layercache.tools.compare.calls import PictureCalls, Pictures, batches_of, quiet
from layercache.tools.compare.entries import Job, Method, Methods, jobs_of, methods_of
from layercache.tools.compare.files import SHOWN as SHOWN
from layercache.tools.compare.files import VERSION as VERSION
from layercache.tools.compare.files import ComparisonFiles, Outcome, first_stills, parsed_file
from layercache.tools.compare.files import read_comparison as read_comparison
from layercache.tools.compare.model import CalibratedModel, Entry
from layercache.tools.compare.own import contents_of
from layercache.tools.compare.scores import Fidelity, Scorer, joined
from layercache.tools.compare.trial import Counter as Counter
from layercache.tools.compare.trial import run_trial, shares_device

REPEATS = 3
_GIVEN: dict[Any, Any] = {}  # warnings that were given once, as Python keeps them per module


class Comparison(ComparisonFiles):
    """Runs entries one after the other; keeps what they gave, so that a run that was stopped goes on.

    The processes of a crew share out the calls, and tune methods side by side. All of them get the same outcomes; the
    leader alone reads and writes the folder, and measures times.

    Args:
        model: the model and its calibration samples.
        prompts: one call per entry: a list of as many prompts as the call has pictures, a prompt, or a mapping of
            arguments of the call.
        seeds: one per picture.
        folder: where results and pictures are kept.
        repeats: full and cached runs side by side that a speedup is the median of.
        request: what was asked for, for `layercache.tools.compare.files.finished`.
        crew: processes that share out the calls, each with the whole pipeline, at most one per call; the model's
            methods are tuned by them too.
        categories: of the pictures, one each; none where the prompts have none.
        scorer: what computes figures beside PSNR and SSIM; by default LPIPS where it is available.
        about: what outcomes hold for beside model, call, prompts and seeds.

    Raises:
        BudgetError: a budget is out of range.
        CalibrationError: there are more processes than calls.
        CrewError: one of the processes is gone.
        LayerCacheError: there is not one seed per picture.
        OutputError: nothing can be written to the folder.
        ScheduleMismatchError: the folder holds a comparison with other settings.
    """

    def __init__(
        self,
        model: CalibratedModel,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        folder: Path,
        *,
        repeats: int = REPEATS,
        request: Mapping[str, Any] | None = None,
        crew: Crew | None = None,
        categories: Sequence[str] = (),
        scorer: Scorer | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        metrics.check_installed()
        super().__init__(folder)
        self.scorer = scorer or Scorer(lpips=True)
        self._warns = not about  # of other settings the warnings are what outcomes are for
        self.crew = crew or model.crew
        self.model, self.repeats = model, repeats
        model.crew = self.crew
        self.calls = PictureCalls(model.pipeline, prompts, seeds, model.call)
        for budget in model.budgets:
            if not 0 < budget <= 1:
                raise BudgetError(
                    f"budgets are shares of the block time above 0 and at most 1, got {budget}", argument="budgets"
                )
        self.crew.check_samples(len(self.calls.batches))
        settings = _settings_of(model, self.calls) | dict(about or {})
        if any(categories):  # left out where there are none, so that folders of earlier versions go on
            settings["categories"] = list(categories)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        with self.crew.together():
            if self.crew.leads:
                self._begin(digest)
        if self.crew.agree(digest) != digest:
            raise ScheduleMismatchError("the processes compare different models, seeds or settings")
        self.outcomes, self.clip_model = self.crew.agree((self.outcomes, self.clip_model))
        self.settings, self.digest = settings, digest
        self.request = dict(request or {})
        self.full: dict[int, Pictures] = {}  # of this process's calls
        self.entries: dict[str, Entry] = {}  # that were made, by the keys of their outcomes
        self._times_alone = shares_device(model.pipeline, self.crew)

    def _begin(self, digest: str) -> None:
        """Makes the folder, or reads what it holds."""
        check_output_folder(self.folder, "output")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self.take(parsed_file(self.file))
            if self.digest != digest:
                raise ScheduleMismatchError(
                    f"{self.file} compares another model, other seeds or other settings; name another folder"
                )

    @property
    def prompts(self) -> list[list[Any]]:
        """By call."""
        return self.calls.prompts

    def run(
        self,
        methods: Methods | Sequence[Method],
        say: Callable[[str], None] = lambda text: None,
        done: Callable[[], object] = lambda: None,
        retry: bool = False,
    ) -> list[Outcome]:
        """All methods at all budgets; one that fails leaves its reason and does not stop the others.

        Args:
            methods: see `layercache.tools.compare.entries.methods_of`.
            say: called with what is run next.
            done: called when an entry is finished, or was before.
            retry: run again everything that failed, and not only what may fail for another reason now.

        Raises:
            CrewError: one of the processes is gone; the same command again goes on.
        """
        jobs = self._jobs(methods)
        pending, needs_full = self._pending(jobs, retry)
        self._warn_of_others(pending)
        for _ in range(len(jobs) - len(pending)):
            done()
        if needs_full:
            say("generating the full pictures")
            with quiet(self.model.pipeline):
                self._run_full()
        for number, job in enumerate(pending):
            at = "" if job.method.is_fixed else f" at {job.budget:g}"
            say(f"{job.method.name}{at} ({number + 1} of {len(pending)})")
            if number % self.crew.world == 0:
                self.tune(pending[number : number + self.crew.world])
            self._settle(job)
            done()
        return self.of(jobs)

    def _warn_of_others(self, pending: Sequence[Job]) -> None:
        """Says which outcomes were kept and are run again."""
        names = dict.fromkeys(job.method.name for job in pending if self.is_of_another(job))
        if names and self.crew.leads:
            warnings.warn(
                f"what {self.folder} holds of {', '.join(names)} was measured with another method of that name, or "
                "one that was tuned in another way; it is run again, and the others are kept",
                LayerCacheWarning,
                stacklevel=3,
            )

    def is_complete(self, methods: Methods | Sequence[Method], retry: bool = False) -> bool:
        """Whether `run` would run nothing; the same on all processes."""
        pending, needs_full = self._pending(self._jobs(methods), retry)
        return not pending and not needs_full

    def _pending(self, jobs: Sequence[Job], retry: bool) -> tuple[list[Job], bool]:
        """The jobs that are to be run, and whether the full pictures are."""
        with self.crew.together():
            # the folder is the leader's alone, and may not be there for others
            pending = [job for job in jobs if self.crew.leads and not self._is_settled(job, retry)]
            lacks_clip = bool(self.scorer.clip_model) and self.clip_model != self.scorer.clip_model
            needs_full = bool(self.crew.leads and (pending or lacks_clip or not self.has_full_pictures))
        keys, needs_full = self.crew.agree(({job.key for job in pending}, needs_full))
        return [job for job in jobs if job.key in keys], needs_full

    def count_jobs(self, methods: Methods | Sequence[Method]) -> int:
        """How many entries there are: every method at every budget."""
        return len(self._jobs(methods))

    def _jobs(self, methods: Any) -> list[Job]:
        is_resolved = not isinstance(methods, str) and all(isinstance(method, Method) for method in methods)
        return list(jobs_of(methods if is_resolved and methods else methods_of(methods), self.model.budgets))

    def _is_settled(self, job: Job, retry: bool) -> bool:
        if not self.is_done(job):
            return False
        outcome = self.outcomes[job.key]
        if outcome.error:
            return not retry
        # scores of another CLIP model are none of this one's
        lacks_clip = bool(self.scorer.clip_model) and self.clip_model != self.scorer.clip_model
        return not lacks_clip and all(getattr(outcome, name) for name in self.scorer.required)

    def _run_full(self) -> None:
        """Runs this process's calls in full and keeps the first pictures."""

        def run(batch: int) -> tuple[Pictures, float, tuple[float, ...]]:
            self.full[batch], seconds = self.calls.run(batch)
            clip = self.scorer.clip_scores(self.full[batch], self.prompts[batch])
            return first_stills(self.full[batch], self.calls.batches[batch][0]), seconds, clip

        found: list[tuple[Pictures, float, tuple[float, ...]]] = []
        self.crew.map(run, range(len(self.calls.batches)), lambda batch, one: found.append(one), keep=False)
        with self.crew.together():
            if self.crew.leads:
                seconds = sum(seconds for _, seconds, _ in found) / len(self.calls.seeds)
                if self._times_alone:
                    low, high = self.calls.batches[0]
                    seconds = self.calls.run(0)[1] / (high - low)
                self.keep_full(np.concatenate([pictures for pictures, _, _ in found]), seconds)
                self._keep_clip(tuple(chain(*(clip for _, _, clip in found))))
                self.save()

    def _keep_clip(self, full: tuple[float, ...]) -> None:
        """Keeps the full pictures' CLIP scores; those of another model are forgotten, of all entries."""
        if not self.scorer.clip_model:
            return
        if self.clip_model != self.scorer.clip_model:
            self.outcomes = {key: replace(outcome, clip=()) for key, outcome in self.outcomes.items()}
        self.clip_model, self.full_clip = self.scorer.clip_model, full

    def tune(self, jobs: Sequence[Job]) -> None:
        """Tunes the methods of so many jobs at once as there are processes."""
        with quiet(self.model.pipeline):
            self.model.tune([(job.method.tuned_as, job.budget) for job in jobs])

    def _settle(self, job: Job) -> None:
        """Runs a job and keeps what it gave."""
        found = self._outcome_of(job)
        outcome, method = self.crew.agree(found[0]), job.method
        assert outcome is not None  # the leader's
        budget = outcome.used if method.is_fixed else job.budget
        outcome = replace(outcome, budget=budget, is_fixed=method.is_fixed, identity=method.identity)
        self.outcomes[job.key] = outcome
        with self.crew.together():
            if self.crew.leads:
                if found[1] is not None:
                    self.keep(outcome, found[1])
                self.save()

    def _outcome_of(self, job: Job) -> tuple[Outcome | None, Pictures | None]:
        """What a job gave, and its first pictures, on the leader; an error of one process is raised in all of them."""
        method = job.method
        with _heard(self._warns) as heard:
            try:
                with quiet(self.model.pipeline):
                    with self.crew.together():
                        entry = method.make(self.model, job.budget)
                    self.entries[job.key] = entry  # on all processes or on none
                    outcome, pictures = self._judge(entry)
            except CrewError:
                raise  # the other processes are gone, whatever the method is
            except Exception as error:  # of another package, or of a method of one's own, it may be any
                outcome = Outcome(method.name, "", job.budget, error=f"{type(error).__name__}: {error}")
                pictures = None
            finally:
                _restore(self.model.pipeline)
        return replace(outcome, warnings=tuple(heard)) if outcome is not None else None, pictures

    def _judge(self, entry: Entry) -> tuple[Outcome | None, Pictures | None]:
        def look(batch: int, pictures: Pictures) -> tuple[Fidelity, Pictures]:
            close = self.scorer.fidelity(self.full[batch], pictures, self.prompts[batch])
            return close, first_stills(pictures, self.calls.batches[batch][0])

        crew, alone = self.crew, self._times_alone
        how: dict[str, Any] = {"counts": True, "look": look, "crew": crew, "alone": alone, "changed": entry.call}
        trial = run_trial(self.calls, entry.attach, self.repeats, **how)
        if trial is None:
            return None, None
        close = joined(fidelity for fidelity, _ in trial.looks)
        outcome = Outcome(
            entry.method,
            entry.setting,
            entry.budget,
            used=trial.used,
            seconds=trial.seconds,
            speedup=trial.speedup,
            speedups=trial.speedups,
            cache_bytes=trial.cache_bytes,
            operators=trial.timing.operators,
            reads=trial.timing.reads,
            forwards=trial.forwards,
            in_full=trial.in_full,
            **{one.name: getattr(close, one.name) for one in fields(close)},
        )
        return outcome, np.concatenate([pictures for _, pictures in trial.looks])


@contextmanager
def _heard(again: bool) -> Iterator[list[str]]:
    """Context that collects the library's warnings, each once; behind it they are given ``again``, or others alone."""
    heard: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield heard
    heard += dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, LayerCacheWarning))
    for one in caught if again else (one for one in caught if not issubclass(one.category, LayerCacheWarning)):
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno, registry=_GIVEN)


def _restore(pipeline: Any) -> None:
    """Nothing of a method that failed stays on the model."""
    attachment = attachment_of(find_transformer(pipeline))
    if attachment is not None:
        attachment.detach()


def _settings_of(model: CalibratedModel, calls: PictureCalls) -> dict[str, Any]:
    """What outcomes hold for, as JSON can hold it: pictures, tensors and weights as digests."""
    pipeline = model.pipeline
    transformer = find_transformer(pipeline)
    return {
        "call": {name: _as_text(value) for name, value in sorted(model.call.items())},
        "model": f"{type(pipeline).__name__} {type(transformer).__name__}",
        "weights": digest_of(model_identity(pipeline)),
        "prompts": [[_prompt_as_text(prompt) for prompt in batch] for batch in calls.prompts],
        "seeds": calls.seeds,
        "calibration_prompts": [[_prompt_as_text(prompt) for prompt in batch] for batch in batches_of(model.prompts)],
        "calibration_seeds": list(model.seeds),
        "effort": model.effort,
    }


def _prompt_as_text(prompt: Any) -> Any:
    if isinstance(prompt, Mapping):
        return {str(name): _as_text(value) for name, value in prompt.items()}
    return prompt if isinstance(prompt, (str, int)) else _as_text(prompt)


def _as_text(value: Any) -> str:
    """Plain values as they are written, others by the digest of what they hold."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"{type(value).__name__} {digest_of(contents_of(value))}"
