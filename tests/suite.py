"""Every encoding as a case of one behavioural suite, and the tiny layer that the suite runs it in.

A new encoding joins by one line in CASES: what it is, and what it claims. test_encodings.py and its neighbours run them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax as pj
from posjax.attention.backends.bias_terms import BiasTerm, Tile, bias_terms
from posjax.attention.backends.reference import scores_of
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare

# D is not N * H, so that a table of the wrong width cannot pass. One length and its half nearly everywhere: operations are compiled
# once a shape, which is most of the time that these tests take.
B, T, N, K, H, D = 2, 12, 4, 2, 8, 24
DIMS = pj.Dims(num_heads=N, head_dim=H, embed_dim=D, max_length=16, num_kv_heads=K)


@dataclasses.dataclass(frozen=True)
class Case:
    """An encoding and its claims.

    Attributes:
      shift_invariant: adding one number to all positions changes nothing.
      shift: how far, in positions.
      order_blind: without a causal mask, permuting the tokens permutes the output and does nothing else.
      inert: a learned leaf that adds the same to all scores of a row, which softmax does not see.
    """

    name: str
    encoding: pj.PositionalEncoding
    shift_invariant: bool = False
    shift: int = 1000
    order_blind: bool = False
    inert: str | None = None

    @property
    def is_causal_choices(self) -> tuple[bool, ...]:
        return (True,) if self.encoding.needs_causal else (True, False)


FAR = 100_000  # where a float32 phase is off by more than 6e-3 rad
CASES = [
    Case("identity", pj.identity(), shift_invariant=True, order_blind=True),
    Case("sinusoidal", pj.sinusoidal()),
    Case("learned", pj.learned()),
    Case("rope half", pj.rope(), shift_invariant=True, shift=FAR),
    Case("rope interleaved", pj.rope(pairing="interleaved"), shift_invariant=True, shift=FAR),
    Case("rope fraction", pj.rope(theta=500.0, fraction=0.25), shift_invariant=True, shift=FAR),
    Case(
        "rope yarn",
        pj.rope(fraction=0.5, pairing="interleaved", scaling=pj.yarn_scaling(4.0, 16), channels="last"),
        shift_invariant=True,
        shift=FAR,
    ),
    Case("query_scale + rope", pj.chain(pj.query_scale(1.5), pj.rope()), shift_invariant=True, shift=FAR),
    Case("log_scale + rope", pj.chain(pj.log_scale(3), pj.rope())),
    Case("mrope", pj.mrope((2, 1, 1)), shift_invariant=True, shift=FAR),
    Case("mrope interleaved", pj.mrope((2, 1, 1), "interleaved", pairing="interleaved"), shift_invariant=True, shift=FAR),
    Case("mrope alternating", pj.mrope((2, 1, 1), "alternating"), shift_invariant=True, shift=FAR),
    Case("axial_rope", pj.axial_rope(), shift_invariant=True, shift=FAR),
    Case("axial_rope blocks", pj.axial_rope(layout="blocks", theta=100.0), shift_invariant=True, shift=FAR),
    Case("axial_rope split", pj.axial_rope(layout="split", pairing="interleaved"), shift_invariant=True, shift=FAR),
    Case("axial_rope widths", pj.axial_rope(3, "widths", widths=(2, 4, 2), scale=0.5), shift_invariant=True),
    Case("rope_mixed", pj.rope_mixed(), shift_invariant=True, shift=FAR),
    Case("xpos", pj.xpos(), shift_invariant=True),
    Case("pope", pj.pope(), shift_invariant=True, shift=FAR),
    Case("alibi", pj.alibi(), shift_invariant=True),
    Case("t5", pj.t5(num_buckets=6, max_distance=8), shift_invariant=True),
    Case("t5 bidirectional", pj.t5(num_buckets=8, max_distance=8, bidirectional=True), shift_invariant=True),
    Case("tupe a", pj.tupe()),
    Case("tupe a tied", pj.tupe(untie_cls=False)),
    Case("tupe a released", pj.tupe(released=True)),
    Case("tupe a released tied", pj.tupe(released=True, untie_cls=False), inert="key_bias"),
    Case("tupe r", pj.tupe(relative=True)),
    Case("tupe r tied", pj.tupe(relative=True, untie_cls=False)),
    Case("tupe r released", pj.tupe(relative=True, released=True)),
    Case("tupe r released tied", pj.tupe(relative=True, released=True, untie_cls=False), inert="key_bias"),
    Case("cope", pj.cope(max_position=4), shift_invariant=True),
    Case("cope scaled", pj.cope(max_position=16, scaled=True), shift_invariant=True),
    Case("cope per head", pj.cope(max_position=4, per_head=True), shift_invariant=True),
    Case("cope content", pj.cope(max_position=4, gates="content"), shift_invariant=True),
    Case("cope keys", pj.cope(max_position=4, gates="keys", per_head=True), shift_invariant=True),
    Case("cope values", pj.cope(max_position=4, gates="values"), shift_invariant=True),
    Case("cope_alibi", pj.cope_alibi(slope=0.5), shift_invariant=True),
    Case("cope_alibi learned", pj.cope_alibi(learned=True), shift_invariant=True),
    Case("cope_mlp", pj.cope_mlp(hidden_dim=32), shift_invariant=True),
    Case("cope_mlp keys", pj.cope_mlp(hidden_dim=32, gates="keys", scaled=True), shift_invariant=True),
    Case("rope + cope", pj.chain(pj.rope(), pj.cope(4)), shift_invariant=True, shift=FAR),
    Case("rope + cope content", pj.chain(pj.rope(), pj.cope(4, gates="content")), shift_invariant=True, shift=FAR),
    Case("cope + alibi", pj.chain(pj.cope(4), pj.alibi()), shift_invariant=True),
    Case("cope + t5", pj.chain(pj.cope(4), pj.t5(6, 8)), shift_invariant=True),
    Case("learned + rope", pj.chain(pj.learned(), pj.rope())),
]
LEARNED = [case for case in CASES if jax.tree.leaves(jax.eval_shape(lambda case=case: case.encoding.init(jax.random.key(0), DIMS)))]


# Data ----------------------------------------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def noisy(params, seed: int = 0):
    """The same tree with noise on every leaf: tables that start at zero have no effect, and would hide any fault."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


