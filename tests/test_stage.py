"""One stage and a chain of them: what is refused, what is suggested, and what a student's file will say."""

from dataclasses import replace
from itertools import pairwise
from math import prod
from types import SimpleNamespace

import pytest

from dnnlib.cli import UsageError, UserError
from engine.setup import check_compatible
from formats.network_files import NetworkFile
from helpers import small_network
from training.distillation import Stage, plan_stage
from training.grids import Sampling, karras_levels, network_grid
from training.steps import plan_ladder


@pytest.fixture(scope="module")
def original():
    return NetworkFile(small_network(), None, "a" * 64, "original.pkl", None, {})


def student_of(stage: Stage, name: str) -> NetworkFile:
    """What loading the student of a stage would give."""
    return replace(stage.teacher, sampling=stage.sampling, sha256=name[0] * 64, source=name)


def test_an_undistilled_teacher_gets_the_rho_grid_and_heun(original):
    stage = plan_stage(original, 32)
    assert (stage.solver, stage.ratio) == ("heun", 2)
    assert stage.grid.levels == pytest.approx((*karras_levels(32), 0.0), rel=1e-6) and stage.grid.levels[0] == 80
    assert plan_stage(original, 32, solver="euler").solver == "euler"
    assert plan_stage(original, 32, 4).sampling.grid.levels == stage.grid.levels[::4]


def test_grids_nest_and_lineage_grows_from_stage_to_stage(original):
    first = plan_stage(original, 12, 2)
    six = student_of(first, "six.pkl")
    second = plan_stage(six, 6, 3)
    two = student_of(second, "two.pkl")
    third = plan_stage(two, None, 2)
    assert [stage.solver for stage in (first, second, third)] == ["heun", "euler", "euler"]
    assert second.grid.levels == first.grid.levels[::2] and third.grid.levels == first.grid.levels[::6]
    assert third.sampling.grid.levels == (80.0, 0.0) and third.sampling.teacher_steps == 2
    assert third.sampling.lineage == (
        {"network": "original.pkl", "sha256": "a" * 64, "steps": 12, "solver": "heun"},
        {"network": "six.pkl", "sha256": "s" * 64, "steps": 6, "solver": "euler"},
        {"network": "two.pkl", "sha256": "t" * 64, "steps": 2, "solver": "euler"},
    )
    assert Sampling.from_dict(third.sampling.to_dict()) == third.sampling
    assert "6 euler steps -> 2, noise levels 80, " in second.describe() and second.describe().endswith(", 0")
    assert plan_stage(original, 64).describe().count(",") == 7, "a long grid is shortened"


@pytest.mark.parametrize(
    ("steps", "ratio", "message"),
    [
        (None, 2, "--num_steps is needed: original.pkl"),
        (9, 2, "ratios that work: 3, 9"),
        (8, 1, "--ratio=1: a student takes at least 2"),
        (0, 2, "--num_steps=0"),
        (-4, 2, "--num_steps=-4"),
        (1, 2, "a single step is the end"),
        (7, 2, "ratios that work: 7"),
    ],
)
def test_impossible_stages_are_refused(original, steps, ratio, message):
    with pytest.raises(UsageError) as caught:
        plan_stage(original, steps, ratio)
    assert message in str(caught.value)


def test_what_contradicts_a_student_is_refused(original):
    student = student_of(plan_stage(original, 8), "four.pkl")
    assert plan_stage(student, None).grid == plan_stage(student, 4).grid == student.sampling.grid
    assert plan_stage(student, 4, solver="euler").solver == "euler"
    for args, message in (
        ({"num_steps": 8}, "was distilled to 4 steps on a grid of its own; use --num_steps=4 or leave it out"),
        ({"num_steps": None, "ratio": 3}, "ratios that work: 2, 4"),
        ({"num_steps": 4, "solver": "heun"}, "its output is a jump and not a slope; use euler"),
    ):
        with pytest.raises(UsageError) as caught:
            plan_stage(student, **args)
        assert message in str(caught.value)
    last = student_of(plan_stage(student, None, 4), "one.pkl")
    with pytest.raises(UsageError, match="a single step is the end"):
        plan_stage(last, None)
    with pytest.raises(UsageError, match="a single step is the end"):
        plan_stage(last, 4)


