"""Benchmarks of the ops: cases, measuring, results on disk. Run by ``layercache bench`` and ``pytest bench/``."""
