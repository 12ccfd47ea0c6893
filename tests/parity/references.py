"""The published formulas in float64 NumPy, as slow and as literal as they are written.

Nothing here imports posjax, JAX or torch: every function is a second opinion, written from the paper (or, where the
authors' code differs from their paper, from what that code computes), with loops where the paper has indices.
Letters: B batch, T queries, S keys, N heads, H head dimension, D model dimension, P embeddings.
"""

import cmath
import math

import numpy as np

# --- attention ---------------------------------------------------------------------------------------------------


def softmax(logits):
    """Softmax over the last axis; -inf entries get probability zero."""
    shifted = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def causal(length):
    """Boolean [T, T]: query i sees key j where j <= i."""
    return np.tril(np.ones((length, length), bool))


def logits(query, key, scale=None):
    """[B, N, T, S] products times scale (1/sqrt(H) unless given) of query [B, T, N, H] and key [B, S, K, H]."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return scale * np.einsum("btnh,bsnh->bnts", query, key)


def attend(scores, value, visible):
    """Output [B, T, N, H] of softmax(scores [B, N, T, S]) over the visible [T, S] pairs, and the weights."""
    value = np.asarray(value, np.float64)
    value = np.repeat(value, scores.shape[1] // value.shape[2], axis=2)
    weights = softmax(np.where(visible, scores, -np.inf))
    return np.einsum("bnts,bsnh->btnh", weights, value), weights


# --- absolute and rotary -----------------------------------------------------------------------------------------


def sinusoidal(positions, embed_dim, theta=10_000.0):
    """Vaswani et al. 2017, section 3.5: PE(pos, 2i) = sin(pos / theta^(2i/D)), PE(pos, 2i+1) = cos of the same."""
    table = np.zeros((*np.shape(positions), embed_dim))
    for where in np.ndindex(np.shape(positions)):
        for channel in range(embed_dim):
            angle = int(positions[where]) / theta ** (2 * (channel // 2) / embed_dim)
            table[(*where, channel)] = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
    return table


def rotary_channels(rotary_dim, pairing):
    """The pairs (real channel, imaginary channel), in order of falling frequency."""
    half = rotary_dim // 2
    return {
        "half": [(m, m + half) for m in range(half)],
        "interleaved": [(2 * m, 2 * m + 1) for m in range(half)],
    }[pairing]


def rope(x, positions, theta=10_000.0, fraction=1.0, pairing="half"):
    """RoFormer, Eqs. 12-16: pair m of x [B, T, N, H] as a complex number times exp(i * position * theta^(-2m/R)).

    positions [T] or [B, T] integers. The first R = fraction * H channels turn, the others pass.
    """
    x = np.asarray(x, np.float64)
    out = x.copy()
    rotary_dim = int(x.shape[-1] * fraction)
    positions = np.broadcast_to(positions, x.shape[:2])
    for m, (real, imaginary) in enumerate(rotary_channels(rotary_dim, pairing)):
        frequency = theta ** (-2 * m / rotary_dim)
        turn = np.zeros(x.shape[:2], complex)
        for where in np.ndindex(x.shape[:2]):
            turn[where] = cmath.exp(1j * int(positions[where]) * frequency)
        turned = (x[..., real] + 1j * x[..., imaginary]) * turn[..., None]
        out[..., real], out[..., imaginary] = turned.real, turned.imag
    return out


def linear_attention(query, key, value, visible, positions, feature_map="elu", theta=10_000.0, pairing=None):
    """RoFormer, Eq. 19, pair by pair: the numerator's features are rotated (pairing None: not), the denominator's not.

    out_m = sum_n (R_m phi(q_m)) . (R_n phi(k_n)) v_n / sum_n phi(q_m) . phi(k_n), phi = elu + 1 or exp.
    visible [B, T, S] or [T, S].
    """
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    phi = {"elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))), "exp": np.exp}[feature_map]
    query, key = phi(query), phi(key)
    turned_query = query if pairing is None else rope(query, positions, theta, 1.0, pairing)
    turned_key = key if pairing is None else rope(key, positions, theta, 1.0, pairing)
    visible = np.broadcast_to(visible, (query.shape[0], query.shape[1], key.shape[1]))
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, t, n in np.ndindex(query.shape[:3]):
        numerator, denominator = 0.0, 0.0
        for s in range(key.shape[1]):
            if visible[b, t, s]:
                numerator = numerator + turned_query[b, t, n] @ turned_key[b, s, n // groups] * value[b, s, n // groups]
                denominator = denominator + query[b, t, n] @ key[b, s, n // groups]
        out[b, t, n] = numerator / denominator
    return out


# --- static biases -----------------------------------------------------------------------------------------------


def alibi_slopes(num_heads):
    """The authors' rule: 2^(-8k/N) for N a power of two, else those of c = 2^floor(log2 N) and every second of 2c."""

    def power_of_two(count):
        return [2 ** (-8 * k / count) for k in range(1, count + 1)]

    c = 2 ** math.floor(math.log2(num_heads))
    return np.array(power_of_two(c) + power_of_two(2 * c)[0::2][: num_heads - c])


