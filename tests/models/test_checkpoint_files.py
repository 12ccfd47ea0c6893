"""Checkpoints of other libraries, opened: folders of safetensors and GGUF files, whole, lazily, and damaged."""

import json
import math
import re
import struct

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    CONFIG,
    HEADS,
    LLAMA_KEYS,
    VOCAB,
    WIDTH,
    header_of,
    llama_arrays,
    llama_gguf_arrays,
    read_safetensors,
    write_folder,
    write_gguf,
    write_safetensors,
    write_tokenizer,
)

from posjax.models.pretrained.files import open_checkpoint, read_header, write_tensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_holds_its_tensors(tmp_path, dtype, shards):
    arrays = llama_arrays(dtype=dtype)
    checkpoint = open_checkpoint(write_folder(tmp_path / "model", arrays, shards=shards))
    assert checkpoint.config == CONFIG and checkpoint.tokenizer is None and set(checkpoint.tensors) == set(arrays)
    for name, array in arrays.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
        assert tensor.read().tobytes() == array.tobytes()


def test_a_part_of_a_file_larger_than_memory_can_be_read(tmp_path):
    rows, path = 2**24, tmp_path / "large.safetensors"  # 64 GiB, of which the file system stores a few pages
    text = json.dumps({"large": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}}).encode()
    row = np.arange(1024, dtype=np.float32)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + rows * 4096)
        file.seek(8 + len(text) + (rows - 2) * 4096)
        file.write(row.tobytes())
    large = read_header(path)["large"].read()
    assert large.shape == (rows, 1024) and np.array_equal(large.T[5:8, -3:], [[0, 5, 0], [0, 6, 0], [0, 7, 0]])


