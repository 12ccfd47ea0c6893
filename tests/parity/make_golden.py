"""Writes tests/parity/golden/*.npz: what other people's packages answer, so that CI without torch can ask the same.

    pip install torch x-transformers transformers rotary-embedding-torch diffusers && pip install --no-deps timm PoPE-pytorch
    python tests/parity/make_golden.py

The files hold float32 inputs, float32 answers (float64 arithmetic where the package allows it), and the versions
used ("versions", JSON). Seeds are fixed: with the same versions
the arrays come out the same.
"""

import importlib.metadata
import json
import math
import pathlib
import sys
import types

import numpy as np
import torch
import transformers
from ours import tensors_of
from rotary_embedding_torch import RotaryEmbedding, apply_rotary_emb
from transformers import T5Config
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.distilbert import modeling_distilbert as distilbert
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.t5 import modeling_t5 as t5
from x_transformers.x_transformers import CoPE

FOLDER = pathlib.Path(__file__).parent / "golden"
PACKAGES = ("torch", "x-transformers", "transformers", "rotary-embedding-torch", "numpy")
AXES_PACKAGES = ("torch", "timm", "diffusers", "PoPE-pytorch", "numpy")


def torch64(array):
    return torch.from_numpy(np.asarray(array)).double()


def save(name, packages=PACKAGES, **arrays):
    versions = {package: importlib.metadata.version(package) for package in packages}
    narrow = {key: array.astype(np.float32) if array.dtype == np.float64 else array for key, array in arrays.items()}
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{name}.npz", versions=np.array(json.dumps(versions)), **narrow)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def heads_first(array):
    return torch64(array).transpose(1, 2)


def causal_softmax(logits, value):
    """Output [B, T, N, H] of masked logits [B, N, T, S] over value [B, S, N, H]."""
    return torch.einsum("bnts,bsnh->btnh", logits.softmax(-1), torch64(value)).numpy()


# --- CoPE: x-transformers ----------------------------------------------------------------------------------------


def x_transformers_cope(query, embedding, gate_logits):
    """Bias [B, N, T, S] of x-transformers' CoPE: one module over all heads, or one a head."""
    shared = embedding.ndim == 2
    outs = []
    for n in range(1 if shared else query.shape[2]):
        table = embedding if shared else embedding[n]
        module = CoPE(dim=table.shape[1], heads=1, max_pos=table.shape[0]).double()
        module.pos_emb.data = torch64(table)
        pick = slice(None) if shared else slice(n, n + 1)
        outs.append(module(heads_first(query)[:, pick], gate_logits[:, pick]).detach())
    return torch.cat(outs, dim=1)


def cope_case(query, key, value, embedding, gate_keys, scaled):
    """(output, bias) of causal attention with x-transformers' CoPE.

    The package adds z unscaled (Listing 1); handing it q / sqrt(H) gives the (q.k + z) / sqrt(H) of the released code.
    """
    root = math.sqrt(query.shape[-1])
    hidden = torch.ones(query.shape[1], key.shape[1]).triu(1).bool()
    lowest = -torch.finfo(torch.float64).max

    def scores(other):
        product = heads_first(query) @ heads_first(other).transpose(-1, -2) / root
        return product.masked_fill(hidden, lowest)

    bias = x_transformers_cope(query / root if scaled else query, embedding, scores(gate_keys))
    return causal_softmax(scores(key) + bias.masked_fill(hidden, 0.0), value), bias.masked_fill(hidden, 0.0).numpy()


def make_cope():
    batch, length, heads, width, max_position = 2, 20, 3, 8, 6
    shape = (batch, length, heads, width)
    query, key, value, gate_keys, shared, per_head = normal(
        0, shape, shape, shape, shape, (max_position, width), (heads, max_position, width)
    )
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "gate_keys": gate_keys,
        "shared": shared,
        "per_head": per_head,
    }
    gates = {"logits": key, "keys": gate_keys, "values": value}
    for name, embedding in (("shared", shared), ("per_head", per_head)):
        for gate, other in gates.items():
            for form, scaled in (("listing", False), ("released", True)):
                out, bias = cope_case(query, key, value, embedding, other, scaled)
                arrays[f"out_{name}_{gate}_{form}"] = out
                if gate == "logits" and form == "listing":
                    arrays[f"bias_{name}"] = bias
    save("cope", **arrays)


# --- ALiBi: BLOOM ------------------------------------------------------------------------------------------------


def make_alibi():
    """Slopes for 1 to 64 heads, padded with zeros, and the output of BLOOM's own attention at 4 and at 6 heads."""
    slopes = np.zeros((64, 64), np.float32)
    for heads in range(1, 65):
        bias = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
        slopes[heads - 1, :heads] = bias[:, 0, 1].numpy()
    arrays = {"slopes": slopes}
    for heads in (4, 6):
        shape = (2, 16, heads, 8)
        query, key, value = normal(heads, shape, shape, shape)
        bias = bloom.build_alibi_tensor(torch.ones(2, 16, dtype=torch.long), heads, torch.float64)
        scores = heads_first(query) @ heads_first(key).transpose(-1, -2) / math.sqrt(8) + bias.view(2, heads, 1, 16)
        scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
        arrays |= {f"query_{heads}": query, f"key_{heads}": key, f"value_{heads}": value}
        arrays[f"out_{heads}"] = causal_softmax(scores, value)
    save("alibi", **arrays)


