"""The mathematics of the programs in experiments/, on small sizes."""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import common  # noqa: E402
import contrasts  # noqa: E402
import counting  # noqa: E402
import extrapolation  # noqa: E402
import flip_flop  # noqa: E402
import flip_flop_shapes  # noqa: E402
import flip_flop_variants  # noqa: E402
import language_code  # noqa: E402
import language_text  # noqa: E402
import learning_rates  # noqa: E402
import more_steps  # noqa: E402
import readme  # noqa: E402
import roformer_decay  # noqa: E402
import roformer_linear  # noqa: E402
import scoring  # noqa: E402
import selective_copy  # noqa: E402
import symmetry  # noqa: E402
import tupe  # noqa: E402

from posjax.lab.ablation.engine import BatchedRuns  # noqa: E402
from posjax.lab.ablation.sweeps import grid, groups  # noqa: E402
from posjax.lab.config import Config  # noqa: E402
from posjax.lab.evaluation import EvalSet  # noqa: E402
from posjax.lab.run import check  # noqa: E402
from posjax.lab.source import EVAL_SEED, TaskBatches, on_device, open_source  # noqa: E402

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


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_the_float64_encoder_is_posjaxs(encoder):
    f, x, error = encoder
    assert error < 1e-5 and f(x).dtype == np.float64 and abs(float(f(x))) > 1e-3


@pytest.mark.thorough
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


@pytest.mark.thorough
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


def row(spec, seed, items, diverged=None, **settings):
    """A run that was scored after 10 steps on items of two answers each, in percent wrong."""
    sums = np.asarray(items, float)
    scored = {10: {"dense": np.stack([sums, np.full(sums.shape, 2.0)])}}
    return {"encoding": spec, "seed": seed, "label": spec, "settings": settings, "items": scored, "diverged": diverged}


def test_cells_hold_what_the_seeds_got():
    solved = [row("rope", seed, [0.0] * 50) for seed in range(3)]
    assert contrasts.cell(solved, 10, "dense", 100.0, 2) == "0.00 (0.00)"
    # Clopper and Pearson's bound of none in n answers is 1 - 0.025^(1/n).
    assert contrasts.cell(solved, 10, "dense", 100.0, 2, solved=True) == f"0 (≤ {100 * (1 - 0.025**0.01):.1g}), 3/3"
    mixed = [row("rope", 0, [1.0] * 50), row("rope", 1, [0.0] * 50), row("rope", 2, [2.0] * 50, diverged=7)]
    assert contrasts.cell(mixed, 10, "dense", 100.0, 1, solved=True) == "25.0 (35.4), 1/3, 1 diverged"
    assert contrasts.cell(mixed, 10, "sparse", 100.0, 1) == "1 of 3 diverged"


def test_seeds_are_paired_by_their_numbers_and_those_that_diverged_count_as_the_worst():
    rng = np.random.default_rng(0)
    good, bad = rng.integers(0, 2, (3, 20)), rng.integers(1, 3, (3, 20))
    rows = [row("a", seed, good[seed]) for seed in (2, 0, 1)] + [row("b", seed, bad[seed]) for seed in (0, 1, 2)]
    scores = contrasts.scores_of(rows)
    np.testing.assert_array_equal(scores("a", 10, "dense")[0], good)
    found = contrasts.measured(contrasts.Claim("a", "b", "dense", 1.0), scores, 10, 10, 100.0, exact=False)
    assert found["mean"] == pytest.approx(100 * (good - bad).sum() / 120)

    lost = [one | {"diverged": 5} if (one["label"], one["seed"]) == ("a", 1) else one for one in rows]
    sums = contrasts.scores_of(lost)("a", 10, "dense")[0]
    np.testing.assert_array_equal(sums[[0, 2]], good[[0, 2]])
    np.testing.assert_array_equal(sums[1], np.concatenate([good, bad]).max(0))


