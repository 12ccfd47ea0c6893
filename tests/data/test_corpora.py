"""Corpora and pipelines against the files on disk and naive loops over the same text."""

import io
import itertools
import json
import math
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from posjax.data import batches, load_corpus, unigram_bits_per_byte
from posjax.data.stdlib_source import source_files, source_name, stdlib_root, validation_paths

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("tokens", "targets", "weights", "segment_ids", "positions")


def write(folder, texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def random_texts(count, seed=0, suffix=".txt"):
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "délta", "10", "\n", "日本", "def f(x):", "    return x", "✓"]
    return {f"part{i % 3}/{i}{suffix}": " ".join(generator.choices(words, k=generator.randint(5, 60))) for i in range(count)}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("text"), random_texts(40))


@pytest.fixture(scope="session")
def corpus(folder, data_dir):
    return load_corpus(str(folder), data_dir=data_dir)


@pytest.fixture(scope="session")
def stdlib(data_dir):
    return {split: load_corpus("stdlib", split, data_dir=data_dir) for split in ("train", "validation")}


def documents(corpus):
    return [bytes(corpus.tokens[a:b]) for a, b in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)]


# which files, and which are held out


def test_source_files_are_the_library_without_packages_and_tests(tmp_path):
    kept = ["a.py", "json/decoder.py", "unittest/case.py", "tests.py"]
    dropped = ["a.txt", "noext", "site-packages/b.py", "test/c.py", "ctypes/test/d.py", "lib2to3/tests/e.py", ".f.py"]
    dropped += ["idlelib/idle_test/g.py", "__pycache__/h.py", "_sysconfigdata__linux.py", "config-3.13-x86_64/i.py"]
    write(tmp_path, dict.fromkeys([*kept, *dropped], "x = 1\n"))
    assert source_files(tmp_path) == sorted(kept)


def test_source_name_changes_with_the_text_and_the_python(tmp_path):
    first = source_name(write(tmp_path / "1", {"a.py": "x = 1", "b.py": ""}))
    assert first == source_name(write(tmp_path / "2", {"a.py": "x = 1", "b.py": ""}))
    assert f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}" in first
    others = [{"a.py": "x = 2", "b.py": ""}, {"a.py": "x = 1", "c.py": ""}, {"a.py": "x =", "b.py": " 1"}]
    names = {source_name(write(tmp_path / f"other{i}", texts)) for i, texts in enumerate(others)}
    assert len(names | {first}) == 4


def test_a_tenth_is_held_out_whatever_else_is_there():
    paths = [f"lib/{i}.py" for i in range(5000)]
    held_out = validation_paths(paths)
    assert abs(len(held_out) / 5000 - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 5000)
    assert validation_paths(paths[1000:2000]) == held_out & set(paths[1000:2000])
    assert validation_paths(reversed(paths)) == held_out


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_few_files_always_leave_something_on_both_sides(count):
    for trial in range(50):
        assert 1 <= len(validation_paths([f"{trial}-{i}" for i in range(count)])) < count


# the standard library through TFDS


def test_stdlib_corpus_is_the_files_on_disk(stdlib):
    held_out = validation_paths(source_files())
    for split, corpus in stdlib.items():
        paths = [path for path in source_files() if (path in held_out) == (split == "validation")]
        texts = [(stdlib_root() / path).read_bytes() for path in paths]
        assert documents(corpus) == [text for text in texts if text]
        assert corpus.tokens.dtype == np.uint8 and not corpus.tokens.flags.writeable
        assert corpus.num_bytes == len(corpus.tokens) == sum(map(len, texts))
        assert (corpus.vocab_size, corpus.bos, corpus.cls, corpus.mask) == (258, 256, 256, 257)


def test_stdlib_is_source_code_of_the_expected_size_and_entropy(stdlib):
    train, validation = stdlib["train"], stdlib["validation"]
    assert train.num_documents > 400 and train.num_bytes > 5e6 and validation.num_bytes > 5e5
    assert 4.4 < unigram_bits_per_byte(train) < 5.0
    assert b"def namedtuple(" in b"".join(documents(train) + documents(validation))


