"""Properties of ``chain`` over random members: it is a value, it can be nested, and it adds up what its members do."""

import functools
import pickle

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from suite import noisy, normal

import posjax as pj
from posjax.attention.backends import reference
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare

B, T, N, K, H, D = 1, 9, 4, 2, 8, 16
DIMS = pj.Dims(num_heads=N, head_dim=H, embed_dim=D, max_length=16, num_kv_heads=K)
QUERY, KEY, VALUE, X = normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H), normal(4, B, T, D)

ADDED = (  # to embeddings, or to scores: in any order
    st.just(pj.identity()),
    st.just(pj.sinusoidal()),
    st.just(pj.learned()),
    st.builds(pj.alibi, slope=st.sampled_from([0.5, 1.0])),
    st.builds(pj.t5, num_buckets=st.sampled_from([4, 8]), max_distance=st.just(8)),
)
ROTATED = st.builds(
    pj.rope,
    theta=st.sampled_from([100.0, 10_000.0]),
    fraction=st.sampled_from([0.5, 1.0]),
    pairing=st.sampled_from(["half", "interleaved"]),
)
COUNTED = st.builds(pj.cope, max_position=st.sampled_from([3, 5]), gates=st.sampled_from(["logits", "content", "values"]))
MEMBERS = st.lists(st.one_of(*ADDED, ROTATED, COUNTED), min_size=1, max_size=4)


def settings(examples):
    return hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@settings(100)
@hypothesis.given(MEMBERS)
def test_a_chain_is_a_value(members):
    encoding, again = pj.chain(*members), pj.chain(*members)
    for one in (again, pickle.loads(pickle.dumps(encoding)), eval(repr(encoding), vars(pj))):
        assert one == encoding and hash(one) == hash(encoding) and repr(one) == repr(encoding)
    assert len(encoding.members) == len(members)
    shapes = jax.eval_shape(functools.partial(encoding.init, dims=DIMS), jax.random.key(0))
    assert set(shapes) == {name for name, member in encoding.members.items() if _learns(member)}
    assert encoding.needs_causal == any(member.needs_causal for member in members)


@functools.cache
def _learns(member):
    return bool(jax.eval_shape(functools.partial(member.init, dims=DIMS), jax.random.key(0)))


def check(members, split):
    """Compares a chain in dense attention with itself in tiles, nested, and with the sum of what its members add."""
    encoding = pj.chain(*members)
    params = noisy(encoding.init(jax.random.key(0), DIMS))
    names = list(encoding.members)
    first, rest = pj.chain(*members[:split]), members[split:]
    nested = pj.chain(first, *rest)
    own = dict(zip(names[:split], first.members, strict=True))
    nested_params = {first.name: {own[name]: params[name] for name in own if name in params}} if own.keys() & params else {}
    outer = [name for name in nested.members if name != first.name]
    nested_params |= {new: params[old] for new, old in zip(outer, names[split:], strict=True) if old in params}

    def scores(one, params):
        return reference.scores_of(prepare(QUERY, KEY, VALUE, one, params, is_causal=True))[1]

    @jax.jit
    def results(params, nested_params):
        call, same = (
            prepare(QUERY, KEY, VALUE, one, own, is_causal=True) for one, own in ((encoding, params), (nested, nested_params))
        )
        dense = reference.attention(call)
        tokens = pj.Tokens.at(jnp.arange(T))
        embedded = encoding.embed(params, X, tokens)
        alike = [
            (xla_chunked.attention(call, tile=(4, 3)), dense),
            (reference.attention(same), dense),
            (nested.embed(nested_params, X, tokens), embedded),
            (embedded - X, sum(m.embed(params.get(n, {}), X, tokens) - X for n, m in encoding.members.items())),
        ]
        if not any(isinstance(member, type(pj.rope()) | type(pj.cope(4))) for member in members):
            plain = scores(pj.identity(), {})
            biases = [scores(member, params.get(name, {})) - plain for name, member in encoding.members.items()]
            alike.append((scores(encoding, params), plain + sum(biases)))
        return alike

    for got, want in results(params, nested_params):
        np.testing.assert_allclose(got, want, atol=2e-5)


def random_chains(examples):
    @settings(examples)
    @hypothesis.given(MEMBERS.filter(lambda members: len(members) > 1), st.data())
    def run(members, data):
        check(members, data.draw(st.integers(1, len(members) - 1)))

    run()


def test_members_add_up_in_tiles_and_nested():
    random_chains(5)


@pytest.mark.thorough
def test_many_chains():
    random_chains(60)
