"""Entries of the cache: a damaged one is named, moved and made again, and what is whole is not read at every start."""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from posjax import progress
from posjax.data import cache, load_corpus

TEXT = "some text, and more of it\n" * 400


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


def load(text, tmp_path, **settings):
    return load_corpus(text, data_dir=tmp_path / "data", **settings)


def entry(tmp_path, kind="corpora"):
    (folder,) = [path for path in (tmp_path / "data" / kind).iterdir() if "." not in path.name]
    return folder


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "half of the tokens": ("tokens.bin", halve, "tokens.bin has .* bytes instead of"),
    "a cut index": ("offsets.npy", halve, "offsets.npy has .* bytes instead of"),
    "another index": ("offsets.npy", lambda path: np.save(path, [0, 5]), "offsets.npy was changed"),
    "a flipped bit": ("tokens.bin", flip, "tokens.bin was changed"),
    "no tokens": ("tokens.bin", Path.unlink, "tokens.bin is missing"),
    "an empty description": ("corpus.json", lambda path: path.write_text("{}"), "corpus.json has 2 bytes instead of"),
    "an empty manifest": ("manifest.json", lambda path: path.write_text("{}"), "manifest.json is no manifest"),
    "an empty list of files": ("manifest.json", lambda path: path.write_text('{"files": {}}'), "manifest.json is no manifest"),
    "half of the manifest": ("manifest.json", halve, "manifest.json is no manifest"),
    "a manifest of another kind": ("manifest.json", lambda path: path.write_text('{"files": [1]}'), "is no manifest"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_corpus_is_named_moved_and_made_again(text, tmp_path, damage):
    name, spoil, fault = DAMAGES[damage]
    before = load(text, tmp_path)
    tokens, digest, folder = np.array(before.tokens), before.digest, entry(tmp_path)
    for number in (1, 2):
        spoil(folder / name)
        with pytest.warns(UserWarning, match=fault) as warned:
            again = load(text, tmp_path)
        np.testing.assert_array_equal(again.tokens, tokens)
        assert again.digest == digest and (folder.parent / f"{folder.name}.damaged-{number}").is_dir()
        (line,) = (str(one.message) for one in warned)
        assert "\n" not in line and str(folder) in line and line.endswith(f"it is kept as {folder.name}.damaged-{number}")
    load(text, tmp_path)  # without a warning


def test_a_damaged_tokenizer_is_made_again(text, tmp_path):
    settings = {"tokenizer": "bpe", "vocab_size": 262}
    before = load(text, tmp_path, **settings)
    content = before.tokenizer_path.read_bytes()
    halve(before.tokenizer_path)
    with pytest.warns(UserWarning, match=r"tokenizer.json has"):
        assert load(text, tmp_path, **settings).tokenizer_path.read_bytes() == content


def test_files_that_are_as_they_were_written_are_not_read(text, tmp_path, monkeypatch):
    load(text, tmp_path)
    monkeypatch.setattr(cache, "file_digest", lambda path: pytest.fail(f"{path} was read"))
    load(text, tmp_path)


def test_a_copied_cache_is_checked_once(text, tmp_path, monkeypatch):
    before = load(text, tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*.*"):
        os.utime(path, ns=(1, 1))
    read, digest_of = [], cache.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda path: read.append(path.name) or digest_of(path))
    for _ in range(2):
        after = load_corpus(text, data_dir=tmp_path / "copy")
        np.testing.assert_array_equal(after.tokens, before.tokens)
    assert sorted(read) == ["corpus.json", "offsets.npy", "tokens.bin"]


def test_the_digest_goes_by_the_text_alone(text, tmp_path):
    first = load(text, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "b.txt"
    shutil.copy(text, other)
    os.utime(other, ns=(10**18, 10**18))
    assert load(other, tmp_path).digest == first.digest
    assert load_corpus(text, "validation", data_dir=tmp_path / "data").digest != first.digest
    other.write_text(TEXT.replace("more", "less"))
    assert load(other, tmp_path).digest != first.digest
    bpe = [load(path, tmp_path, tokenizer="bpe", vocab_size=262).digest for path in (text, text)]
    assert bpe[0] == bpe[1] != first.digest


def test_the_digest_of_tokens_goes_by_their_content(tmp_path):
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"{name}.npy", np.arange(1000) % (300 if name == "c" else 500))
    np.save(tmp_path / "b.offsets.npy", [0, 100])
    digests = [load_corpus(tmp_path / f"{name}.npy", data_dir=tmp_path / "data").digest for name in "abc"]
    (tmp_path / "b.offsets.npy").unlink()
    assert len(set(digests)) == 3
    assert load_corpus(tmp_path / "b.npy", data_dir=tmp_path / "data").digest == digests[0]


def test_a_build_that_fails_leaves_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        load(text, tmp_path)
    assert list((tmp_path / "data" / "corpora").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_read(text, tmp_path, monkeypatch):
    before = load(text, tmp_path)
    for name in ("mkdir", "rename", "replace"):
        monkeypatch.setattr(Path, name, lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    np.testing.assert_array_equal(load(text, tmp_path).tokens, before.tokens)
    halve(entry(tmp_path) / "tokens.bin")
    with pytest.raises(OSError, match=r"is damaged .*and cannot be renamed .Permission denied"):
        load(text, tmp_path)


def test_the_manifest_states_what_is_on_disk(text, tmp_path):
    load(text, tmp_path)
    files = json.loads((entry(tmp_path) / "manifest.json").read_text())["files"]
    assert set(files) == {path.name for path in entry(tmp_path).iterdir()} - {"manifest.json"}
    for name, state in files.items():
        sums = subprocess.run(["sha256sum", entry(tmp_path) / name], capture_output=True, text=True, check=True).stdout
        assert state["sha256"] == sums.split()[0] and state["size"] == (entry(tmp_path) / name).stat().st_size


def test_progress_is_a_line_every_15_seconds_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("tokenizing the train split", 100_000_000) as advance:
        for _ in range(4):  # at 10, 20, 30 and 40 seconds
            advance(20_000_000)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "posjax: tokenizing the train split: 40 MB of 100 MB, 2.0 MB/s, 30 s left",
        "posjax: tokenizing the train split: 80 MB of 100 MB, 2.0 MB/s, 10 s left",
    ]


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with progress.progress("tokenizing [red]", 100) as advance:
        advance(40)
    assert "tokenizing [red]" in terminal.getvalue() and "40/100 bytes" in terminal.getvalue()
