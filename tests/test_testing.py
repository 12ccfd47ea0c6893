"""``check_encoding`` accepts what behaves, and names the rule that a broken encoding breaks."""

import dataclasses

import jax.numpy as jnp
import pytest

import posjax as pj
from posjax.testing import check_encoding


def uncentred(differences, args):
    """Not elementwise: every tile has a mean of its own."""
    distance = jnp.abs(differences[0]).astype(jnp.float32)
    return 0.1 * (distance - distance.mean())


def of_key(differences, args):
    return -differences[0]


def halves(differences, args):
    """With another slope for the first half of whatever heads there are."""
    heads = differences[0].shape[1]
    slopes = jnp.where(jnp.arange(heads) < heads / 2, 0.1, 0.3)
    return -slopes[None, :, None, None] * differences[0]


def embed_mean(params, x, tokens):
    return x + x.mean(1, keepdims=True) * tokens.positions[..., None]


def embed_float32(params, x, tokens):
    return x + tokens.positions[..., None].astype(jnp.float32)


def embed_index(params, x, tokens):
    return x + jnp.arange(x.shape[1])[None, :, None].astype(x.dtype)


def logarithm(differences, args):
    """Of a distance that is negative where a causal mask hides the pair."""
    return -jnp.log(differences[0].astype(jnp.float32) + 1.0)


def log_distance(params, inputs):
    return biased(pj.Pair(logarithm))


def by_order(params, inputs):
    """Rotates by the order of tokens, whatever their coordinates are."""
    phases = (0.1 * tokens.order[..., None, None].astype(jnp.float32) for tokens in (inputs.q, inputs.k))
    return pj.ScoreModifications((pj.Rotate(*phases),))


def low_phases(params, inputs):
    phases = (0.1 * tokens.positions[..., None, None].astype(inputs.query.dtype) for tokens in (inputs.q, inputs.k))
    return pj.ScoreModifications((pj.Rotate(*phases),))


def whole_length(params, inputs):
    """Divides positions by the length of the sequence, which grows while decoding."""
    phases = (tokens.positions[..., None, None] / inputs.key.shape[1] for tokens in (inputs.q, inputs.k))
    return pj.ScoreModifications((pj.Rotate(*phases),))


def init_half(key, dims):
    return {"slope": jnp.ones(dims.num_heads, jnp.float16)}


def biased(pair):
    return pj.ScoreModifications(biases=(pj.Bias(pair),))


def far_keys(params, inputs):
    """Keys that know what comes after them."""
    sums = jnp.cumsum(inputs.key[:, ::-1, :, 0].astype(jnp.float32), 1)[:, ::-1]
    zeros = jnp.zeros((1, 1, inputs.query.shape[1]))
    return biased(pj.Pair(of_key, (zeros,), (jnp.swapaxes(sums, 1, 2),)))


def mean_of_tile(params, inputs):
    return biased(pj.Pair(uncentred))


def half_slopes(params, inputs):
    heads, position = inputs.query.shape[2], inputs.q.positions.astype(jnp.float32)
    return biased(
        pj.Pair(halves, (jnp.repeat(position[:, None], heads, axis=1),), (inputs.k.positions[:, None].astype(jnp.float32),))
    )


def moved(params, inputs):
    """Moves keys along the tokens, by a reflection of a half."""
    key = inputs.key / jnp.linalg.norm(inputs.key.astype(jnp.float32), axis=-1, keepdims=True)
    return pj.ScoreModifications((pj.Transport(direction=key, strength=jnp.full((*key.shape[:3], 1), 0.5)),))


def sums(params, inputs):
    """Rotates by angles that are summed along the sequence, over padding too."""
    heads, before = inputs.key.shape[2], 0.0 if inputs.state is None else inputs.state[:, None]
    angles = before + jnp.cumsum(inputs.key[..., :1].astype(jnp.float32), axis=1)
    rotation = pj.Rotate(jnp.repeat(angles, inputs.query.shape[2] // heads, axis=2), angles)
    return pj.ScoreModifications((rotation,), state=angles[:, -1])


def sums_of_tokens(params, inputs):
    if inputs.k.segments is None:
        return sums(params, inputs)
    real = (inputs.k.segments != 0)[..., None, None]
    return sums(params, dataclasses.replace(inputs, key=jnp.where(real, inputs.key, 0)))


class Unequal(pj.PositionalEncoding):
    """Registered by nothing, so that it has no fields to compare."""

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)

    def __repr__(self):
        return "unequal()"


@pytest.mark.parametrize(
    ("encoding", "claims"),
    [
        pytest.param(pj.alibi(), dict(shift=9), marks=pytest.mark.thorough),
        pytest.param(pj.chain(pj.rope(), pj.t5(6, 8)), dict(shift=9), marks=pytest.mark.thorough),
        pytest.param(pj.chain(pj.rope(), pj.cope(4, gates="keys")), dict(shift=9), marks=pytest.mark.thorough),
        pytest.param(pj.tupe(relative=True), {}, marks=pytest.mark.thorough),
        pytest.param(moved, dict(shift=9), marks=pytest.mark.thorough),
        pytest.param(sums_of_tokens, dict(shift=9), marks=pytest.mark.thorough),
        pytest.param(pj.chain(pj.learned(), pj.cope_mlp(8), pj.alibi()), {}, marks=pytest.mark.thorough),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_encodings_that_behave(encoding, claims):
    check_encoding(encoding if isinstance(encoding, pj.PositionalEncoding) else pj.encoding("mine", attend=encoding), **claims)


BROKEN = {
    "values": (Unequal(), {}),
    "parameters": (pj.encoding("half", init=init_half), {}),
    "dtypes": (pj.encoding("float32", embed=embed_float32), {}),
    "dtypes of phases": (pj.encoding("low", attend=low_phases), {}),
    "finite": (pj.encoding("log", attend=log_distance), {}),
    "coordinates": (pj.encoding("order", attend=by_order), {}),
    "columns of phases": (pj.encoding("length", attend=whole_length), {}),
    "causality": (pj.encoding("mean", embed=embed_mean), {}),
    "tiles": (pj.encoding("mean", attend=mean_of_tile), {}),
    "packing": (pj.encoding("index", embed=embed_index), {}),
    "padding": (pj.encoding("sums", attend=sums), {}),
    "columns": (pj.encoding("far", attend=far_keys), {}),
    "heads": (pj.encoding("halves", attend=half_slopes), {}),
    "order": (pj.identity(), {}),
    "shifted": (pj.sinusoidal(), dict(shift=5)),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_encoding_is_told_by_its_rule(rule):
    encoding, claims = BROKEN[rule]
    with pytest.raises(AssertionError) as caught:
        check_encoding(encoding, **claims)
    message = str(caught.value)
    assert f"breaks the rule {rule.partition(' ')[0]!r}" in message, message


def test_what_is_no_encoding():
    with pytest.raises(TypeError, match=r"encoding must be a PositionalEncoding such as rope\(\), got 'rope'"):
        check_encoding("rope")
