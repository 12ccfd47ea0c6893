# ruff: noqa: E402 (what needs the packages is imported after they are known to be there)
"""Models of other libraries in posjax: a tiny random model of every family, made by transformers, gives the same logits.

Every model has grouped heads where its family does, a vocabulary and a theta that are not round, and random norms and biases. The
logits are compared whole, in chunks, token by token and in left-padded batches; the weights written back give the same model.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")
load_file = pytest.importorskip("safetensors.numpy").load_file

from posjax.models.pretrained import save_pretrained
from posjax.models.transformer import Transformer, functional

V, T = 53, 13
SIZES = dict(vocab_size=V, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, max_position_embeddings=40)
LLAMA = SIZES | dict(intermediate_size=70, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT = dict(vocab_size=V, n_embd=48, n_layer=3, n_head=6, bos_token_id=1, eos_token_id=2)
BERT = SIZES | dict(intermediate_size=70, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GEMMA = LLAMA | dict(head_dim=10, rms_norm_eps=1e-5)


def theta(value, **others):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value, **others}}


LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


FULL, LOCAL = "full_attention", "sliding_attention"
BY_TYPE = {LOCAL: {"rope_type": "default", "rope_theta": 700.0}, FULL: {"rope_type": "linear", "rope_theta": 9e4, "factor": 8.0}}
GEMMA3 = GEMMA | dict(rope_parameters=BY_TYPE, sliding_window=4)
NEOX = SIZES | dict(intermediate_size=70)
CASES = {
    "llama": ("Llama", LLAMA | theta(5_000.0) | dict(rms_norm_eps=1e-3)),
    "llama-biases": ("Llama", LLAMA | theta(3e5) | dict(attention_bias=True, mlp_bias=True, head_dim=10, tie_word_embeddings=True)),
    "llama-llama3": ("Llama", LLAMA | theta(5e3, **LLAMA3)),
    "llama-linear": ("Llama", LLAMA | theta(5e3, rope_type="linear", factor=2.5)),
    "qwen2-yarn": ("Qwen2", LLAMA | theta(1e4, rope_type="yarn", factor=4.0, original_max_position_embeddings=10)),
    "mistral": ("Mistral", LLAMA | theta(7_000.0) | dict(sliding_window=None)),
    "mistral-window": ("Mistral", LLAMA | theta(7_000.0) | dict(sliding_window=4)),
    "qwen2": ("Qwen2", LLAMA | theta(1e6)),
    "qwen2-window": ("Qwen2", LLAMA | theta(1e6) | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3", LLAMA | theta(1e6) | dict(head_dim=10, tie_word_embeddings=True)),
    "qwen3-biases": ("Qwen3", LLAMA | theta(1e6) | dict(head_dim=8, attention_bias=True)),
    "smollm3": ("SmolLM3", LLAMA | theta(2e6) | dict(no_rope_layers=[1, 0, 1])),
    "smollm3-window": ("SmolLM3", LLAMA | theta(2e6) | dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=4)),
    "olmo2": ("Olmo2", LLAMA | theta(5e5)),
    "gemma": ("Gemma", GEMMA | theta(8_000.0)),
    "gemma2": ("Gemma2", GEMMA | theta(8_000.0) | dict(sliding_window=4, attn_logit_softcapping=3.0, final_logit_softcapping=2.0)),
    "gemma3": ("Gemma3", GEMMA3 | dict(layer_types=[LOCAL, FULL, LOCAL], query_pre_attn_scalar=7)),
    "gemma3-biases": ("Gemma3", GEMMA3 | dict(final_logit_softcapping=2.0, attention_bias=True)),
    "gpt_neox": ("GPTNeoX", NEOX | theta(9_000.0, partial_rotary_factor=0.25) | dict(hidden_act="gelu")),
    "gpt_neox-sequential": ("GPTNeoX", NEOX | dict(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new")),
    "gptj": ("GPTJ", GPT | dict(rotary_dim=4, n_positions=40)),
    "bloom": ("Bloom", dict(vocab_size=V, hidden_size=48, n_layer=3, n_head=6)),
    "gpt2": ("GPT2", GPT | dict(n_positions=40, n_inner=70)),
    "gpt2-untied": ("GPT2", GPT | dict(n_positions=40, tie_word_embeddings=False, activation_function="gelu")),
    "bert": ("Bert", BERT | dict(type_vocab_size=3)),
    "bert-tanh": ("Bert", BERT | dict(hidden_act="gelu_new")),
    "roberta": ("Roberta", BERT | dict(type_vocab_size=2)),
    "xlm_roberta": ("XLMRoberta", BERT | dict(type_vocab_size=1)),
}
ENCODERS = ("Bert", "Roberta", "XLMRoberta")
HEADS = dict.fromkeys(ENCODERS, "ForMaskedLM") | {"GPT2": "LMHeadModel"}


def theirs_of(case, seed=0):
    """A model of transformers with random weights, norms and biases included."""
    name, options = CASES[case]
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    model_class = getattr(transformers, name + HEADS.get(name, "ForCausalLM"))
    torch.manual_seed(seed)
    config = config_class(**options)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        is_scale = parameter.ndim == 1 and parameter_name.endswith("weight") and "Gemma" not in name
        with torch.no_grad():
            parameter.copy_(1 + 0.3 * noise if is_scale else (0.3 if parameter.ndim == 1 else 0.2) * noise)
    return model


def logits_of(model, tokens, **others):
    with torch.no_grad():
        return model(torch.as_tensor(tokens), **{k: torch.as_tensor(v) for k, v in others.items()}).logits.numpy()


def near(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.thorough  # it compiles several shapes of every model
@pytest.mark.parametrize("case", CASES)
def test_a_model_gives_the_logits_of_transformers(case, tmp_path):
    model = theirs_of(case)
    model.save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    with_params, params = functional(ours)
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, V, (2, T))
    whole = logits_of(model, tokens)
    assert whole.std() > 0.05
    near(ours(jnp.asarray(tokens)), whole)

    # Left-padded: the second row has five tokens less.
    pads = np.array([0, 5])
    real = np.arange(T) >= pads[:, None]
    padded = np.where(real, tokens, 1)
    places = np.maximum(np.arange(T) - pads[:, None], 0)
    is_encoder = not ours.config.is_causal
    given = {"attention_mask": real.astype(np.int64)}
    if "position_ids" in inspect.signature(model.forward).parameters and not case.endswith("roberta"):
        given["position_ids"] = places
    expected = logits_of(model, padded, **given)
    segments = jnp.asarray(real, jnp.int32)
    found = ours(jnp.asarray(padded), jnp.asarray(places), segments)
    near(np.asarray(found)[real], expected[real])

    if is_encoder:
        types = rng.integers(0, ours.config.num_token_types, (2, T))
        near(ours(jnp.asarray(tokens), token_types=jnp.asarray(types)), logits_of(model, tokens, token_type_ids=types))
    else:
        decode = jax.jit(lambda params, *arguments: with_params(params).decode(*arguments))
        for sizes in ([5, 5, 3], [1] * T):
            cache, parts, start = ours.init_cache(2, T), [], 0
            for size in sizes:
                logits, cache = decode(params, jnp.asarray(tokens[:, start : start + size]), cache)
                parts.append(logits)
                start += size
            near(jnp.concatenate(parts, 1), whole)
        cache, parts = ours.init_cache(2, T), []
        for start in range(0, T, 5):
            rows = slice(start, start + 5)
            logits, cache = decode(params, jnp.asarray(padded[:, rows]), cache, None, segments[:, rows])
            parts.append(logits)
        near(np.asarray(jnp.concatenate(parts, 1))[real], expected[real])

    # And back, in files that transformers reads.
    save_pretrained(ours, tmp_path / "ours", source=tmp_path / "theirs")
    tensors, written = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert written.keys() == tensors.keys()
    for name, tensor in written.items():
        if "position_embeddings" not in name:  # RoBERTa's first rows, which no position uses, become zero
            np.testing.assert_allclose(tensor, tensors[name], rtol=0, atol=2e-7 if "gemma" in case else 0)
    near(logits_of(type(model).from_pretrained(tmp_path / "ours").eval(), tokens), whole)
