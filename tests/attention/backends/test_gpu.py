"""The GPU kernels, interpreted on the CPU, equal dense attention; what they refuse; which programs contain them."""

import dataclasses
import functools
import types

import hypothesis
import jax
import jax.numpy as jnp
import kernel_calls
import numpy as np
import pytest
import suite
import test_kernels_properties as properties
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh
from kernel_calls import (
    DISTINCT,
    EVERYTHING,
    GATED,
    KNOWN,
    LONG,
    D,
    all_agree,
    compiled,
    loss,
    make_operands,
    packed,
    saturating,
    shapes,
    stacked,
)
from suite import (
    normal,
)

import posjax as pj
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.gpu import blocks as gpu_blocks
from posjax.attention.backends.gpu import triton_kernels
from posjax.attention.backends.gpu.blocks import GpuBlocks, blocks_for, check_gpu_blocks
from posjax.attention.backends.gpu.plan import longest_run
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.call import prepare

SMALL = GpuBlocks(block_q=32, block_kv=32, block_kv_count=16, block_q_rows=16, num_warps=4, num_stages=2)
UNEVEN = GpuBlocks(64, 32, 32, 64, 4, 2)
thorough = pytest.mark.thorough
KERNELS = ("forward", "query_plain", "key_plain", "query_band", "key_band")


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """The kernels with some blocks. Equal ones are one program."""

    tile: GpuBlocks = SMALL

    def __call__(self, call):
        return gpu.attention(call, block_sizes=self.tile, interpret=True)


def check(encoding, tile=SMALL, **call):
    return kernel_calls.check(Interpreted(tile), encoding, **call)


def with_every_operation(queries, keys, args):
    """A function of a float and an integer, of all operations that functions of pairs may have."""
    (place, at), (key_place, key_at) = queries, keys
    far = jnp.abs(place - key_place)
    bent = jnp.where(far > 1.0, jnp.log(1.0 + far), jnp.sqrt(1.0 + far))
    waves = jnp.cos(jnp.floor(0.25 * (at - key_at).astype(jnp.float32))) * jnp.exp(-far)
    return args[0] * bent + args[1] * waves


def attend(params, inputs):
    """The float of a key is that of its key head, and that of a query is the same for all heads."""
    queries, keys = inputs.q.positions[:, None], inputs.k.positions[:, None]
    place = jnp.swapaxes(jnp.sin(inputs.key[..., 0].astype(jnp.float32)), 1, 2)
    pair = pj.Pair(with_every_operation, (jnp.sin(1.0 * queries), queries), (place, keys), params["slopes"], relative=False)
    return pj.ScoreModifications(biases=(pj.Bias(pair),))


PAIRS = pj.encoding("pairs", init=lambda key, dims: {"slopes": jnp.zeros((dims.num_heads, 2))}, attend=attend)


def warped(differences, args):
    return args[0] * jnp.log(1.0 + jnp.abs(args[1] * differences[0])) + differences[1]


def bucket(differences, args):
    return jnp.floor(jnp.abs(differences[0]) / args)


def attend_by_reading(params, inputs):
    """Tables and a network, read at functions that have args and features of their own."""
    at = inputs.k.positions[:, None].astype(jnp.float32)
    content, zeros = jnp.swapaxes(jnp.tanh(inputs.key[..., 0]), 1, 2), jnp.zeros(at.shape)
    tables = [pj.Bias(pj.Pair(bucket, args=params["sizes"] ** 2 + 2, learned=False), pj.Table(params[name])) for name in ("t", "u")]
    network = pj.Hinges(*(params[name] for name in ("weight_in", "bias_in", "weight_out", "offset")))
    return pj.ScoreModifications(biases=(*tables, pj.Bias(pj.Pair(warped, (at, zeros), (at, content), params["warps"]), network)))


def params_for_reading(key, dims):
    heads = dims.num_heads
    shapes = dict(sizes=(heads,), t=(heads, 9), u=(1, 30), warps=(heads, 2), weight_in=(heads, 5), bias_in=(1, 5), offset=(heads,))
    return {name: jnp.zeros(shape) for name, shape in (shapes | dict(weight_out=(heads, 5))).items()}


READING = pj.encoding("reading", init=params_for_reading, attend=attend_by_reading)


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """The kernels on a mesh of four parts of the heads."""

    def __call__(self, call):
        mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        return gpu.attention(call, block_sizes=SMALL, spec=ShardSpec(mesh, ("data",), ("tensor",)), interpret=True)


