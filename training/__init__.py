"""Training, distillation and sampling of EDM networks.

Start with `sampling` (from a network file to images), `solvers` (every formula of the ODE), `grids` (noise grids),
`loss` (what is trained), `training_loop` (how) and `ladder` (stages and their measurement). docs/architecture.md has
the whole map, docs/notebook.md how to use it from Python.
"""
