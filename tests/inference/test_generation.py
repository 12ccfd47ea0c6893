"""Sampling against closed forms, generation against a loop over the whole text, and ``posjax generate``."""

import dataclasses
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from suite import noisy

import posjax as pj
from posjax import cli
from posjax.encodings.spec import parse_encoding
from posjax.inference import generation
from posjax.inference.generation import generate, stream
from posjax.inference.sampling import Sampling, filtered_logits, sample
from posjax.lab import prompting, source
from posjax.lab import run as runs
from posjax.lab.config import load_config
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.training.checkpoints import Checkpoints
from posjax.training.state import init_state

ROOT = Path(__file__).resolve().parents[2]

# Sampling ------------------------------------------------------------------------------------------------------------

P = np.asarray([[0.15, 0.4, 0.1, 0.35], [0.7, 0.1, 0.1, 0.1]])
LOGITS = jnp.asarray(np.log(P) + 3.0, jnp.float32)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), P),
        (Sampling(temperature=0.5), P**2 / (P**2).sum(1, keepdims=True)),
        (Sampling(temperature=0), [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (Sampling(top_k=2), [[0, 8 / 15, 0, 7 / 15], [7 / 8, 1 / 8, 0, 0]]),  # of equals, the first
        (Sampling(top_k=9), P),
        (Sampling(top_p=0.7), [[0, 8 / 15, 0, 7 / 15], [1, 0, 0, 0]]),
        (Sampling(top_p=0.8), [[1 / 6, 4 / 9, 0, 7 / 18], [7 / 8, 1 / 8, 0, 0]]),
        (Sampling(top_p=1e-9), [[0, 1, 0, 0], [1, 0, 0, 0]]),
        (Sampling(top_p=1.0), P),
        (Sampling(top_k=2, top_p=0.5), [[0, 1, 0, 0], [1, 0, 0, 0]]),  # 8/15 is half already
        (Sampling(temperature=0.5, top_p=0.5), [[0, 1, 0, 0], [1, 0, 0, 0]]),  # 0.49 of the squares
    ],
)
def test_filtered_probabilities_are_the_closed_form(sampling, expected):
    np.testing.assert_allclose(jax.nn.softmax(filtered_logits(LOGITS, sampling)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_p=0.25), [0]),
        (Sampling(top_p=0.5), [0, 1]),
        (Sampling(top_p=0.75), [0, 1, 2]),
        (Sampling(top_p=1.0), [0, 1, 2, 3]),
        (Sampling(top_k=1), [0]),
        (Sampling(top_k=3), [0, 1, 2]),
        (Sampling(top_k=4), [0, 1, 2, 3]),
        (Sampling(top_k=2, top_p=0.5), [0]),  # of the two that are left, each has one half
        (Sampling(temperature=4.0, top_p=0.5), [0, 1]),
    ],
)
def test_a_set_ends_with_the_token_that_reaches_the_sum(sampling, kept):
    """Of four tokens with probabilities of exactly one quarter."""
    assert np.flatnonzero(np.isfinite(filtered_logits(jnp.zeros((1, 4)), sampling)[0])).tolist() == kept


def test_draws_have_the_filtered_probabilities():
    count, sampling = 20_000, Sampling(temperature=2.0, top_k=3)
    keys = jax.random.split(jax.random.key(0), count)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: sample(key, LOGITS, sampling)))(keys))
    expected = np.sqrt(P[0] * [1, 1, 0, 1])
    expected /= expected.sum()
    frequency = np.bincount(drawn[:, 0], minlength=4) / count
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()
    together = np.corrcoef(drawn[:, 0] == 1, drawn[:, 1] == 0)[0, 1]
    assert abs(together) < 5 / np.sqrt(count)  # rows are drawn apart


def test_a_row_draws_the_same_in_any_company():
    logits = jnp.zeros((3, 100))
    draws = sample(jax.random.key(1), logits)
    assert (sample(jax.random.key(1), logits[:2]) == draws[:2]).all() and len(set(draws.tolist())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
    ],
)
def test_samplings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


# Generation ----------------------------------------------------------------------------------------------------------

V = 29
GREEDY = Sampling(temperature=0)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, V, n) for n in (3, 9, 6)]
TINY = TransformerConfig(vocab_size=V, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, max_length=32, tie_embeddings=False)


