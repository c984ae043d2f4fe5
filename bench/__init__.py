"""Benchmarks. Start them as `python -m bench.run --help`.

`run` times every stage of the work against the plain way to do it (`plain`), `load` the reading of network files;
`recipe`, `compare` and `earlier_attempt` set recipes and ladders side by side.
"""
