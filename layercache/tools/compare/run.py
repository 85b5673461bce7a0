"""Every method on one model, the same seeds and budgets: `layercache compare` and `layercache.compare`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layercache._utils import metrics
from layercache._utils.files import check_output_folder
from layercache.errors import BudgetError, ScheduleMismatchError
from layercache.models.registry import find_transformer
from layercache.planning.search_files import digest_of, model_identity
from layercache.runtime.attachment import attachment_of
from layercache.tools.compare.calls import PictureCalls, Pictures, batches_of, fidelity, quiet
from layercache.tools.compare.entries import Job, Method, Methods, jobs_of, methods_of
from layercache.tools.compare.files import SHOWN as SHOWN
from layercache.tools.compare.files import VERSION as VERSION
from layercache.tools.compare.files import ComparisonFiles, Outcome, parsed_file
from layercache.tools.compare.files import read_comparison as read_comparison
from layercache.tools.compare.model import CalibratedModel, Entry
from layercache.tools.compare.own import contents_of
from layercache.tools.compare.trial import Counter as Counter
from layercache.tools.compare.trial import run_trial

REPEATS = 3


class Comparison(ComparisonFiles):
    """Runs entries one after the other; keeps what they gave, so that a run that was stopped goes on.

    Args:
        model: the model and its calibration samples.
        prompts: one call per entry: a list of as many prompts as the call has pictures, a prompt, or a mapping of
            arguments of the call.
        seeds: one per picture.
        folder: where results and pictures are kept.
        repeats: full and cached runs side by side that a speedup is the median of.
        request: what was asked for, for `layercache.tools.compare.files.finished`.

    Raises:
        BudgetError: a budget is out of range.
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
    ):
        metrics.check_installed()
        super().__init__(folder)
        self.model, self.repeats = model, repeats
        self.calls = PictureCalls(model.pipeline, prompts, seeds, model.call)
        for budget in model.budgets:
            if not 0 < budget <= 1:
                raise BudgetError(
                    f"budgets are shares of the block time above 0 and at most 1, got {budget}", argument="budgets"
                )
        check_output_folder(self.folder, "output")
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = _settings_of(model, self.calls)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if self.file.exists():
            self.take(parsed_file(self.file))
            if self.digest != digest:
                raise ScheduleMismatchError(
                    f"{self.file} compares another model, other seeds or other settings; name another folder"
                )
        self.settings, self.digest = settings, digest
        self.request = dict(request or {})

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
        """
        jobs = self._jobs(methods)
        pending = [job for job in jobs if not self.is_done(job) or (retry and self.outcomes[job.key].error)]
        for _ in range(len(jobs) - len(pending)):
            done()
        if pending or not self.has_full_pictures:
            say("generating the full pictures")
            with quiet(self.model.pipeline):
                self.full, seconds = self.calls.run_all()
            self.keep_full(self.full, seconds)
            self.save()
        for number, job in enumerate(pending, 1):
            at = "" if job.method.is_fixed else f" at {job.budget:g}"
            say(f"{job.method.name}{at} ({number} of {len(pending)})")
            self.outcomes[job.key] = self._outcome_of(job)
            self.save()
            done()
        return self.of(jobs)

    def count_jobs(self, methods: Methods | Sequence[Method]) -> int:
        """How many entries there are: every method at every budget."""
        return len(self._jobs(methods))

    def _jobs(self, methods: Any) -> list[Job]:
        is_resolved = not isinstance(methods, str) and all(isinstance(method, Method) for method in methods)
        return list(jobs_of(methods if is_resolved and methods else methods_of(methods), self.model.budgets))

    def _outcome_of(self, job: Job) -> Outcome:
        """What a job gave; its pictures are kept."""
        method = job.method
        try:
            with quiet(self.model.pipeline):
                outcome, pictures = self._judge(method.make(self.model, job.budget))
        except Exception as error:  # of another package, or of a method of one's own, it may be any
            outcome, pictures = Outcome(method.name, "", job.budget, error=f"{type(error).__name__}: {error}"), None
        finally:
            _restore(self.model.pipeline)
        budget = outcome.used if method.is_fixed else job.budget
        outcome = replace(outcome, budget=budget, is_fixed=method.is_fixed, identity=method.identity)
        if pictures is not None:
            self.keep(outcome, pictures)
        return outcome

    def _judge(self, entry: Entry) -> tuple[Outcome, Pictures]:
        trial = run_trial(self.calls, entry.attach, self.repeats, counts=True)
        close = fidelity(self.full, trial.pictures)
        outcome = Outcome(
            entry.method,
            entry.setting,
            entry.budget,
            used=trial.used,
            seconds=trial.seconds,
            speedup=trial.speedup,
            speedups=trial.speedups,
            psnr=close.psnr,
            ssim=close.ssim,
            lpips=close.lpips,
            cache_bytes=trial.cache_bytes,
            operators=trial.operators,
            reads=trial.reads,
        )
        return outcome, trial.pictures


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
