"""Decoders with rotary positions, RMSNorm and a gated MLP: Llama, Mistral, Qwen, SmolLM, OLMo 2 and Gemma."""

from collections.abc import Sequence
from typing import Any, Literal

from posjax.core.encoding import identity
from posjax.models.config import TransformerConfig
from posjax.models.pretrained.architecture import Architecture
from posjax.models.pretrained.families.keys import Keys
from posjax.models.pretrained.layouts import ONE_MORE, SAME, Weight, from_heads, linear, normalization, to_heads

SILU = dict(silu="swiglu", swish="swiglu")
GELU = dict(gelu_pytorch_tanh="geglu", gelu="geglu", gelu_new="geglu")  # in Gemma, "gelu" means the approximation, too
LAYER_TYPES = ("full_attention", "sliding_attention")
NormPosition = Literal["pre", "output", "sandwich"]

# The name of each norm, by norm_position.
_NORMS: dict[NormPosition, dict[str, str]] = {
    "pre": dict(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    "output": dict(attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm"),
    "sandwich": dict(
        attention_norm="input_layernorm",
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    ),
}


def llama(keys: Keys) -> Architecture:
    """Returns the architecture of Llama 1 to 3, SmolLM 1 and 2, and others that use its code."""
    return _decoder(keys, biases=_attention_biases(keys) + (("mlp",) if keys.flag("mlp_bias", default=False) else ()))


def mistral(keys: Keys) -> Architecture:
    """Returns the architecture of Mistral 7B and its successors, with a window in all layers or in none."""
    window = keys.size("sliding_window", default=None if "sliding_window" in keys.config else 4096)
    return _decoder(keys, kv_heads=8, windows=keys.windows(["sliding_attention"], window))


def qwen2(keys: Keys) -> Architecture:
    """Returns the architecture of Qwen 2 and 2.5: biases of query, key and value."""
    return _decoder(keys, biases=("qkv",), windows=_qwen_windows(keys))


def qwen3(keys: Keys) -> Architecture:
    """Returns the architecture of Qwen 3: norms of queries and keys by head."""
    return _decoder(keys, head_dim=128, biases=_attention_biases(keys), qk_norm="head", windows=_qwen_windows(keys))


def smollm3(keys: Keys) -> Architecture:
    """Returns the architecture of SmolLM 3: no rotation in every fourth layer."""
    layers = keys.size("num_hidden_layers")
    window = keys.size("sliding_window", default=None) if keys.flag("use_sliding_window", default=False) else None
    types = [LAYER_TYPES[window is not None and encoding == identity()] for encoding in keys.rotary(layers)]
    types = keys.layers("layer_types", layers, LAYER_TYPES, types)
    biases = _attention_biases(keys) + (("mlp",) if keys.flag("mlp_bias", default=False) else ())
    return _decoder(keys, kv_heads=4, biases=biases, tied=True, windows=keys.windows(types, window))


def olmo2(keys: Keys) -> Architecture:
    """Returns the architecture of OLMo 2: norms of the outputs of branches, and of all queries and all keys of a token."""
    return _decoder(keys, biases=_attention_biases(keys), epsilon=1e-5, norm_position="output", qk_norm="full")


def gemma(keys: Keys) -> Architecture:
    """Returns the architecture of Gemma 1: norms with a factor of 1 + w, GeGLU, and an embedding scale of sqrt(D)."""
    keys.refuse(use_bidirectional_attention=False)
    return _gemma(keys, kv_heads=16)


def gemma2(keys: Keys) -> Architecture:
    """Returns the architecture of Gemma 2: Gemma 1 with norms before and after a branch, soft caps, windows by layer."""
    layers = keys.size("num_hidden_layers")
    types = keys.layers("layer_types", layers, LAYER_TYPES, [LAYER_TYPES[layer % 2 == 0] for layer in range(layers)])
    return _gemma23(keys, types, caps=(50.0, 30.0))


def gemma3(keys: Keys) -> Architecture:
    """Returns the architecture of Gemma 3 for text: Gemma 2 with norms of queries and keys, and a theta for each type of layer."""
    layers = keys.size("num_hidden_layers")
    pattern = keys.size("sliding_window_pattern", "_sliding_window_pattern", default=6)
    types = [LAYER_TYPES[(layer + 1) % pattern != 0] for layer in range(layers)]
    types = keys.layers("layer_types", layers, LAYER_TYPES, types)
    keys.refuse(attn_logit_softcapping=None)  # transformers ignores it in Gemma 3
    return _gemma23(keys, types, caps=(None, None), qk_norm="head")


def _gemma23(keys: Keys, types: Sequence[str], caps: tuple[float | None, float | None], **options: Any) -> Architecture:
    keys.refuse(use_bidirectional_attention=False)
    attention, final = (
        keys.number(name, default=None if name in keys.config else cap)
        for name, cap in zip(("attn_logit_softcapping", "final_logit_softcapping"), caps, strict=True)
    )
    transformer = dict(
        attention_scale=keys.number("query_pre_attn_scalar", default=256) ** -0.5,
        logits_soft_cap=attention,
        final_logits_soft_cap=final,
    )
    windows = keys.windows(types, keys.size("sliding_window", default=4096))
    return _gemma(keys, kv_heads=4, norm_position="sandwich", windows=windows, **options, **transformer)


def _gemma(keys: Keys, **options: Any) -> Architecture:
    biases = _attention_biases(keys)
    own = dict(head_dim=256, biases=biases, activations=GELU, tied=True, embedding_scale=None, one_more=True)
    return _decoder(keys, **own, **options)


def _attention_biases(keys: Keys) -> tuple[str, ...]:
    return ("qkv", "out") if keys.flag("attention_bias", default=False) else ()


def _qwen_windows(keys: Keys) -> int | tuple[int | None, ...] | None:
    """Returns the windows of Qwen's layers, by default in those from ``max_window_layers`` on."""
    layers = keys.size("num_hidden_layers")
    window = keys.size("sliding_window", default=4096) if keys.flag("use_sliding_window", default=False) else None
    first = keys.get("max_window_layers", default=28)
    types = [LAYER_TYPES[window is not None and layer >= first] for layer in range(layers)]
    return keys.windows(keys.layers("layer_types", layers, LAYER_TYPES, types), window)


def _decoder(
    keys: Keys,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    biases: tuple[str, ...] = (),
    activations: dict[str, str] = SILU,
    tied: bool = False,
    epsilon: float = 1e-6,
    norm_position: NormPosition = "pre",
    qk_norm: Literal["head", "full"] | None = None,
    one_more: bool = False,
    embedding_scale: float | None = 1.0,
    windows: int | tuple[int | None, ...] | None = None,
    **options: Any,
) -> Architecture:
    """Returns the architecture of a decoder.

    Args:
      keys: its config.json.
      kv_heads, head_dim, tied, epsilon: defaults for absent keys; None stands for the sizes that follow from others.
      biases, norm_position, qk_norm, embedding_scale, windows, options: as in TransformerConfig.
      activations: names of activation functions in config.json, and those of TransformerConfig.
      one_more: whether norms multiply by 1 + w.
    """
    width, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads, hidden, vocab = keys.size("num_attention_heads"), keys.size("intermediate_size"), keys.size("vocab_size")
    kv_heads = keys.size("num_key_value_heads", default=heads if "num_key_value_heads" in keys.config else kv_heads or heads)
    head_dim = keys.size("head_dim", default=head_dim or width // heads)
    tied = keys.flag("tie_word_embeddings", default=tied)
    config = TransformerConfig(
        vocab,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=hidden,
        max_length=keys.size("max_position_embeddings", default=2048),
        norm_epsilon=keys.number("rms_norm_eps", default=epsilon),
        norm_position=norm_position,
        qk_norm=qk_norm,
        embedding_scale=embedding_scale,
        activation=keys.choice("hidden_activation", "hidden_act", choices=activations, default=next(iter(activations))),
        biases=biases,
        tie_embeddings=tied,
        local_window_size=windows,
        **options,
    )

    def norm(name: str, path: str, channels: int) -> tuple[Weight, ...]:
        return normalization(name, path, channels, "rmsnorm", ONE_MORE if one_more else SAME)

    layer, attention, mlp = (f"model.layers.{{layer}}{part}" for part in (".", ".self_attn.", ".mlp."))
    qkv, out, mlp_bias = ("qkv" in biases, "out" in biases, "mlp" in biases)
    weights = [
        Weight("model.embed_tokens.weight", (vocab, width), ("token_embedding/embedding",), SAME),
        *to_heads(attention + "q_proj", "layers/query", width, heads, head_dim, qkv),
        *to_heads(attention + "k_proj", "layers/key", width, kv_heads, head_dim, qkv),
        *to_heads(attention + "v_proj", "layers/value", width, kv_heads, head_dim, qkv),
        *from_heads(attention + "o_proj", "layers/out", width, heads, head_dim, out),
        *linear(mlp + "gate_proj", "layers/gate", width, hidden, mlp_bias),
        *linear(mlp + "up_proj", "layers/up", width, hidden, mlp_bias),
        *linear(mlp + "down_proj", "layers/down", hidden, width, mlp_bias),
        *norm("model.norm", "outer_norm", width),
    ]
    for path, name in _NORMS[norm_position].items():
        weights += norm(layer + name, f"layers/{path}", width)
    if qk_norm is not None:
        each = qk_norm == "head"
        weights += norm(attention + "q_norm", "layers/query_norm", head_dim if each else heads * head_dim)
        weights += norm(attention + "k_norm", "layers/key_norm", head_dim if each else kv_heads * head_dim)
    if not tied:
        weights += linear("lm_head", "head", width, vocab, False)
    unused = (r"rotary_emb\.inv_freq$", *([r"^lm_head\.weight$"] if tied else []))
    return Architecture(config, keys.rotary(layers), tuple(weights), "model.", unused=unused)
