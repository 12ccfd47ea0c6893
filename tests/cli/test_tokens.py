"""Runs on files of tokens, with the tokenizer of a file, and on mixtures, through every verb that reads a run."""

import json
import re
import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.thorough
FIELDS = [
    "--encoding=rope", "--num_layers=1", "--embed_dim=16", "--num_heads=2", "--seq_length=8", "--batch_size=8", "--steps=4",
    "--warmup_steps=1", "--checkpoint_every=2", "--eval_lengths=1", "--eval_tokens=64", "--log_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    home = tmp_path_factory.mktemp("home")
    for name in "ab":
        (home / f"{name}.txt").write_text(f"the {name} of every word is {name * 3}, or not\n" * 60)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([str(home / "a.txt")], tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    tokenizer.save(str(home / "own.json"))
    np.save(home / "tokens.npy", np.random.default_rng(0).integers(0, 100, 2000).astype(np.uint16))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("POSJAX_DATA_DIR", str(home / "data"))
        yield home


@pytest.fixture
def run(home, run):
    """The command line, in that folder."""
    return run


def metric(run, *argv):
    """The value that ``posjax evaluate`` prints, and the heading."""
    code, out, err = run("evaluate", *argv)
    assert (code, err) == (0, "")
    return float(re.search(r"rope +│ +([\d.]+)", out)[1]), out


def test_a_run_with_the_tokenizer_of_a_file_does_not_need_the_file(run, home):
    shutil.copy("own.json", "copy.json")
    assert run("train", "quickstart", *FIELDS, "--data", "a.txt", "--tokenizer", "copy.json", "--workdir", "own")[0] == 0
    value, out = metric(run, "own")
    assert "bits per byte" in out
    assert run("train", "quickstart", *FIELDS, "--data", "a.txt", "--tokenizer", "own.json", "--workdir", "own")[0] == 0  # the same
    (home / "copy.json").unlink()
    (home / "own.json").rename("away.json")
    assert metric(run, "own")[0] == value
    code, out, err = run("generate", "own", "--prompt", "the a", "--max_new_tokens", 4)
    assert (code, err) == (0, "") and out.startswith("the a")
    (home / "away.json").rename("own.json")


def test_a_run_on_tokens_of_an_unknown_tokenizer(run, home):
    assert run("train", "quickstart", *FIELDS, "--data", "tokens.npy", "--workdir", "tokens")[0] == 0
    value, out = metric(run, "tokens")
    assert "bits per token" in out and 6 < value < 7.5  # log2(102) is 6.7
    assert set(json.loads((home / "tokens" / "results.json").read_text())["rows"][0]["metrics"]) >= {"bits_per_token"}
    code, out, err = run("generate", "tokens", "--prompt", "1 2", "--max_new_tokens", 4)
    assert (code, err) == (0, "") and re.fullmatch(r"1 2( (\d+|<bos>|<mask>))*\n", out.replace("<", " <"))
    code, _, err = run("generate", "tokens", "--prompt", "words")
    assert code != 0 and "token ids below 100" in err


def test_a_run_on_a_mixture(run, home):
    mixture = ("--data", "a.txt:0.7,b.txt:0.3", "--tokenizer", "bpe", "--vocab_size", 280)
    code, out, err = run("train", "quickstart", *FIELDS, *mixture, "--workdir", "mixture")
    assert (code, err) == (0, "") and "a.txt: 70.00% of rows" in out
    lines = [json.loads(line) for line in (home / "mixture" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line["epoch"] for line in lines]
    assert epochs == sorted(epochs) and 0 < epochs[0] < epochs[-1]
    metric(run, "mixture")
    metric(run, "mixture", "--data", "b.txt")


def test_a_run_on_a_mixture_resumes_exactly(run, home):
    mixture = ["--data", "a.txt:0.7,b.txt:0.3", "--decay", "constant"]
    final = {}
    for name, lengths in (("once", (4,)), ("twice", (2, 4))):
        for steps in lengths:
            assert run("train", "quickstart", *FIELDS, *mixture, "--workdir", name, "--steps", steps)[0] == 0
        final[name] = json.loads((home / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["once"]["loss"] == final["twice"]["loss"] and final["once"]["grad_norm"] == final["twice"]["grad_norm"]
