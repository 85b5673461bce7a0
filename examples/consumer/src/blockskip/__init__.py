"""A first-block cache for any list of blocks."""

from blockskip.cache import FirstBlockCache as FirstBlockCache