@functools.cache
def random_params(encoding: pj.PositionalEncoding, seed: int = 0):
    with jax.ensure_compile_time_eval():  # what is cached must not be traced
        return noisy(encoding.init(jax.random.key(seed), DIMS), seed)


TOKENS = normal(1, B, T, D)
WEIGHTS = {name: normal(seed, D, heads, H) / math.sqrt(D) for name, seed, heads in (("q", 2, N), ("k", 3, K), ("v", 4, K))}


VARIANTS = (  # of other cases; README's command leaves them to the thorough tests
    "rope fraction",
    "rope yarn",
    "query_scale + rope",
    "log_scale + rope",
    "mrope",
    "mrope interleaved",
    "mrope alternating",
    "axial_rope",
    "axial_rope blocks",
    "axial_rope split",
    "axial_rope widths",
    "rope_mixed",
    "xpos",
    "pope",
    "t5 bidirectional",
    "tupe a tied",
    "tupe a released",
    "tupe a released tied",
    "tupe r tied",
    "tupe r released",
    "cope scaled",
    "cope values",
    "cope_alibi learned",
    "cope_mlp keys",
    "rope + cope content",
    "cope + alibi",
    "tupe a",
    "cope per head",
    "cope content",
    "cope + t5",
    "learned + rope",
)


def parametrized(cases: list[Case]) -> pytest.MarkDecorator:
    marks = {name: pytest.mark.thorough for name in VARIANTS}
    params = [pytest.param(case, id=case.name, marks=marks.get(case.name, ())) for case in cases]
    return pytest.mark.parametrize("case", params)


every_case, learned_cases = parametrized(CASES), parametrized(LEARNED)


def close(got, want, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0, atol=atol)


def differs(a, b) -> bool:
    """By far more than rounding."""
    return float(jnp.abs(a - b).max()) > 1e-3


# One layer -----------------------------------------------------------------------------------------------------------