def test_builder_round_trip(tmp_path):
    from posjax.data.stdlib_source.stdlib_source_dataset_builder import Builder, source_config

    texts = random_texts(30, suffix=".py") | {"empty.py": "", "latin.py": b"# caf\xe9\n"}
    config = source_config(write(tmp_path / "lib", texts))
    for _ in range(2):  # built, then read again
        builder = Builder(config=config, data_dir=str(tmp_path / "data"), file_format="array_record")
        builder.download_and_prepare()
        read = {}
        for split in ("train", "validation"):
            examples = [(x["path"].decode(), x["text"]) for x in builder.as_data_source(split=split)]
            assert examples == sorted(examples) and examples
            read |= dict(examples)
        assert read == {name: text if isinstance(text, bytes) else text.encode() for name, text in texts.items()}
    assert builder.name == "stdlib_source" and builder.info.file_format.value == "array_record"
    assert builder.builder_config.name == source_name(tmp_path / "lib")
    assert "tensorflow" not in sys.modules


def test_a_data_set_that_version_0_1_prepared_is_read(tmp_path):
    """It names the module of its builder, which had another place then."""
    from posjax.data.stdlib_source.stdlib_source_dataset_builder import Builder, source_config

    config = source_config(write(tmp_path / "lib", random_texts(10, suffix=".py")))
    builder = Builder(config=config, data_dir=str(tmp_path / "data"), file_format="array_record")
    builder.download_and_prepare()
    want = list(builder.as_data_source(split="train"))
    info = next((tmp_path / "data").rglob("dataset_info.json"))
    assert info.read_text().count("posjax.data.stdlib_source") == 1
    info.write_text(info.read_text().replace("posjax.data.stdlib_source", "posjax.datasets.stdlib_source"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    again = Builder(config=config, data_dir=str(tmp_path / "data"), file_format="array_record")
    again.download_and_prepare()
    assert list(again.as_data_source(split="train")) == want
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before  # nothing was prepared anew


SMALL_STDLIB = """
import os, sys
from pathlib import Path
import posjax.data.stdlib_source as stdlib_source
for name in ("tensorflow_datasets", "grain", "tokenizers"):
    assert name not in sys.modules, f"import posjax.data must not import {name}"
stdlib_source.stdlib_root = lambda: Path(sys.argv[1])
if sys.argv[3] == "die":
    import posjax.data.stdlib_source.stdlib_source_dataset_builder as module
    read, reads = module.read_file, []
    def dying(path):
        reads.append(path)
        if len(reads) == 10:
            os._exit(9)
        return read(path)
    module.read_file = dying
if sys.argv[3] == "die late":
    import numpy
    numpy.save = lambda *_: os._exit(9)
from posjax.data import load_corpus
corpus = load_corpus("stdlib", data_dir=sys.argv[2])
print(corpus.num_documents, corpus.num_bytes)
"""


def small_stdlib(library, data_dir, mode):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SMALL_STDLIB, str(library), str(data_dir), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_processes_at_once_after_two_that_were_killed(tmp_path):
    texts = random_texts(30, suffix=".py")
    library, data_dir = write(tmp_path / "lib", texts), tmp_path / "data"
    # One after the other: side by side, the one that dies late may have made the data before the other begins.
    assert [small_stdlib(library, data_dir, mode).wait(timeout=100) for mode in ("die", "die late")] == [9, 9]
    assert list(data_dir.rglob("*nfinished*")) or list(data_dir.rglob("incomplete*"))
    both = [small_stdlib(library, data_dir, "live") for _ in range(2)]
    answers = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    kept = [text.encode() for path, text in texts.items() if path not in validation_paths(texts)]
    assert [out for out, _ in answers] == [f"{len(kept)} {sum(map(len, kept))}\n"] * 2


# other sources


def test_folder_corpus_is_the_files_in_order(folder, corpus, data_dir):
    validation = load_corpus(str(folder), "validation", data_dir=data_dir)
    texts = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.txt")}
    assert documents(corpus) + documents(validation) == [texts[path] for path in sorted(texts)]
    assert 0.05 < validation.num_bytes / (corpus.num_bytes + validation.num_bytes) < 0.15
    assert corpus.num_bytes + validation.num_bytes == sum(map(len, texts.values()))


def test_a_changed_folder_is_read_again(tmp_path):
    folder = write(tmp_path / "text", random_texts(40))
    before = load_corpus(str(folder), data_dir=tmp_path / "data")
    (changed,) = [path for path in folder.rglob("*.txt") if path.read_bytes() == documents(before)[0]]
    changed.write_text("another text")
    after = load_corpus(str(folder), data_dir=tmp_path / "data")
    assert documents(after) == [b"another text", *documents(before)[1:]]


def test_hidden_files_are_ignored(tmp_path):
    texts = {"train": "one", "valid": "two", ".hidden": b"\xff", ".git/c": b"\xff", "__pycache__/train.pyc": b"\xff"}
    folder = write(tmp_path / "text", texts)
    read = [d for s in ("train", "validation") for d in documents(load_corpus(folder, s, data_dir=tmp_path / "data"))]
    assert sorted(read) == [b"one", b"two"]


@pytest.mark.parametrize("cache", ["", "cache"])
def test_a_cache_within_the_folder_is_no_text(tmp_path, cache):
    folder = write(tmp_path, random_texts(40))
    first, second = (
        [documents(load_corpus(folder, split, tokenizer="bpe", vocab_size=300, data_dir=folder / cache)) for split in both]
        for both in 2 * [("train", "validation")]
    )
    assert first == second and len(first[0] + first[1]) == 40


@pytest.mark.parametrize("text", ["line\n" * 101, "é" * 501, "no line end", "x" * 95 + "\n" + "y" * 4, "z" * 99 + "\n"])
def test_one_file_holds_out_its_end(tmp_path, text):
    path = write(tmp_path, {"text.txt": text}) / "text.txt"
    train, validation = (load_corpus(path, split, data_dir=tmp_path / "data") for split in ("train", "validation"))
    (start,), (end,) = documents(train), documents(validation)
    assert (start + end).decode() == text and start.decode() and end.decode()
    assert 0.8 < len(start) / len(text.encode()) < 0.97
    if text.count("\n") > 1:
        assert start.endswith(b"\n")


TFDS_BUILDER = """
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text = tfds.features.Text()
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(FEATURES))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        for i in range(40):
            yield i, {name: f"{split} {name} {i}" for name in self.info.features}
"""


@pytest.fixture(scope="session")
def tfds_package(tmp_path_factory):
    package = tmp_path_factory.mktemp("packages")
    settings = {
        "posjax_demo_three": ('{"title": text, "text": text}', '["train", "validation", "test"]'),
        "posjax_demo_train": ('{"body": text}', '["train"]'),
        "posjax_demo_vague": ('{"question": text, "answer": text}', '["train"]'),
    }
    for name, (features, splits) in settings.items():
        code = TFDS_BUILDER.replace("FEATURES", features).replace("SPLITS", splits)
        write(package, {f"{name}/__init__.py": "", f"{name}/{name}_dataset_builder.py": code})
    sys.path.insert(0, str(package))
    for name in settings:
        __import__(f"{name}.{name}_dataset_builder")
    yield
    sys.path.remove(str(package))


def test_tfds_splits_and_features(tfds_package, tmp_path):
    for split in ("train", "validation", "test"):
        got = documents(load_corpus("tfds:posjax_demo_three", split, data_dir=tmp_path))
        assert sorted(got) == sorted(f"{split} text {i}".encode() for i in range(40))
    got = documents(load_corpus("tfds:posjax_demo_three:1.2.0:title", "test[:50%]", data_dir=tmp_path))
    assert len(got) == 20 and all(text.startswith(b"test title ") for text in got)
    assert (tmp_path / "tfds" / "posjax_demo_three" / "1.2.0").is_dir()


def test_tfds_without_validation_holds_out_a_tenth_of_train(tfds_package, tmp_path):
    train, validation = (documents(load_corpus("tfds:posjax_demo_train", s, data_dir=tmp_path)) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (36, 4)
    assert sorted(train + validation) == sorted(f"train body {i}".encode() for i in range(40))


def test_tfds_beside_validation_data(tfds_package, tmp_path):
    def read(source, **options):
        return {s: len(documents(load_corpus(source, s, data_dir=tmp_path / "data", **options))) for s in ("train", "validation")}

    path = str(write(tmp_path, {"a.txt": "text"}) / "a.txt")
    assert read("tfds:posjax_demo_three", validation_data=path) == {"train": 80, "validation": 1}  # all but test
    assert read("tfds:posjax_demo_train", validation_data=path) == {"train": 40, "validation": 1}
    assert read(path, validation_data="tfds:posjax_demo_train") == {"train": 1, "validation": 40}
    assert read(path, validation_data="tfds:posjax_demo_three") == {"train": 1, "validation": 40}
    for name in ("stdlib", "tfds:posjax_demo_three"):
        with pytest.raises(ValueError, match=f"validation_data must be another source than '{name}'"):
            load_corpus(name, data_dir=tmp_path / "data", validation_data=name)


# tokens


def test_decode_shows_the_text(corpus):
    text = documents(corpus)[0].decode()
    assert corpus.decode(corpus.encode(text)) == text
    assert corpus.decode([corpus.bos, 104, 105, corpus.mask, 33]) == "<bos>hi<mask>!"
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 257\], got 0 to 258"):
        corpus.decode([0, 258])


def test_bpe_round_trip(folder, data_dir):
    splits = {s: load_corpus(str(folder), s, tokenizer="bpe", vocab_size=300, data_dir=data_dir) for s in ("train", "validation")}
    for split, bpe in splits.items():
        plain = load_corpus(str(folder), split, data_dir=data_dir)
        assert bpe.vocab_size == 300 and (bpe.bos, bpe.mask) == (298, 299)
        assert bpe.tokens.dtype == np.uint16 and bpe.tokens.max() < 298
        assert len(bpe.tokens) < len(plain.tokens) and bpe.num_bytes == plain.num_bytes
        for row, text in zip(np.split(bpe.tokens, bpe.offsets[1:-1]), documents(plain), strict=True):
            assert bpe.decode(row) == text.decode()
            np.testing.assert_array_equal(bpe.encode(text), row)
    assert splits["train"].tokenizer_path == splits["validation"].tokenizer_path


def test_bpe_says_when_there_was_nothing_left_to_merge(tmp_path):
    path = write(tmp_path, {"a.txt": "ab " * 50}) / "a.txt"
    bpe = load_corpus(path, tokenizer="bpe", data_dir=tmp_path / "data")
    assert 258 < bpe.vocab_size < 270
    assert bpe.decode([*bpe.encode("ab"), bpe.mask]) == "ab<mask>"


def test_unigram_bits_of_known_frequencies(tmp_path):
    path = write(tmp_path, {"a.txt": "abcd" * 1000}) / "a.txt"
    assert unigram_bits_per_byte(load_corpus(path, data_dir=tmp_path / "data")) == pytest.approx(2.0)
    path = write(tmp_path, {"b.txt": "aaab" * 1000}) / "b.txt"
    assert unigram_bits_per_byte(load_corpus(path, data_dir=tmp_path / "data")) == pytest.approx(0.811278, abs=1e-5)


# batches


def naive_rows(corpus, length):
    """Rows of the stream of BOS and document, one token at a time."""
    stream = []
    for number, document in enumerate(documents(corpus)):
        stream += [(number, token) for token in (corpus.bos, *document)]
    for begin in range(0, len(stream) - 1, length):
        window = stream[begin : begin + length + 1]
        row = {name: [] for name in NAMES}
        before = None
        for (number, token), (following, target) in itertools.pairwise(window):
            row["tokens"].append(token)
            row["targets"].append(target)
            row["weights"].append(float(number == following))
            row["segment_ids"].append(number - window[0][0] + 1)
            row["positions"].append(row["positions"][-1] + 1 if number == before else 0)
            before = number
        yield {name: values + [0] * (length - len(values)) for name, values in row.items()}


def collect(iterator, count=None):
    """The rows of `count` batches (all of them by default), as a dict of arrays [rows, T]."""
    got = [next(iterator) for _ in range(count)] if count else list(iterator)
    return {name: np.concatenate([batch[name] for batch in got]) for name in NAMES}


@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_one_epoch_is_the_naive_windows(corpus, length):
    got = collect(batches(corpus, length=length, batch_size=5, seed=0, shuffle=False, repeat=False))
    wanted = list(naive_rows(corpus, length))
    for name in NAMES:
        assert got[name].dtype == (np.float32 if name == "weights" else np.int32)
        assert got[name].shape == (-(-len(wanted) // 5) * 5, length)
        np.testing.assert_array_equal(got[name][: len(wanted)], [row[name] for row in wanted])
        assert not got[name][len(wanted) :].any()
    assert got["weights"].sum() == len(corpus.tokens)  # every token of the text is predicted, once


def test_epochs_are_different_orders_of_the_same_rows(corpus):
    length = 50
    full = [tuple(row["tokens"]) for row in naive_rows(corpus, length) if row["segment_ids"][-1]]
    count = len(full)
    orders = []
    for seed in (0, 1):
        got = collect(batches(corpus, length=length, batch_size=1, seed=seed), 2 * count)["tokens"]
        for epoch in (got[:count], got[count:]):
            assert sorted(map(tuple, epoch)) == sorted(full)
            orders.append(epoch.tobytes())
    assert len(set(orders)) == 4  # no epoch of one seed is an epoch of the next


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shuffle", "repeat"), [(True, True), (False, False)])
def test_resuming_gives_exactly_what_would_have_followed(corpus, masked, shuffle, repeat):
    def make():
        return batches(corpus, length=32, batch_size=4, seed=3, shuffle=shuffle, repeat=repeat, masked=masked)

    iterator = make()
    collect(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = collect(iterator, 20)
    resumed = make()
    collect(resumed, 2)
    resumed.set_state(state)
    for name, values in collect(resumed, 20).items():
        np.testing.assert_array_equal(values, wanted[name])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_processes_together_see_what_one_would(corpus, masked, repeat):
    settings = {"length": 40, "batch_size": 6, "seed": 1, "masked": masked, "repeat": repeat}
    whole = list(itertools.islice(batches(corpus, **settings), 30))
    shares = [list(itertools.islice(batches(corpus, **settings, process_index=i, process_count=3), 30)) for i in range(3)]
    assert len(whole) > 10 and {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole, *shares, strict=True):
        for name in NAMES:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])


def test_masked_rows_and_their_shares(stdlib):
    corpus = stdlib["train"]
    got = collect(batches(corpus, length=128, batch_size=100, seed=0, shuffle=False, masked=True), 20)
    tokens, targets, chosen = got["tokens"], got["targets"], got["weights"] > 0
    np.testing.assert_array_equal(targets[:, 1:].ravel(), corpus.tokens[: targets[:, 1:].size])
    assert (tokens[:, 0] == corpus.cls).all() and not chosen[:, 0].any()
    assert (got["segment_ids"] == 1).all() and (got["positions"] == np.arange(128)).all()
    assert (tokens == targets)[~chosen].all()

    def assert_share(hits, probability):
        assert abs(hits.mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / hits.size)

    shown, text = tokens[chosen], targets[chosen]
    assert_share(chosen[:, 1:], 0.15)
    assert_share(shown == corpus.mask, 0.8)
    assert_share(shown == text, 0.1 + 0.1 / 256)
    replaced = shown[(shown != corpus.mask) & (shown != text)]
    assert replaced.max() < 256 and len(np.unique(replaced)) == 256  # any byte, frequent or not
    assert_share(replaced < 128, 0.5 * (128 / 127.5) - 1 / 256)


def test_masks_are_drawn_anew_in_each_epoch(tmp_path):
    path = write(tmp_path, {"a.txt": "abcdefgh" * 40}) / "a.txt"
    corpus = load_corpus(path, data_dir=tmp_path / "data")
    got = collect(batches(corpus, length=289, batch_size=1, seed=0, masked=True), 4)
    assert len({row.tobytes() for row in got["weights"]}) == 4 and len({row.tobytes() for row in got["targets"]}) == 1


def test_masked_epoch_leaves_nothing_out(corpus):
    got = collect(batches(corpus, length=30, batch_size=4, seed=0, shuffle=False, repeat=False, masked=True))
    real = (got["segment_ids"] == 1) & (got["positions"] > 0)
    np.testing.assert_array_equal(got["targets"][real], corpus.tokens)
    assert not got["weights"][~real].any() and not got["tokens"][got["segment_ids"] == 0].any()


# errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "stdlb"},
            "source must be 'stdlib', 'tfds:NAME' or an existing file or folder.*'stdlb'; did you mean 'stdlib'",
        ),
        ({"source": "/nowhere/at/all"}, "source must be .* existing file or folder, got '/nowhere/at/all'"),
        ({"source": "tfds:imdb_reviewz"}, "got 'tfds:imdb_reviewz'; did you mean 'imdb_reviews'"),
        ({"split": "trian"}, "split must be one of train, validation, got 'trian'; did you mean 'train'"),
        ({"split": "train[:1%]"}, "split must be one of train, validation, got"),
        ({"tokenizer": "byte"}, "tokenizer must be 'bytes', 'bpe', or the path of a .* file, got 'byte'; did you mean 'bytes'"),
        ({"vocab_size": 1000}, "vocab_size must be 258 or None with tokenizer='bytes', got 1000"),
        ({"tokenizer": "bpe", "vocab_size": 258}, "vocab_size must be at least 259 with tokenizer='bpe', got 258"),
    ],
)
def test_load_corpus_says_what_would_work(folder, data_dir, settings, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(**{"source": str(folder), "data_dir": data_dir} | settings)


def test_misspelt_path_is_answered_with_its_neighbour(tmp_path):
    write(tmp_path, {"wiki.txt": "text"})
    with pytest.raises(ValueError, match=r"did you mean '.*wiki.txt'"):
        load_corpus(tmp_path / "wikki.txt", data_dir=tmp_path / "data")


def test_tfds_features_must_be_told_apart(tfds_package, tmp_path):
    with pytest.raises(ValueError, match=r"one of the text features \['answer', 'question'\], as in 'tfds:NAME:FEATURE'"):
        load_corpus("tfds:posjax_demo_vague", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"one of the text features \['answer', 'question'\].*did you mean 'answer'"):
        load_corpus("tfds:posjax_demo_vague:anwser", data_dir=tmp_path)
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        load_corpus("tfds:posjax_demo_train", "test", data_dir=tmp_path)


@pytest.mark.parametrize("texts", [{}, {"a.txt": ""}, {"a.txt": "", "b.txt": ""}])
def test_empty_source(tmp_path, texts):
    (tmp_path / "text").mkdir()
    write(tmp_path / "text", texts)
    for _ in range(2):  # and it does not stay behind in the cache
        with pytest.raises(
            ValueError, match=r"must contain text, (but the train split of .* is empty|got .*, a folder without files)"
        ):
            load_corpus(tmp_path / "text", data_dir=tmp_path / "data")


@pytest.mark.parametrize(("data", "where"), [(b"ab\xff", "0xff at 2"), (b"a\0b", "0x00 at 1")])
def test_binary_file(tmp_path, data, where):
    path = write(tmp_path, {"a.txt": data}) / "a.txt"
    with pytest.raises(ValueError, match=f"only UTF-8 text, but .*a.txt has the byte {where}"):
        load_corpus(path, data_dir=tmp_path / "data")


def test_unreadable_file(tmp_path):
    folder = write(tmp_path / "text", {"a.txt": "one", "b.txt": "two"})
    (folder / "c.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match=r"cannot read .*c.txt \(No such file"):
        for split in ("train", "validation"):
            load_corpus(folder, split, data_dir=tmp_path / "data")


def test_folder_without_python_files(tmp_path):
    with pytest.raises(ValueError, match=r"root must contain \.py files"):
        source_files(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"process_count": 0}, "process_count must be at least 1, got 0"),
        ({"process_index": 2, "process_count": 2}, "process_index must lie in \\[0, process_count=2\\), got 2"),
        ({"process_index": -1}, "process_index must lie in \\[0, process_count=1\\), got -1"),
        ({"batch_size": 5, "process_count": 2}, r"batch_size must be a multiple of process_count \(2\), got 5"),
        ({"seed": -1}, "seed must be from 0 to 2\\^32 - 1, got -1"),
        ({"length": 1, "masked": True}, "length must be at least 2 with masked=True"),
    ],
)
def test_batches_says_what_would_work(corpus, settings, message):
    with pytest.raises(ValueError, match=message):
        batches(corpus, **{"length": 8, "batch_size": 4, "seed": 0} | settings)


