"""Configurations of released models, old and new forms of them, and what is refused, with the name of its key."""

import math

import jax
import numpy as np
import pytest

import posjax as pj
from posjax.models.pretrained.architecture import match_names, params_from
from posjax.models.pretrained.families import FAMILIES, architecture_of

ROPE = {"rope_type": "default"}
LLAMA = dict(model_type="llama", hidden_act="silu")
GEMMA3_TYPES = {"sliding_attention": ROPE | {"rope_theta": 1e4}, "full_attention": ROPE | {"rope_theta": 1e6}}
BERT = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu")


def sizes(width, layers, heads, kv_heads, hidden, vocab, **others):
    own = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    return own | dict(intermediate_size=hidden, vocab_size=vocab, **others)


# The keys of config.json that matter, as they stand on the Hub, and the number of parameters of the model.
TIED = dict(tie_word_embeddings=True)
QWEN2 = dict(model_type="qwen2", rope_theta=1e6, use_sliding_window=False, sliding_window=32768, max_window_layers=24)
QWEN3 = dict(model_type="qwen3", rope_theta=1e6, use_sliding_window=False, sliding_window=None, head_dim=128)
GEMMA3 = dict(model_type="gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=None, head_dim=256)
GEMMA3 |= dict(sliding_window=512, sliding_window_pattern=6, query_pre_attn_scalar=256, attn_logit_softcapping=None)
NEOX = dict(model_type="gpt_neox", rotary_pct=0.25, rotary_emb_base=10000, hidden_act="gelu")
GPT2 = dict(model_type="gpt2", n_embd=768, n_layer=12, n_head=12, n_ctx=1024, n_positions=1024, vocab_size=50257)
ROBERTA = BERT | dict(model_type="roberta", vocab_size=50265, type_vocab_size=1, max_position_embeddings=514, pad_token_id=1)
RELEASED = {
    "SmolLM2-135M": (LLAMA | sizes(576, 30, 9, 3, 1536, 49152, rope_theta=100_000, **TIED), 134_515_008),
    "Llama-3.2-1B": (LLAMA | sizes(2048, 16, 32, 8, 8192, 128256, head_dim=64, rope_theta=5e5, **TIED), 1_235_814_400),
    "Mistral-7B-v0.1": (sizes(4096, 32, 32, 8, 14336, 32000, model_type="mistral", sliding_window=4096), 7_241_732_096),
    "Qwen2.5-0.5B": (QWEN2 | sizes(896, 24, 14, 2, 4864, 151936, **TIED), 494_032_768),
    "Qwen3-0.6B": (QWEN3 | sizes(1024, 28, 16, 8, 3072, 151936, **TIED), 596_049_920),
    "SmolLM3-3B": (sizes(2048, 36, 16, 4, 11008, 128256, model_type="smollm3", rope_theta=5e6), 3_075_098_624),
    "OLMo-2-0425-1B": (sizes(2048, 16, 16, 16, 8192, 100352, model_type="olmo2", rope_theta=5e5), 1_484_916_736),
    "gemma-2b": (sizes(2048, 18, 8, 1, 16384, 256000, model_type="gemma", hidden_act="gelu", head_dim=256), 2_506_172_416),
    "gemma-2-2b": (sizes(2304, 26, 8, 4, 9216, 256000, model_type="gemma2", head_dim=256), 2_614_341_888),
    "gemma-3-1b-it": (GEMMA3 | sizes(1152, 26, 4, 1, 6912, 262144), 999_885_952),
    "pythia-70m": (NEOX | sizes(512, 6, 8, 8, 2048, 50304), 70_426_624),
    "gpt-j-6b": (dict(model_type="gptj", n_embd=4096, n_layer=28, n_head=16, vocab_size=50400, rotary_dim=64), 6_050_882_784),
    "bloom-560m": (dict(model_type="bloom", n_embed=1024, n_layer=24, num_attention_heads=16, vocab_size=250880), 559_214_592),
    "gpt2": (GPT2, 124_439_808),
    "bert-base-uncased": (BERT | dict(model_type="bert", vocab_size=30522), 109_514_298),
    "roberta-base": (ROBERTA, 124_697_433),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_its_number_of_parameters(name):
    config, count = RELEASED[name]
    architecture = architecture_of(config)
    assert sum(math.prod(weight.shape) for _, _, weight in architecture.tensors()) == count
    assert len(architecture.encodings) == architecture.config.num_layers


def released(name, **changes):
    return architecture_of(RELEASED[name][0] | changes)


def test_positions_and_windows_of_released_models():
    """transformers counts the token itself in a window; posjax counts the earlier ones."""
    assert released("SmolLM2-135M").encodings == (pj.rope(100_000.0),) * 30
    assert released("Mistral-7B-v0.1").config.local_window_size == 4095
    assert released("Mistral-7B-v0.1", sliding_window=None).config.local_window_size is None
    assert released("Qwen2.5-0.5B").config.local_window_size is None
    windows = released("Qwen2.5-0.5B", use_sliding_window=True, max_window_layers=20).config.windows
    assert windows == (None,) * 20 + (32767,) * 4
    assert released("gemma-2-2b").config.windows == (4095, None) * 13
    gemma3 = released("gemma-3-1b-it")
    assert gemma3.config.windows == ((511,) * 5 + (None,)) * 4 + (511,) * 2
    assert gemma3.encodings == ((pj.rope(1e4),) * 5 + (pj.rope(1e6),)) * 4 + (pj.rope(1e4),) * 2
    assert released("SmolLM3-3B").encodings == ((pj.rope(5e6),) * 3 + (pj.identity(),)) * 9
    assert released("pythia-70m").encodings == (pj.rope(fraction=0.25),) * 6
    assert released("gpt-j-6b").encodings == (pj.rope(fraction=0.25, pairing="interleaved"),) * 28
    assert released("bloom-560m").encodings == (pj.alibi(),) * 24
    assert released("gpt2").encodings == (pj.learned(),) * 12
    assert released("roberta-base").config.max_length == 512


def test_old_and_new_forms_of_a_configuration_are_the_same():
    def described(architecture):
        weights = [(weight.name, weight.shape, weight.paths) for weight in architecture.weights]
        return architecture.config, architecture.encodings, weights

    def same(name, drop, **new):
        old = RELEASED[name][0]
        config = {key: value for key, value in old.items() if key not in drop} | new
        assert described(architecture_of(config)) == described(architecture_of(old))

    same("SmolLM2-135M", ["rope_theta"], rope_parameters=ROPE | {"rope_theta": 100_000.0}, dtype="bfloat16")
    same("pythia-70m", ["rotary_pct"], rope_parameters=ROPE | {"rope_theta": 10_000, "partial_rotary_factor": 0.25})
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2
    dropped = ["rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"]
    same("gemma-3-1b-it", dropped, rope_parameters=GEMMA3_TYPES, layer_types=types)
    same("bloom-560m", ["n_embed", "num_attention_heads"], hidden_size=1024, n_head=16)


# Names ---------------------------------------------------------------------------------------------------------------


def tiny(model_type, **changes):
    own = dict(model_type=model_type, rope_theta=5e3, max_position_embeddings=8)
    common = sizes(8, 2, 2, 2, 12, 11) | own
    if model_type in ("gpt2", "gptj", "bloom"):
        common = dict(model_type=model_type, n_embd=8, hidden_size=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8)
        common |= dict(rotary_dim=4) if model_type == "gptj" else {}
    return common | (dict(rotary_pct=0.5) if model_type == "gpt_neox" else {}) | changes


def tensors_of(architecture):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=weight.shape).astype(np.float32) for name, _, weight in architecture.tensors()}


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer.")),  # as the first GPT-2 was published
        ("bloom", lambda name: name.removeprefix("transformer.")),
        ("bert", lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")),
    ],
)
def test_names_of_old_checkpoints(model_type, changed):
    architecture = architecture_of(tiny(model_type))
    tensors = tensors_of(architecture)
    old = {changed(name): tensor for name, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    jax.tree.map(np.testing.assert_array_equal, params_from(architecture, old), params_from(architecture, tensors))


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "h.1.attn.masked_bias"),
        ("gptj", "transformer.h.0.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("bert", "bert.pooler.dense.weight"),
        ("bert", "cls.seq_relationship.bias"),
        ("bert", "bert.embeddings.position_ids"),
        ("roberta", "lm_head.decoder.weight"),
    ],
)
def test_tensors_that_a_model_does_not_need(model_type, extra):
    architecture = architecture_of(tiny(model_type))
    tensors = tensors_of(architecture)
    assert list(match_names(architecture, tensors | {extra: np.zeros(3)}).values()) == list(tensors)


