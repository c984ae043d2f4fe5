"""The method, networks and data: training, distillation and sampling of EDM networks.

Start with `distillation` (the method), `solvers` (every formula of the ODE), `grids` (noise grids) and `training_loop`
(a step). docs/architecture.md has the whole map, docs/notebook.md the use from Python.
"""
