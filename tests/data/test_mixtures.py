"""Mixtures: the shares of their sources, exact resumption, and what cannot be mixed."""

import itertools
import json

import jax
import numpy as np
import pytest

from posjax.data import Mixture, batches, load_corpus
from posjax.data.corpus import excerpts, holds_tokens, parse_mixture
from posjax.data.on_device import on_device
from posjax.data.pipeline import _Proportions, epochs

LETTERS = "abc"
SIZES = {"a": 30_000, "b": 4_000, "c": 9_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of pairs of the letters a, b and c, with digits by which rows differ."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for letter, size in SIZES.items():
        digits = rng.integers(0, 10, size)
        (folder / f"{letter}.txt").write_text("".join(f"{letter}{letter}{digit}" for digit in digits[: size // 3]))
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def mixture(folder, data_dir, weights, split="train", **settings):
    names = [f"{folder / letter}.txt" + ("" if weight is None else f":{weight}") for letter, weight in weights.items()]
    return load_corpus(",".join(names), split, data_dir=data_dir, **settings)


def letters_of(rows):
    """The source of each row: the letter that it holds."""
    return np.asarray([chr(max(token for token in row if token < 256)) for row in np.asarray(rows)])


def take(iterator, count):
    drawn = list(itertools.islice(iterator, count))
    return {name: np.concatenate([batch[name] for batch in drawn]) for name in ("tokens", "targets")}


WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}


@pytest.mark.parametrize(("weights", "masked"), [(WEIGHTS, False), ({"a": 33.3, "b": 60.05, "c": 1.23}, True)])
def test_rows_have_the_shares_of_the_weights(folder, data_dir, weights, masked):
    mixed = mixture(folder, data_dir, weights)
    assert isinstance(mixed, Mixture) and sum(mixed.weights) == pytest.approx(1)
    iterator = batches(mixed, length=4, batch_size=500, seed=3, masked=masked)
    rows = take(iterator, 20)["targets" if masked else "tokens"]
    found = letters_of(rows)
    assert len(found) == 10_000
    for letter, weight in weights.items():
        share = weight / sum(weights.values())
        assert abs((found == letter).sum() - 10_000 * share) <= 1.0 + 1e-6  # to within one row, let alone 1 %


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.7, 0.3), (1e-4, 1 - 1e-4), tuple(np.full(7, 1 / 7)), (0.123, 0.456, 0.421)])
def test_every_prefix_has_its_shares_and_each_part_is_read_in_order(weights):
    chosen = [_Proportions(weights)[index] for index in range(3000)]
    counts = np.zeros(len(weights), int)
    for number, (part, index) in enumerate(chosen, 1):
        assert index == counts[part]
        counts[part] += 1
        assert np.abs(counts - np.asarray(weights) * number).max() < len(weights) + 1
    assert np.abs(counts - np.asarray(weights) * 3000).max() <= 1.5


@pytest.mark.parametrize("masked", [False, True])
def test_a_mixture_resumes_exactly(folder, data_dir, masked):
    def make():
        return batches(mixture(folder, data_dir, WEIGHTS), length=16, batch_size=8, seed=5, masked=masked)

    iterator = make()
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = take(iterator, 30)
    resumed = make()
    take(resumed, 2)
    resumed.set_state(state)
    for name, values in take(resumed, 30).items():
        np.testing.assert_array_equal(values, wanted[name])


def test_processes_together_see_the_same_mixture(folder, data_dir):
    mixed = mixture(folder, data_dir, WEIGHTS)
    settings = {"length": 16, "batch_size": 6, "seed": 1}
    whole = take(batches(mixed, **settings), 9)["tokens"].reshape(9, 6, 16)
    shares = [take(batches(mixed, **settings, process_index=i, process_count=3), 9)["tokens"] for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([share.reshape(9, 2, 16) for share in shares], axis=1), whole)


def test_each_source_has_epochs_of_its_own(folder, data_dir):
    mixed = mixture(folder, data_dir, {"a": 1, "b": 1})
    short = mixed.parts[1]
    rows_of_short = (len(short.tokens) + short.num_documents - 1) // 10
    rows = take(batches(mixed, length=10, batch_size=2, seed=0), 3 * rows_of_short)["tokens"]
    of_short = rows[letters_of(rows) == "b"].reshape(3, rows_of_short, 10)
    epochs_of_short = [sorted(map(tuple, epoch)) for epoch in of_short]
    assert epochs_of_short[0] == epochs_of_short[1] == epochs_of_short[2]
    assert len({epoch.tobytes() for epoch in of_short}) == 3  # in different orders
    counted = epochs(mixed, len(rows), length=10)
    assert counted[short.source] == pytest.approx(3.0) and counted[mixed.parts[0].source] < 1
    assert epochs(short, rows_of_short, length=10) == {short.source: 1.0}
    iterator = batches(mixed, length=10, batch_size=2, seed=0)
    assert iterator.epoch == 0
    iterator.set_state({"next_index": 3 * rows_of_short})
    assert iterator.epoch == pytest.approx(3.0)


def test_sources_without_weights_are_read_in_proportion_to_their_tokens(folder, data_dir):
    mixed = mixture(folder, data_dir, dict.fromkeys(LETTERS))
    sizes = [part.num_tokens for part in mixed.parts]
    np.testing.assert_allclose(mixed.weights, np.asarray(sizes) / sum(sizes))