def test_what_is_written_follows_the_format(tmp_path):
    arrays = llama_arrays(dtype=ml_dtypes.bfloat16) | {"scalar": np.asarray(3.0, np.float32), "empty": np.zeros((0, 4), np.float32)}
    write_tensors(tmp_path / "model.safetensors", arrays)
    found, metadata = read_safetensors(tmp_path / "model.safetensors")
    assert metadata == {"format": "pt"}  # without which transformers refuses a file
    assert {name: array.tobytes() for name, array in found.items()} == {name: array.tobytes() for name, array in arrays.items()}
    (size,) = struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])
    assert size % 8 == 0 and [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert read_header(tmp_path / "model.safetensors")["empty"].read().shape == (0, 4)


# GGUF ----------------------------------------------------------------------------------------------------------------------


def test_a_llama_in_gguf_has_the_names_keys_and_order_of_transformers(tmp_path):
    gguf = pytest.importorskip("gguf")
    arrays = llama_arrays()
    quantized = {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.BF16, "blk.1.ffn_up.weight": gguf.GGMLQuantizationType.F16}
    write_gguf(tmp_path / "a.gguf", "llama", LLAMA_KEYS, llama_gguf_arrays(arrays), quantized)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    expected = {name: value for name, value in CONFIG.items() if name != "torch_dtype"}
    expected |= {"rope_scaling": None, "pad_token_id": None}
    assert checkpoint.config == expected and set(checkpoint.tensors) == set(arrays)
    for name, array in arrays.items():
        tensor = checkpoint.tensors[name]
        exact = {"model.layers.0.mlp.up_proj.weight": ml_dtypes.bfloat16, "model.layers.1.mlp.up_proj.weight": np.float16}
        assert tensor.shape == array.shape and np.array_equal(tensor.read(), array.astype(exact.get(name, np.float32))), name


def test_quantized_tensors_are_dequantized(tmp_path):
    """Q8_0: blocks of 32 numbers, a float16 scale and bytes."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    scales = (2.0 ** rng.integers(-8, -2, (VOCAB, 1))).astype(np.float16)
    steps = rng.integers(-127, 128, (VOCAB, 32)).astype(np.int8)
    stored = np.concatenate([scales.view(np.uint8), steps.view(np.uint8)], axis=1)
    writer_arrays = {"output_norm.weight": np.ones(32, np.float32)}
    path = tmp_path / "q.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (LLAMA_KEYS | {"embedding_length": 32}).items():
        full = name if name.startswith("tokenizer.") else f"llama.{name}"
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(full, value)
    writer.add_tensor("token_embd.weight", stored, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", writer_arrays["output_norm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_checkpoint(path).tensors["model.embed_tokens.weight"]
    assert (tensor.shape, tensor.stored) == ((VOCAB, 32), "Q8_0")
    assert np.array_equal(tensor.read(), scales.astype(np.float32) * steps)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_divisors(theta, channels, factor, low, high, length):
    """Grattafiori et al. 2024, for rope_type llama3: long waves are divided, short ones kept."""
    divisors = []
    for m in range(channels // 2):
        wavelength = 2 * math.pi * theta ** (2 * m / channels)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(divisors, np.float32)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0, "rope.scaling.original_context_length": 4096},
            {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.yarn_beta_fast": 24.0},
            {"rope_type": "yarn", "factor": 8.0, "beta_fast": 24.0},
        ),
    ],
)
def test_scalings_of_a_gguf(tmp_path, keys, expected):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "a.gguf", "llama", LLAMA_KEYS | keys, {"token_embd.weight": np.zeros((VOCAB, WIDTH), np.float32)})
    assert open_checkpoint(tmp_path / "a.gguf").config["rope_scaling"] == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_llama_3_in_a_gguf_become_its_scaling(tmp_path, factor):
    pytest.importorskip("gguf")
    wide = LLAMA_KEYS | {"rope.freq_base": 500_000.0, "attention.key_length": 128, "rope.dimension_count": 128}
    divisors = llama3_divisors(500_000.0, 128, factor, 1.0, 4.0, 8192)
    assert len(set(divisors.tolist())) > 5  # some between
    arrays = {"token_embd.weight": np.zeros((VOCAB, WIDTH), np.float32), "rope_freqs.weight": divisors}
    write_gguf(tmp_path / "a.gguf", "llama", wide, arrays)
    assert open_checkpoint(tmp_path / "a.gguf").config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3, "factor": factor}
    write_gguf(tmp_path / "b.gguf", "llama", wide, arrays | {"rope_freqs.weight": divisors * 1.5})
    scaling = open_checkpoint(tmp_path / "b.gguf").config["rope_scaling"]
    assert scaling["rope_type"] == "longrope" and scaling["attention_factor"] == 1.0
    assert np.array_equal(np.float32(scaling["long_factor"]), divisors * np.float32(1.5))


def test_norms_of_gemma_3_lose_the_one_that_its_converter_adds(tmp_path):
    pytest.importorskip("gguf")
    weight = np.linspace(-0.5, 0.5, WIDTH, dtype=np.float32)
    arrays = {"token_embd.weight": np.zeros((VOCAB, WIDTH), np.float32), "blk.1.post_ffw_norm.weight": 1 + weight}
    write_gguf(tmp_path / "a.gguf", "gemma3", LLAMA_KEYS | {"attention.sliding_window": 32, "block_count": 12}, arrays)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    found = checkpoint.tensors["model.layers.1.post_feedforward_layernorm.weight"].read()
    assert np.allclose(found, weight, atol=1e-7)
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    assert checkpoint.config["layer_types"] == kinds * 2 and checkpoint.config["rope_local_base_freq"] == 10_000.0


@pytest.mark.parametrize("architecture", ["gptneox", "bloom"])
def test_queries_keys_and_values_of_each_head_are_together_again(tmp_path, architecture):
    """The converter takes q, k, v of each head apart: rows (head, which of three, channel) become (which, head, channel)."""
    pytest.importorskip("gguf")
    rows = [(which, head, channel) for which in range(3) for head in range(HEADS) for channel in range(WIDTH // HEADS)]
    labels = np.asarray([100 * head + 10 * which + channel for which, head, channel in rows], np.float32)
    keys = LLAMA_KEYS | {"attention.layer_norm_epsilon": 1e-5, "use_parallel_residual": True, "rope.dimension_count": 1}
    arrays = {"token_embd.weight": np.zeros((VOCAB, WIDTH), np.float32), "blk.0.attn_qkv.bias": labels}
    arrays["blk.0.attn_qkv.weight"] = np.tile(labels[:, None], WIDTH)
    write_gguf(tmp_path / "a.gguf", architecture, keys, arrays)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    (name,) = [name for name in checkpoint.tensors if name.endswith("query_key_value.bias")]
    bias, kernel = checkpoint.tensors[name].read(), checkpoint.tensors[name.replace("bias", "weight")].read()
    expected = [100 * h + 10 * w + c for h in range(HEADS) for w in range(3) for c in range(WIDTH // HEADS)]
    assert bias.tolist() == expected and kernel[:, 3].tolist() == expected
    if architecture == "gptneox":
        assert checkpoint.config["rotary_pct"] == 0.25 and checkpoint.config["use_parallel_residual"] is True


def test_kernels_of_gpt_2_are_transposed_back(tmp_path):
    pytest.importorskip("gguf")
    kernel = np.arange(WIDTH * 3 * WIDTH, dtype=np.float32).reshape(WIDTH, 3 * WIDTH)  # Conv1D: [in, out]
    arrays = {"token_embd.weight": np.zeros((VOCAB, WIDTH), np.float32), "blk.0.attn_qkv.weight": kernel.T.copy()}
    write_gguf(tmp_path / "a.gguf", "gpt2", LLAMA_KEYS | {"attention.layer_norm_epsilon": 1e-5}, arrays)
    tensor = open_checkpoint(tmp_path / "a.gguf").tensors["transformer.h.0.attn.c_attn.weight"]
    assert tensor.shape == kernel.shape and np.array_equal(tensor.read(), kernel)


# Bad input -----------------------------------------------------------------------------------------------------------------


def edit(path, **changes):
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def with_header(folder, change):
    """Writes the weights with a changed header."""
    arrays = llama_arrays()
    header = header_of(arrays)
    header = change(header) or header
    write_safetensors(folder / "model.safetensors", arrays, header)


def entry(header, **changes):
    header["model.norm.weight"] |= changes


def only(folder, *names):
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def pickles(folder):
    only(folder, "config.json")
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def moved_in_index(folder):
    write_folder(folder, shards=2)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    other = next(file for name, file in files.items() if file != files["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": files | {"model.norm.weight": other}}))


def sharded_without(folder, what):
    write_folder(folder, shards=2)
    (folder / "model.safetensors").unlink()
    (folder / what).unlink()


def index_out_of_the_folder(folder):
    sharded_without(folder, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "../../etc/passwd"}}))


def adapter(folder):
    only(folder)
    (folder / "adapter_config.json").write_text("{}")


DUPLICATE = (
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
)
BAD_FOLDERS = {
    "no config.json": (lambda f: only(f, "model.safetensors"), "path must be a folder with config.json"),
    "config.json cut": (lambda f: cut(f / "config.json", 30), "config.json is damaged"),
    "config.json a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged: it must hold an object"),
    "no weights": (
        lambda f: only(f, "config.json"),
        "path must be a folder with model.safetensors or model.safetensors.index.json",
    ),
    "pickles": (pickles, "with pytorch_model.bin, a pickle.*save_pretrained"),
    "an adapter": (adapter, "holds an adapter, which must be merged"),
    "header of 0 bytes": (lambda f: cut(f / "model.safetensors", 0), "is damaged or incomplete: header too small"),
    "header cut": (lambda f: cut(f / "model.safetensors", 300), "is damaged or incomplete: invalid header length"),
    "data cut": (lambda f: cut(f / "model.safetensors", 5000), "is damaged or incomplete: .*; copy or download it again"),
    "another format": (lambda f: (f / "model.safetensors").write_bytes(b"<!DOCTYPE html>" * 9), "is damaged or incomplete"),
    "header not JSON": (lambda f: with_header(f, lambda h: b"{" * 40), "is damaged or incomplete: invalid JSON in header"),
    "header a list": (lambda f: with_header(f, lambda h: b"[1, 2]"), "invalid JSON in header"),
    "a tensor twice": (lambda f: with_header(f, lambda h: DUPLICATE), "is damaged or incomplete"),
    "no shape": (lambda f: with_header(f, lambda h: entry(h, shape=None)), "invalid JSON in header"),
    "negative size": (lambda f: with_header(f, lambda h: entry(h, shape=[-16])), "invalid JSON in header"),
    "wrong size": (lambda f: with_header(f, lambda h: entry(h, shape=[17])), "invalid shape, data type, or offset for tensor"),
    "overlap": (lambda f: with_header(f, lambda h: entry(h, data_offsets=[0, 64])), "invalid offset for tensor"),
    "unknown dtype": (lambda f: with_header(f, lambda h: entry(h, dtype="X4")), "unknown variant `X4`, expected one of"),
    "a dtype of another size": (
        lambda f: with_header(f, lambda h: entry(h, dtype="F8_E8M0", shape=[64])),
        "model.norm.weight must have one of the dtypes .* got 'F8_E8M0'",
    ),
    "index of a missing file": (
        lambda f: sharded_without(f, "model-00002-of-00002.safetensors"),
        "names model-00002-of-00002.safetensors, which does not exist",
    ),
    "index out of the folder": (index_out_of_the_folder, "its weight_map must hold names of files beside it"),
    "index of another file": (moved_in_index, "places model.norm.weight in .*, which does not hold it"),
    "shards without an index": (lambda f: sharded_without(f, "model.safetensors.index.json"), "no index of them"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_line(tmp_path, kind):
    spoil, message = BAD_FOLDERS[kind]
    folder = write_folder(tmp_path / "model")
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and str(tmp_path) in str(error.value)


def gguf_file(path, architecture="llama", keys=(), drop=(), arrays=None):
    keys = {name: value for name, value in (LLAMA_KEYS | dict(keys)).items() if name not in drop}
    write_gguf(path, architecture, keys, llama_gguf_arrays(llama_arrays()) if arrays is None else arrays)


TABLE = {"token_embd.weight": np.zeros((VOCAB, WIDTH), np.float32)}


def twice(path):
    gguf_file(path, arrays={"token_embd.weight": TABLE["token_embd.weight"], "token_embd.weighs": TABLE["token_embd.weight"]})
    path.write_bytes(path.read_bytes().replace(b"token_embd.weighs", b"token_embd.weight"))


def of_dtype(path, number):
    gguf_file(path, arrays=TABLE)
    data = path.read_bytes()
    at = data.index(b"token_embd.weight") + 17 + 4 + 16
    path.write_bytes(data[:at] + struct.pack("<I", number) + data[at + 4 :])


BAD_GGUF = {
    "cut in the header": (lambda p: (gguf_file(p), cut(p, 200)), "damaged or incomplete"),
    "cut in the data": (lambda p: (gguf_file(p), cut(p, 20_000)), "is damaged or incomplete: .*; copy or download it again"),
    "empty": (lambda p: p.write_bytes(b""), "is no GGUF file: it must begin with GGUF, got b''"),
    "not GGUF": (lambda p: p.write_bytes(b"safetensors, renamed to .gguf"), "it must begin with GGUF, got b'safe'"),
    "big endian": (lambda p: p.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(32)), "(version|byte order)"),
    "unknown architecture": (lambda p: gguf_file(p, "lama"), "general.architecture must be one of llama, .*did you mean 'llama'"),
    "experts": (lambda p: gguf_file(p, keys={"expert_count": 8}), "a model without experts, got 8"),
    "one part of three": (lambda p: gguf_file(p, keys={"split.count": 3}), "a whole GGUF file, .* one of 3 parts; merge them"),
    "no layers": (lambda p: gguf_file(p, drop=["block_count"]), "must have the key llama.block_count"),
    "sizes by layer": (lambda p: gguf_file(p, keys={"attention.head_count": [4, 2]}), "must be one positive number for all layers"),
    "no embedding": (
        lambda p: gguf_file(p, arrays={"output_norm.weight": np.ones(4, np.float32)}),
        "must have the tensor token_embd",
    ),
    "unknown tensor": (
        lambda p: gguf_file(p, arrays=TABLE | {"blk.0.conv.weight": np.ones(4, np.float32)}),
        "got blk.0.conv.weight",
    ),
    "a tensor twice": (twice, "duplicated tensor with name token_embd.weight"),
    "unknown dtype": (lambda p: of_dtype(p, 999), r"999\)? is not a valid GGMLQuantizationType"),
    "rows of broken blocks": (lambda p: of_dtype(p, 8), r"row size \(16\) is not a multiple of Q8_0 block size"),
    "unknown scaling": (
        lambda p: gguf_file(p, keys={"rope.scaling.type": "odd"}),
        "rope.scaling.type must be none, linear or yarn, got 'odd'",
    ),
    "a window": (lambda p: gguf_file(p, "olmo2", {"attention.sliding_window": 8}), "attention.sliding_window must be absent or 0"),
    "a gain": (
        lambda p: gguf_file(p, keys={"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}),
        "rope.scaling.attn_factor must be 1 or absent, got 1.5",
    ),
    "partial rotation": (
        lambda p: gguf_file(p, keys={"rope.dimension_count": 4}),
        "rope.dimension_count must be the width of a head, 8, got 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_GGUF)
def test_bad_gguf_files_are_refused_in_one_line(tmp_path, kind):
    pytest.importorskip("gguf")
    spoil, message = BAD_GGUF[kind]
    path = tmp_path / "a.gguf"
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and str(path) in str(error.value)


def test_paths_that_are_no_checkpoints(tmp_path):
    write_folder(tmp_path / "models")
    with pytest.raises(ValueError, match=r"which does not exist; models are not downloaded; did you mean '.*models'\?"):
        open_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match=r"config\.json', which is another file"):
        open_checkpoint(tmp_path / "models" / "config.json")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"did you mean {str(tmp_path / 'files' / 'a.gguf')!r}?")):
        open_checkpoint(tmp_path / "files")


# Tokenizers ----------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_a_folder(tmp_path):
    pytest.importorskip("tokenizers")
    from posjax.models.pretrained.tokenizer import tokenizer_of

    write_tokenizer(write_folder(tmp_path / "model"))
    tokenizer = tokenizer_of(tmp_path / "model", data_dir=tmp_path / "data")
    text = "the word <|end|>, or not: é\n"
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.stop_tokens, tokenizer.adds_bos) == (VOCAB, 0, (1,), False)
    assert tokenizer.decode(tokenizer.encode(text)) == text and 1 not in tokenizer.encode(text)
    special = tokenizer.encode(text, special=True)
    assert (special == 1).sum() == 1 and len(special) < len(tokenizer.encode(text)) and tokenizer.decode(special) == text
    assert tokenizer.token_bytes(1) == b"<|end|>"
    assert tokenizer.prompt("").tolist() == [0] and tokenizer.prompt("<|end|>").tolist() == [1]
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    tokenizer = tokenizer_of(tmp_path / "model", data_dir=tmp_path / "data")
    assert (
        tokenizer.stop_tokens == (1, 7)
        and tokenizer.prompt("<|end|>").tolist() == [0, 1]
        and tokenizer.prompt("<|begin|><|end|>").tolist() == [0, 1]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 200}, "the tokenizer must have at most the 200 ids of the model, got 2[5-9]."),
        ({"bos_token_id": None, "eos_token_id": None}, "must have bos_token_id or eos_token_id, got neither"),
    ],
)
def test_tokenizers_that_do_not_fit(tmp_path, changes, message):
    pytest.importorskip("tokenizers")
    from posjax.models.pretrained.tokenizer import tokenizer_of

    folder = write_folder(tmp_path / "model")
    with pytest.raises(ValueError, match=r"path must hold a tokenizer.json, got .*model' without one"):
        tokenizer_of(folder, data_dir=tmp_path / "data")
    write_tokenizer(folder)
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        tokenizer_of(folder, data_dir=tmp_path / "data")
