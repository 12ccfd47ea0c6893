# ruff: noqa: E402 (what needs the packages is imported after they are known to be there)
"""posjax against other people's packages, run here and now on fresh random inputs; skipped where they are missing.

The seed is PARITY_SEED (0 unless set), so that a longer hunt is a shell loop. posjax computes in float32 and must agree
to 1e-5 with packages that compute in float64 wherever they can.
"""

import os
import types

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
x_transformers = pytest.importorskip("x_transformers.x_transformers")
rotary_embedding_torch = pytest.importorskip("rotary_embedding_torch")
bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")
neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")

import make_golden
from ours import attention, close, dense_bias, normal, rotate, visible

import posjax as pj
from posjax.encodings.relative import alibi_slopes

SEED = int(os.environ.get("PARITY_SEED", "0"))
ROUNDS = [pytest.param(100 * SEED + r, id=f"seed{100 * SEED + r}") for r in range(2)]


def sizes(seed, longest=40):
    """Random batch, length, heads and an even width."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(1, 4)), int(rng.integers(2, longest)), int(rng.integers(1, 7)), 2 * int(rng.integers(1, 17))


# --- RoPE --------------------------------------------------------------------------------------------------------


def config_of(width, theta, fraction):
    return types.SimpleNamespace(
        head_dim=width,
        hidden_size=2 * width,
        num_attention_heads=2,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": fraction},
    )


@pytest.mark.parametrize("seed", ROUNDS)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_half_equals_llama_near_the_start(seed, theta):
    """At positions below 40, where Llama's float32 phases are still good to 1e-5."""
    batch, length, heads, width = sizes(seed)
    query, key = normal(seed, (batch, length, heads, width), (batch, length, heads, width))
    positions = np.arange(length)
    cos, sin = llama.LlamaRotaryEmbedding(config_of(width, theta, 1.0))(torch.zeros(1), torch.from_numpy(positions)[None])
    want = llama.apply_rotary_pos_emb(torch.from_numpy(query), torch.from_numpy(key), cos, sin, unsqueeze_dim=2)
    for got, recorded in zip(rotate(pj.rope(theta), query, key, positions), want, strict=True):
        close(got, recorded.numpy())


@pytest.mark.parametrize("seed", ROUNDS)
def test_rope_quarter_equals_gpt_neox_near_the_start(seed):
    batch, length, heads, _ = sizes(seed)
    query, key = normal(seed, (batch, length, heads, 32), (batch, length, heads, 32))
    positions = np.arange(length)
    embedding = neox.GPTNeoXRotaryEmbedding(config_of(32, 10_000.0, 0.25))
    cos, sin = embedding(torch.zeros(1), torch.from_numpy(positions)[None])
    want = neox.apply_rotary_pos_emb(torch.from_numpy(query), torch.from_numpy(key), cos, sin, unsqueeze_dim=2)
    for got, recorded in zip(rotate(pj.rope(fraction=0.25), query, key, positions), want, strict=True):
        close(got, recorded.numpy())


@pytest.mark.parametrize("seed", ROUNDS)
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_rope_interleaved_equals_gptj_near_the_start(seed, fraction):
    batch, length, heads, _ = sizes(seed)
    query, key = normal(seed, (batch, length, heads, 32), (batch, length, heads, 32))
    width = int(32 * fraction)
    sin, cos = gptj.create_sinusoidal_positions(length, width)[None].chunk(2, dim=-1)
    for got, x in zip(
        rotate(pj.rope(fraction=fraction, pairing="interleaved"), query, key, np.arange(length)),
        (query, key),
        strict=True,
    ):
        turned = gptj.apply_rotary_pos_emb(torch.from_numpy(x[..., :width]), sin, cos)
        close(got, np.concatenate([turned.numpy(), x[..., width:]], -1))


@pytest.mark.parametrize("seed", ROUNDS)
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rope_equals_packages_to_position_100_000(seed, pairing):
    """rotary-embedding-torch (interleaved) and Llama's rotation (half), both with frequencies and phases in float64."""
    batch, length, heads, width = sizes(seed)
    rng = np.random.default_rng(seed)
    theta, positions = float(rng.choice([100.0, 10_000.0, 1e6])), np.sort(rng.integers(0, 100_001, length))
    query, key = normal(seed, (batch, length, heads, width), (batch, length, heads, width))
    frequencies = theta ** (-torch.arange(0, width, 2).double() / width)
    if pairing == "interleaved":
        module = rotary_embedding_torch.RotaryEmbedding(dim=width, custom_freqs=frequencies, cache_if_possible=False)
        phases = module.double()(torch.from_numpy(positions).double())
        want = [
            rotary_embedding_torch.apply_rotary_emb(phases, torch.from_numpy(x).double().transpose(1, 2)).transpose(1, 2)
            for x in (query, key)
        ]
    else:
        phases = (torch.from_numpy(positions)[:, None] * frequencies).repeat(1, 2)[None]
        want = llama.apply_rotary_pos_emb(
            torch.from_numpy(query).double(),
            torch.from_numpy(key).double(),
            phases.cos(),
            phases.sin(),
            unsqueeze_dim=2,
        )
    for got, recorded in zip(rotate(pj.rope(theta, pairing=pairing), query, key, positions), want, strict=True):
        close(got, recorded.numpy())


