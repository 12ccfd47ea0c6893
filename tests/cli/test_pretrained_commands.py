"""The command line on checkpoints of other libraries: generate and evaluate without a workdir, and runs that start from one."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "models"))
from checkpoints import CONFIG, VOCAB, llama_arrays, write_folder, write_tokenizer

import posjax
from posjax.models.pretrained import from_pretrained, save_pretrained, tokenizer_of

TEXT = "the word of every line is a word, or not\n"
OTHER = "or the line is not a word of every word\n" * 60
FIELDS = [
    "--from_pretrained=tiny", "--data=a.txt", "--workdir=run", "--seq_length=8", "--batch_size=8", "--steps=4", "--log_every=1",
    "--checkpoint_every=2", "--eval_lengths", "1", "2", "--eval_tokens=64", "--learning_rate=1e-4",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    pytest.importorskip("tokenizers")
    home = tmp_path_factory.mktemp("home")
    write_tokenizer(write_folder(home / "tiny"))
    write_folder(home / "encoder", config=CONFIG | {"model_type": "bort"})
    write_folder(home / "silent")
    (home / "a.txt").write_text(TEXT * 60)
    (home / "b.txt").write_text(OTHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("POSJAX_DATA_DIR", str(home / "data"))
        yield home


@pytest.fixture
def run(home, run):
    """The command line, in that folder."""
    return run


BAD = {
    "another depth": (["--num_layers", "4"], "num_layers must be 2, the one of the checkpoint tiny, got 4"),
    "another vocabulary": (["--vocab_size", "280"], "vocab_size must be 288, the one of the checkpoint tiny, got 280"),
    "another activation": (["--activation", "gelu"], "activation must be 'swiglu', the one of the checkpoint tiny, got 'gelu'"),
    "untied": (["--tie_embeddings", "True"], "tie_embeddings must be False, the one of the checkpoint tiny, got True"),
    "an encoder": (["--task", "mlm"], "task must be 'lm' with from_pretrained='tiny', got 'mlm'"),
    "two beginnings": (["--init_from", "other"], "init_from must be '' with from_pretrained='tiny', got 'other'"),
    "a bad encoding": (["--encoding", "ropes"], "did you mean 'rope'?"),
    "too many encodings": (["--encoding", "rope / rope / rope"], "encoding"),
    "no such folder": (["--from_pretrained", "tine"], "which does not exist; models are not downloaded; did you mean 'tiny'?"),
    "no such model": (["--from_pretrained", "encoder"], "encoder: model_type must be one of"),
    "no tokenizer": (["--from_pretrained", "silent"], "tokenizer must be chosen, because 'silent' has no tokenizer.json"),
    "bytes": (["--tokenizer", "odd.json"], "tokenizer must be an existing file, got 'odd.json'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_flags_that_contradict_the_checkpoint(run, home, kind):
    flags, message = BAD[kind]
    code, out, err = run("train", *FIELDS, *flags)
    assert (code, out) == (2, "") and err.startswith("posjax: ") and message in err and err.count("\n") == 1
    assert not (home / "run").exists()


def test_an_ablation_starts_from_random_parameters(run, home):
    code, out, err = run("ablate", *FIELDS, "--sweep", "learning_rate=1e-3,1e-4")
    assert (code, out) == (2, "") and err.startswith("posjax: from_pretrained must be '' in an ablation") and err.count("\n") == 1


@pytest.mark.thorough
def test_generate_needs_no_workdir(run, home):
    """Against a loop over the whole sequence, of which the most likely token is taken."""
    code, out, err = run("generate", "--from_pretrained", "tiny", "--prompt", "the word", "--max_new_tokens", 6, "--temperature", 0)
    assert (code, err) == (0, "")
    model, tokenizer = from_pretrained("tiny"), tokenizer_of("tiny", data_dir=home / "data")
    tokens = tokenizer.encode("the word").tolist()
    for _ in range(6):
        last = int(np.asarray(model(np.asarray([tokens])))[0, -1].argmax())
        if last in tokenizer.stop_tokens:
            break
        tokens.append(last)
    assert out == tokenizer.decode(np.asarray(tokens)) + "\n"


@pytest.mark.thorough
def test_evaluate_needs_no_workdir(run, home):
    flags = ("--data", "a.txt", "--validation_data", "b.txt", "--seq_length", 8, "--eval_lengths", 1, "--eval_tokens", 10_000)
    code, out, err = run("evaluate", "--from_pretrained", "tiny", *flags)
    assert (code, err) == (0, "") and "loss (bits per byte) of tiny" in out and "Nothing was written" in out
    stated = float(re.search(r"rope\(theta=1000.0\) +│ +([\d.]+)", out)[1])
    tokenizer, model = tokenizer_of("tiny", data_dir=home / "data"), from_pretrained("tiny")
    tokens = np.concatenate([[tokenizer.bos], tokenizer.encode(OTHER)])
    rows = np.stack([tokens[i : i + 9] for i in range(0, len(tokens) - 9, 8)])
    logits = np.asarray(model(rows[:, :-1]), np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    bits = nats.mean() / np.log(2) * len(tokenizer.encode(OTHER)) / len(OTHER)
    assert abs(stated / bits - 1) < 0.02  # the last tokens are not in a whole row


@pytest.mark.thorough
def test_a_run_starts_from_a_checkpoint_and_resumes(run, home):
    fields = [*FIELDS, "--encoding", "rope(1000.0) + cope(4)"]
    code, out, err = run("train", *fields, "--steps", 2, "--warmup_steps", 0, "--decay", "constant")
    assert (code, err) == (0, "") and f"2 layers of width {CONFIG['hidden_size']}" in out
    facts = json.loads((home / "run" / "run.json").read_text())
    assert facts["vocab_size"] == VOCAB and facts["from_pretrained"]["path"] == "tiny"
    code, out, err = run("train", *fields, "--steps", 4, "--warmup_steps", 0, "--decay", "constant")
    assert (code, err) == (0, "") and "step 3/4" in out and "step 1/4" not in out
    (home / "tiny").rename(home / "away")  # the run is complete in itself
    try:
        code, out, err = run("evaluate", "run")
        assert (code, err) == (0, "") and "rope(1000.0) + cope(4)" in out
        code, out, err = run("generate", "run", "--prompt", "the word", "--max_new_tokens", 2)
        assert (code, err) == (0, "") and out.startswith("the word")
    finally:
        (home / "away").rename(home / "tiny")


@pytest.mark.thorough
def test_the_first_step_of_a_run_has_the_loss_of_the_checkpoint(run, home):
    """An output projection of zeros makes every token equally likely: log V nats."""
    arrays = {name: np.zeros_like(array) if name == "lm_head.weight" else array for name, array in llama_arrays().items()}
    write_tokenizer(write_folder(home / "flat", arrays))
    code, _, err = run("train", *FIELDS, "--from_pretrained", "flat", "--workdir", "flat-run")
    assert (code, err) == (0, "")
    first = json.loads((home / "flat-run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and abs(first["loss"] - np.log(VOCAB)) < 1e-4
    trained = posjax.load("flat-run").model
    save_pretrained(trained, "flat-saved", "flat")
    tokens = np.asarray([[3, 1, 4, 1, 5]])
    assert np.array_equal(from_pretrained("flat-saved")(tokens), trained(tokens)) and np.asarray(trained(tokens)).any()
