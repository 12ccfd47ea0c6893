"""Code that the TPU and GPU kernels share as backends of the ring; see ``ring.xla_chunked`` for the interface."""

import dataclasses
from typing import Any, TypeVar, cast

import jax.numpy as jnp

from posjax.attention.backends.constants import EMPTY_LSE, LOG2E, MASK_VALUE
from posjax.typing import Array

OperandsT = TypeVar("OperandsT")


def by_key(x: Any) -> dict[str, Any]:
    return dict(key=x.key, value=x.value, segments=x.key_segments, positions=x.key_positions, features=x.key_features)


def carried(x: Any) -> list[Array]:
    return [] if x.high is None else [x.high, x.low]


def with_keys(x: OperandsT, kv: dict[str, Any], carries: Any) -> OperandsT:
    high, low = carries or (None, None)
    keys = dict(key_segments=kv["segments"], key_positions=kv["positions"], key_features=kv["features"])
    return dataclasses.replace(cast(Any, x), key=kv["key"], value=kv["value"], **keys, high=high, low=low)


def natural_lse(lse: Array) -> Array:
    """Converts a kernel's log-sum-exp from base 2 to base e, with ``EMPTY_LSE`` for rows with no allowed key."""
    return jnp.where(lse < -0.5 * MASK_VALUE, lse / LOG2E, EMPTY_LSE)


def split_by_key(x: Any, grads: dict[str, Array]) -> tuple[dict[str, list[Array]], dict[str, Array]]:
    """Splits gradients by name into those of per-key arrays, in the form of ``by_key`` of operands x, and the rest."""
    rest = dict(grads)
    features = []
    if x.key_features is not None:
        features = [rest.pop("key_features")] if "key_features" in rest else [jnp.zeros_like(x.key_features)]
    return dict(key=[rest.pop("key")], value=[rest.pop("value")], segments=[], positions=[], features=features), rest
