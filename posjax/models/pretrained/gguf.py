"""Presents a GGUF file as a checkpoint with the names and keys of Hugging Face, so that the rest knows one naming only.

A file names its architecture, stores sizes under keys such as ``llama.block_count``, and its tensors under names such as
``blk.0.attn_q.weight``. Its converter changes some tensors, which is undone here:

    llama, smollm3   rows of q and k are permuted for a rotation of neighboring channels
    gemma3           norms store 1 + weight
    gpt2             kernels are transposed
    gptneox, bloom   q, k, v of all heads follow one another, where Hugging Face has q, k, v of each head

Quantized tensors are dequantized to float32 by the package gguf, one at a time, when they are read.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from posjax.checks import near, short
from posjax.data.gguf_file import read_gguf
from posjax.files import DamagedFile
from posjax.models.pretrained.files import Checkpoint, Tensor

if TYPE_CHECKING:
    from gguf import ReaderTensor

Config = dict[str, Any]
Change = Callable[[np.ndarray, Config], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Connects one architecture of GGUF with its names in Hugging Face.

    Attributes:
      model_type: the model type of config.json.
      cls: the class of the model.
      names: GGUF names of tensors, without ".weight" or ".bias", and the names in Hugging Face; "*" is the layer.
      config: from a function that looks a key up and the keys of all models, the keys of config.json.
      changes: what undoes the converter's changes, by GGUF name.
    """

    model_type: str
    cls: str
    names: Mapping[str, str]
    config: Callable[["_Keys", Config], Config]
    changes: Mapping[str, Change] = dataclasses.field(default_factory=dict)


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file. Its keys are read, and no tensor.

    Raises:
      ValueError: the file is damaged, incomplete or one of several parts, or its architecture is not supported.
      ImportError: gguf is not installed.
    """
    file = read_gguf(path)
    keys = _Keys(path, file.keys)
    if (parts := keys.fields.get("split.count")) and int(parts) > 1:
        how = "merge them with llama-gguf-split --merge"
        raise ValueError(f"path must be a whole GGUF file, got {str(path)!r}, one of {parts} parts; {how}")
    name = keys.architecture
    if name not in _KINDS:
        known = ", ".join(_KINDS)
        raise ValueError(f"{path}: general.architecture must be one of {known}, got {name!r}{near(str(name), _KINDS)}")
    if keys.get("attention.sliding_window", 0) and name != "gemma3":  # OLMo 3 among others, whose other layers are not stored
        window = keys.get("attention.sliding_window")
        raise ValueError(f"{path}: {name}.attention.sliding_window must be absent or 0, got {window}; use the model's safetensors")
    if keys.get("expert_count", 0):
        raise ValueError(f"path must be a GGUF file of a model without experts, got {keys.get('expert_count')} in {str(path)!r}")
    kind = _KINDS[name]
    config = _config(keys, kind, file.tensors)
    tensors = {}
    for tensor in file.tensors.values():
        if tensor.name in _NOT_WEIGHTS:
            continue
        stem, _, suffix = tensor.name.rpartition(".")
        layer = next((part for part in stem.split(".") if part.isdecimal()), "")
        pattern = re.sub(r"^blk\.\d+\.", "blk.*.", stem)
        if pattern not in kind.names:
            raise ValueError(f"{path}: tensors must be those of architecture {name!r}, got {tensor.name}")
        change = kind.changes.get(pattern)
        tensors[f"{kind.names[pattern].replace('*', layer)}.{suffix}"] = _tensor(path, tensor, change, config)
    return Checkpoint(path, config, tensors, path)


def _tensor(path: Path, stored: "ReaderTensor", change: Change | None, config: Config) -> Tensor:
    import gguf

    kind = stored.tensor_type
    kinds = gguf.GGMLQuantizationType
    plain = {kinds.F32: np.float32, kinds.F16: np.float16, kinds.BF16: ml_dtypes.bfloat16, kinds.F64: np.float64}
    dtype = np.dtype(plain.get(kind, np.float32))
    shape = tuple(stored.shape.tolist())[::-1]  # GGUF begins with the axis along which elements are neighbors

    def read() -> np.ndarray:
        try:
            array = stored.data.view(dtype) if kind in plain else gguf.dequantize(np.asarray(stored.data), kind)
        except NotImplementedError:
            known = "which the package gguf does not dequantize; use a file of another quantization"
            raise ValueError(f"{path}: tensor {stored.name} has the dtype {kind.name}, {known}") from None
        array = array.reshape(shape)
        return array if change is None else change(array, config)

    # A transposed kernel has another shape.
    changed = shape if change is None else change(np.broadcast_to(np.zeros((), np.int8), shape), config).shape
    return Tensor(changed, dtype, kind.name, path, read)


class _Keys:
    """Looks keys of a GGUF file up."""

    def __init__(self, path: Path, fields: Mapping[str, Any]):
        self.path, self.fields = path, fields
        self.architecture = self.require_key("general.architecture")

    def require_key(self, name: str) -> Any:
        if name not in self.fields:
            raise DamagedFile(f"{self.path} must have the key {name}, got a GGUF file without it")
        return self.fields[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value of a key of the architecture."""
        return self.fields.get(f"{self.architecture}.{name}", default)

    def __getitem__(self, name: str) -> Any:
        return self.require_key(f"{self.architecture}.{name}")

    def size(self, name: str, default: int | None = None) -> int:
        """Returns a size, which must be the same for all layers.

        Raises:
          ValueError: it is not.
        """
        value = self[name] if default is None else self.get(name, default)
        sizes = sorted({*value}) if isinstance(value, Sequence) else [value]
        if len(sizes) != 1 or not isinstance(sizes[0], int) or sizes[0] < 1:
            key = f"{self.architecture}.{name}"
            raise ValueError(f"{self.path}: {key} must be one positive number for all layers, got {short(value)}")
        return sizes[0]


