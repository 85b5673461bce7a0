"""Counts of enabled caches for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layercache.errors import ArgumentError, MissingExtraError
from layercache.runtime.cache import Cache
from layercache.runtime.requests import ScheduleCache

__all__ = ["prometheus"]


def prometheus(cache: Cache, registry: Any = None, namespace: str = "layercache") -> Any:
    """Registers a collector that gives the counts of a cache whenever they are scraped.

    ``layercache_forwards_total``, ``layercache_generations_total``, ``layercache_groups_total`` (label ``result``:
    ``computed`` or ``reused``), ``layercache_fallback_rows_total`` and ``layercache_unidentified_total`` (forwards
    computed in full, as in `CacheReport`), ``layercache_cache_bytes``; of a cache that serves requests, whose counts
    are those of all of them, also ``layercache_requests`` (known now) and ``layercache_evictions_total``.

    Args:
        cache: what ``layercache.enable`` returned, of any plan.
        registry: of prometheus_client; by default the global one.
        namespace: the names begin with it; of several caches in one registry each needs its own.

    Returns:
        The collector: ``registry.unregister(collector)`` ends it, once the cache is disabled.

    Raises:
        MissingExtraError: prometheus-client is not installed.
        ArgumentError: this is no cache, or names of this namespace are registered already.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise MissingExtraError(
            'metrics need prometheus-client, which is not installed: pip install "layercache[metrics]"'
        ) from error
    if not isinstance(cache, Cache):
        raise ArgumentError(f"expected what layercache.enable returned, got {type(cache).__name__}", argument="cache")
    collector = CacheCollector(cache, namespace)
    try:
        (REGISTRY if registry is None else registry).register(collector)
    except ValueError as error:
        raise ArgumentError(
            f"metrics named {namespace}_... are registered already: unregister the collector of the other cache, or "
            "give this one a namespace of its own",
            argument="namespace",
        ) from error
    return collector


class CacheCollector:
    """Asks a cache for its counts at every scrape, as a collector of prometheus_client."""

    def __init__(self, cache: Cache, namespace: str = "layercache"):
        self.cache, self.namespace = cache, namespace

    def describe(self) -> list[Any]:
        """The metric families without values, so that names which are taken are refused at once."""
        return self._families(dict.fromkeys(_NAMES, 0.0))

    def collect(self) -> list[Any]:
        """The metric families. A generation never waits; of a method the scrape does, since its report is timed."""
        return self._families(_counts(self.cache))

    def _families(self, counts: Mapping[str, float]) -> list[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        groups = CounterMetricFamily(
            f"{self.namespace}_groups", "Layer groups that forwards computed or reused.", labels=["result"]
        )
        groups.add_metric(["computed"], counts["misses"])
        groups.add_metric(["reused"], counts["hits"])
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        return [groups] + [
            kinds[kind](f"{self.namespace}_{name}", about, value=counts[key])
            for key, (kind, name, about) in _FAMILIES.items()
            if key in counts
        ]


_FAMILIES = {
    "forwards": ("counter", "forwards", "Calls of the transformer."),
    "generations": ("counter", "generations", "Generations begun."),
    "fallback_rows": ("counter", "fallback_rows", "Forwards computed in full because a residual was missing."),
    "unidentified": ("counter", "unidentified", "Forwards computed in full because nothing said their step."),
    "bytes": ("gauge", "cache_bytes", "Memory of stored residuals and velocities."),
    "requests": ("gauge", "requests", "Requests that have a place in the cache."),
    "evictions": ("counter", "evictions", "Times that a request lost its residuals to the limit of memory."),
}
_NAMES = (*_FAMILIES, "hits", "misses")


def _counts(cache: Cache) -> dict[str, float]:
    """Of a schedule all requests together, of any other plan what its report says."""
    if isinstance(cache, ScheduleCache):
        return cache.metrics()
    report = cache.report()
    return {
        "forwards": report.forwards,
        "generations": report.generations,
        "misses": report.computed_cells,
        "hits": report.cached_cells,
        "fallback_rows": report.fallback_rows,
        "unidentified": report.unidentified,
        "bytes": report.cache_bytes,
    }