def alibi_bias(num_heads, num_queries, num_keys):
    """ALiBi, Eq. 1 of section 3: [N, T, S] of -m_n (i - j), meant for the causal half."""
    slopes = alibi_slopes(num_heads)
    bias = np.zeros((num_heads, num_queries, num_keys))
    for n, i, j in np.ndindex(bias.shape):
        bias[n, i, j] = -slopes[n] * (i - j)
    return bias


def t5_bucket(relative_position, num_buckets=32, max_distance=128, bidirectional=True):
    """T5's bucket of one key position minus query position, an integer, with no logarithm rounded.

    Half of the buckets hold one distance each; the other half divide log(distance) evenly up to max_distance:
    max_exact + floor(m log(distance / max_exact) / log(max_distance / max_exact)), which is the largest k with
    (max_distance / max_exact)^k <= (distance / max_exact)^m: whole numbers on both sides once multiplied out.
    """
    start = 0
    if bidirectional:
        num_buckets //= 2
        start = num_buckets if relative_position > 0 else 0
        distance = abs(relative_position)
    else:
        distance = max(-relative_position, 0)
    max_exact = num_buckets // 2
    if distance < max_exact:
        return start + distance
    m = num_buckets - max_exact
    k = 0
    while k + 1 < m and max_distance ** (k + 1) * max_exact**m <= distance**m * max_exact ** (k + 1):
        k += 1
    return start + max_exact + k


def t5_bias(table, num_queries, num_keys, **options):
    """[N, T, S] bias from a table [num_buckets, N]."""
    bias = np.zeros((table.shape[1], num_queries, num_keys))
    for i in range(num_queries):
        for j in range(num_keys):
            bias[:, i, j] = table[t5_bucket(j - i, num_buckets=table.shape[0], **options)]
    return bias


# --- contextual position encoding --------------------------------------------------------------------------------


def cope_positions(gate_logits, visible):
    """CoPE, Eqs. 3-4: p_ij = sum over k = j..i of sigmoid(gate_logits_ik), invisible keys counting zero."""
    positions = np.zeros(gate_logits.shape)
    for b, n, i in np.ndindex(gate_logits.shape[:3]):
        count = 0.0
        for j in reversed(range(gate_logits.shape[3])):
            if visible[i, j]:
                count += 1 / (1 + math.exp(-gate_logits[b, n, i, j]))
            positions[b, n, i, j] = count
    return positions


def cope_bias(query, embedding, gate_logits, visible):
    """CoPE, Eqs. 5-6: [B, N, T, S] of q_i.e[p_ij], the fractional p between its two neighbours' values.

    embedding [P, H], or [N, P, H] for one table a head; positions past P - 1 use e[P - 1].
    """
    query, embedding = np.asarray(query, np.float64), np.asarray(embedding, np.float64)
    last = embedding.shape[-2] - 1
    positions = cope_positions(gate_logits, visible)
    bias = np.zeros(positions.shape)
    for b, n, i, j in np.ndindex(positions.shape):
        table = embedding if embedding.ndim == 2 else embedding[n]
        p = min(positions[b, n, i, j], last)
        low, high = math.floor(p), math.ceil(p)
        q = query[b, i, n]
        bias[b, n, i, j] = (p - low) * (q @ table[high]) + (1 - (p - low)) * (q @ table[low])
    return bias


