"""Tokenizers against the tokenizers library itself, and files of tokens against the arrays that were written."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from posjax.data import load_corpus, unigram_bits_per_byte
from posjax.data import tokenizers as own
from posjax.data.gguf_tokenizer import PATTERNS
from posjax.data.pretokenized import open_tokens

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

SENTENCES = (
    "The cat sat on the mat; it didn't move. 1234567 times!\n",
    "Größe, naïve façade — “quotes” and 日本語のテキスト。\n",
    "def f(x):\n    return x ** 2  # a comment\n\n\n",
    "tabs\tand   spaces, \r\nCRLF lines\r\n",
    "emoji 😀👍🏽 and e\u0301 combined; <|endoftext|> is text here\n",
    "\u3000ideographic space\u3000\n\u00a0no-break\n",
)
TEXT = "".join(SENTENCES[i % 6] for i in (0, 1, 2, 3, 4, 5, 0, 0, 2, 4, 1, 5, 3))


def byte_level(pre="gpt-2", vocab_size=400, prefix=False):
    tokenizer = Tokenizer(models.BPE())
    if pre == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def sentencepiece(prefix=True):
    """As transformers converts Llama's: bytes, then pieces in the order of their merges, with falling scores."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁\n]+|\n"), "isolated")
    learned.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    merged = ["".join(pair) for pair in model["merges"]]
    single = [token for token in model["vocab"] if len(token) == 1 and token != "\n"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for token in [*dict.fromkeys(merged), *single]:
        vocab.setdefault(token, len(vocab))
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(merged))}
    scores = [-float(ranks.get(token, len(vocab))) for token in vocab]
    pairs = []
    for token in ranks:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab]
        pairs += sorted(cuts, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if prefix else [space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer, scores


def metaspace():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((c, -5.0) for c in sorted(set(TEXT + "▁"))), ("▁the", -3.0)], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def ids(tokenizer, text):
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


KINDS = {
    "gpt-2": byte_level,
    "prefix": lambda: byte_level(prefix=True),
    "llama-bpe": lambda: byte_level("llama-bpe"),
    "qwen2": lambda: byte_level("qwen2"),
    "default": lambda: byte_level("default"),
    "sentencepiece": lambda: sentencepiece()[0],
    "no prefix": lambda: sentencepiece(prefix=False)[0],
    "metaspace": metaspace,
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    tokenizer = KINDS[request.param]()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizer, path


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_a_tokenizer_file_encodes_and_decodes_as_the_library(pair, tmp_path):
    tokenizer, path = pair
    corpus = load_corpus(write(tmp_path / "a.txt", TEXT * 20), tokenizer=str(path), data_dir=tmp_path / "data")
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    assert (corpus.vocab_size, corpus.bos, corpus.mask) == (size + 2, size, size + 1)
    text = (TEXT * 20).encode()[: corpus.num_bytes].decode()
    np.testing.assert_array_equal(corpus.tokens, ids(tokenizer, text))
    np.testing.assert_array_equal(corpus.encode(TEXT), ids(tokenizer, TEXT))
    assert corpus.decode(corpus.tokens[:500]) == tokenizer.decode(ids(tokenizer, text)[:500], skip_special_tokens=False)


def test_bytes_of_tokens_spell_the_text(pair, tmp_path):
    tokenizer, path = pair
    corpus = load_corpus(write(tmp_path / "a.txt", TEXT), tokenizer=str(path), data_dir=tmp_path / "data")
    spelt = b"".join(corpus.token_bytes(int(token)) for token in corpus.encode(TEXT)).decode()
    assert spelt.removeprefix(" ") == TEXT
    assert (corpus.token_bytes(corpus.bos), corpus.token_bytes(corpus.mask)) == (b"<bos>", b"<mask>")
    for token, content in ((token.content, number) for number, token in tokenizer.get_added_tokens_decoder().items()):
        assert corpus.token_bytes(content) == token.encode()


def test_tokens_do_not_depend_on_chunks_and_pieces(pair, monkeypatch):
    tokenizer, path = pair
    text = "".join(np.random.default_rng(0).choice(SENTENCES, 200))
    data = text.encode()
    monkeypatch.setattr(own, "CHUNK", 300)
    monkeypatch.setattr(own, "_BATCH", 1000)
    documents = [[data], [data[:7], data[7:20], data[20:5001], data[5001:]], [b"short"]]
    found = {}
    for number, tokens in own.encode(documents, path):
        found.setdefault(number, []).append(tokens)
    assert len(found[0]) > 10  # it was encoded in several chunks
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(np.concatenate(found[number]), ids(tokenizer, b"".join(document).decode()))


def test_chunks_are_the_document_however_long_its_lines(monkeypatch):
    monkeypatch.setattr(own, "CHUNK", 10)
    for text in ("x" * 1000, "\n" * 1000, "ab " * 300, "日本語" * 300, "a\r\n" * 300, " " * 500 + "x\ny" * 100, ""):
        found = list(own.chunks([text.encode()[begin : begin + 37] for begin in range(0, len(text.encode()), 37)]))
        assert "".join(found) == text and max(map(len, found), default=0) <= 300
    assert "".join(own.chunks([b"a\xff", b"b\xe6\x97"])) == "a\ufffdb\ufffd"


# GGUF


def gguf_file(path, tokenizer, model, pre=None, scores=None, merges=True, **more):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    vocab = sorted((number, token) for token, number in tokenizer.get_vocab(with_added_tokens=True).items())
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    writer.add_token_list([token for _, token in vocab])
    kinds = [2 if t == "<unk>" else 3 if t in special else 6 if re.fullmatch("<0x..>", t) else 1 for _, t in vocab]
    writer.add_token_types(kinds)
    if merges:
        writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    if scores is not None:
        writer.add_token_scores(scores)
    for name, value in more.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "default", None])
