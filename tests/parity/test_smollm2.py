# ruff: noqa: E402 (what needs the packages is imported after they are known to be there)
"""SmolLM2-135M-Instruct, a trained model: posjax against transformers, both from the same GGUF file.

The file is fetched by experiments/smollm2.py, which takes seconds with a network; without one the tests are skipped. Together they
take 80 seconds of one core.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import jax
import jax.numpy as jnp

from posjax.inference.generation import generate
from posjax.inference.sampling import Sampling
from posjax.models.pretrained.load import from_pretrained, save_pretrained
from posjax.models.pretrained.tokenizer import tokenizer_of
from posjax.models.transformer import functional

pytestmark = pytest.mark.thorough
OPTIMIZED = True  # otherwise XLA takes minutes for 30 layers
LENGTH, NEW = 512, 64
ENGLISH = """\
The tide was out when they reached the harbor, and the boats lay on their sides in the mud like animals asleep. Nobody had told
Margaret that the ferry no longer ran on Mondays. She put her suitcase down beside a coil of rope, read the notice twice, and then
sat on the wall to think. There were, she decided, three things that she could do. She could walk back to the station, which would
take an hour, and wait there for the evening train. She could look for a room in the village, although the only hotel had closed in
1987 and was now a museum of fishing nets. Or she could ask one of the men who were mending a net at the end of the pier whether
he would take her across when the water came back.

"It will be four hours," said the oldest of them, without looking up. "Perhaps five. The wind is from the west." He had a knife in
one hand and a length of blue twine in the other, and he worked as he talked. "Are you a relative of Dr. Halloran?"

"I am his daughter," she said.

At this the other two stopped working. The water of the harbor, what was left of it, was the color of slate, and a heron stood in it
on one leg. The youngest of the men took off his cap, turned it around in his hands, and put it on again.

In physics, a tide is explained by the difference between the pull of the moon on the near side of the earth and on its far side.
The force falls off with the cube of the distance, so that the sun, which is 27 million times as heavy as the moon but 390 times as
far away, raises tides that are a little less than half as high. When both lie on one line, their effects add, and the range is
largest; a week later they are at right angles, and the range is smallest. None of this says how high the water will rise in a given
place. That depends on the shape of the coast and the depth of the sea: in some bays the range is more than 15 meters, and in others
it can hardly be measured. Before there were computers, the tables that sailors used were made by machines of brass, in which some
dozens of wheels, one for every component of the motion, pulled on a single wire, and a pen at the end of the wire drew the curve.
"""
TEXTS = [
    "", " ", "Hello, world!", "  two  spaces\t\ttabs\n\n\nand lines \n", "def f(x):\n    return x ** 2  # a square\n",
    "3.14159 1,000,000 2026-12-01 007", "naïve café Ωμέγα Привет 你好 こんにちは 안녕", "🙂🏳️‍🌈👩‍👩‍👧‍👦",
    "it's we'll they'd I'm don't YOU'RE", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|endoftext|>b",
    "<|endoftext|><|endoftext|>", "<|im_start|> <|im_end|>", "a?b=c&d=%20#e", "\\frac{a}{b} $x^2$ {}[]()<>",
    "ALLCAPS camelCase snake_case kebab-case", "e\u0301 combining, \u200b zero width, \ufeff a mark", "\x00\x01\x7f controls",
    "x" * 300, "1" * 50 + " 9 8 7", "<jupyter_code>print(1)<file_sep>", "\r\nlines\r\nof Windows", ENGLISH,
]  # fmt: skip


def script():
    path = Path(__file__).parents[2] / "experiments" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path():
    try:
        return script().fetch()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(path):
    how = dict(gguf_file=path.name, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **how).eval()


@pytest.fixture(scope="module")
def model(path):
    return from_pretrained(path)


@pytest.fixture(scope="module")
def tokens(path):
    found = tokenizer_of(path).encode(ENGLISH)[:LENGTH]
    assert len(found) == LENGTH
    return found


@pytest.fixture(scope="module")
def expected(theirs, tokens):
    """The logits of transformers, [T, V]."""
    return logits_of(theirs, tokens)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].float().numpy()


def test_text_becomes_the_same_tokens(path):
    ours, theirs = tokenizer_of(path), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours.encode(text, special=True).tolist() == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text


def test_logits_equal_those_of_transformers(model, tokens, expected):
    found = np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray(tokens)[None]))[0]
    assert np.abs(found - expected).max() < 1e-3 * expected.std()  # measured: 2e-5
    losses = -np.take_along_axis(jax.nn.log_softmax(found[:-1]), tokens[1:, None], 1)
    assert 2.0 < losses.mean() < 4.0  # nats: it has learned English


def test_greedy_generation_is_that_of_transformers(path, model, theirs):
    ours = tokenizer_of(path)
    prompt = ours.prompt("<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n")
    assert ours.stop_tokens == (2,) and prompt[0] == 1
    greedy = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=2, eos_token_id=-1)
    with torch.no_grad():
        whole = theirs.generate(
            torch.from_numpy(prompt.astype(np.int64))[None], attention_mask=torch.ones(1, len(prompt)), **greedy
        )
    with_params, params = functional(model)
    (found,) = generate(with_params, params, [prompt.tolist()], max_new_tokens=NEW, sampling=Sampling(temperature=0.0))
    assert found.tolist() == whole[0, len(prompt) :].tolist()


def test_transformers_loads_what_is_saved(path, model, tokens, expected, tmp_path):
    folder = save_pretrained(model, tmp_path / "saved", path, shard_bytes=300_000_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert np.abs(logits_of(again, tokens) - expected).max() < 1e-5 * expected.std()
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    assert saved(ENGLISH)["input_ids"][:LENGTH] == tokens.tolist()
