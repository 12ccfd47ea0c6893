"""Weights of other libraries in a Transformer: where each lies, on one and on many devices, with other encodings, saved again."""

import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    CONFIG,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LLAMA_KEYS,
    VOCAB,
    WIDTH,
    llama_arrays,
    llama_gguf_arrays,
    read_safetensors,
    write_folder,
    write_gguf,
    write_tokenizer,
)

import posjax as pj
from posjax.models.pretrained import load
from posjax.models.pretrained.files import open_checkpoint
from posjax.models.pretrained.load import from_pretrained, save_pretrained
from posjax.models.transformer import Transformer, functional
from posjax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return from_pretrained(folder)


def leaves(model):
    flat = jax.tree_util.tree_flatten_with_path(functional(model)[1])[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def expected_params(arrays):
    """Where each tensor lies in posjax: kernels are [L, in, out], and heads an axis of their own."""
    layers = [
        {name.split(".", 3)[3]: a for name, a in arrays.items() if name.startswith(f"model.layers.{n}.")} for n in range(LAYERS)
    ]

    def stack(name, change=lambda array: array):
        return np.stack([change(layer[f"{name}.weight"]) for layer in layers])

    heads = {"query": ("q_proj", HEADS), "key": ("k_proj", KV_HEADS), "value": ("v_proj", KV_HEADS)}
    return {
        "token_embedding/embedding": arrays["model.embed_tokens.weight"],
        "outer_norm/scale": arrays["model.norm.weight"],
        "head/kernel": arrays["lm_head.weight"].T,
        "layers/attention_norm/scale": stack("input_layernorm"),
        "layers/mlp_norm/scale": stack("post_attention_layernorm"),
        "layers/out/kernel": stack("self_attn.o_proj", lambda a: a.T.reshape(HEADS, HEAD_DIM, WIDTH)),
        "layers/gate/kernel": stack("mlp.gate_proj", lambda a: a.T),
        "layers/up/kernel": stack("mlp.up_proj", lambda a: a.T),
        "layers/down/kernel": stack("mlp.down_proj", lambda a: a.T),
    } | {
        f"layers/{ours}/kernel": stack(f"self_attn.{theirs}", lambda a, n=n: a.T.reshape(WIDTH, n, HEAD_DIM))
        for ours, (theirs, n) in heads.items()
    }


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape and np.array_equal(np.asarray(found[name]), array), name


def test_every_tensor_is_where_it_belongs(model):
    same(leaves(model), expected_params(llama_arrays()))
    assert model.encodings == (pj.rope(theta=1000.0),)
    config = model.config
    assert (config.mlp_dim, config.max_length, config.norm_epsilon, config.activation) == (HIDDEN, 64, 1e-5, "swiglu")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32_without_rounding(tmp_path, dtype):
    arrays = llama_arrays(dtype=dtype)
    loaded = leaves(from_pretrained(write_folder(tmp_path / "half", arrays, shards=2)))
    same(loaded, expected_params({name: array.astype(np.float32) for name, array in arrays.items()}))
    assert {leaf.dtype.name for leaf in loaded.values()} == {"float32"}
    loaded = leaves(from_pretrained(tmp_path / "half", dtype="bfloat16"))
    expected = expected_params({name: array.astype(np.float32) for name, array in arrays.items()})
    same(loaded, {k: a if k.endswith("scale") else a.astype(ml_dtypes.bfloat16) for k, a in expected.items()})
    assert {name.rsplit("/")[-1] for name, leaf in loaded.items() if leaf.dtype == jnp.float32} == {"scale"}


def test_a_gguf_file_gives_the_same_parameters(tmp_path, model):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "a.gguf", "llama", LLAMA_KEYS, llama_gguf_arrays(llama_arrays()))
    same(leaves(from_pretrained(tmp_path / "a.gguf")), {name: np.asarray(leaf) for name, leaf in leaves(model).items()})


