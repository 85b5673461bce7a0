"""The tests that diffusers has for its caches, for every one of its transformers: copied among its own tests.

There they are written once, as mixins, and applied to one model.
"""

import importlib
import pathlib

from diffusers.models.cache_utils import CacheMixin

from .. import testing_utils

for path in sorted(pathlib.Path(__file__).parent.glob("test_models_transformer_*.py")):
    module = importlib.import_module(f"{__package__}.{path.stem}")
    for name, config in list(vars(module).items()):
        inputs_of_a_model = name.endswith("TesterConfig") and config.__module__ == module.__name__
        if not inputs_of_a_model or name.endswith(("QuantTesterConfig", "SDNQTesterConfig", "KVCacheTesterConfig")):
            continue
        if issubclass(config().model_class, CacheMixin):
            for cache in ("FirstBlockCache", "TaylorSeerCache"):
                made = f"Test{name.removesuffix('TesterConfig')}{cache}"
                globals()[made] = type(made, (config, getattr(testing_utils, f"{cache}TesterMixin")), {})
