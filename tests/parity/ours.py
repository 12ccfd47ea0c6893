"""How the parity tests call posjax: plain NumPy in, the vectors and biases of one encoding out."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import posjax as pj
from posjax.core.bias import Tile
from posjax.core.encoding import AttentionInputs

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOLERANCE = 1e-5


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def random_leaves(params, seed=0):
    """The same tree with every leaf normal: what starts at zero would hide a wrong sign or a wrong place."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)


def close(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerance)


def inputs_of(query, key, value, query_positions=None, key_positions=None, scale=None):
    def rows(positions, array):
        positions = np.arange(array.shape[1]) if positions is None else positions
        return jnp.broadcast_to(jnp.asarray(positions, jnp.int32), array.shape[:2])

    return AttentionInputs(
        query=jnp.asarray(query),
        key=jnp.asarray(key),
        value=jnp.asarray(value),
        query_positions=rows(query_positions, query),
        key_positions=rows(key_positions, key),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
    )


def attention(query, key, value, encoding, params, **options):
    return pj.attention(*(jnp.asarray(x) for x in (query, key, value)), encoding, params, **options)


def attention_weights(query, key, value, encoding, params, **options):
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    return pj.attention_weights(query, key, encoding, params, value=value, **options)


def linear_attention(query, key, value, encoding, **options):
    return pj.linear_attention(*(jnp.asarray(x) for x in (query, key, value)), encoding, {}, **options)


def rotate(encoding, query, key, positions, params=None):
    """Rotated (or widened) query and key at those positions."""
    inputs = inputs_of(query, key, key, positions, positions)
    return encoding.rotate(params or {}, inputs.query, inputs.key, inputs)


def dense_bias(encoding, params, query, key, value, is_causal, query_positions=None):
    """[B, N, T, S] sum of the encoding's bias terms, each evaluated as one tile over everything."""
    inputs = inputs_of(query, key, value, query_positions)
    turned_query, turned_key = encoding.rotate(params, inputs.query, inputs.key, inputs)
    turned_key = jnp.repeat(turned_key, query.shape[2] // key.shape[2], axis=2)
    product = jnp.einsum("btnh,bsnh->bnts", turned_query, turned_key, precision="highest") * inputs.scale
    seen = np.tril(np.ones(product.shape[2:], bool)) if is_causal else np.ones(product.shape[2:], bool)
    tile = Tile(product, jnp.asarray(seen)[None, None], inputs.query_positions, inputs.key_positions)
    return np.asarray(sum(term.dense(tile) for term in encoding.bias(params, inputs)))


def visible(bias):
    """The causal half of a bias [..., T, S]; what a mask hides has no right value."""
    return np.tril(bias)


def cope_params(encoding, embedding, gate_keys):
    """Parameters with that embedding; separate gate keys come by ``condition`` from a hidden state that holds them.

    The gate kernel is the identity, so that the hidden state of a token, [K * H], is its gate keys.
    """
    heads, width = gate_keys.shape[2:]
    params = {"embedding": jnp.asarray(embedding)}
    dims = pj.Dims(num_heads=heads, head_dim=width, embed_dim=heads * width)
    if "gate_kernel" in encoding.init(jax.random.key(0), dims):
        params["gate_kernel"] = jnp.eye(heads * width).reshape(heads * width, heads, width)
    return encoding.condition(params, jnp.asarray(gate_keys).reshape(*gate_keys.shape[:2], heads * width))
