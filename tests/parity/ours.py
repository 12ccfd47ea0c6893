"""How the parity tests call posjax: plain NumPy in, the vectors and biases of one encoding out."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import posjax as pj
from posjax.attention.backends.bias_terms import Tile, bias_terms
from posjax.attention.call import prepare

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOLERANCE = 1e-5


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def tensors_of(shapes, seed=0):
    """Random weights by name, the same for the same names and shapes; the scales of norms are about one, or zero in Gemma."""
    rng = np.random.default_rng(seed)
    drawn = {name: (0.3 * rng.normal(size=shapes[name])).astype(np.float32) for name in sorted(shapes)}
    is_gemma = any("pre_feedforward_layernorm" in name for name in shapes)
    return {name: x + 1 if x.ndim == 1 and name.endswith("weight") and not is_gemma else x for name, x in drawn.items()}


def random_leaves(params, seed=0):
    """The same tree with every leaf normal: what starts at zero would hide a wrong sign or a wrong place."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)


def close(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance)


def inputs_of(query, key, value, query_positions=None, key_positions=None, scale=None):
    def tokens(positions, array):
        positions = np.arange(array.shape[1]) if positions is None else positions
        return pj.Tokens.at(jnp.broadcast_to(jnp.asarray(positions, jnp.int32), array.shape[:2]))

    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    sides = tokens(query_positions, query), tokens(key_positions, key)
    return pj.AttentionInputs(*(jnp.asarray(x) for x in (query, key, value)), *sides, scale)


def attention(query, key, value, encoding, params, **options):
    return pj.attention(*(jnp.asarray(x) for x in (query, key, value)), encoding, params, **options)


def attention_weights(query, key, value, encoding, params, **options):
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    return pj.attention_weights(query, key, encoding, params, value=value, **options)


def linear_attention(query, key, value, encoding, **options):
    return pj.linear_attention(*(jnp.asarray(x) for x in (query, key, value)), encoding, {}, **options)


def turned(encoding, params, inputs):
    """Query and key after all transforms of the encoding."""
    after = dataclasses.replace(inputs, transforms=encoding.attend(params, inputs).transforms)
    return after.turned_query, after.turned_key


def rotate(encoding, query, key, positions, params=None):
    """Rotated (or widened) query and key at those positions."""
    return turned(encoding, params or {}, inputs_of(query, key, key, positions, positions))


def rotate_at(encoding, query, key, coordinates, params=None):
    """Rotated query and key at coordinates [T, A] or [B, T, A]."""
    inputs = inputs_of(query, key, key)
    coordinates = jnp.asarray(coordinates).reshape(-1, *np.shape(coordinates)[-2:])
    q, k = (dataclasses.replace(side, coordinates=coordinates) for side in (inputs.q, inputs.k))
    return turned(encoding, params or {}, dataclasses.replace(inputs, q=q, k=k))


def dense_bias(encoding, params, query, key, value, is_causal, query_positions=None, hidden=None):
    """[B, N, T, S] sum of the encoding's biases, each evaluated as one tile over everything."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    query_positions = jnp.arange(query.shape[1]) if query_positions is None else jnp.asarray(query_positions)
    own = dict(is_causal=is_causal, query_positions=query_positions, hidden=hidden)
    if encoding.needs_causal and not is_causal:
        own["mask"] = jnp.ones((1, 1, query.shape[1], key.shape[1]), bool)
    call = prepare(query, key, value, encoding, params, **own).transformed()
    turned_key = jnp.repeat(call.key, query.shape[2] // key.shape[2], axis=2)
    product = jnp.einsum("btnh,bsnh->bnts", call.query, turned_key, precision="highest") * call.scale
    seen = np.tril(np.ones(product.shape[2:], bool)) if is_causal else np.ones(product.shape[2:], bool)
    tile = Tile(product, jnp.asarray(seen)[None, None], call.query_positions, call.key_positions)
    return np.asarray(sum(term.dense(tile) for term in bias_terms(call)))


def visible(bias):
    """The causal half of a bias [..., T, S]; what a mask hides has no right value."""
    return np.tril(bias)


def cope_params(encoding, embedding, gate_keys):
    """Parameters with that embedding, and a hidden state from which separate gate keys come; None for other gates.

    The gate kernel is the identity, so that the hidden state of a token, [K * H], is its gate keys.
    """
    heads, width = gate_keys.shape[2:]
    params = {"embedding": jnp.asarray(embedding)}
    if not encoding.needs_hidden:
        return params, None
    params["gate_kernel"] = jnp.eye(heads * width).reshape(heads * width, heads, width)
    return params, jnp.asarray(gate_keys).reshape(*gate_keys.shape[:2], heads * width)