def test_equal_time_gives_the_faster_one_more_steps():
    steps, costs = {"rope": 1600, "cope": 1000, "nope": 1600}, {"rope": 1.0, "cope": 1.6, "nope": 0.5}
    assert contrasts.equal_time(steps, costs, "cope", "rope", 20) == (1000, 1600)
    assert contrasts.equal_time(steps, costs, "nope", "rope", 20) == (1600, 800)
    costs["cope"] = 2.03  # 1,000 steps take 2,030 s: RoPE has 1,600 of them, CoPE 788 steps, in pieces of 20
    assert contrasts.equal_time(steps, costs, "cope", "rope", 20) == (780, 1600)
    asked = contrasts.steps_asked([contrasts.Claim("cope", "rope", "x", 1.0)], steps, costs, 20)
    assert asked == {("cope", "x"): {780, 1000}, ("rope", "x"): {1600, 1000}}


@pytest.mark.parametrize(
    ("steps", "time", "expected"),
    [
        ((-1.0, 0.01, 1.0), (-0.5, 0.02, 1.0), "**shown: lower**"),
        ((1.0, 0.01, 1.0), (0.5, 0.02, 1.0), "**shown: higher**"),
        ((-1.0, 0.01, 1.0), (-0.5, 0.2, 1.0), "shown per step only: lower"),
        ((-1.0, 0.01, 1.0), (0.5, 0.02, 1.0), "shown per step only: lower; in equal time higher"),
        ((-1.0, 0.01, 1.0), None, "shown per step only: lower"),
        ((-0.1, 0.2, 0.01), (0.1, 0.3, 0.04), "tie shown (within 2)"),
        ((-0.1, 0.2, 0.01), (0.1, 0.3, 0.06), "not resolved"),
        ((-0.1, 0.2, 0.2), (0.9, 0.01, 0.5), "not resolved per step; in equal time higher"),
    ],
)
def test_words_follow_from_both_contrasts(steps, time, expected):
    def one(found, width=0.5):
        named = found and dict(zip(("mean", "q_value", "tie_p_value"), found, strict=True))
        return named and named | {"interval": [found[0] - width * abs(found[0]), found[0] + width * abs(found[0])]}

    claim = {"equal_steps": one(steps), "equal_time": one(time), "margin": 2.0}
    assert contrasts.word(claim | {"labels": ["a", "b"]}) == expected
    if time is None:
        assert contrasts.word(claim | {"labels": ["a", "a"]}) == "**shown: lower**"
    if steps[1] < 0.05:  # an interval that holds zero shows nothing, whatever the p value
        wide = {"equal_steps": one(steps, 1.5), "equal_time": one(time, 1.5), "margin": 2.0, "labels": ["a", "b"]}
        assert contrasts.word(wide) == "not resolved"


def recomputed(result, claim, kind):
    """The interval of a claim from the stored items alone, one resample after another, as posjax.lab.statistics defines it."""
    arrays = np.load(EXPERIMENTS / "results" / f"{result}_items.npz")
    stored = json.loads((EXPERIMENTS / "results" / f"{result}.json").read_text())
    part, found = claim["part"], claim[kind]
    about = stored["parts"][part]
    counts = arrays[f"{part}|{claim['column']}"].astype(float)
    sides = []
    for label, step, column in zip(claim["labels"], found["steps"], claim["columns"], strict=True):
        sums = arrays[f"{part}|{label}|{step}|{column}"].astype(float)
        sums = sums if stored["parts"][part]["measure"] == "error" else sums / 1024 * counts
        rows = [row for row in stored["rows"] if row["part"] == part and row["label"] == label]
        assert all(row["diverged"] is None for row in rows)  # what a diverged seed counts as has a test of its own
        sides.append(sums * about["scale"])
    seeds, items = sides[0].shape
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(seeds, [1 / seeds] * seeds, 2000), rng.multinomial(items, [1 / items] * items, 2000)
    means = []
    for of_seeds, of_items in zip(*drawn, strict=True):
        seed_list, item_list = np.repeat(np.arange(seeds), of_seeds), np.repeat(np.arange(items), of_items)
        picked = [side[np.ix_(seed_list, item_list)].sum() / (seeds * counts[item_list].sum()) for side in sides]
        means.append(picked[0] - picked[1])
    mean = (sides[0] - sides[1]).sum() / (seeds * counts.sum())
    reach = scipy.stats.t.ppf(0.975, seeds - 1) * np.std(means) * np.sqrt(seeds / (seeds - 1))
    return mean, mean - reach, mean + reach