# --- ALiBi -------------------------------------------------------------------------------------------------------


def test_alibi_slopes_equal_bloom_and_x_transformers_for_every_head_count():
    for heads in range(1, 65):
        ones = torch.ones(1, 2, dtype=torch.long)
        close(alibi_slopes(heads), bloom.build_alibi_tensor(ones, heads, torch.float32)[:, 0, 1].numpy(), 1e-6)
        close(alibi_slopes(heads), x_transformers.AlibiPositionalBias(heads).slopes[:, 0, 0].numpy(), 1e-6)


@pytest.mark.parametrize("seed", ROUNDS)
def test_alibi_bias_equals_bloom_up_to_a_constant_a_row(seed):
    batch, length, heads, _ = sizes(seed)
    x = np.zeros((batch, length, heads, 4), np.float32)
    bias = dense_bias(pj.alibi(), {}, x, x, x, is_causal=True)
    ours = bias - np.diagonal(bias, axis1=-2, axis2=-1)[..., None]
    theirs = bloom.build_alibi_tensor(torch.ones(batch, length, dtype=torch.long), heads, torch.float64)
    theirs = np.broadcast_to(theirs.view(batch, heads, 1, length).numpy(), bias.shape)
    close(visible(ours), visible(theirs - np.diagonal(theirs, axis1=-2, axis2=-1)[..., None]))


# --- T5 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", ROUNDS)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_attention_equals_transformers(seed, bidirectional):
    """T5's own attention module with identity projections; T5 does not scale q.k."""
    batch, length, heads, _ = sizes(seed)
    rng = np.random.default_rng(seed)
    num_buckets, max_distance = 4 * int(rng.integers(2, 12)), int(rng.integers(30, 300))
    x, table = normal(seed, (batch, length, heads * 4), (num_buckets, heads))
    module = make_golden.t5_attention(num_buckets, max_distance, not bidirectional, table).double().eval()
    module.config._attn_implementation = "eager"
    for projection in (module.q, module.k, module.v, module.o):
        projection.weight.data = torch.eye(heads * 4).double()
    hidden = torch.zeros(1, 1, length, length).double()
    if not bidirectional:
        hidden = hidden.masked_fill(torch.ones(length, length).triu(1).bool(), torch.finfo(torch.float64).min)
    want = module(torch.from_numpy(x).double(), mask=hidden)[0].detach().numpy()
    split = x.reshape(batch, length, heads, 4)
    encoding = pj.t5(num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional)
    got = attention(split, split, split, encoding, {"bias": jnp.asarray(table)}, is_causal=not bidirectional, scale=1.0)
    close(np.asarray(got).reshape(x.shape), want)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_bias_equals_x_transformers_at_thousands(bidirectional):
    """The last query's row of a 3,000-long input."""
    (table,) = normal(SEED, (32, 2))
    module = x_transformers.RelativePositionBias(scale=1.0, causal=not bidirectional, num_buckets=32, heads=2)
    module.relative_attention_bias.weight.data = torch.from_numpy(table)
    want = module(1, 3_000).detach().numpy()
    query, key = np.zeros((1, 1, 2, 4), np.float32), np.zeros((1, 3_000, 2, 4), np.float32)
    got = dense_bias(
        pj.t5(bidirectional=bidirectional),
        {"bias": jnp.asarray(table)},
        query,
        key,
        key,
        False,
        query_positions=[2_999],
    )
    np.testing.assert_array_equal(got[0], want)


# --- CoPE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", ROUNDS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("gates", ["logits", "values"])
def test_cope_equals_x_transformers(seed, per_head, scaled, gates):
    batch, length, heads, width = sizes(seed)
    max_position = int(np.random.default_rng(seed).integers(2, 12))
    shape, table = (batch, length, heads, width), (max_position, width)
    query, key, value, embedding = normal(seed, shape, shape, shape, (heads, *table) if per_head else table)
    embedding /= np.float32(width) ** 0.5  # biases of order one: 1e-5 is below one rounding of a float32 near 100
    other = key if gates == "logits" else value
    want, want_bias = make_golden.cope_case(query, key, value, embedding, other, scaled)
    encoding = pj.cope(max_position=max_position, gates=gates, scaled=scaled, per_head=per_head)
    params = {"embedding": jnp.asarray(embedding)}
    close(visible(dense_bias(encoding, params, query, key, value, is_causal=True)), visible(want_bias))
    got = attention(query, key, value, encoding, params, is_causal=True)
    close(got, want)
