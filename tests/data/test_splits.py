"""Which files of a folder, and which parts of them, become which split, against lists written by hand."""

import collections
import os
import socket

import pytest

from posjax.data import load_corpus
from posjax.data.files import find_files, matches
from posjax.data.sources import open_source
from posjax.data.text.splits import split_names
from posjax.lab.config import Config
from posjax.lab.source import open_source as open_data


def write(folder, files):
    """Writes files of text, given as text or as a number of lines; each line has 50 bytes and occurs only once."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (f"{name:<43}{number:6}\n" for number in range(content)) if isinstance(content, int) else [content]
        path.write_text("".join(lines))
    return folder


def documents(source, split, **options):
    text = open_source(str(source), source.parent / "cache", None, **options)
    return [b"".join(document).decode() for document in text.documents(split)]


def lines_by_file(texts):
    return dict(collections.Counter(line[:43].rstrip() for text in texts for line in text.splitlines()))


# For each layout: the lines of its files, and the lines of each file that a person expects in train and in validation.
SHARDS = {f"train-{i:05}-of-00003.txt": 100 for i in range(3)}
BOOKS = dict.fromkeys(("emma.txt", "iliad.txt", "middlemarch.txt", "pan.txt", "walden.txt"), 100)
MODULES = {f"src/m{i:03}.py": 10 for i in range(200)}
LAYOUTS = {
    "WikiText": (
        {"wiki.train.tokens": 500, "wiki.valid.tokens": 60, "wiki.test.tokens": 70},
        {"wiki.train.tokens": 500},
        {"wiki.valid.tokens": 60},
    ),
    "files named after splits": (
        {"train.txt": 300, "val.txt": 30, "test.txt": 40, "README.md": 400},
        {"train.txt": 300},
        {"val.txt": 30},
    ),
    "folders named after splits": (
        {"train/a.txt": 10, "train/b/c.py": 20, "validation/a.txt": 5, "test/a.txt": 6},
        {"train/a.txt": 10, "train/b/c.py": 20},
        {"validation/a.txt": 5},
    ),
    "numbered shards": (
        {"fineweb_train_000001.txt": 100, "fineweb_train_000002.txt": 100, "fineweb_val_000000.txt": 50},
        {"fineweb_train_000001.txt": 100, "fineweb_train_000002.txt": 100},
        {"fineweb_val_000000.txt": 50},
    ),
    "shards of Hugging Face": (
        {f"data/{name}": size for name, size in SHARDS.items()} | {"data/validation-00000-of-00001.txt": 30, "README.md": 9},
        {f"data/{name}": size for name, size in SHARDS.items()},
        {"data/validation-00000-of-00001.txt": 30},
    ),
    "training and test only": (
        {"train.txt": 1000, "test.txt": 300},
        {"train.txt": 900},
        {"train.txt": 100},
    ),
    "validation beside files without a split": (
        {"part1.txt": 200, "part2.txt": 210, "dev.txt": 50},
        {"part1.txt": 200, "part2.txt": 210},
        {"dev.txt": 50},
    ),
    "a text, and its validation beside it": (
        {"corpus.txt": 200, "corpus.val.txt": 50},
        {"corpus.txt": 200},
        {"corpus.val.txt": 50},
    ),
    "one file": ({"all.txt": 1000}, {"all.txt": 900}, {"all.txt": 100}),
    "a few books": (BOOKS, dict.fromkeys(BOOKS, 90), dict.fromkeys(BOOKS, 10)),
    "a program that has a train.py and a test.py": (
        MODULES | {"src/train.py": 10, "src/test.py": 10, "src/validation/rules.py": 10, "docs/dev/notes.md": 10},
        {"docs/dev/notes.md": 10} | {name: 10 for name in MODULES if name < "src/m183"},
        {name: 10 for name in MODULES if name >= "src/m183"}
        | {"src/train.py": 10, "src/test.py": 10, "src/validation/rules.py": 10},
    ),
    "a program that has a folder for training": (
        MODULES | {"train/README.md": 10, "train/run.py": 10, "test/data.json": 10, "README.md": 10},
        {name: 10 for name in MODULES if name < "src/m182"},
        {name: 10 for name in MODULES if name >= "src/m182"} | {"train/README.md": 10, "train/run.py": 10},
    ),
    "a large file and small ones": (
        {"big.txt": 5000} | {f"small/{i:02}.txt": 5 for i in range(20)},
        {"big.txt": 4500} | {f"small/{i:02}.txt": 5 for i in range(18)},
        {"big.txt": 500, "small/18.txt": 5, "small/19.txt": 5},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_split_as_a_person_expects(tmp_path, layout):
    files, *expected = LAYOUTS[layout]
    folder = write(tmp_path / "data", files)
    found = [documents(folder, split) for split in ("train", "validation")]
    assert list(map(lines_by_file, found)) == expected
    train, validation = ({line for text in texts for line in text.splitlines()} for texts in found)
    assert not train & validation
    for texts, sizes in zip(found, expected, strict=True):  # each file, or part of one, is a document, in the order of the paths
        assert [text[:43].rstrip() for text in texts] == sorted(sizes)
    for name in set(expected[0]) & set(expected[1]):  # training text comes first in a file that both splits have
        assert found[0][sorted(expected[0]).index(name)] + found[1][sorted(expected[1]).index(name)] == (folder / name).read_text()


@pytest.mark.parametrize(
    ("paths", "splits"),
    [
        (["crash-test.txt", "dev-diary.txt", "novel.txt"], [None, None, None]),  # no other split has such a name
        (["a.train.en", "a.valid.en", "b.txt"], ["train", "validation", None]),
        (["train.en", "valid.en"], ["train", "validation"]),
        (["Train.txt", "VAL.TXT"], ["train", "validation"]),
        (["test-train.txt", "test-val.txt"], ["train", "validation"]),
        (["train.bin", "val.bin"], ["train", "validation"]),
        (["x/train.txt", "x/valid.txt", "y/train.txt"], ["train", "validation", "train"]),
        (["train/test_1.txt", "validation/b.txt"], ["train", "validation"]),
        (["docs/dev/a.md", "b.md"], [None, None]),
        (["en/train/a.txt", "en/dev/a.txt", "de/test/a.txt"], ["train", "validation", None]),
        (["train/a.py", "test/a.py"], [None, None]),
        (["train/a.py", "valid/a.py", "test/a.py", "b.py"], ["train", "validation", "test", None]),
        (["set/dev/a.md", "set/b.md"], ["validation", None]),
        (["demo-train.array_record-00000-of-00001", "demo-test.array_record-00000-of-00001"], ["train", "test"]),
        (["train.py", "validation.rs", "test.c"], [None, None, None]),
        (["training/a.txt", "testing/a.txt"], ["train", "test"]),
        (["trains.txt", "value.txt", "device.txt"], [None, None, None]),
    ],
)
def test_names_of_splits(paths, splits):
    assert split_names(paths) == dict(zip(paths, splits, strict=True))


def test_files_that_are_named_after_one_split_only_are_the_text(tmp_path):
    for name in ("test.txt", "valid.txt"):
        folder = write(tmp_path / name, {name: 100})
        assert [lines_by_file(documents(folder, split)) for split in ("train", "validation")] == [{name: 90}, {name: 10}]
    folder = write(tmp_path / "both", {"test.txt": 10, "valid.txt": 10})
    with pytest.raises(ValueError, match=r"must contain training text.*valid\.txt, named after it"):
        documents(folder, "train")


def test_the_test_split_can_be_read_by_name(tmp_path):
    folder = write(tmp_path / "data", {"train.txt": 20, "test.txt": 3})
    assert load_corpus(folder, "test", data_dir=tmp_path / "cache").num_bytes == 150
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        load_corpus(folder / "train.txt", "test", data_dir=tmp_path / "cache")


# validation_data, include, exclude


def test_validation_data_of_its_own(tmp_path):
    data = write(tmp_path / "data", {"a.txt": 100, "valid.txt": 7, "test.txt": 8})
    other = write(tmp_path / "other", {"c.txt": 40, "test.txt": 9})

    def splits(validation):
        return [lines_by_file(documents(data, split, validation_data=str(validation))) for split in ("train", "validation")]

    assert splits(other) == [{"a.txt": 100, "valid.txt": 7}, {"c.txt": 40}]
    assert splits(other / "test.txt") == [{"a.txt": 100, "valid.txt": 7}, {"test.txt": 9}]
    assert splits(data / "test.txt") == [{"a.txt": 100, "valid.txt": 7}, {"test.txt": 8}]
    assert splits(data / "a.txt") == [{"valid.txt": 7}, {"a.txt": 100}]  # no longer training text
    write(other, {"train.txt": 5, "dev.txt": 6})
    assert splits(other)[1] == {"dev.txt": 6}
    with pytest.raises(ValueError, match="validation_data must leave files for training"):
        documents(data / "a.txt", "train", validation_data=str(data / "a.txt"))
    with pytest.raises(ValueError, match=r"validation_data must be 'stdlib', 'tfds:NAME' or an existing .*gone'"):
        splits(data / "gone")


def test_the_sources_of_a_mixture_agree_on_what_is_held_out(tmp_path):
    folder = write(tmp_path / "data", {f"small/{i:02}.txt": 5 for i in range(10)} | {"big.txt": 5000})

    def load(*sources):
        return load_corpus(",".join(f"{source}:1" for source in sources), data_dir=tmp_path / "cache")

    assert load(folder / "big.txt", folder / "small").num_documents == 11  # nine tenths of each file
    with pytest.raises(ValueError, match=r"mixture must agree .* but small/00\.txt, small/01\.txt, .* split in two ways"):
        load(folder, folder / "small")
    assert load(folder / "big.txt", folder).num_documents == 11  # the last tenth of big.txt is held out in both


def test_include_and_exclude(tmp_path):
    folder = write(tmp_path / "data", {"a.txt": 10, "b.md": 10, "books/c.txt": 10, "books/old/d.txt": 10, "books/e.png": "\0"})

    def read(**options):
        return {name for split in ("train", "validation") for name in lines_by_file(documents(folder, split, **options))}

    assert read(include=("*.txt",)) == {"a.txt", "books/c.txt", "books/old/d.txt"}
    assert read(include=("books/*.txt",)) == {"books/c.txt"}
    assert read(include=("books/**/*.txt", "*.md"), exclude=("old",)) == {"b.md", "books/c.txt"}
    assert read(exclude=("books",)) == {"a.txt", "b.md"}
    with pytest.raises(ValueError, match=r"include must match files of .*, got \('\*.rst',\), which match none"):
        read(include=("*.rst",))
    with pytest.raises(ValueError, match=r"exclude must be a tuple of patterns .*, got \(' ',\)"):
        read(exclude=(" ",))
    with pytest.raises(ValueError, match="include must be a tuple of patterns"):
        read(include="*.txt")
    for source in ("stdlib", str(folder / "a.txt")):
        with pytest.raises(ValueError, match=r"exclude must be empty unless a source is a folder, got \('a',\) for"):
            open_source(source, tmp_path / "cache", None, exclude=("a",))


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("*.txt", ["a.txt", "x/b.txt", "x.txt/c"], ["a.txts"]),
        ("x/*.txt", ["x/a.txt"], ["y/x/a.txt", "x/y/a.txt"]),
        ("x/**/*.txt", ["x/a.txt", "x/y/z/a.txt"], ["a.txt"]),
        ("x/**", ["x/a", "x/y/a"], ["y/x/a"]),
        ("x", ["x", "x/a", "y/x/a"], ["xx/a"]),
        ("/x", ["x/a"], ["y/x/a"]),
        ("./x/", ["x/a"], ["xx/a"]),
        ("**/x.md", ["x.md", "a/b/x.md"], ["xx.md"]),
        ("[a-c]?[!0].t", ["bx1.t"], ["dx1.t", "bx0.t"]),
        ("a[.{b}+", ["a[.{b}+"], ["a[.bb"]),
        ("[]].t", ["].t"], ["x.t"]),
    ],
)
def test_patterns(pattern, matching, others):
    assert all(matches(pattern, path) for path in matching) and not any(matches(pattern, path) for path in others)


# what is no text


def test_links_are_followed_and_no_text_comes_twice(tmp_path):
    outside = write(tmp_path / "outside", {"o.txt": 30})
    folder = write(tmp_path / "data", {"a.txt": 30, "sub/b.txt": 30})
    (folder / "sub/loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "linked").symlink_to(outside)
    (folder / "again").symlink_to(outside)
    (folder / "0.txt").symlink_to("a.txt")
    os.link(folder / "a.txt", folder / "z.txt")
    files, _ = find_files(folder)
    assert [file.path for file in files] == ["0.txt", "a.txt", "again/o.txt", "sub/b.txt", "z.txt"]
    read = [lines_by_file(documents(folder, split)) for split in ("train", "validation")]
    assert read == [{name: 27 for name in ("a.txt", "o.txt", "sub/b.txt")}, {name: 3 for name in ("a.txt", "o.txt", "sub/b.txt")}]
    (folder / "valid.txt").symlink_to("a.txt")  # the name that says something wins
    read = [lines_by_file(documents(folder, split)) for split in ("train", "validation")]
    assert read == [{"o.txt": 30, "sub/b.txt": 30}, {"a.txt": 30}]


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "a device in a folder"])
def test_special_files_are_refused_by_name(tmp_path, kind):
    folder = write(tmp_path / "data", {"a.txt": 10})
    path = folder / "p\x1b[2J.txt"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(os.path.relpath(path))
    else:
        path.symlink_to("/dev/zero")
    message = rf"consist of regular files, but .*p\\x1b\[2J\.txt is {kind.removesuffix(' in a folder')}"
    for source in (folder, path):
        with pytest.raises(ValueError, match=message):
            documents(source, "train")
    assert lines_by_file(documents(folder, "train", exclude=("p*",))) == {"a.txt": 9}


def test_a_broken_link_is_named(tmp_path):
    folder = write(tmp_path / "data", {"a.txt": 10})
    (folder / "b\n.txt").symlink_to("gone")
    with pytest.raises(OSError, match=r"cannot read .*b\\n\.txt \(No such file"):
        documents(folder, "train")


def test_a_workdir_in_the_data_is_no_text(tmp_path):
    folder = write(tmp_path / "data", {"a.txt": 10, "runs/mine/metrics.jsonl": "{}\n", "config.json": "{}"})
    expected = [text for split in ("train", "validation") for text in documents(folder, split, exclude=("runs",))]
    own = [text for split in ("train", "validation") for text in documents(folder, split, workdir=folder / "runs/mine")]
    write(folder, {"runs/mine/config.json": '{"workdir": "", "seq_length": 1, "encodings": ["rope"]}'})
    found = [text for split in ("train", "validation") for text in documents(folder, split)]
    assert found == own == expected
    assert "left out: runs/mine, written by posjax" in open_source(str(folder), tmp_path / "cache", None).notes
    for workdir in (folder, None):
        with pytest.raises(ValueError, match=r"must be a folder of text, got '.*', which is the workdir of a run"):
            documents(folder if workdir else folder / "runs/mine", "train", workdir=workdir)


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_blank_paths_are_refused(tmp_path, monkeypatch, blank):
    monkeypatch.chdir(write(tmp_path, {"secret.txt": 10}))
    with pytest.raises(ValueError, match="source must be 'stdlib', 'tfds:NAME' or an existing file or folder, got "):
        load_corpus(blank, data_dir="cache")
    with pytest.raises(ValueError, match="data must be 'stdlib', 'tfds:NAME' or an existing file or folder, got "):
        Config(data=blank)
    if blank:
        with pytest.raises(ValueError, match="validation_data must be 'stdlib', 'tfds:NAME' or an existing"):
            load_corpus("secret.txt", data_dir="cache", validation_data=blank)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a\0b", "x" * 5000])
def test_impossible_paths_are_refused(tmp_path, name):
    with pytest.raises((ValueError, OSError), match=r"source must be 'stdlib'|cannot read x+"):
        load_corpus(name, data_dir=tmp_path)


# the key, and the summary


def test_the_key_changes_with_the_text_and_the_splits(tmp_path):
    folder = write(tmp_path / "data", {"a.txt": 50, "b.txt": 50})

    def key(**options):
        return open_source(str(folder), tmp_path / "cache", None, **options).key

    keys = [key(), key(exclude=("a.txt",)), key(include=("a.txt",)), key(text_key="body")]
    keys += [key(validation_data=str(folder / "a.txt")), key(validation_data=str(folder / "b.txt"))]
    (folder / "b.txt").rename(folder / "valid.txt")
    keys.append(key())
    (folder / "a.txt").write_text("changed")
    keys.append(key())
    assert len(set(keys)) == len(keys) and keys[-1] == key()


def test_the_opening_summary(tmp_path):
    folder = write(tmp_path / "data", {"train.txt": 100, "valid.txt": 200, "notes.md": 10})
    config = Config(data=str(folder), data_dir=str(tmp_path / "cache"), seq_length=16, eval_lengths=(1,), eval_tokens=64)
    lines = open_data(config).summary
    assert lines[2].split() == ["train", "1", "5,000", "5,000"] and lines[3].split() == ["validation", "1", "10,000", "10,000"]
    assert "  left out: notes.md, because other files are named after splits" in lines
    assert lines[-1] == "warning: validation has more tokens than training, 10,000 and 5,000"
    write(folder, {"train.txt": 200, "train2.txt": 10, "valid.txt": 0})
    (folder / "valid.txt").write_bytes((folder / "train2.txt").read_bytes())
    assert open_data(config).summary[-1] == (
        "warning: at least 1 of 1 validation documents, 100.0% of the validation tokens, are also training documents"
    )
