"""The version of the installed package; ``pyproject.toml`` is its only source."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("layercache")
except PackageNotFoundError:
    __version__ = "0+checkout"
