"""Llama."""

from collections.abc import Mapping
from typing import Any

from posjax.encodings.rotary import rope
from posjax.models.config import TransformerConfig
from posjax.models.pretrained.architecture import SAME, TRANSPOSED, Architecture, Weight, from_heads, to_heads


def llama(config: Mapping[str, Any]) -> Architecture:
    """Returns the architecture of a Llama."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, hidden = config["num_attention_heads"], config["intermediate_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    tied = config.get("tie_word_embeddings", False)
    vocab = config["vocab_size"]
    transformer = TransformerConfig(
        vocab,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=hidden,
        max_length=config["max_position_embeddings"],
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        activation="swiglu",
        embedding_scale=1.0,
        tie_embeddings=tied,
    )
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10_000.0)
    layer = "model.layers.{layer}."
    weights = [
        Weight("model.embed_tokens.weight", (vocab, width), ("token_embedding/embedding",), SAME),
        Weight(layer + "input_layernorm.weight", (width,), ("layers/attention_norm/scale",), SAME),
        Weight(layer + "self_attn.q_proj.weight", (heads * head_dim, width), ("layers/query/kernel",), to_heads(heads, head_dim)),
        Weight(layer + "self_attn.k_proj.weight", (kv_heads * head_dim, width), ("layers/key/kernel",), to_heads(kv_heads, head_dim)),
        Weight(layer + "self_attn.v_proj.weight", (kv_heads * head_dim, width), ("layers/value/kernel",), to_heads(kv_heads, head_dim)),
        Weight(layer + "self_attn.o_proj.weight", (width, heads * head_dim), ("layers/out/kernel",), from_heads(heads, head_dim)),
        Weight(layer + "post_attention_layernorm.weight", (width,), ("layers/mlp_norm/scale",), SAME),
        Weight(layer + "mlp.gate_proj.weight", (hidden, width), ("layers/gate/kernel",), TRANSPOSED),
        Weight(layer + "mlp.up_proj.weight", (hidden, width), ("layers/up/kernel",), TRANSPOSED),
        Weight(layer + "mlp.down_proj.weight", (width, hidden), ("layers/down/kernel",), TRANSPOSED),
        Weight("model.norm.weight", (width,), ("outer_norm/scale",), SAME),
    ]  # fmt: skip
    if not tied:
        weights.append(Weight("lm_head.weight", (vocab, width), ("head/kernel",), TRANSPOSED))
    unused = (r"rotary_emb\.inv_freq$", *([r"^lm_head\.weight$"] if tied else []))
    return Architecture(transformer, (rope(theta),) * layers, tuple(weights), "model.", unused=unused)
