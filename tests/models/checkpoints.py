"""Tiny checkpoints in the formats of other libraries, written from the formats' definitions and not by posjax."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "float8_e4m3fn": "F8_E4M3", "float64": "F64"}
LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 2, 16, 4, 2, 8, 24, 288
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    "intermediate_size": HIDDEN, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
}  # fmt: skip


def header_of(arrays, start=0):
    """The entries of a header, with the data one after the other."""
    entries, end = {}, start
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": [begin, end]}
    return entries


def write_safetensors(path: Path, arrays, header=None):
    text = json.dumps(header_of(arrays) if header is None else header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values()))


def read_safetensors(path: Path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    dtypes = {code: np.dtype(getattr(ml_dtypes, name, name)) for name, code in CODES.items()}
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(data[begin:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return found, header.get("__metadata__")


def llama_arrays(seed=0, dtype=np.float32):
    """Random tensors of a Llama, by their names in transformers."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (WIDTH,),
                "post_attention_layernorm": (WIDTH,),
                "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
                "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
                "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
                "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
                "mlp.gate_proj": (HIDDEN, WIDTH),
                "mlp.up_proj": (HIDDEN, WIDTH),
                "mlp.down_proj": (WIDTH, HIDDEN),
            }.items()
        }
    return {name: (rng.normal(size=shape) * 0.3).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder: Path, arrays=None, config=CONFIG, shards=1, index=True):
    """Writes a checkpoint of one file, or of several with an index."""
    arrays = llama_arrays() if arrays is None else arrays
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", arrays)
        return folder
    names, where = list(arrays), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = {name: arrays[name] for name in names[number::shards]}
        write_safetensors(folder / file, own)
        where |= dict.fromkeys(own, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_tokenizer(folder: Path, texts=("the word of every line is a word, or not\n",)):
    """Writes a byte-level BPE with two special tokens, ids 0 and 1."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_gguf(path: Path, architecture: str, keys, arrays, quantized=None):
    """Writes a GGUF file with the package gguf; ``quantized`` names tensors to store in a quantized dtype."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, value in keys.items():
        full = name if name.startswith(("general.", "tokenizer.", "split.")) else f"{architecture}.{name}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        else:
            writer.add_array(full, value)
    for name, array in arrays.items():
        if quantized and name in quantized:
            kind = quantized[name]
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA_KEYS = {
    "block_count": LAYERS, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": HIDDEN,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
    "rope.dimension_count": HEAD_DIM, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1000.0,
    "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1,
}  # fmt: skip
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def llama_gguf_arrays(arrays):
    """The tensors of a Llama as its converter writes them: channels m and m + H/2 of q and k become neighbors."""
    found = {
        "token_embd.weight": arrays["model.embed_tokens.weight"],
        "output_norm.weight": arrays["model.norm.weight"],
        "output.weight": arrays["lm_head.weight"],
    }
    order = np.asarray([channel for m in range(HEAD_DIM // 2) for channel in (m, m + HEAD_DIM // 2)])
    for layer in range(LAYERS):
        for theirs, ours in GGUF_NAMES.items():
            array = arrays[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                heads = array.shape[0] // HEAD_DIM
                rows = np.concatenate([head * HEAD_DIM + order for head in range(heads)])
                array = array[rows]
            found[f"blk.{layer}.{ours}.weight"] = array
    return found
