"""Calls that the machine code kernels are tested with, on CPUs interpreted, and what dense attention answers to them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import suite
from jax.sharding import NamedSharding, PartitionSpec
from suite import agree, differs, normal, output_and_gradients, relative_errors

import posjax as pj
from posjax.attention.backends import reference

D = 6  # model width
GATED = pj.chain(pj.rope(theta=1e6), pj.cope(12))
EVERYTHING = pj.chain(pj.rope(theta=1e6), pj.cope(12), pj.t5(6, 8), pj.alibi())
KNOWN = [case for case in suite.CASES if not any(word in case.name for word in ("content", "keys", "values", "cope_"))]
SAME = ("tied", "sinusoidal", "learned", "scaled", "per head")  # to the kernel as another case, here or below
DISTINCT = [case for case in KNOWN if not any(word in case.name for word in SAME)]


def make_operands(encoding, batch, length, keys, heads, gates=None, scale=None):
    """Query, key, value, params, and scale where given; ``heads`` is N, K, H, V.

    Args:
      gates: None for random ones; "near 0" and "near 1" within 1e-6; "mixed" among the rows; "by group" of 128 queries; "small",
        around 0.02; "small and large", where those of keys 300 to 419 are around one half.
    """
    count, kv_heads, width, value_width = heads
    rng = np.random.default_rng(0)
    query, key = 0.5 * normal(1, batch, length, count, width), normal(2, batch, keys, kv_heads, width)
    if gates is not None:
        channel = width // 2 - 1  # the one that rope turns least
        index = np.broadcast_to(np.arange(length)[:, None], (batch, length, count))
        signs = {"near 0": -1, "near 1": 1, "mixed": rng.choice([-1, 1], index.shape), "by group": 1 - 2 * (index // 128 % 2)}
        signs |= {"small": -0.25, "small and large": -0.25}
        query, key = (0.3 * x for x in (query, key))
        query = query.at[..., channel].set(4.0 * math.sqrt(width) * signs[gates])
        key = key.at[..., channel].set(4.0)
        if gates == "small and large":
            key = key.at[:, 300:420, ..., channel].set(0.0)
    dims = pj.Dims(count, width, D, max(length, keys) + 7, kv_heads)  # as far as packed() goes
    params = encoding.init(jax.random.key(0), dims)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    operands = {"query": query, "key": key, "value": normal(3, batch, keys, kv_heads, value_width), "params": params}
    return operands | ({} if scale is None else {"scale": jnp.float32(scale)})


@functools.cache
def compiled(encoding, static, kernel=None):
    """(operands, hidden, weight, arrays) -> output and gradients, of dense attention for ``kernel=None``.

    Args:
      kernel: a function of an ``AttentionCall``, and hashable.
    """

    def answers(operands, hidden, weight, arrays):
        options = dict(static) | arrays
        return output_and_gradients(kernel or reference.attention, encoding, operands, hidden, weight, **options)

    return jax.jit(answers)


def answers(
    kernel, encoding, dtype="float32", length=140, keys=None, batch=1, heads=(2, 1, 16, 16),
    gates=None, scale=None, arrays=None, **static,
):  # fmt: skip
    """What the kernel and dense attention answer to a call, and its operands, in float32 all.

    Args:
      arrays: a dict of the options of ``pj.attention`` that are arrays.
      **static: the other options.
    """
    keys = keys or length
    operands = make_operands(encoding, batch, length, keys, heads, gates, scale)
    low = operands | {name: operands[name].astype(dtype) for name in ("query", "key", "value")}
    given = normal(5, batch, keys, D), normal(4, batch, length, heads[0], heads[3]), arrays or {}
    static = tuple(static.items())
    got = compiled(encoding, static, kernel)(low, *given)
    assert got["out"].dtype == dtype
    assert jax.tree.map(lambda a, b: a.dtype == b.dtype, {name: got[name] for name in low}, low)
    low, got = jax.tree.map(lambda x: x.astype(jnp.float32), (low, got))
    return got, compiled(encoding, static)(low, *given), low


def check(kernel, encoding, dtype="float32", tolerance=1e-4, **call):
    """The kernel's answer agrees with that of dense attention in float32 on the same inputs."""
    got, want, operands = answers(kernel, encoding, dtype=dtype, **call)
    if dtype == "float32":
        agree(got, want, operands, tolerance)
    else:  # weights and the result are rounded to 8 bits: 2^-9 each, and 2^-6 in gradients
        errors = relative_errors(got, want, operands)
        assert errors.pop("['out']") < 2.0**-7, errors
        assert max(errors.values()) < 2.0**-6, errors
    return got