# Many devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_each_device_holds_its_share_only(tmp_path, folder, model, kind):
    path = folder
    if kind == "gguf":
        pytest.importorskip("gguf")
        path = tmp_path / "a.gguf"
        write_gguf(path, "llama", LLAMA_KEYS, llama_gguf_arrays(llama_arrays()))
    sharded = leaves(from_pretrained(path, mesh=make_mesh(fsdp=4, tensor=2)))
    whole = leaves(model)
    same(sharded, {name: np.asarray(leaf) for name, leaf in whole.items()})
    held = {device: 0 for device in jax.devices()}
    for name, leaf in sharded.items():
        parts = 1 if "norm" in name else 8
        for shard in leaf.addressable_shards:
            assert shard.data.nbytes == leaf.nbytes // parts, name
            held[shard.device] += shard.data.nbytes
    norms = sum(leaf.nbytes for name, leaf in whole.items() if "norm" in name)
    total = sum(leaf.nbytes for leaf in whole.values())
    assert set(held.values()) == {norms + (total - norms) // 8}


def test_a_shard_is_read_without_the_rest_of_the_file(folder):
    """Every part of a safetensors file is a view of the mapped file: what is not copied from it is not read."""
    checkpoint = open_checkpoint(folder)
    architecture = load.architecture_in(checkpoint)
    rows = load._rows(architecture, checkpoint, load._Old(architecture.encodings, architecture.encodings))
    assert len(rows) == 12
    for parts in rows.values():
        for part in parts:
            view = part.read()
            while isinstance(view, np.ndarray) and view.base is not None:
                view = view.base
            assert type(view).__name__ == "mmap"


# Other encodings -----------------------------------------------------------------------------------------------------------


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(one.message) for one in caught if "encoding:" in str(one.message)]


@pytest.mark.parametrize("added", ["cope(4)", 'cope(4, gates="keys")', "cope_mlp(8)", "t5"])
def test_an_encoding_that_starts_at_zero_is_added_without_a_word(folder, model, added):
    extended, said = warnings_of(lambda: from_pretrained(folder, encoding=f"rope(1000.0) + {added}"))
    assert said == []
    found = leaves(extended)
    same({name: leaf for name, leaf in found.items() if not name.startswith("encoding/")}, expected_params(llama_arrays()))
    last = ("/embedding", "/weight_out", "/table", "/bias")
    zero = [leaf for name, leaf in found.items() if name.endswith(last) and name.startswith("encoding/")]
    assert len(zero) == 1 and not np.asarray(zero[0]).any()


@pytest.mark.thorough
@pytest.mark.parametrize("added", ["cope(4)", 'cope(4, gates="keys")', "cope_mlp(8)", "t5"])
def test_it_leaves_the_logits_as_they_are(folder, model, added):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 12))
    extended = from_pretrained(folder, encoding=f"rope(1000.0) + {added}")
    before, after = (np.asarray(one(jnp.asarray(tokens))) for one in (model, extended))
    assert np.abs(before - after).max() <= 1e-6 * before.std()


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("alibi", "rope(theta=1000.0) of the checkpoint is not used; alibi() is new."),
        (pj.chain(pj.rope(1000.0), pj.alibi()), "alibi() is new; rope(theta=1000.0) is carried over."),
        ([pj.rope(1000.0), pj.identity()], "rope(theta=1000.0) of the checkpoint is not used; rope(theta=1000.0) is carried over."),
    ],
)
def test_a_warning_says_what_is_not_carried_over(folder, encoding, message):
    _, said = warnings_of(lambda: from_pretrained(folder, encoding=encoding))
    assert said == [f"encoding: {message} The weights were not trained with this encoding."]


def test_a_new_encoding_is_drawn_from_the_seed(folder):
    added = 'rope(1000.0) + cope(4, gates="keys")'
    a, b, c = (leaves(from_pretrained(folder, encoding=added, seed=seed)) for seed in (0, 0, 1))
    (name,) = [name for name in a if name.endswith("/gate_kernel")]
    assert np.array_equal(a[name], b[name]) and not np.array_equal(a[name], c[name])


# Arguments and weights that do not fit ------------------------------------------------------------------------------------------


