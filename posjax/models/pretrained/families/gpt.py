"""Decoders with LayerNorm and biases: GPT-2, GPT-J, GPT-NeoX and BLOOM."""

import numpy as np

from posjax.encodings.absolute import learned
from posjax.encodings.relative import alibi
from posjax.models.config import TransformerConfig
from posjax.models.pretrained.architecture import Architecture
from posjax.models.pretrained.families.keys import Keys
from posjax.models.pretrained.layouts import (
    SAME,
    Layout,
    Weight,
    from_heads,
    fused_qkv,
    linear,
    normalization,
    to_heads,
)

TANH = dict(gelu_new="gelu", gelu_pytorch_tanh="gelu", gelu_fast="gelu", gelu="gelu_exact")
_MASKS = r"(attn|attention)\.(bias|masked_bias)$"  # stored causal masks


def gpt2(keys: Keys) -> Architecture:
    """Returns the architecture of GPT-2: learned positions, and weights stored as [in, out] (Conv1D)."""
    keys.refuse(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width, layers = keys.size("n_embd", "hidden_size"), keys.size("n_layer", "num_hidden_layers")
    heads, vocab, length = keys.size("n_head", "num_attention_heads"), keys.size("vocab_size"), _positions(keys)
    hidden = keys.size("n_inner", default=4 * width)
    config = TransformerConfig(
        vocab,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        mlp_dim=hidden,
        max_length=length,
        norm="layernorm",
        norm_epsilon=keys.number("layer_norm_epsilon", default=1e-5),
        embedding_scale=1.0,
        activation=keys.choice("activation_function", choices=TANH, default="gelu_new"),
        biases=("qkv", "out", "mlp"),
        tie_embeddings=(tied := keys.flag("tie_word_embeddings", default=True)),
    )
    layer = "transformer.h.{layer}."
    weights = [
        Weight("transformer.wte.weight", (vocab, width), ("token_embedding/embedding",), SAME),
        Weight("transformer.wpe.weight", (length, width), ("encoding/0/embedding",), SAME),
        *_norms(layer, width),
        *_conv1d_qkv(layer + "attn.c_attn", width, heads, width // heads),
        *_conv1d_out(layer + "attn.c_proj", width, heads, width // heads),
        *_conv1d(layer + "mlp.c_fc", "layers/up", width, hidden),
        *_conv1d(layer + "mlp.c_proj", "layers/down", hidden, width),
    ]
    unused = (_MASKS, *([r"^lm_head\.weight$"] if tied else []))
    if not tied:
        weights += linear("lm_head", "head", width, vocab, False)
    return Architecture(config, (learned(),) * layers, tuple(weights), "transformer.", unused=unused)


def gptj(keys: Keys) -> Architecture:
    """Returns the architecture of GPT-J: one norm for two parallel branches, and a bias of the head."""
    keys.refuse(tie_word_embeddings=False)
    width, layers = keys.size("n_embd", "hidden_size"), keys.size("n_layer", "num_hidden_layers")
    heads, vocab = keys.size("n_head", "num_attention_heads"), keys.size("vocab_size")
    hidden = keys.size("n_inner", default=4 * width)
    config = TransformerConfig(
        vocab,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        mlp_dim=hidden,
        max_length=_positions(keys),
        norm="layernorm",
        norm_epsilon=keys.number("layer_norm_epsilon", default=1e-5),
        parallel_residual=True,
        shared_norm=True,
        embedding_scale=1.0,
        activation=keys.choice("activation_function", choices=TANH, default="gelu_new"),
        biases=("mlp", "head"),
        tie_embeddings=False,
    )
    layer, head_dim = "transformer.h.{layer}.", width // heads
    weights = [
        Weight("transformer.wte.weight", (vocab, width), ("token_embedding/embedding",), SAME),
        *normalization(layer + "ln_1", "layers/attention_norm", width, "layernorm"),
        *to_heads(layer + "attn.q_proj", "layers/query", width, heads, head_dim, False),
        *to_heads(layer + "attn.k_proj", "layers/key", width, heads, head_dim, False),
        *to_heads(layer + "attn.v_proj", "layers/value", width, heads, head_dim, False),
        *from_heads(layer + "attn.out_proj", "layers/out", width, heads, head_dim, False),
        *linear(layer + "mlp.fc_in", "layers/up", width, hidden, True),
        *linear(layer + "mlp.fc_out", "layers/down", hidden, width, True),
        *normalization("transformer.ln_f", "outer_norm", width, "layernorm"),
        *linear("lm_head", "head", width, vocab, True),
    ]
    return Architecture(config, keys.rotary(layers), tuple(weights), "transformer.", unused=(_MASKS,))


def gpt_neox(keys: Keys) -> Architecture:
    """Returns the architecture of GPT-NeoX and Pythia: parallel branches, and rotation of a part of the channels."""
    width, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads, hidden, vocab = keys.size("num_attention_heads"), keys.size("intermediate_size"), keys.size("vocab_size")
    bias = keys.flag("attention_bias", default=True)
    tied = keys.flag("tie_word_embeddings", default=False)
    config = TransformerConfig(
        vocab,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        mlp_dim=hidden,
        max_length=keys.size("max_position_embeddings", default=2048),
        norm="layernorm",
        norm_epsilon=keys.number("layer_norm_eps", default=1e-5),
        parallel_residual=keys.flag("use_parallel_residual", default=True),
        embedding_scale=1.0,
        activation=keys.choice("hidden_act", choices=TANH, default="gelu"),
        biases=("qkv", "out", "mlp") if bias else ("mlp",),
        tie_embeddings=tied,
    )
    layer, head_dim = "gpt_neox.layers.{layer}.", width // heads
    weights = [
        Weight("gpt_neox.embed_in.weight", (vocab, width), ("token_embedding/embedding",), SAME),
        *normalization(layer + "input_layernorm", "layers/attention_norm", width, "layernorm"),
        *normalization(layer + "post_attention_layernorm", "layers/mlp_norm", width, "layernorm"),
        *fused_qkv(layer + "attention.query_key_value", "layers", width, heads, head_dim, bias),
        *from_heads(layer + "attention.dense", "layers/out", width, heads, head_dim, bias),
        *linear(layer + "mlp.dense_h_to_4h", "layers/up", width, hidden, True),
        *linear(layer + "mlp.dense_4h_to_h", "layers/down", hidden, width, True),
        *normalization("gpt_neox.final_layer_norm", "outer_norm", width, "layernorm"),
    ]
    unused = (_MASKS, r"rotary_emb\.inv_freq$", *([r"^embed_out\.weight$"] if tied else []))
    if not tied:
        weights += linear("embed_out", "head", width, vocab, False)
    return Architecture(config, keys.rotary(layers), tuple(weights), "gpt_neox.", unused=unused)


def bloom(keys: Keys) -> Architecture:
    """Returns the architecture of BLOOM: ALiBi, and a norm of the embedding."""
    keys.refuse(apply_residual_connection_post_layernorm=False)
    width, layers = keys.size("hidden_size", "n_embed"), keys.size("n_layer", "num_hidden_layers")
    heads, vocab = keys.size("n_head", "num_attention_heads"), keys.size("vocab_size")
    hidden, head_dim = 4 * width, width // heads
    tied = keys.flag("tie_word_embeddings", default=True)
    config = TransformerConfig(
        vocab,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        mlp_dim=hidden,
        max_length=keys.size("seq_length", default=2048),
        norm="layernorm",
        norm_epsilon=keys.number("layer_norm_epsilon", default=1e-5),
        embedding_norm=True,
        embedding_scale=1.0,
        activation="gelu",
        biases=("qkv", "out", "mlp"),
        tie_embeddings=tied,
    )
    layer = "transformer.h.{layer}."
    weights = [
        Weight("transformer.word_embeddings.weight", (vocab, width), ("token_embedding/embedding",), SAME),
        *normalization("transformer.word_embeddings_layernorm", "embedding_norm", width, "layernorm"),
        *normalization(layer + "input_layernorm", "layers/attention_norm", width, "layernorm"),
        *normalization(layer + "post_attention_layernorm", "layers/mlp_norm", width, "layernorm"),
        *fused_qkv(layer + "self_attention.query_key_value", "layers", width, heads, head_dim, True),
        *from_heads(layer + "self_attention.dense", "layers/out", width, heads, head_dim, True),
        *linear(layer + "mlp.dense_h_to_4h", "layers/up", width, hidden, True),
        *linear(layer + "mlp.dense_4h_to_h", "layers/down", hidden, width, True),
        *normalization("transformer.ln_f", "outer_norm", width, "layernorm"),
    ]
    if not tied:
        weights += linear("lm_head", "head", width, vocab, False)
    unused = (r"^lm_head\.weight$",) if tied else ()
    return Architecture(config, (alibi(),) * layers, tuple(weights), "transformer.", unused=unused)


def _positions(keys: Keys) -> int:
    return keys.size("n_positions", "max_position_embeddings", default=1024)


def _norms(layer: str, width: int) -> tuple[Weight, ...]:
    return (
        *normalization(layer + "ln_1", "layers/attention_norm", width, "layernorm"),
        *normalization(layer + "ln_2", "layers/mlp_norm", width, "layernorm"),
        *normalization("transformer.ln_f", "outer_norm", width, "layernorm"),
    )


def _conv1d(name: str, path: str, source: int, target: int) -> tuple[Weight, ...]:
    return (
        Weight(f"{name}.weight", (source, target), (f"{path}/kernel",), SAME),
        Weight(f"{name}.bias", (target,), (f"{path}/bias",), SAME),
    )


def _conv1d_out(name: str, width: int, heads: int, head_dim: int) -> tuple[Weight, ...]:
    layout = Layout(lambda tensor: (tensor.reshape(heads, head_dim, width),), lambda array: array.reshape(width, width))
    return (
        Weight(f"{name}.weight", (width, width), ("layers/out/kernel",), layout),
        Weight(f"{name}.bias", (width,), ("layers/out/bias",), SAME),
    )


def _conv1d_qkv(name: str, width: int, heads: int, head_dim: int) -> tuple[Weight, ...]:
    """Returns the rows of [width, 3 width], in which all queries come first, then all keys and all values."""
    kernels, biases = (tuple(f"layers/{part}/{leaf}" for part in ("query", "key", "value")) for leaf in ("kernel", "bias"))

    def layout(*before: int) -> Layout:
        return Layout(
            lambda tensor: tuple(np.moveaxis(tensor.reshape(*before, 3, heads, head_dim), -3, 0)),
            lambda *arrays: np.stack(arrays, axis=-3).reshape(*before, 3 * width),
        )

    return (
        Weight(f"{name}.weight", (width, 3 * width), kernels, layout(width)),
        Weight(f"{name}.bias", (3 * width,), biases, layout()),
    )
