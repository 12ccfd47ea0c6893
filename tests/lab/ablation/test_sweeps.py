"""Grids in words, their points, and which runs are one program."""

import dataclasses
import json

import pytest

import posjax as pj
from posjax.encodings.spec import parametrize_spec, parse_encoding, substitute, with_argument
from posjax.lab.ablation.sweeps import grid, groups, parse_sweep
from posjax.lab.config import Config

CONFIG = Config(task="flip_flop", seq_length=16, encodings=("rope", "alibi", "rope + cope(8)"))


def test_numbers_that_may_be_traced_are_blanked_and_filled_again():
    spec, numbers = parametrize_spec("rope(theta=500) + cope(64, gates='keys', clamp=15) / identity")
    assert spec == "rope(theta=_0) + cope(64, gates='keys', clamp=_2, gate_bias=_1) / identity"
    assert numbers == (500.0, 0.0, 15.0)
    assert substitute(spec, {1: -2.0}) == "rope(theta=_0) + cope(64, gates='keys', clamp=_1, gate_bias=-2.0) / identity"
    assert parametrize_spec("rope(500.0, 0.5)") == ("rope(_0, 0.5)", (500.0,))
    assert parametrize_spec("t5 / alibi") == ("t5 / alibi", ())


def test_equal_layers_stay_equal_when_they_are_blanked():
    spec, numbers = parametrize_spec("rope / cope(8) / rope")
    assert spec == "rope(theta=_0) / cope(8, gate_bias=_1) / rope(theta=_0)" and numbers == (10_000.0, 0.0)
    first, _, last = parse_encoding(spec, numbers)
    assert first is last


@pytest.mark.parametrize(
    ("spec", "change", "expected"),
    [
        ("rope + cope(64)", ("cope", "gate_bias", -2.0), "rope + cope(64, gate_bias=-2.0)"),
        ("rope(500.0) / rope", ("rope", "theta", 10.0), "rope(10.0) / rope(theta=10.0)"),
        ("cope(64, gates='keys')", ("cope", "gates", "values"), "cope(64, gates='values')"),
        ("alibi", ("rope", "theta", 10.0), "alibi"),
        ("rope(500.0)", ("rope", "scaling", pj.linear_scaling(2.0)), "rope(500.0, scaling=linear_scaling(factor=2.0))"),
    ],
)
def test_an_argument_is_set_where_it_belongs(spec, change, expected):
    assert with_argument(spec, *change) == expected
    parse_encoding(expected)


