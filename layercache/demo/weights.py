"""Where the bundled model's weights are: in a checkout, else in the package `layercache-demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from layercache.errors import MissingExtraError

MISSING = 'the weights of the bundled model are not installed: pip install "layercache[demo]"'
CHECKOUT = Path(__file__).resolve().parents[2] / "integrations" / "demo" / "layercache_demo"
PACKAGE = "layercache_demo"
FILE = "transformer/diffusion_pytorch_model.safetensors"  # which a source distribution leaves out


def find_weights() -> Path:
    """The folder with ``transformer/`` and ``class_encoder/``; nothing is imported.

    Raises:
        MissingExtraError: neither a checkout nor the package has it.
    """
    if (CHECKOUT / FILE).is_file():
        return CHECKOUT
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingExtraError(MISSING)
    return Path(found.origin).parent
