"""Counts of caches as Prometheus reads them."""

import sys

import pytest

import layercache
from layercache.errors import ArgumentError, MissingExtraError
from layercache.methods import FBCache, Universal
from layercache.metrics import prometheus
from support.tiny import generate, mixed_cells, schedule_for, tiny_pipeline

client = pytest.importorskip("prometheus_client")
STEPS = 8


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def registry():
    return client.CollectorRegistry()


def scraped(registry) -> dict[str, float]:
    """What a scrape gives, by name and label, read from the text as Prometheus would."""
    from prometheus_client.parser import text_string_to_metric_families

    text = client.generate_latest(registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {".".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def expected(report, namespace="layercache") -> dict[str, float]:
    return {
        f"{namespace}_forwards_total": report.forwards,
        f"{namespace}_generations_total": report.generations,
        f"{namespace}_groups_total.computed": report.computed_cells,
        f"{namespace}_groups_total.reused": report.cached_cells,
        f"{namespace}_fallback_rows_total": report.fallback_rows,
        f"{namespace}_unidentified_total": report.unidentified,
        f"{namespace}_cache_bytes": report.cache_bytes,
    }


@pytest.mark.parametrize("plan", [FBCache(threshold=2.0), Universal(budget=0.5)], ids=lambda plan: plan.name)
def test_of_a_method_a_scrape_is_its_report(plan, pipe, registry):
    with layercache.enabled(pipe, plan) as cache:
        collector = prometheus(cache, registry, "mine")
        assert scraped(registry)["mine_forwards_total"] == 0
        generate(pipe, steps=STEPS)
        assert scraped(registry) == expected(cache.report(), "mine")
        assert cache.report().cached_cells > 0
    registry.unregister(collector)
    assert scraped(registry) == {}


def test_of_a_schedule_all_requests_are_counted_and_none_is_named(pipe, registry):
    with layercache.enabled(pipe, schedule_for(pipe, mixed_cells(STEPS))) as cache:
        prometheus(cache, registry)
        generate(pipe, steps=STEPS)
        alone = expected(cache.report())
        assert scraped(registry) == alone | {"layercache_requests": 0, "layercache_evictions_total": 0}
        with cache.request("secret name", pipe.scheduler):
            generate(pipe, steps=STEPS)
        both = {name: 2 * value for name, value in alone.items()}
        assert scraped(registry) == both | {"layercache_requests": 1, "layercache_evictions_total": 0}
        cache.forget("secret name")
        after = both | {"layercache_cache_bytes": alone["layercache_cache_bytes"]}
        assert scraped(registry) == after | {"layercache_requests": 0, "layercache_evictions_total": 0}
        assert b"secret" not in client.generate_latest(registry)


def test_what_cannot_be_counted_is_refused(pipe, registry, monkeypatch):
    with layercache.enabled(pipe, FBCache(threshold=0.3)) as cache:
        prometheus(cache, registry)
        with pytest.raises(ArgumentError, match="namespace of its own"):
            prometheus(cache, registry)
        with pytest.raises(ArgumentError, match=r"what layercache\.enable returned, got FBCache"):
            prometheus(FBCache(threshold=0.3), registry)
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        with pytest.raises(MissingExtraError, match=r"layercache\[metrics\]"):
            prometheus(cache)
