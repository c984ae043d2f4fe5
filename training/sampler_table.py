"""The solvers of undistilled networks: which function of training.samplers runs each, and what it costs.

A new one is a function there and a line here: generate.py's choices and help, `nfe` and `plan_sampling` follow. Imports
no torch, so that `--help` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A solver of the probability-flow ODE.

    sampler  name of a function in training.samplers: (net, latents, class_labels, randn_like, num_steps, settings)
    nfe      network calls per image for a number of steps
    text     a few words for the help
    """

    sampler: str
    nfe: Callable[[int], int]
    text: str


SOLVERS: dict[str, Method] = {
    "euler": Method("ablation_sampler", lambda steps: steps, "Euler, Alg. 3"),
    "heun": Method("ablation_sampler", lambda steps: 2 * steps - 1, "Heun, Alg. 3"),  # the jump to 0 is Euler's
    "dpmpp2m": Method("dpmpp2m_sampler", lambda steps: steps, "DPM-Solver++(2M)"),
}