def test_tied_weights_may_be_stored_twice():
    architecture = architecture_of(tiny("llama", tie_word_embeddings=True))
    tensors = tensors_of(architecture)
    assert "lm_head.weight" not in tensors
    match_names(architecture, tensors | {"lm_head.weight": np.zeros((11, 8))})


def test_roberta_skips_the_rows_before_the_first_position():
    architecture = architecture_of(tiny("roberta", pad_token_id=1))
    tensors = tensors_of(architecture)
    table = tensors["roberta.embeddings.position_embeddings.weight"]
    np.testing.assert_array_equal(params_from(architecture, tensors)["encoding"]["0"]["embedding"], table[2:])


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("lama", {}, r"model_type must be one of bert, .*, got 'lama'; did you mean 'llama'\?"),
        (None, {}, r"model_type must be one of bert, .*, got None"),
        ("llama", {"hidden_size": None}, r"config.json of model_type='llama' must have the key 'hidden_size'"),
        ("llama", {"hidden_size": "8"}, r"hidden_size of config.json must be an integer of at least 1, got '8'"),
        ("llama", {"num_hidden_layers": 0}, r"num_hidden_layers of config.json must be an integer of at least 1, got 0"),
        ("llama", {"num_key_value_heads": 3}, r"num_kv_heads must divide num_heads=2, got 3"),
        ("llama", {"rms_norm_eps": 0}, r"rms_norm_eps of config.json must be positive, got 0"),
        ("llama", {"tie_word_embeddings": "yes"}, r"tie_word_embeddings of config.json must be True or False, got 'yes'"),
        ("llama", {"hidden_act": "relu"}, r"hidden_act of config.json must be 'silu' or 'swish', got 'relu'"),
        ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config of config.json must be null .* got {'bits': 4}"),
        ("llama", {"is_encoder_decoder": True}, r"is_encoder_decoder of config.json must be False or absent, got True"),
        ("llama", {"rope_scaling": {"type": "spiral", "factor": 2.0}}, r"spiral"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor.* got 0.5"),
        ("mistral", {"sliding_window": 1}, r"sliding_window of config.json must be at least 2, got 1"),
        ("qwen3", {"layer_types": ["full_attention"]}, r"layer_types of config.json must be .* each of 2 layers, got 1"),
        ("qwen3", {"layer_types": "full_attention"}, r"layer_types of config.json must be a list .* got 'full_attention'"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, r"layer_types of config.json must have only .*'chunked_attention'"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, r"attn_logit_softcapping of config.json must be positive, got -1.0"),
        ("gemma", {"hidden_activation": "silu"}, r"hidden_activation of config.json must be 'gelu_pytorch_tanh' .* got 'silu'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, r"use_bidirectional_attention of config.json must be False"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping of config.json must be null .* got 50.0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx of config.json must be False"),
        ("gpt2", {"scale_attn_weights": False}, r"scale_attn_weights of config.json must be True or absent, got False"),
        ("gpt2", {"add_cross_attention": True}, r"add_cross_attention of config.json must be False or absent, got True"),
        ("gpt2", {"activation_function": "relu"}, r"activation_function of config.json must be 'gelu_new' or .* got 'relu'"),
        ("gptj", {"tie_word_embeddings": True}, r"tie_word_embeddings of config.json must be False or absent, got True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, r"apply_residual_connection_post_layernorm .* got True"),
        ("bert", {"is_decoder": True}, r"is_decoder of config.json must be False or absent, got True"),
        ("bert", {"position_embedding_type": "relative_key"}, r"position_embedding_type of config.json must be 'absolute'"),
        ("bert", {"tie_word_embeddings": False}, r"tie_word_embeddings of config.json must be True or absent, got False"),
        ("roberta", {"hidden_act": "gelu_new"}, r"hidden_act of config.json must be 'gelu', got 'gelu_new'"),
        ("roberta", {"pad_token_id": 9}, r"max_position_embeddings of config.json must be above the 10 rows .* got 8"),
    ],
)  # fmt: skip
def test_what_posjax_does_not_have_is_named(model_type, changes, message):
    config = tiny(model_type, **changes)
    with pytest.raises(ValueError, match=message) as error:
        architecture_of(config)
    assert "\n" not in str(error.value)


def test_a_configuration_is_a_mapping():
    with pytest.raises(ValueError, match=r"config must be a mapping, the keys and values of a config.json, got \['llama'\]"):
        architecture_of(["llama"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"got missing: model.norm.weight$"),
        (lambda tensors: tensors.clear(), r"got missing: model.embed_tokens.weight, .* and 18 more$"),
        (lambda tensors: tensors.update({"score.weight": np.zeros(2)}), r"got unexpected: score.weight$"),
        (
            lambda tensors: tensors.update({"lm_head.weight": np.zeros((12, 8))}),
            r"got other shapes: lm_head.weight \[12, 8\] instead of \[11, 8\]$",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": np.zeros(3), "x": tensors.pop("model.norm.weight")}),
            r"got missing: model.norm.weight; unexpected: x; other shapes: lm_head.weight \[3\] instead of \[11, 8\]$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(changed, message):
    architecture = architecture_of(tiny("llama"))
    tensors = tensors_of(architecture)
    changed(tensors)
    with pytest.raises(ValueError, match=message):
        params_from(architecture, tensors)


def test_every_family_is_tested():
    assert {config["model_type"] for config, _ in RELEASED.values()} | {"xlm-roberta"} == set(FAMILIES)
