"""Encoders with a head for masked tokens: BERT and RoBERTa."""

from posjax.encodings.absolute import learned
from posjax.models.config import TransformerConfig
from posjax.models.pretrained.architecture import Architecture
from posjax.models.pretrained.families.keys import Keys
from posjax.models.pretrained.layouts import SAME, Weight, from_heads, linear, normalization, skipping, to_heads

ACTIVATIONS = dict(gelu="gelu_exact", gelu_new="gelu", gelu_pytorch_tanh="gelu")
_OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def bert(keys: Keys) -> Architecture:
    """Returns the architecture of BERT. The pooler and the head for the next sentence are not used."""
    width, vocab = keys.size("hidden_size"), keys.size("vocab_size")
    head = [
        *linear("cls.predictions.transform.dense", "head_transform", width, width, True),
        *normalization("cls.predictions.transform.LayerNorm", "head_norm", width, "layernorm"),
        Weight("cls.predictions.bias", (vocab,), ("head_bias",), SAME),
    ]
    unused = (r"^cls\.predictions\.decoder\.", r"^cls\.seq_relationship\.")
    return _encoder(keys, "bert.", head, ACTIVATIONS, unused)


def roberta(keys: Keys) -> Architecture:
    """Returns the architecture of RoBERTa: BERT with positions that begin in row ``pad_token_id + 1`` of their table."""
    width, vocab = keys.size("hidden_size"), keys.size("vocab_size")
    head = [
        *linear("lm_head.dense", "head_transform", width, width, True),
        *normalization("lm_head.layer_norm", "head_norm", width, "layernorm"),
        Weight("lm_head.bias", (vocab,), ("head_bias",), SAME),
    ]
    first = keys.get("pad_token_id", default=1) + 1
    exact = dict(gelu="gelu_exact")  # the head has this activation whatever the configuration says
    return _encoder(keys, "roberta.", head, exact, (r"^lm_head\.decoder\.",), skipped=first)


def _encoder(
    keys: Keys, prefix: str, head: list[Weight], activations: dict[str, str], unused: tuple[str, ...], skipped: int = 0
) -> Architecture:
    """Returns the architecture of an encoder, whose table of positions begins with ``skipped`` rows without a position."""
    keys.refuse(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute", tie_word_embeddings=True)
    width, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads, hidden, vocab = keys.size("num_attention_heads"), keys.size("intermediate_size"), keys.size("vocab_size")
    rows, types = keys.size("max_position_embeddings", default=512), keys.size("type_vocab_size", default=2)
    if rows <= skipped:
        raise ValueError(
            f"max_position_embeddings of config.json must be above the {skipped} rows up to that of pad_token_id, got {rows}"
        )
    head_dim = width // heads
    config = TransformerConfig(
        vocab,
        num_layers=layers,
        embed_dim=width,
        num_heads=heads,
        mlp_dim=hidden,
        max_length=rows - skipped,
        is_causal=False,
        norm="layernorm",
        norm_epsilon=keys.number("layer_norm_eps", default=1e-12),
        norm_position="post",
        embedding_scale=1.0,
        num_token_types=types,
        activation=keys.choice("hidden_act", choices=activations, default="gelu"),
        biases=("qkv", "out", "mlp", "head"),
        head_transform=True,
    )
    embeddings, layer = prefix + "embeddings.", prefix + "encoder.layer.{layer}."
    own = layer + "attention.self."
    weights = [
        Weight(embeddings + "word_embeddings.weight", (vocab, width), ("token_embedding/embedding",), SAME),
        Weight(embeddings + "token_type_embeddings.weight", (types, width), ("token_type_embedding/embedding",), SAME),
        Weight(embeddings + "position_embeddings.weight", (rows, width), ("encoding/0/embedding",), skipping(skipped)),
        *normalization(embeddings + "LayerNorm", "outer_norm", width, "layernorm"),
        *to_heads(own + "query", "layers/query", width, heads, head_dim, True),
        *to_heads(own + "key", "layers/key", width, heads, head_dim, True),
        *to_heads(own + "value", "layers/value", width, heads, head_dim, True),
        *from_heads(layer + "attention.output.dense", "layers/out", width, heads, head_dim, True),
        *normalization(layer + "attention.output.LayerNorm", "layers/attention_norm", width, "layernorm"),
        *linear(layer + "intermediate.dense", "layers/up", width, hidden, True),
        *linear(layer + "output.dense", "layers/down", hidden, width, True),
        *normalization(layer + "output.LayerNorm", "layers/mlp_norm", width, "layernorm"),
        *head,
    ]
    unused = (r"embeddings\.position_ids$", r"(^|\.)pooler\.", *unused)
    return Architecture(config, (learned(),) * layers, tuple(weights), prefix, renamed=_OLD_NAMES, unused=unused)