def test_validation_has_the_shares_of_the_weights(folder, data_dir):
    held_out = excerpts(mixture(folder, data_dir, WEIGHTS, "validation"), 20, 10)
    found = letters_of(np.split(np.asarray(held_out.tokens), held_out.offsets[1:-1]))
    assert {letter: (found == letter).sum() for letter in LETTERS} == {"a": 7, "b": 2, "c": 1}
    assert held_out.num_bytes == len(held_out.tokens) == 200
    longer_than_any = excerpts(mixture(folder, data_dir, WEIGHTS, "validation"), 10**6, 1)
    assert longer_than_any.num_documents == 3


def test_a_validation_source_of_its_own_holds_for_the_mixture(folder, data_dir):
    mixed = mixture(folder, data_dir, {"a": 1, "b": 1}, "validation", validation_data=str(folder / "c.txt"))
    assert set(letters_of([mixed.tokens])) == {"c"}


def test_one_tokenizer_is_trained_on_all_sources(folder, data_dir):
    options = {"tokenizer": "bpe", "vocab_size": 270}
    mixed = mixture(folder, data_dir, WEIGHTS, **options)
    held_out = mixture(folder, data_dir, WEIGHTS, "validation", **options)
    assert {part.tokenizer_path for part in (*mixed.parts, *held_out.parts)} == {mixed.tokenizer_path}
    merged = {mixed.decode([token]) for token in range(256, mixed.bos)}
    assert {letter for text in merged for letter in text if letter in LETTERS} == set(LETTERS)
    assert mixed.decode(mixed.encode("a1b2c3")) == "a1b2c3"


def test_tokens_of_several_files_have_one_vocabulary(tmp_path):
    for name, most in (("x", 50), ("y", 300)):
        np.save(tmp_path / f"{name}.npy", np.arange(1000) % most)
    mixed = load_corpus(f"{tmp_path / 'x.npy'}:1,{tmp_path / 'y.npy'}:2", data_dir=tmp_path / "data")
    assert mixed.vocab_size == 302 and {part.vocab_size for part in mixed.parts} == {302} and mixed.num_bytes is None
    assert holds_tokens(mixed.source)


def test_rows_on_the_device_have_the_shares_of_the_weights(folder, data_dir):
    mixed = mixture(folder, data_dir, WEIGHTS)
    windows = {
        row.tobytes() for part in mixed.parts
        for batch in batches(part, length=8, batch_size=50, seed=0, shuffle=False, repeat=False) for row in batch["tokens"]
    }  # fmt: skip
    data, draw = on_device(mixed, length=8, batch_size=4000)
    rows = np.asarray(jax.jit(draw)(data, jax.random.key(0))["tokens"])
    assert {row.tobytes() for row in rows} <= windows
    found = letters_of(rows)
    for letter, weight in WEIGHTS.items():
        assert abs((found == letter).mean() - weight) < 5 * (weight * (1 - weight) / 4000) ** 0.5
    assert set(letters_of(on_device_masked(mixed))) == set(LETTERS)


def on_device_masked(mixed):
    data, draw = on_device(mixed, length=8, batch_size=300, masked=True)
    return draw(data, jax.random.key(0))["targets"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stdlib", {"stdlib": None}),
        ("tfds:lm1b:1.1.0", {"tfds:lm1b:1.1.0": None}),
        ("tfds:lm1b:0.5,stdlib:1.5", {"tfds:lm1b": 0.5, "stdlib": 1.5}),
        ("tfds:lm1b:1.1.0:text:2 , stdlib:1e-1", {"tfds:lm1b:1.1.0:text": 2.0, "stdlib": 0.1}),
        ("gs://bucket/a:0.7,gs://bucket/b:3", {"gs://bucket/a": 0.7, "gs://bucket/b": 3.0}),
        ("gs://bucket/a,s3://bucket/a", {"gs://bucket/a": None, "s3://bucket/a": None}),
        ("C:/text,stdlib", {"C:/text": None, "stdlib": None}),
    ],
)
def test_what_a_mixture_is_read_as(text, wanted):
    assert parse_mixture(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0.7,b:0", "weights of a mixture must be positive and finite, got '0' for 'b'"),
        ("a:0.7,b:-1", "weights of a mixture must be positive and finite, got '-1'"),
        ("a:nan,b:1", "weights of a mixture must be positive and finite, got 'nan'"),
        ("a:inf,b:1", "weights of a mixture must be positive and finite, got 'inf'"),
        ("a:1,b", "either all sources of a mixture have weights or none has, got 'a:1,b', where 'b' has none"),
        ("a:1,a:2", "sources of a mixture must differ, got 'a' twice"),
        ("a:1,./a:2", "sources of a mixture must differ, got './a' twice"),
        ("a,,b", "sources separated by commas, .* where one is empty"),
        ("a:1,:2", "sources separated by commas, .* where one is empty"),
    ],
)
def test_what_is_no_mixture(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(text)


def test_a_path_with_a_comma_is_one_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:1,b:2").write_text("one text\n" * 9)
    assert parse_mixture("a:1,b:2") == {"a:1,b:2": None}
    assert load_corpus("a:1,b:2", data_dir=tmp_path / "data").num_documents == 1


def test_text_and_tokens_need_their_tokenizer(folder, tmp_path):
    np.save(tmp_path / "x.npy", np.arange(1000))
    with pytest.raises(ValueError, match=r"tokenizer must be the file .* of .*x.npy.*a.txt' is text"):
        load_corpus(f"{tmp_path / 'x.npy'},{folder / 'a.txt'}", data_dir=tmp_path / "data")


def test_a_mixture_never_ends(folder, data_dir):
    with pytest.raises(ValueError, match="repeat must be True with a mixture"):
        batches(mixture(folder, data_dir, WEIGHTS), length=8, batch_size=4, seed=0, repeat=False)
