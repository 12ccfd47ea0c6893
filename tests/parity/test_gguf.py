# ruff: noqa: E402 (what needs the packages is imported after they are known to be there)
"""Tiny models of every architecture of GGUF: made by transformers, converted here as llama.cpp does it, and read by posjax.

Where transformers reads the architecture from GGUF, it reads the same file, which checks the conversion.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import jax.numpy as jnp

import posjax as pj
from posjax.models.pretrained.load import from_pretrained, save_pretrained

pytestmark = pytest.mark.thorough
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, LENGTH = 2, 32, 4, 2, 8, 48, 96, 64
LLAMA = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM, intermediate_size=HIDDEN, max_position_embeddings=LENGTH, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1,
    pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)  # fmt: skip
GEMMA3 = LLAMA | dict(
    rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    query_pre_attn_scalar=HEAD_DIM, sliding_window=5, num_hidden_layers=6,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
)  # fmt: skip
KEYS = {
    "context_length": LENGTH, "embedding_length": WIDTH, "feed_forward_length": HIDDEN, "attention.head_count": HEADS,
    "rope.freq_base": 5000.0, "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip
GROUPED = {"attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
GROUPED |= {"rope.dimension_count": HEAD_DIM, "vocab_size": VOCAB}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window": 5}
NEOX = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=HIDDEN,
    max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
)  # fmt: skip
BLOOM = dict(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, bos_token_id=0, eos_token_id=1)
GPT2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH, bos_token_id=0, eos_token_id=1)
# GGUF's name, the classes of transformers, the configuration, keys, and whether transformers reads the architecture from GGUF.
MODELS = {
    "llama": ("Llama", LLAMA | dict(tie_word_embeddings=True), GROUPED, True),
    "qwen2": ("Qwen2", LLAMA, GROUPED, True),
    "qwen3": ("Qwen3", LLAMA, GROUPED, False),  # whose head_dim transformers does not read
    "smollm3": ("SmolLM3", LLAMA | dict(no_rope_layer_interval=4, num_hidden_layers=8), GROUPED, False),
    "olmo2": ("Olmo2", LLAMA, GROUPED, False),
    "gemma3": ("Gemma3", GEMMA3, GROUPED | LINEAR, False),
    "gptneox": ("GPTNeoX", NEOX, {"rope.dimension_count": 4, "use_parallel_residual": True}, False),
    "bloom": ("Bloom", BLOOM | dict(tie_word_embeddings=True), {"vocab_size": VOCAB}, True),
    "gpt2": ("GPT2", GPT2, {"feed_forward_length": 4 * WIDTH}, False),  # as its vocabulary and positions
}
CLASSES = {"GPT2": ("GPT2Config", "GPT2LMHeadModel"), "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


def made(name):
    """A random model; norms and biases, which begin at one or zero, are random too."""
    cls, fields, _, _ = MODELS[name]
    config, model = CLASSES.get(cls, (f"{cls}Config", f"{cls}ForCausalLM"))
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval().float()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.2))
    return built


def converted(name, key, array, config):
    """A tensor as llama.cpp's converter writes it."""
    heads = config.num_attention_heads
    if name in ("llama", "smollm3") and key.endswith(("q_proj.weight", "k_proj.weight")):
        count = heads if "q_proj" in key else config.num_key_value_heads
        return array.reshape(count, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
    if name == "gemma3" and key.endswith("norm.weight"):
        return array + 1
    if name == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return array.T
    if name in ("gptneox", "bloom") and "query_key_value" in key:
        return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in np.moveaxis(
            array.reshape(heads, 3, -1, *array.shape[1:]), 1, 0
        )])  # fmt: skip
    return array


def write(path, name, model):
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    layers = config.num_hidden_layers
    for key, value in (KEYS | {"block_count": layers} | MODELS[name][2]).items():
        kind = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        kind(f"{name}.{key}", value)
    names = gguf.get_tensor_name_map(next(arch for arch, own in gguf.MODEL_ARCH_NAMES.items() if own == name), layers)
    tied = config.tie_word_embeddings
    for key, tensor in model.state_dict().items():
        if tied and key.startswith(("lm_head", "embed_out")):
            continue
        ours = names.get_name(key.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
        assert ours is not None, key
        writer.add_tensor(ours, np.ascontiguousarray(converted(name, key, tensor.numpy(), config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits_of(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_models_from_gguf_give_the_logits_of_transformers(name, tmp_path):
    model = made(name)
    write(tmp_path / "a.gguf", name, model)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 24))
    expected = logits_of(model, tokens)
    if MODELS[name][3]:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
        assert np.abs(logits_of(theirs, tokens) - expected).max() < 1e-5 * expected.std()
    ours = from_pretrained(tmp_path / "a.gguf")
    found = np.asarray(ours(jnp.asarray(tokens)))
    assert np.abs(found - expected).max() < 1e-4 * expected.std()
    with pytest.warns(UserWarning, match="the tokenizer of .* is not saved"):  # the file has none
        save_pretrained(ours, tmp_path / "saved", tmp_path / "a.gguf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert type(again) is type(model) and np.abs(logits_of(again, tokens) - expected).max() < 1e-5 * expected.std()


@pytest.mark.parametrize("name", MODELS)
def test_models_from_a_folder_and_into_another(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "ours", tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert type(again) is type(model)
    for key, tensor in model.state_dict().items():
        off = 1e-7 if name == "gemma3" and "norm" in key else 0.0  # 1 is added to them and subtracted
        assert (again.state_dict()[key] - tensor).abs().max() <= off, key
    original, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert saved == {key: value for key, value in original.items() if key != "dtype"} | {"torch_dtype": "float32"}


def test_learned_positions_are_carried_over_into_a_chain(tmp_path):
    model = made("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 24))
    own = from_pretrained(tmp_path / "gpt2")
    (learned,) = own.encodings
    chained = from_pretrained(tmp_path / "gpt2", encoding=pj.chain(pj.cope(4), learned))
    expected = logits_of(model, tokens)
    assert np.abs(np.asarray(chained(jnp.asarray(tokens))) - expected).max() < 1e-4 * expected.std()
    with pytest.warns(UserWarning, match=r"encoding: learned\(.*\) of the checkpoint is not used; rope\(\) is new"):
        other = from_pretrained(tmp_path / "gpt2", encoding="rope")
    assert np.abs(np.asarray(other(jnp.asarray(tokens))) - expected).max() > 0.1 * expected.std()
    with pytest.raises(ValueError, match=r"must have the shape \[32, 32\], .* got \[64, 32\]"):
        from_pretrained(tmp_path / "gpt2", max_length=32)
