"""The mathematics of the programs in experiments/, on small sizes."""

import argparse
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import quick_compilation  # noqa: F401, a fixture

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import common  # noqa: E402
import counting  # noqa: E402
import extrapolation  # noqa: E402
import flip_flop  # noqa: E402
import flip_flop_shapes  # noqa: E402
import language_code  # noqa: E402
import language_text  # noqa: E402
import readme  # noqa: E402
import roformer_decay  # noqa: E402
import roformer_linear  # noqa: E402
import selective_copy  # noqa: E402
import symmetry  # noqa: E402
import trained  # noqa: E402
import tupe  # noqa: E402

from posjax.runs import check  # noqa: E402
from posjax.source import open_source  # noqa: E402
from posjax.sweeps import groups  # noqa: E402

# What is written down


def test_a_result_says_what_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/experiments/name.py", "--steps", "3", "--encoding", "rope + cope(8)"])
    path = common.write("name", [{"loss": 1.5}], seeds=[0, 1])
    found = json.loads(path.read_text())
    assert path == tmp_path / "name.json" and [*tmp_path.iterdir()] == [path]
    assert found["command"] == "python experiments/name.py --steps 3 --encoding 'rope + cope(8)'"
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["jax"] == jax.__version__
    assert found["hardware"]["platform"] == "cpu" and found["hardware"]["devices"] == 8 and found["hardware"]["cpu_cores"] >= 1
    assert found["seeds"] == [0, 1] and found["rows"] == [{"loss": 1.5}]
    with pytest.raises(ValueError, match="JSON"):
        common.write("name", [{"loss": float("nan")}])
    assert json.loads(path.read_text()) == found


def test_tables_are_markdown():
    assert common.markdown(["a", "b"], [["x", 1], ["y", 2]]) == "| a | b |\n|---|---:|\n| x | 1 |\n| y | 2 |"


# Symmetry and expansion


def test_only_positions_and_a_mask_over_two_layers_tell_the_order():
    for is_causal, num_layers in ((False, 2), (True, 1)):
        assert symmetry.change_under_permutation("identity", is_causal, num_layers, 2) < 1e-5
    assert symmetry.change_under_permutation("identity", True, 2, 2) > 0.01
    assert symmetry.change_under_permutation("t5", False, 1, 2) > 0.01  # its table is zero before training


@pytest.fixture
def encoder():
    with jax.enable_x64(True):
        yield made()


@functools.cache
def made():
    return symmetry.scalar_of(0)


def test_the_float64_encoder_is_posjaxs(encoder):
    f, x, error = encoder
    assert error < 1e-5 and f(x).dtype == np.float64 and abs(float(f(x))) > 1e-3