@pytest.mark.parametrize("masked", [False, True])
def test_window_longer_than_the_corpus(corpus, masked):
    longest = len(corpus.tokens) + (1 if masked else corpus.num_documents - 1)
    settings = {"batch_size": 1, "seed": 0, "masked": masked}
    assert next(batches(corpus, length=longest, **settings))["tokens"].shape == (1, longest)
    with pytest.raises(ValueError, match=f"length must be at most {longest} for a corpus this small, got {longest + 1}"):
        batches(corpus, length=longest + 1, **settings)


@pytest.mark.parametrize("package", ["tensorflow_datasets", "grain", "tokenizers"])
def test_missing_package_says_how_to_install_it(corpus, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    path = write(tmp_path, {"a.txt": "some text"}) / "a.txt"
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'posjax\[lab\]'"):
        if package == "tensorflow_datasets":
            load_corpus("tfds:lm1b", data_dir=tmp_path)
        elif package == "tokenizers":
            load_corpus(path, tokenizer="bpe", data_dir=tmp_path)
        else:
            batches(corpus, length=8, batch_size=4, seed=0)


def test_data_dir_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POSJAX_DATA_DIR", str(tmp_path / "cache"))
    load_corpus(write(tmp_path, {"a.txt": "some text"}) / "a.txt")
    assert list((tmp_path / "cache" / "corpora").iterdir())


def test_a_data_set_that_cannot_be_downloaded(tmp_path):
    """TFDS raises the errors of requests, whose texts are long; a network that is down is not wrong usage."""
    import requests

    from posjax.data import sources

    class Builder:
        data_path, info = tmp_path / "absent", types.SimpleNamespace(full_name="lm1b/1.1.0")

        def download_and_prepare(self):
            raise requests.exceptions.ConnectionError(
                "HTTPConnectionPool: Max retries exceeded (Caused by NameResolutionError('x'))"
            )

    words = r"^the data set lm1b/1.1.0 cannot be downloaded: NameResolutionError\('x'\); check the network .* or copy .*absent$"
    with pytest.raises(ConnectionError, match=words):
        sources._prepare(Builder, io.StringIO())
