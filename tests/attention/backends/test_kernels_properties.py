"""Every kernel equals dense attention, in its output and in every gradient: random calls, and CoPE where gates saturate.

The oracle gets one boolean mask that NumPy makes from the options, so that the kernel's own masks have something independent to
equal. All arrays have one length, of which the kernel gets a part: whatever surrounds it is then compiled once.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite
from hypothesis import strategies as st
from suite import (
    CASES,
    Case,
    agree,
    every_case,
    every_kernel,
    normal,
    output_and_gradients,
)

import posjax as pj
from posjax.attention.backends import reference
from posjax.attention.call import prepare
from posjax.core.structures import take_tokens

B, D, LONGEST, TABLE = 2, 6, 40, 128  # batch; model width; length of all arrays; positions of the encodings that have a table

settings = hypothesis.settings(
    max_examples=7,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


@dataclasses.dataclass(frozen=True)
class Form:
    """What of a call is known before compilation.

    Attributes:
      sizes: N, K, H, V.
      mask: which axes of [B, N, T, S] a boolean mask has; None: no mask.
      segments: "packed" in ascending order; "shuffled", with queries that no key belongs to; or None.
      positions: None (not given); "shared" by the batch; "rows", other ones in each; "decoding": queries are the last of the keys;
        "restarting" in every segment.
    """

    sizes: tuple[int, int, int, int]
    length: int
    keys: int
    tile: tuple[int, int] | None
    is_causal: bool
    window: int | tuple[int | None, int | None] | None
    soft_cap: float | None
    mask: tuple[bool, bool, bool, bool] | None
    segments: str | None
    positions: str | None
    is_scaled: bool


@functools.cache
def programs() -> dict[str, tuple[int, int]]:
    """Two numbers for each case: its program, the same for cases that a kernel sees no difference in, and which of those it is."""

    def call(encoding, params, x):
        hidden = jnp.zeros((1, 2, suite.D))
        return prepare(x, x[:, :, : suite.K], x[:, :, : suite.K], encoding, params, is_causal=True, hidden=hidden)

    seen, numbers = {}, {}
    for case in CASES:
        x, params = jnp.zeros((1, 2, suite.N, suite.H)), suite.random_params(case.encoding)
        leaves, structure = jax.tree.flatten(jax.eval_shape(functools.partial(call, case.encoding), params, x))
        alike = seen.setdefault((structure, str(leaves)), [len(seen)])
        numbers[case.name] = alike[0], len(alike) - 1
        alike.append(case)
    return numbers


def random_form(case: Case) -> Form:
    """The form of an encoding. A program takes seconds to compile: one for cases that could share it, two for the larger groups."""
    program, which = programs()[case.name]
    rng = np.random.default_rng([program, 0 if case.name.startswith("tupe") else which % 2])

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    length, keys = pick(1, 7, 16, 21, 33, 40), pick(1, 9, 24, 33, 40)
    keys = pick(length, keys) if length > 1 else 40
    mask = pick(None, None, (True,) * 4, (False, False, True, True), (True, False, False, True), (True, True, True, False))
    segments = pick(None, "packed", "shuffled")
    positions = [None, "shared", "rows"]
    positions += ["decoding"] * (length <= keys) + ["restarting"] * 2 * (segments == "packed" and length == keys)
    side = pick(None, 6, 15, 0)
    sizes = [(4, 2, 8, 5), (3, 1, 8, 8), (2, 2, 16, 16)][program % 3]
    if case.name.startswith("mrope"):  # its sections are those of heads with 8 channels
        sizes = (4, 2, 8, 5)
    return Form(
        sizes=sizes,
        length=length,
        keys=keys,
        tile=pick((8, 8), (16, 8), (8, 32), None),
        is_causal=pick(True, False) or (case.encoding.needs_causal and mask is None),
        window=pick(None, None, 5, (side, None), (None, 3), (side, 4)),
        soft_cap=pick(None, None, 3.0),
        mask=mask,
        segments=segments,
        positions=pick(*positions),
        is_scaled=pick(False, True),
    )


def random_call(form: Form, rng: np.random.Generator, size: float, longest: int) -> tuple[dict, dict]:
    """Operands (but for params) and traced options of ``pj.attention``, all ``longest`` long. ``size``: of queries and keys."""
    heads, kv_heads, width, value_width = form.sizes
    operands = {
        name: rng.normal(size=(B, longest, n, w)) * by
        for name, n, w, by in (("query", heads, width, size), ("key", kv_heads, width, size), ("value", kv_heads, value_width, 1.0))
    }
    if form.is_scaled:
        operands["scale"] = rng.uniform(0.1, 0.6)
    options = {}
    if form.mask is not None:
        whole = (B, heads, longest, longest)
        mask = rng.random([n if has else 1 for n, has in zip(whole, form.mask, strict=True)]) < rng.choice([0.9, 0.3])
        mask[:, :, rng.random(mask.shape[2]) < 0.2] = False  # rows that see nothing
        mask[..., : rng.integers(mask.shape[3])] &= rng.random() < 0.7  # the past, in whole tiles
        options["mask"] = mask
    if form.segments is not None:
        queries, keys = rng.integers(0, 3, (B, longest)), rng.integers(0, 4, (B, longest))
        if form.segments == "packed":
            queries, keys = np.sort(queries), np.sort(keys)
            keys = queries if form.length == form.keys else keys
        else:
            queries[:, rng.random(longest) < 0.1] = 9
        options["segment_ids"] = queries, keys
    start, rows = rng.integers(TABLE // 2 - longest) if form.positions else 0, () if form.positions == "shared" else (B,)
    if form.positions in ("shared", "rows"):
        queries, keys = rng.integers(0, TABLE, (*rows, longest)), rng.random((*rows, TABLE)).argsort(-1)[..., :longest]
        options["query_positions"] = np.sort(queries) if rng.random() < 0.5 else queries
        options["key_positions"] = np.sort(keys) if rng.random() < 0.5 else start + np.sort(keys // 4)  # with gaps, with repeats
    elif form.positions == "decoding":
        options["query_positions"] = start + form.keys - form.length + np.arange(longest)
        options["key_positions"] = start + np.arange(longest)
    elif form.positions == "restarting":
        segments = options["segment_ids"][0]
        starts = (segments[:, :, None] > segments[:, None]).sum(-1)
        options["query_positions"] = options["key_positions"] = np.arange(longest) - starts
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), operands), jax.tree.map(jnp.asarray, options)


def allowed(form: Form, options: dict, longest: int) -> np.ndarray:
    """The mask of a call in NumPy, [B, N, longest, longest]."""
    index = np.arange(longest)
    query_positions = np.asarray(options.get("query_positions", index)).reshape(-1, 1, longest, 1)
    key_positions = np.asarray(options.get("key_positions", index)).reshape(-1, 1, 1, longest)
    mask = np.broadcast_to((index[:, None] < form.length) & (index < form.keys), (B, form.sizes[0], longest, longest)).copy()
    if form.is_causal:
        mask &= key_positions <= query_positions
    left, right = form.window if isinstance(form.window, tuple) else (form.window, form.window)
    if left is not None:
        mask &= key_positions >= query_positions - left
    if right is not None:
        mask &= key_positions <= query_positions + right
    if "mask" in options:
        mask &= np.asarray(options["mask"])
    if "segment_ids" in options:
        queries, keys = map(np.asarray, options["segment_ids"])
        mask &= queries[:, None, :, None] == keys[:, None, None, :]
    return mask


@functools.cache
def compiled(kernel):
    """The kernel on the first queries and keys of a call, zeros where queries are left out. Alike calls compile once."""

    def cut(length, keys, call, **tile):
        first = call.replace(
            query=call.query[:, :length],
            key=call.key[:, :keys],
            value=call.value[:, :keys],
            biases=take_tokens(take_tokens(call.biases, "query", 0, length), "key", 0, keys),
            transforms=take_tokens(take_tokens(call.transforms, "query", 0, length), "key", 0, keys),
            mask=call.mask.cut(0, length, 0, keys),
            query_positions=call.query_positions[:, :length],
            key_positions=call.key_positions[:, :keys],
        )
        return jnp.pad(kernel(first, **tile), [(0, 0), (0, call.query.shape[1] - length), (0, 0), (0, 0)])

    return jax.jit(cut, static_argnums=(0, 1), static_argnames="tile")


def random_params(encoding, dims: pj.Dims, size: float, rng: np.random.Generator):
    """Params of an encoding, all of them normal."""
    shapes = jax.eval_shape(lambda: encoding.init(jax.random.key(0), dims))
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.normal(size=leaf.shape), jnp.float32), shapes)


def check(kernel, form: Form, encoding, seed: int, size: float, longest: int = LONGEST) -> None:
    """A random call of the form: the kernel's answer agrees with the oracle's."""
    rng = np.random.default_rng(seed)
    operands, options = random_call(form, rng, size, longest)
    heads, kv_heads, width, value_width = form.sizes
    operands["params"] = random_params(encoding, pj.Dims(heads, width, D, TABLE, kv_heads), 0.3, rng)
    hidden, weight = normal(seed, B, longest, D), normal(seed + 1, B, longest, heads, value_width)
    static = {"is_causal": form.is_causal, "local_window_size": form.window, "logits_soft_cap": form.soft_cap}
    tiled = functools.partial(compiled(kernel), form.length, form.keys, tile=form.tile)
    got = output_and_gradients(tiled, encoding, operands, hidden, weight, **static, **options)
    plain = {name: options[name] for name in ("query_positions", "key_positions") if name in options}
    plain |= {"mask": jnp.asarray(allowed(form, options, longest)), "logits_soft_cap": form.soft_cap}
    if form.positions == "restarting":  # positions of one segment must not decrease
        plain["segment_ids"] = options["segment_ids"]
    oracle = functools.partial(compiled(reference.attention), longest, longest)
    want = output_and_gradients(oracle, encoding, operands, hidden, weight, **plain)
    agree(got, want, operands)


@every_kernel
@every_case
@settings
@hypothesis.given(st.integers(0, 999), st.sampled_from([1.0, 0.3, 3.0]))
def test_random_calls(kernel, case, seed, size):
    check(kernel, random_form(case), case.encoding, seed, size)


@every_kernel
def test_a_call_of_a_thousand_tokens(kernel):
    form = Form((2, 1, 8, 8), 1000, 1000, None, True, None, None, None, "packed", None, False)
    check(kernel, form, pj.chain(pj.cope(16), pj.alibi()), 0, 1.0, longest=1000)


# CoPE where gates saturate -------------------------------------------------------------------------------------------

LENGTH = 33
EXTREMES = {
    "plain": pj.cope,
    "per head": functools.partial(pj.cope, per_head=True, scaled=True),
    "content": functools.partial(pj.cope, gates="content"),
    "keys": functools.partial(pj.cope, gates="keys"),
    "values": functools.partial(pj.cope, gates="values"),
    "rope": lambda last: pj.chain(pj.rope(theta=1e6), pj.cope(last)),
    "alibi": lambda last: pj.chain(pj.cope(last), pj.alibi()),
}
MANY = LENGTH + 1  # positions, more than there are tokens


@functools.cache
def extreme(name: str, max_position: int) -> pj.PositionalEncoding:
    return EXTREMES[name](max_position)


@every_kernel
@pytest.mark.parametrize("regime", ["near 0", "near 1", "mixed"])
@pytest.mark.parametrize(
    ("name", "max_position"),
    [("plain", 2), ("alibi", 2), ("per head", 2), ("keys", 2)] + [(name, MANY) for name in ("plain", "content", "values", "rope")],
)
def test_gates_near_zero_and_one(kernel, name, max_position, regime):
    """Counts that never reach the last position, that reach it in a few keys, and both among the rows of one tile."""
    encoding = extreme(name, max_position)
    heads, kv_heads, width = 4, 2, 8
    channel = width // 2 - 1  # the one that rope turns least: 1e-5 rad a position
    rng = np.random.default_rng(0)
    sign = {"near 0": -1, "near 1": 1, "mixed": rng.choice([-1, 1], (B, LENGTH, heads))}[regime]
    query, key, value = (0.3 * rng.normal(size=(B, LENGTH, n, width)) for n in (heads, kv_heads, kv_heads))
    query[..., channel] = 8.0 * sign
    gate_key = value if name == "values" else key
    gate_key[..., channel] = 8.0
    operands = {"query": query, "key": key, "value": value}
    dims = pj.Dims(heads, width, D, num_kv_heads=kv_heads)
    hidden = np.ones((B, LENGTH, D)) + 0.1 * rng.normal(size=(B, LENGTH, D))
    operands["params"] = random_params(encoding, dims, 0.1, rng)
    if name == "keys":
        operands["params"]["gate_kernel"] = operands["params"]["gate_kernel"].at[..., channel].set(8.0 / D)
        gate_key = np.einsum("btd,dkh->btkh", hidden, operands["params"]["gate_kernel"])
    operands, hidden = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (operands, hidden))

    logits = np.einsum("btnh,bsnh->btns", query, np.repeat(gate_key, heads // kv_heads, axis=2)) / width**0.5
    gates = 1 / (1 + np.exp(-logits))
    is_one = np.broadcast_to(np.asarray(sign)[..., None] == 1, gates.shape) if regime == "mixed" else regime == "near 1"
    assert np.abs(gates - is_one).max() < 1e-6
    if regime == "mixed":
        assert all(0 < np.mean(sign[:, row : row + 8]) + 1 < 2 for row in range(0, 32, 8))

    tiled, weight = functools.partial(compiled(kernel), LENGTH, LENGTH, tile=(8, 8)), normal(1, *query.shape)
    got = output_and_gradients(tiled, encoding, operands, hidden, weight, is_causal=True)
    oracle = functools.partial(compiled(reference.attention), LENGTH, LENGTH)
    want = output_and_gradients(oracle, encoding, operands, hidden, weight, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
    agree(got, want, operands)