def test_the_byte_level_tokenizer_of_a_gguf_file(tmp_path, pre):
    tokenizer = byte_level(pre or "default")
    path = gguf_file(tmp_path / "model.gguf", tokenizer, "gpt2", pre)
    corpus = load_corpus(write(tmp_path / "a.txt", TEXT * 5), tokenizer=str(path), data_dir=tmp_path / "data")
    text = (TEXT * 5).encode()[: corpus.num_bytes].decode()
    np.testing.assert_array_equal(corpus.tokens, ids(tokenizer, text))
    assert corpus.decode(corpus.tokens) == text
    assert corpus.vocab_size == tokenizer.get_vocab_size() + 2


@pytest.mark.parametrize("prefix", [True, False])
def test_the_sentencepiece_tokenizer_of_a_gguf_file(tmp_path, prefix):
    tokenizer, scores = sentencepiece(prefix)
    path = gguf_file(tmp_path / "m.gguf", tokenizer, "llama", "default", scores, merges=False, add_add_space_prefix=prefix)
    corpus = load_corpus(write(tmp_path / "a.txt", TEXT * 5), tokenizer=str(path), data_dir=tmp_path / "data")
    text = (TEXT * 5).encode()[: corpus.num_bytes].decode()
    np.testing.assert_array_equal(corpus.tokens, ids(tokenizer, text))
    assert corpus.decode(corpus.tokens) == text


@pytest.mark.parametrize(
    ("model", "pre", "message"),
    [("gpt2", "tekken", "one of the pre-tokenizers gpt-2, .*, got 'tekken'"), ("t5", None, "of model gpt2 or llama, got 't5'")],
)
def test_an_unknown_gguf_tokenizer_is_named(tmp_path, model, pre, message):
    path = gguf_file(tmp_path / "model.gguf", byte_level(), model, pre)
    with pytest.raises(ValueError, match=message):
        load_corpus(write(tmp_path / "a.txt", TEXT), tokenizer=str(path), data_dir=tmp_path / "data")


def test_the_identity_of_a_tokenizer_is_its_content(tmp_path):
    text = write(tmp_path / "a.txt", TEXT)
    first, second, other = (tmp_path / name for name in ("one.json", "two.json", "other.json"))
    byte_level().save(str(first))
    second.write_bytes(first.read_bytes())
    byte_level(vocab_size=380).save(str(other))
    corpora = [load_corpus(text, tokenizer=str(path), data_dir=tmp_path / "data") for path in (first, second, other)]
    assert corpora[0].tokenizer_path == corpora[1].tokenizer_path != corpora[2].tokenizer_path
    assert len(list((tmp_path / "data" / "corpora").iterdir())) == 2
    assert corpora[0].digest == corpora[1].digest != corpora[2].digest