# The keys of config.json ---------------------------------------------------------------------------------------------------


def _config(keys: _Keys, kind: _Kind, stored: "Mapping[str, ReaderTensor]") -> Config:
    """Returns config.json for a file: the keys of all models, and those of its architecture."""
    if "token_embd.weight" not in stored:
        raise DamagedFile(f"{keys.path} must have the tensor token_embd.weight, got a GGUF file without it")
    width, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    common = {
        "model_type": kind.model_type,
        "architectures": [kind.cls],
        "vocab_size": int(stored["token_embd.weight"].shape[-1]),
        "hidden_size": width,
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "tie_word_embeddings": "output.weight" not in stored,
    }
    for name in ("bos", "eos"):
        if (token := keys.fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            common[f"{name}_token_id"] = int(token)
    padding = keys.fields.get("tokenizer.ggml.padding_token_id")  # none is not the same as the default of a model type
    common["pad_token_id"] = None if padding is None else int(padding)
    return common | kind.config(keys, common) | _rope(keys, common, stored)


def _rms_norm_config(keys: _Keys, common: Config) -> Config:
    """Returns the keys that Llama and its relatives share."""
    return {
        "num_key_value_heads": keys.size("attention.head_count_kv", common["num_attention_heads"]),
        "head_dim": keys.size("attention.key_length", common["hidden_size"] // common["num_attention_heads"]),
        "intermediate_size": keys.size("feed_forward_length"),
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": _decimal(keys["attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
    }


def _rope(keys: _Keys, common: Config, stored: "Mapping[str, ReaderTensor]") -> Config:
    """Returns the keys of the rotation."""
    if keys.architecture in ("gpt2", "bloom"):
        return {}
    theta = _decimal(keys.get("rope.freq_base", 10_000.0))
    if keys.architecture == "gptneox":
        return {"rotary_emb_base": theta, "rope_scaling": _scaling(keys, common)}
    if "rope_freqs.weight" in stored:
        return {"rope_theta": theta, "rope_scaling": _factors(keys, stored["rope_freqs.weight"], common, theta)}
    return {"rope_theta": theta, "rope_scaling": _scaling(keys, common)}


def _scaling(keys: _Keys, common: Config) -> Config | None:
    """Returns the scaling of the frequencies; None if there is none.

    Raises:
      ValueError: it is of a kind that is not known.
    """
    kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor", 0.0)
    if kind == "none" and keys.get("rope.scale_linear", 1.0) != 1.0:  # of 2023
        kind, factor = "linear", keys["rope.scale_linear"]
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _decimal(factor)}
    if kind != "yarn":
        raise ValueError(f"{keys.path}: {keys.architecture}.rope.scaling.type must be none, linear or yarn, got {kind!r}")
    scaling: Config = {"rope_type": "yarn", "factor": _decimal(factor)}
    if original := keys.get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = int(original)
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if (value := keys.get(f"rope.scaling.{theirs}")) is not None:
            scaling[ours] = _decimal(value)
    if (
        gain := keys.get("rope.scaling.attn_factor", 1.0)
    ) != 1.0:  # a factor of the default, or in its place, by llama.cpp's version
        raise ValueError(f"{keys.path}: {keys.architecture}.rope.scaling.attn_factor must be 1 or absent, got {gain}")
    return scaling


def _factors(keys: _Keys, tensor: "ReaderTensor", common: Config, theta: float) -> Config:
    """Returns the scaling for a file with a divisor of each frequency: Llama 3's if they are its, a list otherwise."""
    divisors = np.asarray(_tensor(keys.path, tensor, None, common).read(), np.float64)
    factor, low, high, length = float(divisors.max()), 1.0, 4.0, 8192
    wavelength = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
    if factor > 1 and np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5):
        parts = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
        return {"rope_type": "llama3", "factor": factor, **parts}
    each = [float(one) for one in divisors]
    length = keys.size("context_length")
    return {
        "rope_type": "longrope",
        "short_factor": each,
        "long_factor": each,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": length,
    }