def test_terms_of_the_expansion_are_finite_differences(encoder):
    f, x, _ = encoder
    m, n, step = 3, 11, 1e-3
    p_m, p_n = symmetry.sinusoids(50)[[5, 40]]
    terms, left = symmetry.expansion(f, x, m, n, p_m, p_n)

    def at(a: float, b: float) -> float:
        return float(f(x.at[m].add(a * step * p_m).at[n].add(b * step * p_n)))

    wanted = [
        (at(1, 0) - at(-1, 0)) / (2 * step),
        (at(0, 1) - at(0, -1)) / (2 * step),
        (at(1, 0) - 2 * at(0, 0) + at(-1, 0)) / step**2 / 2,
        (at(0, 1) - 2 * at(0, 0) + at(0, -1)) / step**2 / 2,
        (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / (4 * step**2),
    ]
    np.testing.assert_allclose(terms, wanted, rtol=1e-4, atol=1e-7)
    assert min(map(abs, wanted)) > 1e-6
    assert float(f(x.at[m].add(p_m).at[n].add(p_n))) == pytest.approx(float(f(x) + terms.sum() + left), rel=1e-12)
    assert float(p_m @ symmetry.cross_hessian(f, x, m, n) @ p_n) == pytest.approx(wanted[-1], rel=1e-4)


def test_the_remainder_is_of_third_order(encoder):
    f, x, _ = encoder
    sizes = np.geomspace(1e-2, 0.1, 3)
    left = np.abs(symmetry.remainders(f, x, 3, 11, jnp.asarray(sizes)))
    assert symmetry.fitted_power(sizes, left) == pytest.approx(3, abs=0.1)


def test_fitted_power_of_a_power():
    assert symmetry.fitted_power(np.array([1.0, 2.0, 5.0]), -7 * np.array([1.0, 2.0, 5.0]) ** 2.5) == pytest.approx(2.5)


def test_shares_of_variance():
    place = np.arange(40)
    m, n = place[:, None], place[None, :]
    by_distance = symmetry.explained(np.cos(0.3 * (m - n)))
    assert by_distance["by_distance"] == pytest.approx(1) and by_distance["by_one_position_each"] < 0.2
    one_each = symmetry.explained(np.sin(m) + n**2 / 100)
    assert one_each["by_one_position_each"] == pytest.approx(1) and one_each["by_distance"] < 0.6
    neither = symmetry.explained(np.random.default_rng(0).normal(size=(40, 40)))
    assert neither["by_distance"] == pytest.approx(78 / 1599, abs=0.04)  # 79 means of 1,600 numbers
    assert neither["by_one_position_each"] == pytest.approx(78 / 1599, abs=0.04)


# RoFormer's bound


def test_bound_in_closed_form():
    distances = np.array([0, 1, 2, 5, 100])
    # Two frequencies, 1 and 1/10: |S_1| = 1 and |S_2| = |2 cos(0.45 d)|.
    wanted = (1 + np.abs(2 * np.cos(0.45 * distances))) / 2
    np.testing.assert_allclose(roformer_decay.bound_in_numpy(distances, 4, theta=100.0), wanted, rtol=1e-12)
    assert roformer_decay.bound_in_numpy(np.array([0]), 16)[0] == pytest.approx(4.5)  # the mean of 1 .. 8


def test_decay_bound_is_the_formula_in_float64():
    distances = np.array([0, 1, 50, 250, 4096, 100_000])
    for head_dim, theta in ((64, 10_000.0), (128, 10_000.0), (8, 100.0)):
        ours = roformer_decay.decay_bound(jnp.asarray(distances), head_dim, theta)
        np.testing.assert_allclose(ours, roformer_decay.bound_in_numpy(distances, head_dim, theta), rtol=1e-5)


def test_products_are_rotations_and_stay_below_the_bound():
    distances, head_dim = np.array([0, 1, 7, 300]), 16
    query, key = np.random.default_rng(0).standard_normal((2, 200, head_dim))
    found = roformer_decay.products(query, key, distances)
    frequencies = 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    as_complex = [x[:, :8] + 1j * x[:, 8:] for x in (query, key)]
    turned = np.exp(1j * distances[:, None] * frequencies)
    wanted = np.einsum("pm,dm,pm->pd", as_complex[0], turned, as_complex[1].conj()).real
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    limits = roformer_decay.bounds_of(query, key, roformer_decay.bound_in_numpy(distances, head_dim))
    assert (np.abs(wanted) <= limits).all() and (np.abs(wanted) / limits).max() > 0.3
    # Equal channels everywhere: h changes once, from 2 to nothing past the end, and the bound is an equality of |S| there.
    ones = np.ones((1, 2))
    limit = roformer_decay.bounds_of(ones, ones, roformer_decay.bound_in_numpy(distances, 2))
    np.testing.assert_allclose(limit, [[2.0] * 4])


def test_sign_changes():
    assert roformer_decay.sign_changes(np.array([1.0, -2.0, -1.0, 3.0, 4.0])) == 0.5


# Experiments that train


def row(spec, seed, error, diverged=None, **settings):
    metrics = {"error": {"dense": error}, "limit": None, "parameters": 10}
    return {"encoding": spec, "seed": seed, "label": spec, "settings": settings, "metrics": metrics, "diverged": diverged}


def test_rows_are_found_and_written_as_the_papers_do():
    rows = [row("rope", 0, 1.0, dim=2), row("rope", 1, 3.0, dim=2), row("rope", 0, 9.0, dim=4), row("alibi", 0, 5.0, diverged=7)]
    assert trained.values(trained.of(rows, encoding="rope", dim=2), "dense") == [1.0, 3.0]
    assert trained.cell(trained.of(rows, dim=2), "dense") == "2.0 (1.4)"
    assert trained.cell(trained.of(rows, dim=4), "dense", 2) == "9.00"
    assert trained.cell(trained.of(rows, encoding="alibi"), "dense") == "1 of 1 diverged"


@pytest.mark.parametrize(
    ("lower", "higher", "expected"),
    [
        # Of three differences -1, -2, -3: t_{0.975, 2} = 4.303 standard errors of 1 / sqrt(3)
        ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], ["-2.0 % [-4.5, +0.5]", "not shown: the interval holds zero"]),
        ([1.0, 2.0, 3.0], [5.0, 6.1, 7.0], ["-4.0 % [-4.2, -3.9]", "found"]),
        ([5.0, 6.1, 7.0], [1.0, 2.0, 3.0], ["+4.0 % [+3.9, +4.2]", "the opposite was found"]),
        ([1.0], [2.0], ["-1.0 %, one seed", "not shown"]),
        ([], [2.0], ["no number", "not shown"]),
    ],
)
def test_a_claim_is_found_where_its_interval_is_below_zero(lower, higher, expected):
    assert trained.verdict("claim", lower, higher, " %") == ["claim", *expected]


TRAINED = {
    module.__name__: module
    for module in (
        flip_flop,
        flip_flop_shapes,
        counting,
        selective_copy,
        extrapolation,
        language_text,
        language_code,
        tupe,
        roformer_linear,
    )
}


SYNTHETIC = ("flip_flop", "flip_flop_shapes", "counting", "selective_copy")


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_grid_can_be_made(name, scale):
    parts = TRAINED[name].parts(argparse.Namespace(scale=scale, data="text"))
    for part in parts.values():
        assert part.seeds >= (5 if scale == "cpu" and name in SYNTHETIC else 3)
        made = groups(part.points, range(part.seeds))
        assert sum(len(group.runs) for group in made) == len(part.points) * part.seeds
        assert len({point.label for point in part.points}) == len(part.points)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["flip_flop", "selective_copy"])
def test_the_published_models_fit_their_task(name):
    part = next(iter(TRAINED[name].parts(argparse.Namespace(scale="paper")).values()))
    source = open_source(part.points[0].config)
    check(part.points[-1].config, [part.points[-1].config.encoding], source, devices=1)


def test_the_clamps_and_biases_of_the_gates_are_two_programs():
    points = language_code.parts(argparse.Namespace(scale="cpu", data=None))["clamp"].points
    assert len(points) == 7 and len(groups(points, range(3))) == 2


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (EXPERIMENTS / "README.md").read_text()
    assert readme.filled(text) == text


def test_every_result_of_an_experiment_stands_in_the_readme():
    text = (EXPERIMENTS / "README.md").read_text()
    for path in (EXPERIMENTS / "results").glob("*.json"):
        if "table" in json.loads(path.read_text()):
            assert f"<!-- results {path.stem} -->" in text, path.stem