def test_truncation_and_padding_of_a_tokenizer_are_off(tmp_path):
    tokenizer = byte_level()
    want = ids(tokenizer, TEXT)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=4000)
    tokenizer.save(str(tmp_path / "t.json"))
    corpus = load_corpus(write(tmp_path / "a.txt", TEXT), tokenizer=str(tmp_path / "t.json"), data_dir=tmp_path / "data")
    np.testing.assert_array_equal(corpus.encode(TEXT), want)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {}, "tokenizer must be an existing file, got"),
        ("{}", {}, "tokenizer must be a tokenizer.json of the tokenizers library, got"),
        (None, {"tokenizer": "model.ggf"}, "tokenizer must be 'bytes', 'bpe', or the path of"),
        ("ok", {"vocab_size": 300}, "vocab_size must be None with the tokenizer of a file, which has its own, got 300"),
    ],
)
def test_a_file_that_is_no_tokenizer(tmp_path, content, settings, message):
    path = tmp_path / "tokenizer.json"
    if content == "ok":
        byte_level().save(str(path))
    elif content is not None:
        path.write_text(content)
    text = write(tmp_path / "a.txt", TEXT)
    with pytest.raises(ValueError, match=message):
        load_corpus(text, **{"tokenizer": str(path), "data_dir": tmp_path / "data"} | settings)


def test_a_file_that_is_no_gguf(tmp_path):
    pytest.importorskip("gguf")
    path = write(tmp_path / "a.gguf", "not GGUF at all")
    with pytest.raises(ValueError, match=r"tokenizer must be a GGUF file: .*a.gguf is no GGUF file"):
        load_corpus(write(tmp_path / "a.txt", TEXT), tokenizer=str(path), data_dir=tmp_path / "data")


# corpora of tokens


def random_ids(count, most=50_257, dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, most, count).astype(dtype)


def load(path, data_dir, split="train", **settings):
    return load_corpus(str(path), split, data_dir=data_dir, **settings)


def test_a_folder_as_nanogpt_writes_it(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    train, held_out = random_ids(5000), random_ids(700, seed=1)
    train.tofile(folder / "train.bin")
    held_out.tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"\x80")
    for split, wanted in (("train", train), ("validation", held_out)):
        corpus = load(folder, tmp_path / "cache", split)
        np.testing.assert_array_equal(corpus.tokens, wanted)
        assert isinstance(corpus.tokens, np.memmap) or isinstance(corpus.tokens.base, np.memmap)
        assert corpus.num_bytes is None and corpus.offsets.tolist() == [0, len(wanted)]
        assert corpus.bos == max(train.max(), held_out.max()) + 1 and corpus.vocab_size == corpus.bos + 2
        assert corpus.decode([5, 6, corpus.bos]) == "5 6<bos>" and corpus.encode("5 6").tolist() == [5, 6]
        assert not corpus.is_bytes


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
def test_one_file_holds_out_its_last_tenth(tmp_path, dtype):
    tokens = random_ids(1000, dtype=dtype)
    np.save(tmp_path / "t.npy", tokens)
    train, held_out = (load(tmp_path / "t.npy", tmp_path / "cache", split) for split in ("train", "validation"))
    np.testing.assert_array_equal(np.concatenate([train.tokens, held_out.tokens]), tokens)
    assert len(held_out.tokens) == 100 and train.tokens.dtype == dtype


def test_raw_uint32_is_recognized(tmp_path):
    tokens = random_ids(1000, most=128_256, dtype=np.uint32)
    tokens.tofile(tmp_path / "t.bin")
    train = load(tmp_path / "t.bin", tmp_path / "cache")
    np.testing.assert_array_equal(train.tokens, tokens[:900])


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)])
def test_the_header_of_llm_c(tmp_path, magic, version, dtype):
    tokens = random_ids(1000, dtype=dtype)
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens)
    (tmp_path / "t.bin").write_bytes(header.tobytes() + tokens.tobytes())
    np.testing.assert_array_equal(load(tmp_path / "t.bin", tmp_path / "cache").tokens, tokens[:900])
    (tmp_path / "t.bin").write_bytes(header.tobytes() + tokens[:800].tobytes())
    with pytest.raises(ValueError, match="has 800 tokens where its header says 1,000"):
        load(tmp_path / "t.bin", tmp_path / "cache")