# --- T5 ----------------------------------------------------------------------------------------------------------


def t5_attention(num_buckets, max_distance, is_decoder, table):
    heads = table.shape[1]
    config = T5Config(d_model=heads * 4, d_kv=4, num_heads=heads, is_decoder=is_decoder)
    config.relative_attention_num_buckets = num_buckets
    config.relative_attention_max_distance = max_distance
    module = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    module.relative_attention_bias.weight.data = torch.from_numpy(table)
    return module


def make_t5():
    """Buckets of distances -6000..6000 and biases of T5's own attention module."""
    distances = np.arange(-6000, 6001)
    arrays = {"distances": distances.astype(np.int16)}
    for num_buckets, max_distance in ((32, 128), (16, 50), (64, 4096)):
        for is_decoder in (False, True):
            label = f"{num_buckets}_{max_distance}_{'causal' if is_decoder else 'both'}"
            (table,) = normal(num_buckets + is_decoder, (num_buckets, 3))
            module = t5_attention(num_buckets, max_distance, is_decoder, table)
            buckets = module._relative_position_bucket(torch.from_numpy(distances), not is_decoder, num_buckets, max_distance)
            arrays[f"buckets_{label}"] = buckets.numpy().astype(np.uint8)
            arrays[f"table_{label}"] = table
            arrays[f"bias_{label}"] = module.compute_bias(24, 24).detach().numpy()[0]
    save("t5", **arrays)


# --- RoPE: Llama, GPT-NeoX, GPT-J, rotary-embedding-torch --------------------------------------------------------


def make_rope():
    """Rotated query and key in float64 phases at positions to 100,000, and the packages' own float32 at 0..23.

    The packages round frequency and phase to float32: at position 100,000 that alone is an error near 6e-3 rad. So
    their tables are used where they are good (to position 23), and their rotation, fed phases in float64, elsewhere.
    """
    query, key = normal(7, (1, 24, 2, 16), (1, 24, 2, 16))
    near, far = np.arange(24), np.array([*range(8), *range(500, 508), *range(99_993, 100_001)])
    arrays = {"query": query, "key": key, "near": near, "far": far}

    config = types.SimpleNamespace(head_dim=16, hidden_size=32, num_attention_heads=2, max_position_embeddings=131_072)
    for label, theta, fraction in (("full", 10_000.0, 1.0), ("quarter", 500_000.0, 0.25)):
        width = int(16 * fraction)
        config.rope_parameters = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction}
        # half: Llama for the whole head, GPT-NeoX for a part of it
        package = llama if fraction == 1.0 else neox
        embedding = (llama.LlamaRotaryEmbedding if fraction == 1.0 else neox.GPTNeoXRotaryEmbedding)(config)
        cos, sin = embedding(torch.zeros(1), torch.from_numpy(near)[None])
        turned = package.apply_rotary_pos_emb(torch.from_numpy(query), torch.from_numpy(key), cos, sin, unsqueeze_dim=2)
        for name, array in zip(("query", "key"), turned, strict=True):
            arrays[f"half_{label}_near_{name}"] = array.numpy()
        phases = torch64(far)[:, None] * theta ** (-torch.arange(0, width, 2).double() / width)
        doubled = torch.cat((phases, phases), -1)[None]
        turned = package.apply_rotary_pos_emb(torch64(query), torch64(key), doubled.cos(), doubled.sin(), unsqueeze_dim=2)
        for name, array in zip(("query", "key"), turned, strict=True):
            arrays[f"half_{label}_far_{name}"] = array.numpy()
        # interleaved: rotary-embedding-torch with float64 frequencies, GPT-J with its own float32 table
        exact = RotaryEmbedding(
            dim=width, custom_freqs=theta ** (-torch.arange(0, width, 2).double() / width), cache_if_possible=False
        ).double()
        for name, array in (("query", query), ("key", key)):
            frequencies = exact(torch64(far))
            from_package = apply_rotary_emb(frequencies, torch64(array).transpose(1, 2)).transpose(1, 2)
            arrays[f"interleaved_{label}_far_{name}"] = from_package.numpy()
            if theta == 10_000.0:
                table = gptj.create_sinusoidal_positions(24, width)
                sin, cos = table[None].chunk(2, dim=-1)
                arrays[f"interleaved_{label}_near_{name}"] = gptj.apply_rotary_pos_emb(torch.from_numpy(array), sin, cos).numpy()
    save("rope", **arrays)


# --- sinusoidal: DistilBERT --------------------------------------------------------------------------------------


def make_sinusoidal():
    """DistilBERT's table, sine and cosine interleaved, computed there in float64."""
    table = torch.zeros(512, 32)
    distilbert.create_sinusoidal_embeddings(512, 32, table)
    save("sinusoidal", table=table.numpy())


