"""What is known of each transformer class."""

from layercache.models.registry import known_models as known_models
from layercache.models.registry import register_model as register_model
from layercache.models.registry import spec_for as spec_for
from layercache.models.spec import ModelSpec as ModelSpec

__all__ = ["ModelSpec", "known_models", "register_model", "spec_for"]