def test_documents_of_an_index(tmp_path):
    tokens, offsets = random_ids(1000), [0, 120, 500, 850, 1000]
    tokens.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.offsets.npy", offsets)
    tokens.tofile(tmp_path / "b.bin")
    lengths = np.diff([0, 60, *offsets[1:]]).astype(np.int32)  # the first document has two sequences
    pointers = 2 * np.concatenate([[0], np.cumsum(lengths)[:-1]])
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), 5) + lengths.tobytes() + pointers.astype("<i8").tobytes()
    (tmp_path / "b.idx").write_bytes(index + np.asarray([0, 2, 3, 4, 5], "<i8").tobytes())
    np.save(tmp_path / "c.npy", tokens.reshape(10, 100))
    for name, border, documents in (("a.bin", 850, offsets[:4]), ("b.bin", 850, offsets[:4]), ("c.npy", 900, range(0, 901, 100))):
        train, held_out = (load(tmp_path / name, tmp_path / "cache", split) for split in ("train", "validation"))
        assert train.offsets.tolist() == list(documents)
        assert held_out.offsets.tolist() == [0, 1000 - border]
        np.testing.assert_array_equal(np.concatenate([train.tokens, held_out.tokens]), tokens)


def test_tokens_with_their_tokenizer_have_text_and_bytes(tmp_path):
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "t.json"))
    np.save(tmp_path / "a.npy", np.asarray(ids(tokenizer, TEXT * 30), np.uint16))
    corpus = load(tmp_path / "a.npy", tmp_path / "cache", tokenizer=str(tmp_path / "t.json"))
    text = corpus.decode(corpus.tokens)
    assert (TEXT * 30).startswith(text[:-1]) and abs(corpus.num_bytes - len(text.encode())) < 4
    assert corpus.vocab_size == tokenizer.get_vocab_size() + 2
    assert 0 < unigram_bits_per_byte(corpus) < 8
    np.save(tmp_path / "b.npy", np.arange(2000))
    with pytest.raises(ValueError, match=r"token ids must be ids of the tokenizer, from 0 to 400, got 1,[789]99"):
        load(tmp_path / "b.npy", tmp_path / "cache", tokenizer=str(tmp_path / "t.json"))
    without = load(tmp_path / "a.npy", tmp_path / "cache")
    with pytest.raises(ValueError, match="must have a known tokenizer for bits per byte"):
        unigram_bits_per_byte(without)
    with pytest.raises(ValueError, match=r"text must be token ids below .*because the tokenizer of this corpus is not known"):
        without.encode("words")


@pytest.mark.parametrize(
    ("write_file", "settings", "message"),
    [
        (lambda p: np.save(p, np.zeros(9)), {}, r"tokens must be integers \[n\] or \[documents, n\], got float64\[9\]"),
        (lambda p: np.save(p, np.asarray([1, -1] * 9)), {}, "must be ids of 32 bits, got -1"),
        (lambda p: p.write_bytes(b"\x93NUMPY"), {}, "cannot be read"),
        (lambda p: np.save(p, np.arange(99)), {"vocab_size": 50}, "must count all token ids .* highest of which is 98, got 50"),
        (lambda p: np.save(p, np.arange(99)), {"tokenizer": "bpe"}, "tokenizer must be the file of the tokenizer"),
        (lambda p: np.save(p, np.arange(99)), {"include": ("*.npy",)}, "include must be empty for a source of tokens"),
        (lambda p: np.save(p, np.arange(99)), {"split": "test"}, "split must be one of train, validation, got 'test'"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_used(tmp_path, write_file, settings, message):
    write_file(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npy", tmp_path / "cache", **settings)


def test_text_in_a_bin_file_is_text(tmp_path):
    write(tmp_path / "a.bin", "plain text, in a file with a strange name\n" * 50)
    assert open_tokens(str(tmp_path / "a.bin")) is None
    assert load(tmp_path / "a.bin", tmp_path / "cache").is_bytes


# memory

MEASURE = """
import resource, sys
from posjax.data import load_corpus
load_corpus(sys.argv[1], tokenizer=sys.argv[2], vocab_size=None if sys.argv[2] == "bytes" else 512, data_dir=sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(("tokenizer", "megabytes", "least", "limit"), [("bytes", 100, 1, 60), ("bpe", 12, 1, 400)])
def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, megabytes, least, limit):
    words = np.random.default_rng(0).choice(["alpha ", "beta ", "gamma\n", "délta ", "10 ", "😀 "], 200_000)
    unit = "".join(words).encode()[:1_000_000].decode(errors="ignore").encode()
    peaks = []
    for size in (least, megabytes):
        path = tmp_path / f"{size}.txt"
        with path.open("wb") as file:
            for _ in range(size):
                file.write(unit)
        command = [sys.executable, "-c", MEASURE, str(path), tokenizer, str(tmp_path / f"data-{size}")]
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
        peaks.append(float(result.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < limit, peaks
