"""The version of the installed package, which setuptools-scm takes from the tag."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("layercache")
except PackageNotFoundError:
    __version__ = "0+checkout"