def project(hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value by fixed kernels, in the type of hidden."""
    return tuple(jnp.einsum("btd,dnh->btnh", hidden, WEIGHTS[name].astype(hidden.dtype)) for name in "qkv")


def layer(encoding, params, x, positions=None, **options) -> jax.Array:
    """Tokens x [B, T, D] through embed, projections and attention: [B, T, N, H].

    Args:
      positions: [T] or [B, T], of queries and keys. None: 0, 1, 2, ..., given explicitly.
      **options: of ``pj.attention``.
    """
    positions = jnp.arange(x.shape[1]) if positions is None else jnp.asarray(positions)
    positions = jnp.broadcast_to(positions, x.shape[:2])
    hidden = encoding.embed(params, x, pj.Tokens.at(positions))
    own = dict(query_positions=positions, key_positions=positions, hidden=hidden)
    return pj.attention(*project(hidden), encoding, params, **own, **options)


@functools.cache
def causal(case: Case) -> jax.Array:
    """The plain causal call on TOKENS that most tests compare with."""
    return layer(case.encoding, random_params(case.encoding), TOKENS, is_causal=True)


PAST = 5  # positions before this one are the past


@functools.cache
def past_gradients(case: Case):
    """Gradients of a weighted sum of the causal call's past outputs, in the parameters and in all tokens."""

    def loss(params, x):
        return (layer(case.encoding, params, x, is_causal=True)[:, :PAST] * normal(6, B, PAST, N, H)).sum()

    return jax.grad(loss, argnums=(0, 1))(random_params(case.encoding), TOKENS)


def repeat_key_heads(params):
    """The parameters of N key heads that equal those of K, each repeated."""
    axis_of = {"gate_kernel": 1, "key_kernel": 1, "key_bias": 0, "frequencies": 1}

    def repeat(path, leaf):
        axis = axis_of.get(path[-1].key)
        return leaf if axis is None else jnp.repeat(leaf, N // K, axis=axis)

    return jax.tree_util.tree_map_with_path(repeat, params)


def equations(jaxpr):
    """All operations of a program, those of its loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# Tiles ---------------------------------------------------------------------------------------------------------------


def whole_call(encoding, params, x, mask: pj.Mask, positions) -> tuple[tuple[BiasTerm, ...], Tile]:
    """The bias terms of a call on x, and the one tile of scores that covers it."""
    hidden = encoding.embed(params, x, pj.Tokens.at(positions))
    own = dict(is_causal=True, query_positions=positions, key_positions=positions, hidden=hidden)
    call = prepare(*project(hidden), encoding, params, **own).replace(mask=mask)
    return bias_terms(call.transformed()), scores_of(call)[0]


def walk(term: BiasTerm, mask: pj.Mask, whole: Tile, height: int, width: int) -> jax.Array:
    """The bias [B, N, T, S] put together from tiles, each row of tiles walked from the right to the left."""
    length = whole.logits.shape[-1]
    bands = []
    for row in range(0, length, height):
        carry, band = term.cut(row, height, 0, length).carry, []
        for column in reversed(range(0, length, width)):
            query_positions, key_positions = (
                jax.lax.dynamic_slice_in_dim(p, start, extent, axis=1)
                for p, start, extent in ((whole.query_positions, row, height), (whole.key_positions, column, width))
            )
            tile = Tile(
                logits=whole.logits[:, :, row : row + height, column : column + width],
                allowed=mask.cut(row, height, column, width).allowed(query_positions, key_positions),
                query_positions=query_positions,
                key_positions=key_positions,
            )
            bias, carry = term.cut(row, height, column, width).tile(tile, carry)
            band.insert(0, jnp.broadcast_to(bias, tile.logits.shape))
        bands.append(jnp.concatenate(band, axis=3))
    return jnp.concatenate(bands, axis=2)


# Kernels -------------------------------------------------------------------------------------------------------------


KERNELS = {"xla_chunked": xla_chunked.attention}  # a new kernel joins here
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())


def output_and_gradients(kernel, encoding, operands, hidden, weight, **options) -> dict:
    """A kernel's output under "out", and the gradient of sum(weight * out) in every operand under its name.

    Args:
      kernel: ``reference.attention`` or another function of an ``AttentionCall``.
      operands: a dict of query, key, value, params, and scale where it is an array.
      hidden: [B, S, D], for the encodings that act on hidden states; what they add to it goes into keys and values.
      weight: like the output.
      **options: of ``pj.attention``.
    """

    def loss(operands):
        rest = dict(operands)
        query, key, value, params = (rest.pop(name) for name in ("query", "key", "value", "params"))
        positions = options.get("key_positions", jnp.arange(key.shape[1]))
        embedded = encoding.embed(params, hidden, pj.Tokens.at(jnp.broadcast_to(positions, hidden.shape[:2])))
        if embedded is not hidden:
            key, value = (x + jnp.mean(embedded, -1)[..., None, None] for x in (key, value))
        own = dict(hidden=(jnp.zeros((*query.shape[:2], embedded.shape[-1])), embedded)) if encoding.needs_hidden else {}
        out = kernel(prepare(query, key, value, encoding, params, **own, **rest, **options))
        return (out * weight).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(operands)
    return {"out": out} | gradients


def relative_errors(got: dict, want: dict, operands: dict) -> dict[str, float]:
    """norm(got - want) / norm(want) of every leaf of what ``output_and_gradients`` returns, by its path.

    Where the truth is zero or nearly (one visible key, a leaf that softmax does not see), both sides are the rounding of what has
    cancelled, and the error is relative to that: to a root mean square of 0.01 in gradients of single tokens; in params, whose
    gradients are sums over all rows, to 0.01 of the norm that such a sum of products of query and value has; in scale, one number,
    to the norm of the terms of sum(query * gradient) / scale that it is.
    """
    size = {name: np.linalg.norm(operands[name]) / math.sqrt(operands[name].size) for name in ("query", "value")}
    over_rows = 0.01 * size["query"] * size["value"] * math.sqrt(math.prod(want["out"].shape[:3]))

    def error(path, a, b):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        least = max(over_rows, 0.01) if path[0].key == "params" else 0.01
        floor = least * math.sqrt(b.size)
        if path[0].key == "scale":
            floor = np.linalg.norm(np.maximum(np.abs(want["query"]), 0.01) * operands["query"]) / operands["scale"]
        return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), floor))

    errors = jax.tree_util.tree_map_with_path(error, got, want)
    return {jax.tree_util.keystr(path): e for path, e in jax.tree_util.tree_leaves_with_path(errors)}


def agree(got: dict, want: dict, operands: dict, tolerance: float = 1e-4) -> None:
    """Every leaf within a relative error. NaN does not agree."""
    errors = relative_errors(got, want, operands)
    assert all(e < tolerance for e in errors.values()), errors