def test_intervals_follow_from_the_stored_items():
    checked = 0
    for path in sorted((EXPERIMENTS / "results").glob("*_items.npz")):
        result = path.stem.removesuffix("_items")
        claims = json.loads(path.with_name(f"{result}.json").read_text())["claims"]
        for claim in claims[:: max(1, len(claims) // 2)]:  # the others are made by the same lines
            for kind in contrasts.KINDS:
                if claim[kind] and claim[kind]["tie_p_value"] not in (0.0, 1.0):
                    wanted = recomputed(result, claim, kind)
                    assert (claim[kind]["mean"], *claim[kind]["interval"]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
                    checked += 1
    assert checked >= 1


# What is scored


@pytest.fixture(scope="module")
def excerpt_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(4):
        (folder / f"{number}.txt").write_text("".join(rng.choice([*"abcdefgh=(): \n"], size=3000)))
    config = Config(
        data=str(folder), data_dir=str(folder / "data"), seq_length=16, eval_lengths=(1, 8), eval_tokens=6 * 127, num_layers=2,
        num_heads=2, embed_dim=16, batch_size=4,
    )  # fmt: skip
    return config, open_source(config)


def test_rows_of_excerpts_hold_every_token_once(excerpt_source):
    config, source = excerpt_source
    tests = scoring.excerpts_in_rows(config, source)
    rows = {name: np.concatenate([batch[name] for batch in tests.batches]) for name in tests.batches[0]}
    excerpts = np.asarray(source.validation.tokens).reshape(-1, 127)
    for number, excerpt in enumerate(excerpts):
        own = {name: x[tests.items == number].ravel() for name, x in rows.items()}
        np.testing.assert_array_equal(own["targets"][own["weights"] > 0], excerpt)
        np.testing.assert_array_equal(own["tokens"], [source.validation.bos, *excerpt])
        assert (own["positions"] == np.tile(np.arange(16), 8)).all()


def test_the_same_tokens_are_scored_at_every_length_and_a_window_leaves_out_what_cannot_matter(excerpt_source):
    config, source = excerpt_source
    excerpts = np.asarray(source.validation.tokens).reshape(-1, 127)
    for length, window in ((16, None), (128, None), (128, 16)):
        tests = scoring.ends_of_excerpts(config, source, length, window)
        rows = {name: np.concatenate([batch[name] for batch in tests.batches]) for name in tests.batches[0]}
        scored = rows["targets"][rows["weights"] > 0].reshape(len(excerpts), -1)
        np.testing.assert_array_equal(scored, excerpts[:, -15:])
    assert rows["tokens"].shape[1] == 64 and rows["positions"][0, -1] == 127  # 15 scored, and 15 back in each of two layers

    whole = dataclasses.replace(scoring.ends_of_excerpts(config, source, 128), local_window_size=16)
    (group,) = groups(grid(dataclasses.replace(config, encodings=("sinusoidal + cope(8)",)), []), [0])
    batched_runs = BatchedRuns(group, source, jax.local_devices()[:1], None)
    state = batched_runs.start()
    np.testing.assert_allclose(batched_runs.scores(state, tests), batched_runs.scores(state, whole), rtol=1e-5)


def test_programs_that_were_trained_on_are_no_tests():
    config = dataclasses.replace(counting.recipe("cpu"), num_examples=2000)
    source = open_source(config)
    data, _ = on_device(config, source)
    trained_on = {row.tobytes() for row in np.asarray(data["tokens"])}
    again = TaskBatches((), lambda data, key: source.task.batch(key, 16), EVAL_SEED)
    drawn = [row.tobytes() for _ in range(40) for row in next(again)["tokens"]]
    assert 0.02 < np.mean([row in trained_on for row in drawn]) < 0.6  # without the rejection, tests would hold these
    tests = scoring.strings(config, source, source.task, 512)
    rows = [row.tobytes() for batch in tests.batches for row in batch["tokens"]]
    assert len(rows) == 512 and not trained_on.intersection(rows)
    assert np.bincount(tests.items).tolist() == [2] * 256
    kept = [row for row in drawn if row not in trained_on]
    assert rows[: len(kept)] == kept[: len(rows)]


def test_majority_is_the_error_of_the_commonest_answer():
    batch = {"targets": np.array([[3, 4, 4, 9]]), "weights": np.array([[1.0, 1.0, 1.0, 0.0]])}
    assert scoring.majority({"x": EvalSet([batch])})["x"] == pytest.approx(100 / 3)


TRAINED = {
    module.__name__: module
    for module in (
        flip_flop,
        flip_flop_shapes,
        flip_flop_variants,
        counting,
        selective_copy,
        extrapolation,
        more_steps,
        language_text,
        language_code,
        tupe,
        roformer_linear,
    )
}


SYNTHETIC = ("flip_flop", "flip_flop_variants", "counting", "selective_copy")


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_grid_can_be_made(name, scale):
    parts = TRAINED[name].parts(argparse.Namespace(scale=scale, data="text"))
    for part in parts.values():
        made = groups(part.points, part.all_seeds)
        assert sum(len(group.runs) for group in made) == len(part.points) * part.seeds
        labels = {point.label: point.config.steps for point in part.points}
        assert len(labels) == len(part.points)
        assert {label for claim in part.claims for label in (claim.first, claim.second)} <= set(labels)
        if any(claim.primary for claim in part.claims):
            assert part.seeds >= (8 if name in SYNTHETIC else 5)
        for claim in part.claims:  # can be measured where it is claimed: after whole pieces of the scan
            assert claim.steps is None or claim.steps <= min(labels[claim.first], labels[claim.second])
            assert (claim.steps or 0) % part.points[0].config.log_every == 0


def test_tuning_has_seeds_of_its_own():
    parts = learning_rates.parts(argparse.Namespace(scale="cpu"))
    others = [made for m in TRAINED.values() for made in m.parts(argparse.Namespace(scale="cpu", data="text")).values()]
    final = {seed for part in others for seed in part.all_seeds}
    assert not final.intersection(seed for part in parts.values() for seed in part.all_seeds)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["flip_flop", "selective_copy"])
def test_the_published_models_fit_their_task(name):
    part = next(iter(TRAINED[name].parts(argparse.Namespace(scale="paper")).values()))
    source = open_source(part.points[0].config)
    check(part.points[-1].config, [part.points[-1].config.encoding], source, devices=1)


def test_the_clamps_and_biases_of_the_gates_are_two_programs():
    points = language_code.parts(argparse.Namespace(scale="cpu", data=None))["clamp"].points
    assert len(points) == 8 and len(groups(points, range(3))) == 2  # plain CoPE is in that of the gates


def test_the_tables_of_the_readme_are_those_of_the_results():
    text = (EXPERIMENTS / "README.md").read_text()
    assert readme.filled(text) == text


def test_every_result_of_an_experiment_stands_in_the_readme():
    text = (EXPERIMENTS / "README.md").read_text()
    for path in (EXPERIMENTS / "results").glob("*.json"):
        if "table" in json.loads(path.read_text()):
            assert f"<!-- results {path.stem} -->" in text, path.stem