def cope(query, key, value, embedding, gate_keys=None, scaled=False):
    """Causal CoPE attention: output [B, T, N, H], weights and the bias [B, N, T, S].

    gate_keys [B, S, K, H] is what the query meets in the gates: the keys (None), keys of their own, or the values.
    scaled=False is Listing 1 of the paper, q.k / sqrt(H) + z; scaled=True the code that the authors released,
    (q.k + z) / sqrt(H). The gates divide by sqrt(H) in both.
    """
    visible = causal(query.shape[1])
    bias = cope_bias(query, embedding, logits(query, key if gate_keys is None else gate_keys), visible)
    if scaled:
        bias = bias / math.sqrt(query.shape[-1])
    out, weights = attend(logits(query, key) + bias, value, visible)
    return out, weights, bias


# --- untied positional encoding ----------------------------------------------------------------------------------


def _position_logits(queries, keys, head_dim):
    """[N, L, L] products of [L, N, H] position queries and keys over sqrt(2 H), entry by entry."""
    length, num_heads, _ = queries.shape
    product = np.zeros((num_heads, length, length))
    for n, i, j in np.ndindex(product.shape):
        product[n, i, j] = sum(queries[i, n, h] * keys[j, n, h] for h in range(head_dim)) / math.sqrt(2 * head_dim)
    return product


def tupe(position, query_projection, key_projection, theta_1, theta_2, relative=None):
    """TUPE , section 3: [N, L, L] of reset((p_i U^Q)(p_j U^K) / sqrt(2 H) + b_{j-i}).

    position [L, D], projections [D, N, H], theta_1 and theta_2 [N]; relative [N, L, L] for TUPE-R, or None.
    reset: the first row, its own cell too, is theta_1; the first column of every other row is theta_2.
    """
    position = np.asarray(position, np.float64)
    bias = _position_logits(
        np.einsum("ld,dnh->lnh", position, query_projection),
        np.einsum("ld,dnh->lnh", position, key_projection),
        query_projection.shape[-1],
    )
    if relative is not None:
        bias = bias + relative
    for n, i, j in np.ndindex(bias.shape):
        if i == 0:
            bias[n, i, j] = theta_1[n]
        elif j == 0:
            bias[n, i, j] = theta_2[n]
    return bias


def released_tupe(
    position, norm_scale, norm_bias, query_projection, query_bias, key_projection, key_bias, buckets=None, epsilon=1e-5
):
    """What the code at guolinke/TUPE computes: [N, L, L] from a position table [L + 1, D].

    The table passes a layer norm and projections with biases [N, H]. Its row 0 belongs to no token: its product with
    itself is theta_1. Token i uses row i + 1, so row 1, whose product with itself is theta_2, is also the first
    token's. TUPE-R adds, after the reset and unscaled, a table [33, N] over T5's 32 buckets up to distance 128:
    column 0 reads the bucket appended at the end, and row 0 the one in the middle, which T5's rule never yields
    (a distance of zero with a positive sign).
    """
    position = np.asarray(position, np.float64)
    mean = position.mean(-1, keepdims=True)
    variance = ((position - mean) ** 2).mean(-1, keepdims=True)
    normed = (position - mean) / np.sqrt(variance + epsilon) * norm_scale + norm_bias
    product = _position_logits(
        np.einsum("ld,dnh->lnh", normed, query_projection) + query_bias,
        np.einsum("ld,dnh->lnh", normed, key_projection) + key_bias,
        query_projection.shape[-1],
    )
    bias = product[:, 1:, 1:].copy()
    for n, i, j in np.ndindex(bias.shape):
        if i == 0:
            bias[n, i, j] = product[n, 0, 0]
        elif j == 0:
            bias[n, i, j] = product[n, 1, 1]
        if buckets is not None:
            bins = buckets.shape[0] - 1
            bucket = bins // 2 if i == 0 else bins if j == 0 else t5_bucket(j - i, bins, 128)
            bias[n, i, j] += buckets[bucket, n]
    return bias


def tupe_attention(query, key, value, bias, visible):
    """TUPE's other half: content logits over sqrt(2 H), not sqrt(H), plus the position term [N, T, S]."""
    return attend(logits(query, key, 1 / math.sqrt(2 * query.shape[-1])) + bias, value, visible)
