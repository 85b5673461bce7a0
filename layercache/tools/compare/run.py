"""Every method on one model, the same seeds and budgets: `layercache compare` and `layercache.compare`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from layercache._utils import metrics
from layercache._utils.files import check_output_folder
from layercache.errors import BudgetError, CrewError, ScheduleMismatchError
from layercache.models.registry import find_transformer
from layercache.parallel.crew import Crew
from layercache.planning.search_files import digest_of, model_identity
from layercache.runtime.attachment import attachment_of
from layercache.tools.compare.calls import Fidelity, PictureCalls, Pictures, batches_of, fidelity, quiet
from layercache.tools.compare.entries import Job, Method, Methods, jobs_of, methods_of
from layercache.tools.compare.files import SHOWN as SHOWN
from layercache.tools.compare.files import VERSION as VERSION
from layercache.tools.compare.files import ComparisonFiles, Outcome, first_stills, parsed_file
from layercache.tools.compare.files import read_comparison as read_comparison
from layercache.tools.compare.model import CalibratedModel, Entry
from layercache.tools.compare.own import contents_of
from layercache.tools.compare.trial import Counter as Counter
from layercache.tools.compare.trial import run_trial, shares_device

REPEATS = 3


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
    ):
        metrics.check_installed()
        super().__init__(folder)
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
        settings = _settings_of(model, self.calls)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        with self.crew.together():
            if self.crew.leads:
                self._begin(digest)
        if self.crew.agree(digest) != digest:
            raise ScheduleMismatchError("the processes compare different models, seeds or settings")
        self.outcomes = self.crew.agree(self.outcomes)
        self.settings, self.digest = settings, digest
        self.request = dict(request or {})
        self.full: dict[int, Pictures] = {}  # of this process's calls
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
        with self.crew.together():
            # the folder is the leader's alone, and may not be there for others
            pending = [job for job in jobs if self.crew.leads and not self._is_settled(job, retry)]
            needs_full = bool(self.crew.leads and (pending or not self.has_full_pictures))
        keys, needs_full = self.crew.agree(({job.key for job in pending}, needs_full))
        pending = [job for job in jobs if job.key in keys]
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
                self._tune(pending[number : number + self.crew.world])
            self._settle(job)
            done()
        return self.of(jobs)

    def count_jobs(self, methods: Methods | Sequence[Method]) -> int:
        """How many entries there are: every method at every budget."""
        return len(self._jobs(methods))

    def _jobs(self, methods: Any) -> list[Job]:
        is_resolved = not isinstance(methods, str) and all(isinstance(method, Method) for method in methods)
        return list(jobs_of(methods if is_resolved and methods else methods_of(methods), self.model.budgets))

    def _is_settled(self, job: Job, retry: bool) -> bool:
        return self.is_done(job) and not (retry and self.outcomes[job.key].error)

    def _run_full(self) -> None:
        """Runs this process's calls in full and keeps the first pictures."""

        def run(batch: int) -> tuple[Pictures, float]:
            self.full[batch], seconds = self.calls.run(batch)
            return first_stills(self.full[batch], self.calls.batches[batch][0]), seconds

        found: list[tuple[Pictures, float]] = []
        self.crew.map(run, range(len(self.calls.batches)), lambda batch, one: found.append(one), keep=False)
        with self.crew.together():
            if self.crew.leads:
                seconds = sum(seconds for _, seconds in found) / len(self.calls.seeds)
                if self._times_alone:
                    low, high = self.calls.batches[0]
                    seconds = self.calls.run(0)[1] / (high - low)
                self.keep_full(np.concatenate([pictures for pictures, _ in found]), seconds)
                self.save()

    def _tune(self, jobs: Sequence[Job]) -> None:
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
        try:
            with quiet(self.model.pipeline):
                with self.crew.together():
                    entry = method.make(self.model, job.budget)
                return self._judge(entry)
        except CrewError:
            raise  # the other processes are gone, whatever the method is
        except Exception as error:  # of another package, or of a method of one's own, it may be any
            return Outcome(method.name, "", job.budget, error=f"{type(error).__name__}: {error}"), None
        finally:
            _restore(self.model.pipeline)

    def _judge(self, entry: Entry) -> tuple[Outcome | None, Pictures | None]:
        def look(batch: int, pictures: Pictures) -> tuple[Fidelity, Pictures]:
            return fidelity(self.full[batch], pictures), first_stills(pictures, self.calls.batches[batch][0])

        crew, alone = self.crew, self._times_alone
        how: dict[str, Any] = {"counts": True, "look": look, "crew": crew, "alone": alone, "changed": entry.call}
        trial = run_trial(self.calls, entry.attach, self.repeats, **how)
        if trial is None:
            return None, None
        close = [fidelity for fidelity, _ in trial.looks]
        outcome = Outcome(
            entry.method,
            entry.setting,
            entry.budget,
            used=trial.used,
            seconds=trial.seconds,
            speedup=trial.speedup,
            speedups=trial.speedups,
            psnr=tuple(chain(*(one.psnr for one in close))),
            ssim=tuple(chain(*(one.ssim for one in close))),
            lpips=tuple(chain(*(one.lpips for one in close))),
            cache_bytes=trial.cache_bytes,
            operators=trial.timing.operators,
            reads=trial.timing.reads,
        )
        return outcome, np.concatenate([pictures for _, pictures in trial.looks])


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
