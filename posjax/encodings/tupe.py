"""TUPE: separate correlations of words and positions, with [CLS] untied from all positions.

The score of Ke et al. (equation 10) is

    (x_i W^Q)(x_j W^K)^T / sqrt(2H) + reset( (p_i U^Q)(p_j U^K)^T / sqrt(2H) [ + b_{j-i} in TUPE-R ] )

where reset replaces the row of [CLS] by theta_1 and its column by theta_2. No [T, S] array is needed: query and key are
widened to [q, p U^Q, row, column] and [k, p U^K, 1, is [CLS]], so that one product of width 2H + 2 gives the score, to which
TUPE-R adds b as a bias term.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from posjax.checks import bounded
from posjax.core.encoding import AttentionInputs, Dims, PositionalEncoding, get_param, register
from posjax.core.structures import Bias, Pair, Replace, ScoreModifications, Table
from posjax.encodings.absolute import check_within, require_max_length
from posjax.encodings.relative import MOST_BUCKETS, T5Bucket, check_buckets, t5_bucket
from posjax.typing import Array, Params


@register("tupe")
class Tupe(PositionalEncoding):
    """Adds a correlation of separately projected absolute positions to the scores (TUPE-A; TUPE-R with ``relative``).

        score_ij = (q_i.k_j) / sqrt(2H) + reset((p_i U^Q).(p_j U^K) / sqrt(2H) [+ b_{j-i} with ``relative``])

    reset replaces the row of [CLS], the token at position 0, by theta_1 and its column by theta_2. Nothing is added to the
    embeddings, and all layers share the parameters: params["position"] [max_length, D], ["query_kernel"] [D, N, H],
    ["key_kernel"] [D, K, H], ["reset"] [2, N] (theta_1, theta_2) with untie_cls unless released, and ["bias"] [buckets, N] with
    relative.

    Args:
      relative: True adds a T5 bias inside the reset, unscaled (TUPE-R).
      untie_cls: True resets the row and column of [CLS]; False is the paper's ablation with tied [CLS].
      released: True follows the authors' code instead of the paper. It applies LayerNorm to p, adds biases to the projections, and
        gives p one more row, from which theta_1 = p_0.p_0 and theta_2 = p_1.p_1 are computed by products through U (p_1 is also the
        row of [CLS] itself). In TUPE-R, the column of [CLS] has an extra bucket, and its row uses bucket num_buckets / 2, which no
        distance falls into.
      num_buckets, max_distance: arguments of the relative bias, as in bidirectional ``t5``.

    Raises:
      ValueError: Dims.max_length is not given, a position exceeds it, or ``t5`` rejects the bucket arguments.

    Example:
      >>> encoding = pj.tupe()
      >>> with_distances = pj.tupe(relative=True)

    Ke et al., arXiv:2006.15595, section 3.
    """

    relative: bool = False
    untie_cls: bool = True
    released: bool = False
    num_buckets: int = bounded(32, most=MOST_BUCKETS)
    max_distance: int = 128

    def __post_init__(self) -> None:
        check_buckets(self.num_buckets, self.max_distance, bidirectional=True)

    @property
    def name(self) -> str:
        return "tupe-r" if self.relative else "tupe"

    @property
    def title(self) -> str:
        return "tupe(relative=True)" if self.relative else "tupe"

    @property
    def _extra_row(self) -> int:
        return int(self.released and self.untie_cls)  # the released table begins with p_0, which no token uses

    def max_length(self, dims: Dims) -> int | None:
        return dims.max_length

    def init(self, key: Array, dims: Dims) -> Params:
        length = require_max_length(self.title, dims)
        keys = jax.random.split(key, 4)
        width, size = dims.embed_dim, 0.02 if self.released else 1.0
        params = {
            "position": jax.random.normal(keys[0], (length + self._extra_row, width), jnp.float32) * size,
            "query_kernel": jax.random.normal(keys[1], (width, dims.num_heads, dims.head_dim)) * width**-0.5,
            "key_kernel": jax.random.normal(keys[2], (width, dims.num_kv_heads, dims.head_dim)) * width**-0.5,
        }
        if self.released:
            params |= {
                "norm_scale": jnp.ones(width),
                "norm_bias": jnp.zeros(width),
                "query_bias": jnp.zeros((dims.num_heads, dims.head_dim)),
                "key_bias": jnp.zeros((dims.num_kv_heads, dims.head_dim)),
            }
        elif self.untie_cls:
            params["reset"] = jnp.zeros((2, dims.num_heads))
        if self.relative:
            extra = self._extra_row  # the bucket of a key that is [CLS]
            params["bias"] = jnp.zeros((self.num_buckets + extra, dims.num_heads))
        return params

    def _project(self, params: Params, positions: Array) -> tuple[Array, Array]:
        """Returns p U^Q and p U^K of the given positions, [..., N, H] and [..., K, H] float32."""
        table = get_param(params, "position", self.title, (None, None))
        if self.released:
            centred = table - table.mean(-1, keepdims=True)
            table = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
            width = table.shape[1:]
            scale, offset = (get_param(params, name, self.title, width)[None] for name in ("norm_scale", "norm_bias"))
            table = table * scale + offset
        rows = jnp.take(table, positions, axis=0)
        width = table.shape[1]
        query = jnp.einsum("...d,dnh->...nh", rows, get_param(params, "query_kernel", self.title, (width, None, None)))
        key = jnp.einsum("...d,dkh->...kh", rows, get_param(params, "key_kernel", self.title, (width, None, None)))
        if not self.released:
            return query, key

        def with_bias(name: str, x: Array) -> Array:
            offset = get_param(params, name, self.title, x.shape[-2:])
            return x + offset.reshape((1,) * (x.ndim - 2) + offset.shape)

        return with_bias("query_bias", query), with_bias("key_bias", key)

    def _thetas(self, params: Params, scale: Array | float) -> tuple[Array, Array]:
        """Returns theta_1 and theta_2, [N] each, as they appear in the score."""
        if not self._extra_row:
            reset = get_param(params, "reset", self.title, (2, None))
            return reset[0], reset[1]
        query, key = self._project(params, jnp.arange(2))
        key = jnp.repeat(key, query.shape[1] // key.shape[1], axis=1)
        thetas = (query * key).sum(-1) * scale / math.sqrt(2)
        return thetas[0], thetas[1]

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        widened = self._widened(params, inputs)
        if not self.relative:
            return ScoreModifications((widened,))
        table = get_param(params, "bias", self.title, (self.num_buckets + self._extra_row, inputs.query.shape[2]))
        bucket = TupeBucket(self.num_buckets, self.max_distance, self.untie_cls, self.released)
        return ScoreModifications((widened,), (Bias(Pair(bucket, relative=False), Table(table.T)),))

    def _widened(self, params: Params, inputs: AttentionInputs) -> Replace:
        query, key, query_positions, key_positions = inputs.turned_query, inputs.turned_key, inputs.q.positions, inputs.k.positions
        length = get_param(params, "position", self.title).shape[0] - self._extra_row
        check_within(self.title, query_positions, length)
        check_within(self.title, key_positions, length)
        heads, kv_heads, head_dim = query.shape[2], key.shape[2], inputs.query.shape[3]
        for name, size in (("query_kernel", heads), ("key_kernel", kv_heads)):
            get_param(params, name, self.title, (None, size, head_dim))
        # Attention scales by 1/sqrt(H) of the unwidened head; the query supplies the other factor 1/sqrt(2) of 1/sqrt(2H).
        position_query = self._project(params, query_positions + self._extra_row)[0]
        position_key = self._project(params, key_positions + self._extra_row)[1]
        query_parts, key_parts = [query.astype(jnp.float32) / math.sqrt(2)], [key]
        if self.untie_cls:
            query_is_cls = (query_positions == 0)[..., None, None]
            key_is_cls = (key_positions == 0)[..., None, None]
            position_query = jnp.where(query_is_cls, 0.0, position_query)
            position_key = jnp.where(key_is_cls, 0.0, position_key)
            row, column = (theta[None, None, :, None] / inputs.scale for theta in self._thetas(params, inputs.scale))
            query_parts += [
                position_query / math.sqrt(2),
                jnp.where(query_is_cls, row, 0.0),
                jnp.where(query_is_cls, 0.0, column),
            ]
            key_parts += [
                position_key,
                jnp.ones_like(position_key[..., :1]),
                jnp.where(key_is_cls, 1.0, 0.0) + 0 * position_key[..., :1],
            ]
        else:
            query_parts.append(position_query / math.sqrt(2))
            key_parts.append(position_key)
        return Replace(_join(query_parts, query), _join(key_parts, key))


tupe = Tupe


def _join(parts: list[Array], like: Array) -> Array:
    """Concatenates the parts along the last axis, broadcast to the other axes of ``like`` and cast to its dtype."""
    return jnp.concatenate([jnp.broadcast_to(p, (*like.shape[:-1], p.shape[-1])).astype(like.dtype) for p in parts], axis=-1)


@dataclasses.dataclass(frozen=True)
class TupeBucket:
    """Computes the index of b_{j-i} inside the reset for a pair of positions, for ``Pair``.

    Pairs with [CLS] have no bias in the paper (an index beyond the table), and separate buckets in the released code.
    """

    num_buckets: int
    max_distance: int
    untie_cls: bool
    released: bool

    def __call__(self, queries: tuple[Array, ...], keys: tuple[Array, ...], args: tuple) -> Array:
        bucket = t5_bucket(keys[0] - queries[0], self.num_buckets, self.max_distance, True)
        if not self.untie_cls:
            return bucket
        of_row = self.num_buckets // 2 if self.released else self.num_buckets
        return jnp.where(queries[0] == 0, of_row, jnp.where(keys[0] == 0, self.num_buckets, bucket))

    def uniform(self, first_query: Array, last_query: Array, first_key: Array, last_key: Array) -> Array:
        """Returns whether all pairs in a range of queries and a range of keys have one index."""
        is_same = T5Bucket(self.num_buckets, self.max_distance, True).uniform(first_query, last_query, first_key, last_key)
        return is_same & (first_query > 0) & (first_key > 0) if self.untie_cls else is_same
