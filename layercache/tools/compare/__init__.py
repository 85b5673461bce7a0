"""Comparison of caching methods: entries, runs, report."""
