"""Benchmarks. Start them as `python -m bench.run --help`.

`run` times every part of the work against the plain way to do it (`plain`); `recipe` trains and compares variants.
"""
