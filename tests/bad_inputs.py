"""Calls that work but for what is given, and the check of tables of bad ones: (what is tried, the exception, a pattern)."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import posjax as pj

B, T, S, N, K, H = 2, 4, 6, 4, 2, 8
DIMS = pj.Dims(num_heads=N, head_dim=H, max_length=5, num_kv_heads=K)
X = jnp.ones((B, T, N * H))

Bad = tuple[Callable[[], object], type[Exception], str]  # the pattern has the argument, the value, and what would work


def check_refused(bad: Bad) -> None:
    """Raises AssertionError unless a call raises exactly the exception, with a message that has the pattern."""
    attempt, exception, pattern = bad
    with pytest.raises(exception) as caught:
        attempt()
    assert type(caught.value) is exception
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def call(encoding=None, params=None, query=None, key=None, value=None, function=pj.attention, **options):
    """A call that works, but for what is given."""
    query = ones(B, T, N, H) if query is None else query
    key = ones(B, T, K, H) if key is None else key
    value = ones(B, T, K, H) if value is None else value
    return function(query, key, value, encoding, params, **options)


def blocks(sizes, implementation="pallas"):
    return call(block_sizes=sizes, implementation=implementation)


def made(encoding):
    return encoding.init(jax.random.key(0), DIMS)
