"""What every encoding must do in each way of making the same call: grouped heads, packed rows. Decoding has a file of its own."""

import jax.numpy as jnp
from suite import (
    TOKENS,
    B,
    T,
    causal,
    close,
    every_case,
    layer,
    project,
    random_params,
    repeat_key_heads,
)

import posjax as pj


@every_case
def test_grouped_queries_equal_repeated_key_heads(case):
    params = random_params(case.encoding)
    hidden = case.encoding.embed(params, TOKENS, pj.Tokens.at(jnp.arange(T)))
    query, key, value = project(hidden)
    params = repeat_key_heads(params)
    key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
    close(pj.attention(query, key, value, case.encoding, params, is_causal=True, hidden=hidden), causal(case))


@every_case
def test_packed_segments_equal_separate_sequences(case):
    params, half = random_params(case.encoding), T // 2
    segments, positions = jnp.broadcast_to(jnp.arange(T) // half + 1, (B, T)), jnp.arange(T) % half
    for is_causal in case.is_causal_choices:
        packed = layer(case.encoding, params, TOKENS, positions, is_causal=is_causal, segment_ids=segments)
        apart = [layer(case.encoding, params, x, is_causal=is_causal) for x in (TOKENS[:, :half], TOKENS[:, half:])]
        close(packed, jnp.concatenate(apart, axis=1))