def _decimal(value: float) -> float:
    """Returns the shortest decimal number whose float32 is the value: 1e-5, where the file has 9.99999974738e-06."""
    return float(str(np.float32(value)))


def _llama_config(keys: _Keys, common: Config) -> Config:
    found = _rms_norm_config(keys, common)
    rotated = keys.get("rope.dimension_count", found["head_dim"])
    if rotated != found["head_dim"]:
        raise ValueError(f"{keys.path}: llama.rope.dimension_count must be the width of a head, {found['head_dim']}, got {rotated}")
    return found


def _smollm3_config(keys: _Keys, common: Config) -> Config:
    layers = common["num_hidden_layers"]  # every fourth layer does not rotate: not stored, but part of the architecture
    return _rms_norm_config(keys, common) | {"no_rope_layers": [int((n + 1) % 4 != 0) for n in range(layers)]}


def _gemma3_config(keys: _Keys, common: Config) -> Config:
    found = _rms_norm_config(keys, common)
    layers, every = common["num_hidden_layers"], keys.size("attention.sliding_window_pattern", 6)
    is_27b = layers == 62  # the only size that scales by its width per head
    scalar = common["hidden_size"] // common["num_attention_heads"] if is_27b else found["head_dim"]
    del found["hidden_act"]
    return found | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.size("attention.sliding_window"),
        "layer_types": ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(layers)],
        "rope_local_base_freq": _decimal(keys.get("rope.freq_base_swa", 10_000.0)),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping"),
    }


def _gptneox_config(keys: _Keys, common: Config) -> Config:
    head_dim = common["hidden_size"] // common["num_attention_heads"]
    return {
        "intermediate_size": keys.size("feed_forward_length"),
        "max_position_embeddings": keys.size("context_length"),
        "layer_norm_eps": _decimal(keys["attention.layer_norm_epsilon"]),
        "use_parallel_residual": bool(keys.get("use_parallel_residual", True)),
        "rotary_pct": keys.get("rope.dimension_count", head_dim) / head_dim,
        "hidden_act": "gelu",
    }


def _bloom_config(keys: _Keys, common: Config) -> Config:
    sizes = {"n_layer": common["num_hidden_layers"], "n_head": common["num_attention_heads"]}
    return sizes | {"layer_norm_epsilon": _decimal(keys["attention.layer_norm_epsilon"])}