def build(spec, **changes):
    """A model whose weights are noisy enough that it does not say one token for ever."""
    model = Transformer(dataclasses.replace(TINY, **changes), parse_encoding(spec), rngs=nnx.Rngs(0))
    with_params, params = functional(model)
    return with_params, noisy(params, 3)


@pytest.fixture(scope="module")
def rope_cope():
    return build("rope + cope(8, gates='keys') / identity")


def greedy_loop(with_params, params, prompt, count):
    """The likeliest continuation, by reading the whole text again for every token."""
    text, length = list(prompt), len(prompt) + count
    read = jax.jit(lambda params, tokens: with_params(params)(tokens))
    for _ in range(count):
        padded = jnp.asarray([text + [0] * (length - len(text))], jnp.int32)
        text.append(int(read(params, padded)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


def test_rows_of_one_batch_are_what_each_is_alone(rope_cope):
    expected = [greedy_loop(*rope_cope, prompt, 14) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) == 3 and all(len(set(row)) > 3 for row in expected)
    rows = generate(*rope_cope, PROMPTS, max_new_tokens=14, sampling=GREEDY, chunk=4)
    assert [row.tolist() for row in rows] == expected

    stop = expected[1][5]
    ends = [row.index(stop) if stop in row else 14 for row in expected]
    rows = generate(*rope_cope, PROMPTS, max_new_tokens=14, sampling=GREEDY, chunk=4, stop_tokens=[stop])
    assert [row.tolist() for row in rows] == [row[:end] for row, end in zip(expected, ends, strict=True)]
    rows = generate(*rope_cope, PROMPTS[:1] * 3, max_new_tokens=14, sampling=GREEDY, chunk=4, stop_tokens=expected[0][:1])
    assert [row.size for row in rows] == [0, 0, 0]


@pytest.mark.thorough
def test_prompts_with_coordinates_continue_from_their_largest():
    """Two prompts with images, of different lengths, in chunks: each token equals that of the model on the whole sequence."""
    config = TransformerConfig(vocab_size=17, num_layers=2, embed_dim=24, num_heads=2, max_length=32)
    with_params, params = functional(Transformer(config, pj.mrope((2, 2, 2), theta=100.0), rngs=nnx.Rngs(1)))
    params = noisy(params)
    coordinates = [pj.mrope_positions(parts, merge_size=1)[0] for parts in ([2, (1, 2, 3), 1], [1, (5, 1, 1)])]
    prompts = [[5, 3, 8, 1, 16, 4, 2, 9, 11], [7, 1, 12, 3, 3, 6]]
    rows = generate(with_params, params, prompts, max_new_tokens=4, sampling=GREEDY, chunk=4, coordinates=coordinates)
    for prompt, at, row in zip(prompts, coordinates, rows, strict=True):
        tokens = list(prompt)
        for _ in range(4):
            more = np.repeat(at.max() + 1 + np.arange(len(tokens) - len(prompt))[:, None], 3, axis=1)
            logits = with_params(params)(jnp.asarray([tokens]), coordinates=np.concatenate([at, more]).astype(np.int32))
            tokens.append(int(logits[0, -1].argmax()))
        assert row.tolist() == tokens[len(prompt) :]
    for wrong in (coordinates[:1], [coordinates[0], coordinates[0]], 3, [coordinates[0], coordinates[1][:, :2]]):
        with pytest.raises(ValueError, match=r"coordinates must be one array .* for each of the 2 prompts, got"):
            generate(with_params, params, prompts, max_new_tokens=4, coordinates=wrong)


def test_every_token_is_drawn_anew(rope_cope):
    """From a model for which all tokens are equally likely, always."""
    with_params, params = rope_cope
    params = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    rows = np.stack(generate(with_params, params, PROMPTS, max_new_tokens=14, chunk=4))
    assert all(len(set(row.tolist())) > 5 for row in rows) and (rows[0] != rows[1]).any()


def test_a_windowed_model_goes_far_past_its_training_length():
    with_params, params = build("rope + cope(4)", local_window_size=3, num_layers=1)
    (row,) = generate(with_params, params, PROMPTS[:1], max_new_tokens=300, sampling=GREEDY)
    text = np.concatenate([PROMPTS[0], row])
    logits = with_params(params)(jnp.asarray(text[-21:-1])[None], jnp.arange(len(text) - 21, len(text) - 1)[None])
    assert len(row) == 300 and (logits[0, 3:].argmax(-1) == text[-17:]).all()


def test_nothing_is_compiled_again_as_tokens_come(rope_cope):
    with_params, params = rope_cope
    traces = []

    def counted(params):
        if isinstance(jax.tree.leaves(params)[0], jax.core.Tracer):
            traces.append(1)
        return with_params(params)

    options = dict(sampling=Sampling(top_k=5), chunk=4)
    (first,) = generate(counted, params, PROMPTS[1:2], max_new_tokens=12, seed=7, **options)
    assert len(traces) == 2  # a chunk of the prompt, and a step
    (again,) = generate(counted, params, PROMPTS[1:2], max_new_tokens=20, seed=7, **options)
    (other,) = generate(counted, params, PROMPTS[1:2], max_new_tokens=20, seed=8, **options)
    assert len(traces) == 2
    assert (again[:12] == first).all() and (again != other).any()


@pytest.mark.parametrize(
    ("spec", "prompts", "options", "message"),
    [
        ("rope", [], {}, "prompts must contain at least one prompt, got none"),
        ("rope", [[]], {}, r"prompts must be sequences of at least one token id, got \[\]"),
        ("rope", [[3, V]], {}, "prompts must have ids from 0 to 28, got 3 to 29"),
        ("rope", [[3]], {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ("rope", [[3]], {"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
        (
            "learned",
            [[3] * 9],
            {"max_new_tokens": 24},
            "9 tokens and max_new_tokens=24 exceed max_length=32 of learned; .* 23",
        ),
        ("rope / tupe", [[3] * 9], {"max_new_tokens": 24}, "exceed max_length=32 of tupe"),
    ],
)
def test_calls_that_cannot_be_are_told_before_compiling(spec, prompts, options, message, monkeypatch):
    monkeypatch.setattr(generation, "_read", None)
    with pytest.raises(ValueError, match=message):
        stream(*build(spec), prompts, **{"max_new_tokens": 4} | options)


def test_a_table_of_positions_is_used_to_its_last():
    with_params, params = build("learned")
    rows = generate(with_params, params, PROMPTS[:2], max_new_tokens=23, sampling=GREEDY)
    assert rows[1].tolist() == greedy_loop(with_params, params, PROMPTS[1], 23)


# Text ----------------------------------------------------------------------------------------------------------------


def test_characters_come_whole_and_stop_texts_not_at_all():
    def pieces(data, *stops):
        row = prompting.TextRow(lambda token: bytes([token]), stops)
        return [row.add(byte) for byte in data] + [row.end()]

    assert pieces("aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert pieces(b"\xff\xe2\x82") == ["�", "", "", "�"]
    assert pieces(b"ab##cd", "##") == ["a", "b", "", "", "", "", ""]
    assert pieces(b"a#b#", "##") == ["a", "", "#b", "", "#"]
    assert "".join(pieces(b"one END two", "END", "e E")) == "on"


# The command ---------------------------------------------------------------------------------------------------------

CONFIG = """
from posjax.lab.config import Config

def get_config():
    return Config(
        data="text", encoding="rope + cope(8)", encodings=("rope",), num_layers=1, embed_dim=16, num_heads=2, seq_length=16,
        batch_size=8, steps=4, warmup_steps=1, learning_rate=1e-2, log_every=1, checkpoint_every=4, eval_lengths=(1,),
        eval_tokens=64,
    )
"""


def untrained(folder, **changes):
    """A checkpoint of step 0."""
    config = dataclasses.replace(load_config("tiny.py"), **changes)
    params = runs.build_model(config, config.encoding, source.open_source(config), 0)[1]
    Checkpoints(Path(folder) / "checkpoints").save(0, init_state(params, runs.optimizer_of(config), 0))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a config, a text and what ``posjax train`` made of them."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.py").write_text(CONFIG)
    (home / "text").mkdir()
    for number in range(6):
        (home / "text" / f"{number}.txt").write_text("ein Wörterbuch, größer als je: " * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("POSJAX_DATA_DIR", str(home / "data"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        cli.main(["train", "tiny.py", "--workdir", "run"])
        untrained("bpe", tokenizer="bpe", vocab_size=300)
        untrained("flip", task="flip_flop")
        untrained("both/rope/seed-0", encoding="rope")
        yield home


@pytest.fixture
def run(home, run):
    """The command line, in that folder."""
    return run


def test_a_prompt_is_continued_from_the_checkpoint(run, home):
    before = {path for path in home.rglob("*")}
    base = ("generate", "tiny.py", "--workdir", "run", "--max-new-tokens", 12, "--temperature", 0)
    code, alone, err = run(*base, "--prompt", "ein Wört")
    assert (code, err) == (0, "") and alone.startswith("ein Wört") and alone.endswith("\n")

    config = load_config("tiny.py")
    opened = source.open_source(config)
    params = runs.restore_params(config, config.encoding, 0, Path("run"), opened)
    with_params, _ = runs.build_model(config, config.encoding, opened, 0)
    prompt = [opened.train.bos, *"ein Wört".encode()]
    expected = greedy_loop(with_params, params, prompt, 12)
    assert alone == bytes([*prompt[1:], *expected]).decode("utf-8", "replace") + "\n"

    (home / "more.txt").write_text("größer")
    code, several, _ = run(*base, "--prompt", "ein Wört", "", "--prompt-file", "more.txt")
    assert code == 0 and several.startswith("--- 1 of 3\n" + alone + "--- 2 of 3\n")
    assert several.split("--- 3 of 3\n")[1].startswith("größer")
    first = alone.removeprefix("ein Wört")[4]
    code, stopped, _ = run(*base, "--prompt", "ein Wört", "--stop", first)
    assert stopped == "ein Wört" + alone.removeprefix("ein Wört").split(first)[0] + "\n"
    assert {path for path in home.rglob("*")} - before == {home / "more.txt"}


def test_other_workdirs_tokens_and_tasks(run):
    code, out, _ = run("generate", "tiny.py", "--workdir", "bpe", "--tokenizer", "bpe", "--vocab-size", 300, "--prompt", "ein Wört")
    assert code == 0 and out.startswith("ein Wört") and len(out) > 20
    code, out, _ = run("generate", "tiny.py", "--workdir", "both", "--encoding", "rope", "--max-new-tokens", 5)
    assert code == 0 and out
    flip = ("generate", "tiny.py", "--workdir", "flip", "--task", "flip_flop", "--max-new-tokens", 5)
    code, out, _ = run(*flip, "--prompt", "w 1 r")
    assert code == 0 and out.startswith("w 1 r ") and set(out.split()) <= {"w", "r", "i", "0", "1"} and len(out.split()) == 8
    code, _, err = run(*flip, "--prompt", "w 7")
    assert code == 2 and "prompt must be words of flip_flop, w, r, i, 0, 1, got '7'" in err
    code, _, err = run(*flip)
    assert code == 2 and "prompt must have at least one word of flip_flop" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workdir", "nowhere"), "workdir must hold checkpoints, which posjax train and posjax compare write, got 'nowhere'"),
        (
            ("--encoding", "alibi"),
            "workdir run belongs to a run with another configuration: encoding is 'rope + cope(8)' there and 'alibi' here",
        ),
        (("--task", "mlm"), "task must not be 'mlm', because an encoder cannot generate text"),
        (("--prompt-file", "none.txt"), "prompt_file must be a file of UTF-8 text, got 'none.txt'"),
        (("--temperature", "-1"), "temperature must be at least 0, got -1"),
        (("--top-p", "2"), "top_p must lie in (0, 1], got 2"),
        (("--stop", ""), "stop must not contain an empty text"),
        (("--max-new-tokens", "0"), "max_new_tokens must be an integer of at least 1, got 0"),
        (("--temprature", "1"), "--temperature"),
    ],
)
def test_wrong_words(run, flags, message):
    code, out, err = run("generate", "tiny.py", *(flags if "--workdir" in flags else ("--workdir", "run", *flags)))
    assert code in (1, 2) and out == "" and message in " ".join(err.split())


def test_text_comes_while_it_is_made_and_an_interrupt_ends_it(run, monkeypatch):
    """The interrupt comes with the fifth piece of text, of which there would be thousands."""
    written = []

    def write(text):
        written.append(text)
        if len(written) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys.stdout, "write", write)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        code, _, err = run("generate", "tiny.py", "--workdir", "run", "--max-new-tokens", 5000, "--prompt", "ein")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and err == ""
    assert len(written) == 6 and written[0].startswith("ein") and len("".join(written)) < 50 and written[-1] == "\n"
