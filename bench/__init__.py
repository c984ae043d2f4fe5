"""Benchmarks. Start them as `python -m bench.run --help` and `python -m bench.recipe --help`."""