# --- several axes: timm, diffusers, PoPE-pytorch -----------------------------------------------------------------


def timm_sincos():
    """timm's rotations without timm itself, which needs torchvision."""
    for name in ("timm", "timm.layers"):
        package = types.ModuleType(name)
        folder = pathlib.Path(importlib.metadata.distribution("timm").locate_file(""))
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module("timm.layers.pos_embed_sincos")


def make_axes():
    """RoPE-Mixed, EVA's rescaled grid, DINOv3's coordinates, FLUX's widths and PoPE on small inputs."""
    from diffusers.models.embeddings import apply_rotary_emb as apply_flux  # here, because the live tests import this file
    from diffusers.models.embeddings import get_1d_rotary_pos_embed
    from PoPE_pytorch.pope import PoPE

    timm, (query,) = timm_sincos(), normal(8, (1, 15, 2, 24))
    heads = torch.from_numpy(query).transpose(1, 2)
    arrays = {"query": query}
    frequencies = torch.from_numpy(normal(9, (2, 2, 12))[0])
    x, y = timm.get_mixed_grid([3, 5], "xy")  # columns are the first coordinate, as rope-vit's
    mixed = timm.get_mixed_freqs(frequencies, x, y)
    arrays |= {"mixed_frequencies": frequencies.numpy()}
    arrays["mixed"] = timm.apply_rot_embed_cat(heads, mixed).transpose(1, 2).numpy()
    eva = timm.RotaryEmbeddingCat(24, in_pixels=False, feat_shape=[3, 5], ref_feat_shape=[16, 16]).get_embed()
    arrays["eva"] = timm.apply_rot_embed_cat(heads, eva).transpose(1, 2).numpy()
    for normalize in ("separate", "min", "max"):
        arrays[f"dinov3_{normalize}"] = timm.make_coords_dinov3(3, 5, normalize).numpy()
    at = np.random.default_rng(10).integers(0, 60, (15, 3))
    widths = (4, 8, 12)
    parts = [get_1d_rotary_pos_embed(w, torch64(at[:, a]), use_real=True, freqs_dtype=torch.float64) for a, w in enumerate(widths)]
    cos, sin = (torch.cat(side, -1) for side in zip(*parts, strict=True))
    arrays |= {"flux_coordinates": at, "flux": apply_flux(heads, (cos, sin)).transpose(1, 2).numpy()}
    delta, (key,) = np.random.default_rng(11).uniform(-7, 1, (2, 24)).astype(np.float32), normal(12, (1, 15, 2, 24))
    pope = PoPE(24, heads=2)
    pope.bias.data = torch.from_numpy(delta)
    q, k = pope.apply_pope_to_qk(pope(15), heads, torch.from_numpy(key).transpose(1, 2))
    arrays |= {"key": key, "delta": delta, "pope_scores": (q.double() @ k.double().transpose(-1, -2)).detach().numpy()}
    save("axes", AXES_PACKAGES, **arrays)


# --- whole models ------------------------------------------------------------------------------------------------

TINY = dict(vocab_size=11, num_hidden_layers=2, num_attention_heads=2, hidden_size=12, max_position_embeddings=16)
TINY |= dict(intermediate_size=10, num_key_value_heads=1, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TINY_GPT = dict(vocab_size=11, n_layer=2, n_head=2, n_embd=12, n_positions=16, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "olmo2": ("Olmo2", "ForCausalLM", TINY | dict(head_dim=6)),
    "gemma3_text": (
        "Gemma3",
        "ForCausalLM",
        TINY | dict(sliding_window=3, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=3),
    ),
    "gptj": ("GPTJ", "ForCausalLM", TINY_GPT | dict(rotary_dim=4)),
    "bloom": ("Bloom", "ForCausalLM", dict(vocab_size=11, n_layer=2, n_head=2, hidden_size=12, bos_token_id=1, eos_token_id=2)),
    "bert": ("Bert", "ForMaskedLM", TINY),
}


def make_families():
    """Logits of tiny models, of weights that ``ours.tensors_of`` draws from their names and shapes."""
    arrays = {"tokens": np.random.default_rng(0).integers(0, 11, (1, 7))}
    for family, (name, head, options) in FAMILIES.items():
        config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))(**options)
        config._attn_implementation = "eager"
        model = getattr(transformers, name + head)(config).eval()
        parameters = dict(model.named_parameters())
        tensors = tensors_of({key: parameter.shape for key, parameter in parameters.items()})
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(tensors[key]))
            arrays[family] = model(torch.from_numpy(arrays["tokens"])).logits.numpy()
        keys = {key: value for key, value in config.to_dict().items() if "token_id" not in key and key != "transformers_version"}
        arrays[f"{family}_config"] = np.array(json.dumps(keys))
        arrays[f"{family}_names"] = np.array(sorted(parameters))
    save("families", **arrays)


if __name__ == "__main__":
    for make in (make_cope, make_alibi, make_t5, make_rope, make_sinusoidal, make_axes, make_families):
        make()
    for path in sorted(FOLDER.glob("*.npz")):
        print(f"{path.name:20s} {path.stat().st_size / 1000:6.1f} kB")