def everything_at_once(kernel, gates, dtype="float32"):
    """CoPE, T5 and ALiBi on rotated queries; packed rows, a window, a soft cap, grouped heads, a learned scale."""
    call = dict(length=140, keys=300, batch=2, gates=gates, scale=0.25, arrays=packed(2, 140, 300))
    options = dict(is_causal=True, local_window_size=(200, None), logits_soft_cap=20.0)
    out = check(kernel, EVERYTHING, dtype=dtype, **call, **options)["out"]
    assert not out[:, 20:30].any()
    assert out[:, :20].any()


@functools.cache
def packed(batch, length, keys):
    """Packed rows whose queries are the last of the keys, at positions of their own; queries 20 to 29 have no key at all."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (batch, keys)))
    of_queries = segments[:, keys - length :].copy()
    of_queries[:, 20:30] = 9
    positions = np.arange(keys) + np.asarray([[0], [7]])[:batch]
    rows = dict(query_positions=positions[:, keys - length :], key_positions=positions)
    return jax.tree.map(jnp.asarray, rows | {"segment_ids": (of_queries, segments)})


@functools.cache
def saturating(last, per_head):
    return pj.cope(last, per_head=per_head)


def mesh_of(kind):
    assert jax.device_count() == 8
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)


def gradients_on(mesh, encoding, operands, implementation):
    """Gradients through ``pj.attention``, batch and heads cut over a mesh where there is one; and where query's part lies."""

    def loss(operands):
        query, key, value, params = (operands[name] for name in ("query", "key", "value", "params"))
        out = pj.attention(query, key, value, encoding, params, is_causal=True, implementation=implementation)
        return (out * normal(4, *out.shape)).sum()

    gradient = jax.jit(jax.grad(loss))
    if mesh is None:
        return gradient(operands)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    cut = {name: operands[name] for name in ("query", "key", "value") if operands[name].shape[2] % 2 == 0}
    with jax.set_mesh(mesh):
        return gradient(operands | jax.device_put(cut, sharding))


def on_a_mesh(kind, encoding, kv_heads, length):
    operands = make_operands(encoding, 4, length, length, (4, kv_heads, 8, 8))
    got = gradients_on(mesh_of(kind), encoding, operands, "pallas")
    assert got["query"].sharding.shard_shape(got["query"].shape) == (1, length, 2, 8)
    got, want = jax.device_get((got, gradients_on(None, encoding, operands, "xla")))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), got, want)


def stacked():
    """Two calls: operands and segments, and what dense attention answers to each."""
    operands = [make_operands(GATED, 1, 140, 140, (2, 1, 16, 16), gates) for gates in ("mixed", None)]
    segments = [jnp.arange(140)[None] // 60, jnp.arange(140)[None] // 100]
    zeros, weight = jnp.zeros((1, 140, D)), normal(4, 1, 140, 2, 16)
    one = compiled(GATED, (("is_causal", True),))
    want = [one(x, zeros, weight, {"segment_ids": ids}) for x, ids in zip(operands, segments, strict=True)]
    assert differs(want[0]["query"], want[1]["query"])
    return *(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (operands, segments)), want


def all_agree(gradients, operands, want, tolerance=1e-4):
    for n, one in enumerate(want):
        got, given = jax.tree.map(lambda x, n=n: x[n], (gradients, operands))
        agree({"out": one["out"]} | got, one, given, tolerance)


# Calls through posjax.attention, of which only the program is asked for

LONG = 160  # LONG^2 is above the size up to which dense attention is taken anyway


def shapes(encoding, length=LONG, width=16, dtype="float32"):
    x = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
    own = {"hidden": jax.ShapeDtypeStruct((1, length, D), dtype)} if encoding.needs_hidden else {}
    params = jax.eval_shape(lambda: encoding.init(jax.random.key(0), pj.Dims(2, width, D, length)))
    return {"query": x, "key": x, "value": x, "params": params} | own


def loss(operands, encoding, **options):
    return pj.attention(**operands, encoding=encoding, is_causal=True, **options).astype(jnp.float32).sum()