def test_more_steps_than_a_network_tells_apart_are_refused_with_the_largest_that_work():
    coarse = NetworkFile(small_network(cls="iDDPMPrecond", M=40), None, "b" * 64, "coarse.pkl", None, {})
    with pytest.raises(UsageError, match=r"--num_steps=64: .*at most (\d+) work") as caught:
        plan_stage(coarse, 64)
    works = int(str(caught.value).split("at most ")[1].split()[0])
    assert network_grid(coarse.net, works).steps == works
    with pytest.raises(ValueError, match="at most"):
        network_grid(coarse.net, works + 1)


def test_ladders_with_ratios_of_their_own():
    assert plan_ladder(18, 1, [2, 3, 3]) == [2, 3, 3] and plan_ladder(12, 1, [2, 6]) == [2, 6]
    with pytest.raises(UsageError) as caught:
        plan_ladder(18, 1, [2])
    assert str(caught.value) == "--ratio=2 does not lead from 18 steps to 1; --ratio=2,3,3 does"


def test_ladders_without_a_stage_are_refused():
    for steps, until in ((4, 4), (4, 8), (1, 1), (4, 0)):
        with pytest.raises(UsageError, match="--until must be below --num_steps"):
            plan_ladder(steps, until, [2])


IMPOSSIBLE = [
    (32, 3, [2]),
    (32, 5, [2]),
    (18, 1, [2]),
    (20, 1, [2]),
    (7, 1, [2]),
    (7, 3, [2]),
    (12, 1, [2, 2]),
    (12, 1, [2, 3, 2, 5]),
    (16, 4, [8]),
    (100, 7, [2]),
    (8, 1, [1]),
    (9, 4, [3]),
    (3, 2, [2]),
]


@pytest.mark.parametrize(("steps", "until", "ratios"), IMPOSSIBLE)
def test_following_the_suggestions_arrives(steps, until, ratios):
    """A refusal names an option with a value; after at most two of them the ladder can be climbed."""
    with pytest.raises(UsageError):
        plan_ladder(steps, until, ratios)
    for _ in range(2):
        steps, ratios = follow_suggestion(steps, until, ratios)
    assert until * prod(plan_ladder(steps, until, ratios)) == steps


def follow_suggestion(steps, until, ratios):
    try:
        plan_ladder(steps, until, ratios)
        return steps, ratios
    except UsageError as exc:
        name, value = str(exc).split(";")[-1].strip().split()[0].split("=")
    assert name in ("--num_steps", "--ratio")
    return (int(value), ratios) if name == "--num_steps" else (steps, [int(part) for part in value.split(",")])


def test_every_small_ladder_agrees_with_plain_arithmetic():
    """Accepted if and only if dividing by the ratio again and again hits --until."""
    for steps in range(2, 40):
        for until in range(1, steps):
            for ratio in (2, 3, 4):
                reached = [steps]
                while reached[-1] % ratio == 0 and reached[-1] > until:
                    reached.append(reached[-1] // ratio)
                if reached[-1] == until:
                    assert all(a == b * ratio for a, b in pairwise(reached))
                    assert plan_ladder(steps, until, [ratio]) == [ratio] * (len(reached) - 1)
                else:
                    with pytest.raises(UsageError):
                        plan_ladder(steps, until, [ratio])


def test_only_the_teachers_own_kind_of_data_will_do(original):
    plain, classes = (replace(original, net=small_network(8, 1, label_dim=n), source="t.pkl") for n in (0, 4))

    def data(resolution, channels, label_dim):
        facts = {"resolution": resolution, "num_channels": channels, "label_dim": label_dim}
        return SimpleNamespace(**facts, has_label_vectors=False)

    check_compatible(plain, data(8, 1, 0))
    check_compatible(classes, data(8, 1, 4))
    for teacher, facts, message in (
        (plain, (16, 1, 0), "t.pkl makes images of 8x8 with 1 channel, the data set has 16x16"),
        (plain, (8, 3, 0), "the data set has 8x8 with 3;"),
        (plain, (8, 1, 4), "t.pkl knows no classes; use --cond=0"),
        (classes, (8, 1, 0), "has 4 classes, the data set has no labels"),
        (classes, (8, 1, 10), "has 4 classes, the data set has 10"),
    ):
        with pytest.raises(UserError) as caught:
            check_compatible(teacher, data(*facts))
        assert message in str(caught.value)