# What always runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["mixed", *(pytest.param(gates, marks=thorough) for gates in (None, "near 0", "near 1"))])
def test_everything_at_once(gates):
    kernel_calls.everything_at_once(Interpreted(), gates)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=thorough)])
def test_two_bytes_within_their_rounding_of_float32_on_the_same_inputs(dtype):
    check(GATED, dtype=dtype, is_causal=True)


@thorough
@pytest.mark.parametrize("gates", ["near 0", "small"])
def test_a_band_of_several_rounds(gates, monkeypatch):
    """Where few positions are counted, the backward pass notes down a part of the band at a time."""
    monkeypatch.setattr(triton_kernels, "ROUND", 3)
    jax.clear_caches()
    check(pj.chain(pj.cope(9), pj.t5(6, 8)), tile=UNEVEN, gates=gates, length=200, heads=(4, 2, 8, 8), is_causal=True)
    jax.clear_caches()


def test_tiles_that_the_mask_rules_out_are_not_visited():
    """NaN in a key or a value reaches every row whose tiles hold it, through a weight of zero too."""
    operands = make_operands(pj.alibi(), 1, 200, 200, (2, 1, 16, 16))
    for name in ("key", "value"):
        operands[name] = operands[name].at[:, 128:].set(jnp.nan)
    given = jnp.zeros((1, 200, D)), jnp.zeros((1, 200, 2, 16)).at[:, :128].set(1.0), {}
    found, dense = (compiled(pj.alibi(), (("is_causal", True),), kernel)(operands, *given) for kernel in (Interpreted(), None))
    for name in ("out", "query"):
        assert np.isfinite(found[name][:, :128]).all()
        assert np.isnan(found[name][:, 128:]).all()
        assert np.isnan(dense[name]).all()


def test_the_longest_run():
    flags = jnp.asarray([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 1]], bool)
    begin, end = longest_run(flags)
    assert (begin[0], end[0]) == (2, 4)
    assert begin[1] == end[1]
    assert (begin[2], end[2]) == (0, 6)
    assert (begin[3], end[3]) == (4, 6)


# What they refuse, and where they are --------------------------------------------------------------------------------

REFUSED = {
    "a mask": (pj.identity(), {}, {"mask": np.ones((LONG, LONG), bool)}, "mask is an array"),
    "float64": (pj.identity(), {"dtype": "float64"}, {}, "query has dtype float64"),
    "wide heads": (pj.identity(), {"width": 296}, {}, "query has 296 channels"),
    "gates of their own": (pj.cope(4, gates="keys"), {}, {}, "encoding has a bias that the kernel does not evaluate"),
    "another bias": (pj.chain(pj.rope(), pj.cope_alibi()), {}, {}, "encoding has a bias that the kernel does not evaluate"),
    "cope twice": (pj.chain(pj.cope(4), pj.cope(8)), {}, {}, "encoding has two biases that count by gates"),
    "a second large table": (pj.chain(pj.t5(6, 8), pj.t5(66, 80)), {}, {}, "encoding reads a second table of more than 64 numbers"),
}