def test_fields_that_leave_the_weights_as_they_are(folder):
    model = from_pretrained(folder, max_length=32, compute_dtype="bfloat16", implementation="xla", num_layers=LAYERS)
    assert (model.config.max_length, model.config.compute_dtype, model.config.implementation) == (32, "bfloat16", "xla")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 4}, "num_layers must be that of the checkpoint, 2, got 4; only max_length, "),
        ({"num_layer": 2}, "fields must be those of TransformerConfig, got 'num_layer'; did you mean 'num_layers'?"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, got 'int8'"),
        ({"encoding": [pj.rope()] * 3}, "encoding must be one, or a sequence whose length divides num_layers=2, got 3"),
        ({"encoding": "ropes"}, "did you mean 'rope'?"),
    ],
)
def test_arguments_that_contradict_the_checkpoint(folder, arguments, message):
    with pytest.raises(ValueError) as error:
        from_pretrained(folder, **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def reshaped(arrays):
    arrays["model.norm.weight"] = np.ones(WIDTH + 1, np.float32)


BAD_WEIGHTS = {
    "missing": (lambda a: a.pop("model.layers.1.mlp.up_proj.weight"), "missing: model.layers.1.mlp.up_proj.weight"),
    "unexpected": (lambda a: a.update({"model.layers.1.mlp.bias": np.ones(3, np.float32)}), "unexpected: model.layers.1.mlp.bias"),
    "of another model": (lambda a: [a.pop(name) for name in list(a)[:5]], "missing: .* and 2 more"),
    "shapes": (reshaped, r"other shapes: model.norm.weight \[17\] instead of \[16\]"),
    "integers": (
        lambda a: a.update({"model.norm.weight": np.ones(WIDTH, np.int64)}),
        "must be float32, bfloat16 or float16, got I64",
    ),
    "float8": (
        lambda a: a.update({"model.norm.weight": np.ones(WIDTH, ml_dtypes.float8_e4m3fn)}),
        "must be float32, bfloat16 or float16, got F8_E4M3; load the model without quantization",
    ),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_weights_that_are_not_those_of_the_config(tmp_path, kind):
    spoil, message = BAD_WEIGHTS[kind]
    arrays = llama_arrays()
    spoil(arrays)
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(write_folder(tmp_path / "bad", arrays))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_model_that_posjax_does_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"bad: model_type must be one of .*, got 'lama'; did you mean 'llama'\?"):
        from_pretrained(write_folder(tmp_path / "bad", config=CONFIG | {"model_type": "lama"}))


# Saved again ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_what_was_loaded(tmp_path, folder, model, dtype):
    saved = save_pretrained(model, tmp_path / "saved", folder, dtype=dtype)
    arrays, metadata = read_safetensors(saved / "model.safetensors")
    own = np.dtype(getattr(ml_dtypes, dtype, dtype))
    originals = {name: array.astype(own) for name, array in llama_arrays().items()}
    assert metadata == {"format": "pt"} and set(arrays) == set(originals)
    for name, array in originals.items():
        assert arrays[name].dtype == own and arrays[name].tobytes() == array.tobytes(), name
    assert json.loads((saved / "config.json").read_text()) == CONFIG | {"torch_dtype": dtype}


def test_a_large_model_is_saved_in_several_files(tmp_path, folder, model):
    write_tokenizer(write_folder(tmp_path / "source"))
    saved = save_pretrained(model, tmp_path / "saved", tmp_path / "source", shard_bytes=20_000)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert {file: set(read_safetensors(saved / file)[0]) for file in files} == {
        file: {name for name, own in index["weight_map"].items() if own == file} for file in files
    }
    total = sum(array.nbytes for array in llama_arrays().values())
    assert index["metadata"]["total_size"] == total
    assert (saved / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()
    same(leaves(from_pretrained(saved)), expected_params(llama_arrays()))


def test_models_that_cannot_be_saved(tmp_path, folder, model):
    extended = from_pretrained(folder, encoding="rope(1000.0) + cope(4)")
    with pytest.raises(ValueError, match=r"model must have the encoding that source describes, rope\(theta=1000.0\) in layer 0"):
        save_pretrained(extended, tmp_path / "a", folder)
    with pytest.raises(ValueError, match=r"source must describe the model, whose norm_epsilon is 1e-05, got one with 0\.001"):
        save_pretrained(model, tmp_path / "a", CONFIG | {"rms_norm_eps": 1e-3})
    with pytest.raises(ValueError, match=r"folder must be new or empty, got '.*tiny'"):
        save_pretrained(model, folder, folder)
    with pytest.raises(TypeError, match=r"model must be a Transformer, got \{\}"):
        save_pretrained({}, tmp_path / "a", folder)
    assert not (tmp_path / "a").exists()


def test_the_transformer_loads_itself(folder):
    same(leaves(Transformer.from_pretrained(folder)), expected_params(llama_arrays()))