def _gpt2_config(keys: _Keys, common: Config) -> Config:
    return {
        "n_embd": common["hidden_size"],
        "n_layer": common["num_hidden_layers"],
        "n_head": common["num_attention_heads"],
        "n_positions": keys.size("context_length"),
        "n_inner": keys.get("feed_forward_length"),
        "layer_norm_epsilon": _decimal(keys["attention.layer_norm_epsilon"]),
        "activation_function": "gelu_new",
    }


# The converter's changes, undone ---------------------------------------------------------------------------------------------


def _unpermute(heads: str, array: np.ndarray, config: Config) -> np.ndarray:
    """Moves the rows of a head from pairs of neighbors, (0, 1), (2, 3), ..., to the halves that Hugging Face rotates."""
    rows = array.reshape(config[heads], -1, 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


def _by_head(array: np.ndarray, config: Config) -> np.ndarray:
    """Moves q, k, v of all heads, [3 N H, ...], to q, k, v of each head, [N 3 H, ...]."""
    rows = array.reshape(3, config["num_attention_heads"], -1, *array.shape[1:])
    return rows.swapaxes(0, 1).reshape(array.shape)


def _transposed(array: np.ndarray, config: Config) -> np.ndarray:
    return array.T


def _minus_one(array: np.ndarray, config: Config) -> np.ndarray:
    return array - array.dtype.type(1)


# The architectures -----------------------------------------------------------------------------------------------------------

_NOT_WEIGHTS = {"rope_freqs.weight"}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {f"attn_{ours}": f"self_attn.{theirs}_proj" for ours, theirs in zip("qkv", "qkv", strict=True)}
_ATTENTION |= {"attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_QUERY_AND_KEY = {
    "blk.*.attn_q": functools.partial(_unpermute, "num_attention_heads"),
    "blk.*.attn_k": functools.partial(_unpermute, "num_key_value_heads"),
}


def _layers(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"blk.*.{ours}": f"{prefix}.*.{theirs}" for ours, theirs in names.items()}


_PRE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_LLAMA = _ENDS | _layers("model.layers", _ATTENTION | _MLP | _PRE)
_OLMO2 = _ENDS | _layers("model.layers", _ATTENTION | _MLP | _POST)
_SANDWICH = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_GEMMA3 = _ENDS | _layers("model.layers", _ATTENTION | _MLP | _POST | _SANDWICH)
_NEOX = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"} | _layers(
    "gpt_neox.layers",
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
)
_BLOOM = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
} | _layers(
    "transformer.h",
    {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_qkv": "self_attention.query_key_value",
        "attn_output": "self_attention.dense",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
)
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
} | _layers(
    "transformer.h",
    {
        "attn_norm": "ln_1",
        "ffn_norm": "ln_2",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
)
_NORMS = [name for name in _GEMMA3 if name.endswith("_norm")]
_KERNELS = [f"blk.*.{name}" for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")]

_KINDS = {
    "llama": _Kind("llama", "LlamaForCausalLM", _LLAMA, _llama_config, _QUERY_AND_KEY),
    "qwen2": _Kind("qwen2", "Qwen2ForCausalLM", _LLAMA, _rms_norm_config),
    "qwen3": _Kind("qwen3", "Qwen3ForCausalLM", _LLAMA, _rms_norm_config),
    "smollm3": _Kind("smollm3", "SmolLM3ForCausalLM", _LLAMA, _smollm3_config, _QUERY_AND_KEY),
    "olmo2": _Kind("olmo2", "Olmo2ForCausalLM", _OLMO2, _rms_norm_config),
    "gemma3": _Kind("gemma3_text", "Gemma3ForCausalLM", _GEMMA3, _gemma3_config, dict.fromkeys(_NORMS, _minus_one)),
    "gptneox": _Kind("gpt_neox", "GPTNeoXForCausalLM", _NEOX, _gptneox_config, {"blk.*.attn_qkv": _by_head}),
    "bloom": _Kind("bloom", "BloomForCausalLM", _BLOOM, _bloom_config, {"blk.*.attn_qkv": _by_head}),
    "gpt2": _Kind("gpt2", "GPT2LMHeadModel", _GPT2, _gpt2_config, dict.fromkeys(_KERNELS, _transposed)),
}
