"""``check_encoding`` accepts what behaves, and names the rule that a broken encoding breaks."""

import jax.numpy as jnp
import pytest
from suite import quick_compilation  # noqa: F401, a fixture

import posjax as pj
from posjax.testing import check_encoding


@pytest.mark.parametrize(
    ("encoding", "claims"),
    [
        (pj.alibi(), dict(shift=9)),
        pytest.param(pj.chain(pj.rope(), pj.t5(6, 8)), dict(shift=9), marks=pytest.mark.thorough),
        pytest.param(pj.chain(pj.rope(), pj.cope(4, gates="keys")), dict(shift=9), marks=pytest.mark.thorough),
        pytest.param(pj.tupe(relative=True), {}, marks=pytest.mark.thorough),
        pytest.param(pj.chain(pj.learned(), pj.cope_mlp(8), pj.alibi()), {}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_encodings_that_behave(encoding, claims):
    check_encoding(encoding, **claims)


def linear(query_positions, key_positions, slopes):
    return -slopes[None, :, None, None] * jnp.abs(query_positions - key_positions)


def halves(query_positions, key_positions, slopes):
    """With another slope for the first half of whatever heads there are."""
    factor = jnp.where(jnp.arange(slopes.size) < slopes.size / 2, 1.0, 3.0)
    return linear(query_positions, key_positions, slopes * factor)


def count(tile, rows, columns, tables, carry):
    """Counts what is masked, too."""
    return -0.02 * (carry[..., None] + jnp.arange(tile.logits.shape[-1])[::-1]) ** 2, carry + tile.logits.shape[-1]


def by_key(tile, rows, columns, tables, carry):
    return jnp.repeat(columns, 2, axis=1)[:, :, None], carry


def embed_mean(params, x, positions):
    return x + x.mean(1, keepdims=True) * positions[..., None]


def embed_float32(params, x, positions):
    return x + positions[..., None].astype(jnp.float32)


def embed_index(params, x, positions):
    return x + jnp.arange(x.shape[1])[None, :, None].astype(x.dtype)


def init_half(key, dims):
    return {"slope": jnp.ones(dims.num_heads, jnp.float16)}


def far_keys(params, inputs):
    sums = jnp.cumsum(jnp.swapaxes(inputs.key[..., 0], 1, 2)[..., ::-1], -1)[..., ::-1]
    return (pj.BiasTerm(function=by_key, columns=sums),)


def counted(params, inputs):
    batch, length, num_heads, _ = inputs.query.shape
    return (pj.BiasTerm(function=count, carry=jnp.zeros((batch, num_heads, length))),)


def half_slopes(params, inputs):
    return (pj.position_bias(halves, jnp.ones(inputs.query.shape[2]), heads=(0,)),)


class Unequal(pj.PositionalEncoding):
    """Registered by nothing, so that it has no fields to compare."""

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)

    def __repr__(self):
        return "unequal()"


BROKEN = {
    "values": (Unequal(), {}),
    "parameters": (pj.encoding("half", init=init_half), {}),
    "dtypes": (pj.encoding("float32", embed=embed_float32), {}),
    "causality": (pj.encoding("mean", embed=embed_mean), {}),
    "tiles": (pj.encoding("counted", bias=counted, is_contextual=True), {}),
    "packing": (pj.encoding("index", embed=embed_index), {}),
    "columns": (pj.encoding("far", bias=far_keys), {}),
    "heads": (pj.encoding("halves", bias=half_slopes), {}),
    "order": (pj.identity(), {}),
    "shifted": (pj.sinusoidal(), dict(shift=5)),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_encoding_is_told_by_its_rule(rule):
    encoding, claims = BROKEN[rule]
    with pytest.raises(AssertionError) as caught:
        check_encoding(encoding, **claims)
    message = str(caught.value)
    assert f"breaks the rule {rule!r}" in message, message


def test_what_is_no_encoding():
    with pytest.raises(TypeError, match=r"encoding must be a PositionalEncoding such as rope\(\), got 'rope'"):
        check_encoding("rope")
