"""Tools on top of the library: command line, comparison, benchmarks, reports, demo."""