@pytest.mark.parametrize(("encoding", "sizes", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_they_cannot_do_is_refused_by_name_and_done_by_another(encoding, sizes, options, reason, monkeypatch):
    with jax.enable_x64(sizes.get("dtype") == "float64"):
        operands = shapes(encoding, **sizes)
        program = jax.jit(functools.partial(loss, encoding=encoding, **options)).trace(operands)
        assert "triton" not in program.lower(lowering_platforms=("cuda",)).as_text()
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(NotImplementedError, match=f"implementation='pallas' .*{reason}.*'xla_chunked'"):
            jax.eval_shape(functools.partial(loss, encoding=encoding, implementation="pallas", **options), operands)


@pytest.mark.parametrize(("told", "capability"), [("7.5", 75), ("gfx942", 0), ("9.0", 90), ("12.1", 121)])
def test_other_devices_are_refused(told, capability, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu", compute_capability=told)])
    assert gpu_blocks.capability() == capability
    x = jnp.zeros((1, 4, 2, 8))
    reason = gpu.unsupported_reason(prepare(x, x, x, None, None))
    assert reason is None if capability >= 80 else f"compute capability {capability / 10}" in reason


@pytest.mark.parametrize("case", [case for case in suite.CASES if case not in KNOWN], ids=lambda case: case.name)
def test_encodings_that_they_do_not_know(case, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(NotImplementedError, match="encoding has a bias that the kernel does not evaluate"):
        jax.eval_shape(functools.partial(loss, encoding=case.encoding, implementation="pallas"), shapes(case.encoding))


@pytest.mark.parametrize("implementation", ["pallas", None])
@pytest.mark.parametrize(
    "encoding",
    [
        pj.chain(pj.rope(), pj.cope(8)),
        *(
            pytest.param(encoding, marks=pytest.mark.thorough)
            for encoding in (pj.rope(), pj.chain(pj.t5(6, 8), pj.t5(4, 8), PAIRS), pj.chain(pj.cope(8), PAIRS))
        ),
    ],
    ids=lambda encoding: encoding.name,
)
def test_programs_for_a_gpu_contain_them_wherever_they_are_lowered(implementation, encoding):
    gradient = jax.jit(jax.grad(functools.partial(loss, encoding=encoding, implementation=implementation), allow_int=True))
    texts = [gradient.trace(shapes(encoding)).lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu")]
    wanted = KERNELS if encoding.needs_causal else KERNELS[:3]
    assert [text.count("__gpu$xla.gpu.triton") for text in texts] == [len(wanted), 0]
    assert all(f"posjax_attention_{name}" in texts[0] for name in wanted)


def test_block_sizes_of_the_call():
    """They stand in the program for a GPU, also where no implementation is named; others are checked before compilation."""
    sizes = GpuBlocks(64, 32, 16, 64, 2, 3)
    for implementation in ("pallas", None):
        program = jax.jit(functools.partial(loss, encoding=pj.alibi(), implementation=implementation, block_sizes=sizes))
        text = program.trace(shapes(pj.alibi())).lower(lowering_platforms=("cuda",)).as_text()
        assert "num_warps = 2" in text
        assert "num_stages = 3" in text
    for wrong, message in (
        (sizes._replace(block_kv=48), "block_kv of .* a power of two"),
        (sizes._replace(block_kv_count=64), "at most block_kv"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(loss, encoding=pj.alibi(), block_sizes=wrong), shapes(pj.alibi()))


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("counts", [False, True])
def test_every_call_has_blocks_that_are_some(capability, dtype, counts):
    for channels in (16, 64, 80, 128, 130, 258, 288):
        check_gpu_blocks(blocks_for(capability, dtype, channels, counts))
    assert blocks_for(90, dtype, 64, counts) == blocks_for(100, dtype, 64, counts)


@thorough
def test_two_runs_agree_bit_for_bit():
    operands = make_operands(EVERYTHING, 1, 140, 140, (4, 2, 16, 16))
    given = normal(5, 1, 140, D), normal(4, 1, 140, 4, 16), {}
    runs = [compiled(EVERYTHING, (("is_causal", True),), Interpreted())(operands, *given) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *runs)


# One thing each ------------------------------------------------------------------------------------------------------


@thorough
@pytest.mark.parametrize("case", DISTINCT, ids=lambda case: case.name)
def test_every_encoding(case):
    check(case.encoding, is_causal=case.encoding.needs_causal, heads=(4, 2, 8, 8))


@thorough
@pytest.mark.parametrize("gates", ["near 0", "near 1", "mixed", "small", "small and large"])
@pytest.mark.parametrize(("last", "per_head"), [(6, True), (64, False), (150, False)])
def test_cope_where_gates_saturate(last, per_head, gates):
    check(saturating(last, per_head), gates=gates, length=200, heads=(2, 2, 16, 16), is_causal=True)


def anyhow(call, tile):
    """The kernels in the form that random calls have, whose tiles are of another kernel."""
    return gpu.attention(call, block_sizes=SMALL, interpret=True)


@thorough
@pytest.mark.parametrize("case", DISTINCT[::3], ids=lambda case: case.name)  # a case is one form of a call, with any numbers
@properties.settings
@hypothesis.given(st.integers(0, 999), st.sampled_from([1.0, 0.3, 3.0]))
def test_random_calls(case, seed, size):
    """Of lengths, windows, segments and positions of all kinds."""
    form = dataclasses.replace(properties.random_form(case), mask=None)
    form = dataclasses.replace(form, is_causal=form.is_causal or case.encoding.needs_causal)
    properties.check(anyhow, form, case.encoding, seed, size)


CALLS = {
    "a window to both sides": (pj.alibi(), dict(length=300, local_window_size=(70, 20))),
    "a window to the right": (pj.t5(8, 30, bidirectional=True), dict(length=200, local_window_size=(None, 0))),
    "packed in both directions": (pj.rope(), dict(batch=2, length=300, arrays=packed(2, 300, 300), logits_soft_cap=2.0, scale=0.3)),
    "packed and padded": (pj.identity(), dict(batch=2, keys=150, arrays=packed(2, 140, 150))),
    "tupe + cope, packed": (
        pj.chain(pj.tupe(relative=True), pj.cope(12, per_head=True)),
        dict(is_causal=True, batch=2, keys=150, arrays=packed(2, 140, 150)),
    ),
    "both directions": (pj.chain(pj.rope(pairing="interleaved"), pj.t5(8, 30, bidirectional=True)), dict(keys=384, scale=0.3)),
    "tiles that a window leaves out": (
        pj.cope(12),
        dict(tile=UNEVEN, length=500, heads=(1, 1, 16, 16), is_causal=True, local_window_size=(100, None)),
    ),
    "bfloat16 and a learned scale": (pj.cope(64, per_head=True), dict(dtype="bfloat16", scale=0.2, is_causal=True)),
    "bfloat16 in both directions": (pj.tupe(relative=True), dict(dtype="bfloat16")),
    "float16 and small gates": (pj.cope(12), dict(dtype="float16", gates="small", length=200, is_causal=True)),
    "wide values": (pj.chain(pj.cope(12), pj.alibi()), dict(heads=(4, 1, 8, 136), is_causal=True)),
    "one query": (GATED, dict(length=1, keys=150, arrays={"query_positions": jnp.asarray([149])}, is_causal=True)),
    "positions in any order": (
        pj.chain(pj.rope(), pj.t5(8, 30, bidirectional=True), pj.alibi()),
        dict(
            keys=200,
            is_causal=True,
            arrays={"query_positions": 37 * jnp.arange(140) % 140, "key_positions": 67 * jnp.arange(200) % 200},
        ),
    ),
    "two tables": (pj.chain(pj.t5(6, 8), pj.t5(64, 80, bidirectional=True)), dict(logits_soft_cap=2.0)),
    "pairs, packed": (
        pj.chain(pj.cope(12), PAIRS),
        dict(is_causal=True, batch=2, keys=150, heads=(4, 2, 16, 16), arrays=packed(2, 140, 150), logits_soft_cap=20.0),
    ),
    "tables and a network": (
        pj.chain(pj.cope(6), READING),
        dict(tile=UNEVEN, is_causal=True, heads=(4, 2, 8, 8), logits_soft_cap=5.0, local_window_size=(90, 0)),
    ),
    "bfloat16 and pairs": (PAIRS, dict(dtype="bfloat16", tile=UNEVEN)),
    "blocks of their own": (GATED, dict(tile=GpuBlocks(128, 64, 32, 64, 8, 2), length=600, heads=(1, 1, 16, 16), is_causal=True)),
}


@thorough
@pytest.mark.parametrize(("encoding", "call"), CALLS.values(), ids=CALLS)
def test_calls(encoding, call):
    check(encoding, **call)


def one_loss(operands, segments):
    """Through the kernels, interpreted on a CPU."""
    query, key, value, params = (operands[name] for name in ("query", "key", "value", "params"))
    call = prepare(query, key, value, GATED, params, is_causal=True, segment_ids=segments)
    return (gpu.attention(call, block_sizes=SMALL) * normal(4, *query.shape)).sum()


@thorough
def test_vmap():
    operands, segments, want = stacked()
    all_agree(jax.jit(jax.vmap(jax.grad(one_loss)))(operands, segments), operands, want)


@thorough
def test_gradients_inside_a_scan_and_through_a_checkpoint():
    operands, segments, want = stacked()

    def step(carry, call):
        return carry + 1, jax.grad(jax.checkpoint(one_loss))(*call)

    all_agree(jax.jit(lambda *calls: jax.lax.scan(step, 0, calls)[1])(operands, segments), operands, want)


@thorough
def test_features_of_key_heads_that_shards_share():
    check_on = functools.partial(kernel_calls.check, OnMesh(), PAIRS, batch=2, is_causal=True)
    for kv_heads in (1, 2, 4):
        check_on(heads=(4, kv_heads, 16, 16))


@thorough
@pytest.mark.parametrize(("kind", "kv_heads"), [(AxisType.Auto, 1), (AxisType.Explicit, 4)], ids=str)
def test_a_mesh_of_data_and_tensor_axes(kind, kv_heads, monkeypatch):
    """A mesh that cuts four heads in two parts, of which there is one key head, or two for each part."""
    monkeypatch.setattr(gpu, "default_blocks", lambda call: SMALL)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernel_calls.on_a_mesh(kind, pj.chain(pj.tupe(), pj.cope(6, per_head=kv_heads == 4)), kv_heads, 40)