def test_scalings_are_swept():
    """In results, which are JSON, a scaling is its text."""
    points = grid(CONFIG, [parse_sweep("rope.scaling=None,yarn_scaling(4.0, 64)"), parse_sweep("rope.theta=1e4,1e5")])
    yarn = "yarn_scaling(factor=4.0, original_max_length=64)"
    assert points[2].config.encoding == f"rope(scaling={yarn}, theta=10000.0)"
    assert json.loads(json.dumps(points[2].settings)) == {"rope.scaling": yarn, "rope.theta": 1e4}
    assert parse_encoding(points[2].config.encoding) == pj.rope(scaling=pj.yarn_scaling(4.0, 64))
    assert [len(group.runs) for group in groups(points, [0])] == [2, 2, 1, 2, 2]  # thetas of a scaling share a program


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate=1e-3, 3e-4", ("learning_rate", (1e-3, 3e-4))),
        ("encoding=rope,cope(64, gates='keys'),rope + cope(8)", ("encoding", ("rope", "cope(64, gates='keys')", "rope + cope(8)"))),
        ("norm=rmsnorm,layernorm", ("norm", ("rmsnorm", "layernorm"))),
        ("clip_norm=1.0,None", ("clip_norm", (1.0, None))),
        ("rope.theta=1e4,500", ("rope.theta", (1e4, 500))),
        ("cope.gates='keys',values", ("cope.gates", ("keys", "values"))),
        (
            "rope.scaling=None,linear_scaling(2.0), yarn_scaling(4.0, 64)",
            ("rope.scaling", (None, pj.linear_scaling(2.0), pj.yarn_scaling(4.0, 64))),
        ),
    ],
)
def test_sweeps_are_read(text, expected):
    assert parse_sweep(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate", "must look like learning_rate=1e-3,3e-4"),
        ("learning_rate=", "must look like"),
        ("learning_rat=1", "did you mean learning_rate"),
        ("seeds=1,2", "seeds cannot be swept"),
        ("workdir=a,b", "workdir cannot be swept"),
        ("learning_rate=1,,2", "sweep must not have empty values, got"),
        ("learning_rate=1,1.0", "sweep values must all differ, got 1 more than once in"),
        ("rope.thet=1", "rope has no argument 'thet'; it takes theta, fraction, pairing"),
        ("rop.theta=1", "'rop' is not an encoding; did you mean 'rope'"),
        ("identity.theta=1", "takes no arguments"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_sweep(text)


def test_a_grid_is_every_combination_without_those_that_change_nothing():
    points = grid(CONFIG, [("rope.theta", (100.0, 1000.0)), ("learning_rate", (1e-3, 1e-2))])
    assert [(p.config.encoding, p.config.learning_rate) for p in points] == [
        ("rope(theta=100.0)", 1e-3),
        ("rope(theta=100.0)", 1e-2),
        ("rope(theta=1000.0)", 1e-3),
        ("rope(theta=1000.0)", 1e-2),
        ("alibi", 1e-3),
        ("alibi", 1e-2),
        ("rope(theta=100.0) + cope(8)", 1e-3),
        ("rope(theta=100.0) + cope(8)", 1e-2),
        ("rope(theta=1000.0) + cope(8)", 1e-3),
        ("rope(theta=1000.0) + cope(8)", 1e-2),
    ]
    assert points[4].settings == {"learning_rate": 1e-3} and points[4].label == "alibi, learning_rate=0.001"
    assert points[0].settings == {"rope.theta": 100.0, "learning_rate": 1e-3}


def test_a_swept_encoding_stands_in_place_of_the_configurations():
    assert [p.config.encoding for p in grid(CONFIG, [("encoding", ("t5", "cope(4)"))])] == ["t5", "cope(4)"]


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (
            [("learning_rate", (1.0,)), ("learning_rate", (2.0,))],
            "each field must be swept only once, got two .*learning_rate",
        ),
        ([("learning_rate", (-1.0,))], "learning_rate must be positive, got -1.0"),
        ([("learning_rate", ("fast",))], "learning_rate must be a positive number, got 'fast'"),
        ([("rope.theta", (-1.0,))], "theta must be positive"),
        ([("encoding", ("rop",))], "did you mean 'rope'"),
    ],
)
def test_values_that_cannot_be_are_refused(sweeps, message):
    with pytest.raises(ValueError, match=message):
        grid(CONFIG, sweeps)


def test_runs_that_differ_in_numbers_alone_are_one_group():
    sweeps = [("rope.theta", (100.0, 1000.0)), ("learning_rate", (1e-3, 1e-2)), ("weight_decay", (0.1,)), ("embed_dim", (16, 32))]
    made = groups(grid(CONFIG, sweeps), seeds=(0, 1, 2))
    assert [(g.spec, g.config.embed_dim, len(g.runs)) for g in made] == [
        ("rope(theta=_0)", 16, 12),
        ("rope(theta=_0)", 32, 12),
        ("alibi", 16, 6),
        ("alibi", 32, 6),
        ("rope(theta=_0) + cope(8, gate_bias=0.0)", 16, 12),
        ("rope(theta=_0) + cope(8, gate_bias=0.0)", 32, 12),
    ]
    assert dict(made[0].runs[0].traced) == {"learning_rate": 1e-3, "_0": 100.0}
    assert {tuple(run.traced) for g in made[2:4] for run in g.runs} == {("learning_rate",)}
    assert [run.seed for run in made[0].runs[:4]] == [0, 1, 2, 0]


def test_a_group_of_seeds_alone_is_the_program_of_a_single_run():
    (group,) = groups(grid(dataclasses.replace(CONFIG, encodings=("rope + cope(8)",)), []), seeds=(0, 1))
    assert group.spec == "rope + cope(8)" and all(not run.traced for run in group.runs)


def test_clipping_and_none_are_two_programs():
    made = groups(grid(dataclasses.replace(CONFIG, encodings=("rope",)), [("clip_norm", (None, 1.0, 2.0))]), seeds=(0,))
    assert [len(g.runs) for g in made] == [1, 2]
