"""Every error layercache raises on purpose, so that one ``except LayerCacheError`` catches them all."""

from __future__ import annotations

from collections.abc import Collection


class LayerCacheError(Exception):
    """Base class of the library's own errors.

    Attributes:
        argument: name of the argument that was refused; ``None`` where the error is of no single argument. The command
            line names the option that sets it.
    """

    argument: str | None = None

    def __init__(self, *parts: object, argument: str | None = None) -> None:
        super().__init__(*parts)
        if argument is not None:
            self.argument = argument


class ArgumentError(LayerCacheError, TypeError):
    """A function was given something of another kind, such as a profile in the place of its fingerprint."""


class OpInputError(LayerCacheError, ValueError):
    """An argument of a public op is wrong: shape, dtype, device, layout, aliasing or value."""


class FileFormatError(LayerCacheError, ValueError):
    """A schedule or profile file is damaged, truncated, of another kind, or written by a newer version."""


class OutputError(LayerCacheError, OSError):
    """A file cannot be written where it was asked for: no folder, no permission, a pipe, a full disk."""


class HubError(LayerCacheError, OSError):
    """A repository of the Hugging Face Hub, or a file of it, does not exist, cannot be reached, or refuses access."""


class ScheduleError(LayerCacheError, ValueError):
    """A schedule contradicts itself, for example a cell that reads a step which was never computed."""


class ScheduleMismatchError(LayerCacheError):
    """A schedule was made for another model, step count or noise schedule than it is used on."""


class CalibrationError(LayerCacheError):
    """Calibration saw no samples, an incomplete run, or a number that is not finite."""


class BudgetError(LayerCacheError, ValueError):
    """A budget or speedup is out of range or cannot be reached under the constraints."""


class MethodError(LayerCacheError, ValueError):
    """A setting of a caching method is out of range, or does not fit the model or the run."""


class UnsupportedModelError(LayerCacheError, TypeError):
    """The library does not know how to route the blocks of this model."""


class CacheStateError(LayerCacheError, RuntimeError):
    """A cache is enabled twice, disabled without being enabled, or used where it cannot work."""


class ForeignCacheError(CacheStateError, ValueError):
    """One of diffusers' caches is enabled where one of ours is; a `ValueError` as diffusers' own."""


class NonFiniteResidualError(LayerCacheError, ArithmeticError):
    """A stored residual held NaN or infinity, so the picture of that generation cannot be trusted.

    Attributes:
        samples: which of the transformer's batch hold it, counted from 0; empty where that is not known.
        was_warned_of: whether a `NonFiniteWarning` has said so already.
    """

    samples: tuple[int, ...] = ()
    was_warned_of: bool = False

    @classmethod
    def of(cls, what: str, samples: Collection[int] = (), may_overflow: bool = False) -> NonFiniteResidualError:
        """Of what was stored; ``may_overflow``: in float16, by a group of blocks that may add more than that holds."""
        found = tuple(sorted(samples))
        word, numbers = "sample" if len(found) == 1 else "samples", ", ".join(map(str, found))
        which = f" in {word} {numbers} of the batch (counted from 0)" if found else ""
        cause = (
            "the stored residual may have overflowed float16, which ends at 65504, where the model's own numbers do "
            "not; residuals are stored in float32 from now on: run it again (or enable with storage='float32')"
            if may_overflow
            else "the model itself produced it (try bfloat16 or float32 instead of float16), caching was not the cause"
        )
        error = cls(f"{what} held NaN or infinity{which}, not usable as a result; {cause}")
        error.samples = found
        return error


class NonFiniteWarning(RuntimeWarning):
    """Of a pipeline's finished call, some pictures are NaN; the call gives all of them (`NonFiniteResidualError`)."""


class CrewError(LayerCacheError, ConnectionError):
    """One of the processes that share the samples was ended, stopped answering, or was started wrongly."""


class MissingExtraError(LayerCacheError, ImportError):
    """A part of the library needs an optional package that is not installed."""


class LayerCacheWarning(UserWarning):
    """Something to know: a forward computed in full, or a file or a setting with which the run goes on."""
