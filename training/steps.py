"""Numbers of sampling steps: which ratios divide them, and which ladders arrive. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from dnnlib.cli import UsageError

MAX_STEPS = 100_000  # of a sampler; more is a typing error, and would fill the memory


def ratios_that_work(steps: int) -> list[int]:
    """Every ratio > 1 that divides `steps`."""
    return [ratio for ratio in range(2, steps + 1) if steps % ratio == 0]


def steps_down(steps: int, ratio: int = 2) -> list[int]:
    """`steps`, and what is left of them divided by `ratio` again and again, as long as that is a whole number.

    Raises ValueError for no steps, and for a ratio below 2.
    """
    if steps < 1 or ratio < 2:
        raise ValueError(f"{steps} steps can't be taken {ratio} at a time; a sampler needs at least one step")
    chain = [steps]
    while chain[-1] % ratio == 0:
        chain.append(chain[-1] // ratio)
    return chain


def check_steps(num_steps: int | None, ratio: int) -> None:
    """Raises UsageError for invalid numbers of steps."""
    if ratio < 2:
        raise UsageError(f"--ratio={ratio}: a student takes at least 2 steps of its teacher at once")
    if num_steps is None:
        return
    if not 1 <= num_steps <= MAX_STEPS:
        raise UsageError(f"--num_steps={num_steps}: a teacher takes {ratio} to {MAX_STEPS} steps")
    if num_steps % ratio:
        works = ratios_that_work(num_steps)
        hint = f"ratios that work: {', '.join(map(str, works))}" if works else "a single step is the end"
        raise UsageError(f"--num_steps={num_steps} is not divisible by --ratio={ratio}; {hint}")


def plan_ladder(num_steps: int, until: int, ratios: Sequence[int]) -> list[int]:
    """The ratios of every stage from `num_steps` down to `until`; one given ratio is used throughout.

    Raises UsageError for a chain that does not arrive, with one that does.
    """
    if until < 1 or num_steps <= until:
        raise UsageError(f"a ladder from {num_steps} to {until} steps has no stages; --until must be below --num_steps")
    chain = list(ratios)
    if len(ratios) == 1 and ratios[0] > 1:
        while until * prod(chain) < num_steps:
            chain += ratios
    if until * prod(chain) != num_steps or min(chain) < 2:
        raise UsageError(
            f"--ratio={','.join(map(str, ratios))} does not lead from {num_steps} steps to {until}"
            f"{_remedy(num_steps, until, max([*ratios[:1], 2]))}"
        )
    return chain


def _remedy(num_steps: int, until: int, ratio: int) -> str:
    if num_steps % until:
        near = min((until * ratio**k for k in range(1, 12)), key=lambda n: abs(n - num_steps))
        return f": {num_steps} is no multiple of {until}; --num_steps={near} with --ratio={ratio} does"
    factors, rest = [], num_steps // until
    for prime in range(2, rest + 1):
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
    return f"; --ratio={','.join(map(str, factors))} does"
