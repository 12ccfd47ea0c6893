"""Attention around a ring of devices equals dense attention on one, forward and backward, and no device has the whole sequence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AxisType, Mesh, NamedSharding, PartitionSpec
from kernel_calls import answers, check, make_operands
from suite import (
    equations,
    normal,
)

import posjax as pj
from posjax.attention.backends.ring import attention as ring
from posjax.attention.backends.ring.context import Context, find_context
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.backends.xla_chunked import forward, layout
from posjax.attention.call import prepare

HEADS = (4, 2, 16, 16)
GATED = pj.chain(pj.rope(theta=1e6), pj.cope(12))
LONG = pj.cope(400)  # never saturates


@functools.cache
def mesh_of(data: int, context: int, tensor: int = 1) -> Mesh:
    devices = np.array(jax.devices()[: data * context * tensor]).reshape(data, context, tensor)
    return Mesh(devices, ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)


@dataclasses.dataclass(frozen=True)
class Ring:
    """``ring.attention`` on a mesh, as a function of an ``AttentionCall``."""

    data: int
    context: int
    bare: bool = False  # a mesh of the one axis alone
    kernel: str = "xla"
    tensor: int = 1

    def __call__(self, call):
        mesh = mesh_of(self.data, self.context, self.tensor)
        if self.bare:
            mesh = Mesh(mesh.devices.ravel(), ("context",), axis_types=(AxisType.Auto,))
        cut = ShardSpec(mesh, ("data",) if self.data > 1 else (), ("tensor",) if self.tensor > 1 else ())
        context = Context(cut, "context")
        return ring.attention(call, context, kernel=self.kernel)


def packed_rows(batch: int, length: int):
    """Documents that end anywhere, in chunks of several devices or within one, positions beginning anew in each."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (batch, length)))
    starts = np.stack([np.searchsorted(row, row) for row in segments])
    positions = np.arange(length) - starts
    return jax.tree.map(jnp.asarray, dict(segment_ids=segments, query_positions=positions, key_positions=positions))


EVERY = {
    "none": pj.identity(),
    "rope": pj.rope(),
    "alibi": pj.alibi(),
    "t5": pj.t5(8, 32),
    "tupe": pj.tupe(relative=True),
    "cope": pj.cope(12),
    "cope that does not settle": LONG,
    "rope + cope": GATED,
    "cope_alibi": pj.cope_alibi(learned=True),
    "cope with gates of keys": pj.cope(12, gates="keys", per_head=True),
    "two counts": pj.chain(pj.cope(12), pj.cope_alibi()),
}


@pytest.mark.parametrize(
    "encoding",
    [pytest.param(e, id=name, marks=() if name in ("alibi", "rope + cope") else pytest.mark.thorough) for name, e in EVERY.items()],
)
def test_every_encoding_equals_dense_attention(encoding):
    check(Ring(2, 4), encoding, length=64, batch=2, heads=HEADS, is_causal=True)


@pytest.mark.thorough
@pytest.mark.parametrize("context", [2, 3, 8])
@pytest.mark.parametrize("encoding", [pj.alibi(), GATED], ids=["alibi", "rope + cope"])
def test_any_number_of_devices_equals_dense_attention(encoding, context):
    check(Ring(1, context), encoding, length=96, heads=HEADS, is_causal=True)


@pytest.mark.parametrize("gates", ["near 0", *(pytest.param(g, marks=pytest.mark.thorough) for g in ("near 1", "mixed", "small"))])
def test_counts_go_on_from_chunk_to_chunk_whatever_the_gates_are(gates):
    check(Ring(1, 4), pj.cope(64), length=512, heads=(2, 1, 16, 16), gates=gates, is_causal=True)


@pytest.mark.parametrize("encoding", [pytest.param(pj.t5(8, 32), id="t5", marks=pytest.mark.thorough), GATED])
def test_packed_rows_windows_soft_caps_and_a_learned_scale(encoding):
    options = dict(is_causal=True, local_window_size=(40, None), logits_soft_cap=20.0, scale=0.25)
    check(Ring(2, 4), encoding, length=96, batch=2, heads=HEADS, arrays=packed_rows(2, 96), **options)


@pytest.mark.thorough
@pytest.mark.parametrize("encoding", [pytest.param(pj.t5(8, 32), id="t5"), GATED])
def test_keys_in_several_pieces(encoding, monkeypatch):
    """Packed documents that end in any piece; tiles of eight, of which a chunk has three or four and both as one six or eight."""
    monkeypatch.setattr(layout, "SIZE", 8)
    monkeypatch.setattr(ring, "_PIECE", 8)
    pieces, stacked = set(), ring._stacked
    monkeypatch.setattr(ring, "_stacked", lambda plan, slots: pieces.add(plan.pieces) or stacked(plan, slots))
    for length in (96, 128):
        check(Ring(1, 2), encoding, length=length, heads=HEADS, arrays=packed_rows(1, length), is_causal=True)
    assert pieces == ({3, 4} if encoding.needs_causal else {6, 8})


@pytest.mark.thorough
def test_keys_with_padding_go_around_in_one_piece(monkeypatch):
    """Chunks of 52 keys in tiles of eight have four places of padding, so equal pieces hold unequal numbers of keys."""
    monkeypatch.setattr(layout, "SIZE", 8)
    monkeypatch.setattr(ring, "_PIECE", 7)
    check(Ring(1, 2), pj.alibi(), length=104, heads=HEADS, is_causal=True)


@pytest.mark.thorough
def test_an_encoder_and_keys_of_another_length():
    check(Ring(1, 4), pj.t5(8, 32, bidirectional=True), length=48, keys=80, heads=HEADS)


@pytest.mark.thorough
@pytest.mark.parametrize("encoding", [pj.alibi(), GATED], ids=["alibi", "rope + cope"])
def test_bfloat16_within_its_own_rounding(encoding):
    check(Ring(1, 4), encoding, dtype="bfloat16", length=64, heads=HEADS, is_causal=True)


@pytest.mark.thorough
def test_the_same_bits_every_time():
    first, again = (answers(Ring(1, 4), GATED, length=64, heads=HEADS, is_causal=True)[0] for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))


# With kernels ------------------------------------------------------------------------------------------------------------

KERNELS = ("tpu", "cuda")  # interpreted
thorough = functools.partial(pytest.param, marks=pytest.mark.thorough)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "encoding",
    [thorough(e, id=e.name) for e in (GATED, pj.alibi(), pj.t5(8, 32), pj.tupe())],
)
def test_every_kernel_equals_dense_attention(encoding, kernel):
    """Chunks of 128, a tile, or of 96, of which a tile has some of the next."""
    check(Ring(1, 2, kernel=kernel), encoding, length=512 if encoding is GATED else 384, heads=(2, 1, 16, 16), is_causal=True)


@pytest.mark.thorough
def test_queries_that_are_rotated_before_the_kernel_bring_those_that_count():
    """Two rotations, which no kernel does."""
    encoding = pj.chain(pj.rope(theta=1e6), pj.rope(theta=1e6, fraction=0.5), pj.cope(12))
    check(Ring(1, 2, kernel="tpu"), encoding, length=512, heads=(2, 1, 16, 16), is_causal=True)


@pytest.mark.thorough
@pytest.mark.parametrize(("gates", "kernel"), [("near 0", "tpu"), ("small", "tpu"), ("near 1", "cuda"), ("small", "cuda")])
def test_counts_go_on_from_kernel_to_kernel_whatever_the_gates_are(gates, kernel):
    check(Ring(1, 2, kernel=kernel), pj.cope(300), length=512, heads=(2, 1, 16, 16), gates=gates, is_causal=True)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("encoding", "kernel"),
    [(GATED, "tpu"), (GATED, "cuda"), (pj.t5(8, 32), "cuda")],
    ids=["rope + cope-tpu", "rope + cope-cuda", "t5-cuda"],
)
def test_packed_rows_windows_and_soft_caps_in_kernels(encoding, kernel):
    options = dict(is_causal=True, local_window_size=(140, None), logits_soft_cap=20.0, scale=0.25)
    check(Ring(2, 2, kernel=kernel, tensor=2), encoding, length=512, batch=2, heads=HEADS, arrays=packed_rows(2, 512), **options)


@pytest.mark.thorough
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_in_kernels_within_its_own_rounding(kernel):
    check(Ring(1, 2, kernel=kernel), GATED, dtype="bfloat16", length=512, heads=(2, 1, 16, 16), is_causal=True)


@pytest.mark.thorough
@pytest.mark.parametrize("kernel", KERNELS)
def test_keys_of_a_kernel_in_several_pieces(kernel, monkeypatch):
    monkeypatch.setattr(ring, "_PIECE", 128)
    check(Ring(1, 2, kernel=kernel), GATED, length=1536, heads=(1, 1, 16, 16), is_causal=True)


# Through the public function ------------------------------------------------------------------------------------------


def placed(mesh, tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def test_attention_takes_the_ring_where_the_mesh_has_a_context_axis():
    mesh = mesh_of(2, 2, 2)
    operands = make_operands(GATED, 2, 192, 192, HEADS)
    weight = normal(4, 2, 192, 4, 16)

    def gradient(operands, implementation=None):
        def loss(operands):
            out = pj.attention(*(operands[n] for n in ("query", "key", "value")), GATED, operands["params"], is_causal=True,
                               implementation=implementation)  # fmt: skip
            return (out * weight).sum()

        return jax.grad(loss)(operands)

    want = jax.jit(functools.partial(gradient, implementation="xla"))(operands)
    params = placed(mesh, operands.pop("params"), PartitionSpec())
    cut = placed(mesh, operands, PartitionSpec("data", "context", "tensor")) | {"params": params}
    got = jax.jit(gradient)(cut)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-4 * float(jnp.abs(b).max()))
    moved = [e for e in equations(jax.make_jaxpr(gradient)(cut).jaxpr) if e.primitive.name == "ppermute"]
    assert moved and all(e.params["axis_name"] in ("context", ("context",)) for e in moved)


@pytest.mark.parametrize(
    "encoding", [pytest.param(pj.alibi(), id="alibi"), pytest.param(GATED, id="rope + cope", marks=pytest.mark.thorough)]
)
def test_programs_for_tpus_and_gpus_go_around_it_with_kernels(encoding):
    """Also where there are neither."""

    def loss(query, key, value, params):
        return pj.attention(query, key, value, encoding, params, is_causal=True).astype(jnp.float32).sum()

    def lowered(platform, device):
        mesh = mesh_of(1, 2).abstract_mesh.update(abstract_device=device)
        sharding = NamedSharding(mesh, PartitionSpec(None, "context"))
        query = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16, sharding=sharding)
        params = jax.eval_shape(lambda: encoding.init(jax.random.key(0), pj.Dims(2, 64)))
        program = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(query, query, query, params)
        return program.lower(lowering_platforms=(platform,)).as_text()

    texts = [lowered("tpu", AbstractDevice("TPU v5e", 1, "tpu")), lowered("cuda", AbstractDevice("NVIDIA H200", 132, "gpu"))]
    texts += [lowered("cpu", AbstractDevice("cpu", None, "cpu"))]
    for name in ("forward", "backward"):
        assert [f"posjax_attention_{name}" in text for text in texts] == [True, name == "forward", False]
    for name in ("query_plain", "key_plain", *(["query_band", "key_band"] if encoding is GATED else [])):
        assert f"posjax_attention_{name}" in texts[1]
    assert "tpu_custom_call" in texts[0] and "__gpu$xla.gpu.triton" in texts[1]


def test_which_calls_have_a_context_axis():
    mesh = mesh_of(1, 4)

    def axis(length):
        query = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        found = []
        jax.eval_shape(lambda q: found.append(find_context(q)), query)
        return found[0] and found[0].axis

    assert axis(64) == "context"
    assert axis(1) is None  # one token of a decoder: whole everywhere
    assert axis(12) is None  # no two chunks for every device


@pytest.mark.parametrize(
    ("encoding", "options", "words"),
    [
        (GATED, dict(mask=jnp.tri(64, dtype=bool)), "mask must be None"),
        (pj.identity(), dict(mask=jnp.ones((64, 64), bool)), "mask must be None"),
        (pj.cope(4), dict(local_window_size=(None, 0)), "is_causal=True"),
    ],
)
def test_what_cannot_go_around_the_ring_is_refused_by_name(encoding, options, words):
    operands = make_operands(encoding, 1, 64, 64, HEADS)
    call = prepare(operands["query"], operands["key"], operands["value"], encoding, operands["params"], **options)
    with pytest.raises(NotImplementedError, match=words):
        Ring(1, 4)(call)


def test_lengths_that_do_not_divide_are_refused_by_name():
    operands = make_operands(pj.identity(), 1, 60, 60, HEADS)
    call = prepare(operands["query"], operands["key"], operands["value"], None, {}, is_causal=True)
    with pytest.raises(NotImplementedError, match="multiples of 8, twice its devices, got 60 and 60"):
        Ring(1, 4)(call)


# What it costs --------------------------------------------------------------------------------------------------------


def bytes_of_a_device(encoding, context: int, length: int = 131_072) -> int:
    """Compiled memory of one device for attention, forward and backward."""
    mesh = mesh_of(1, context)
    operands = jax.eval_shape(lambda: make_operands(encoding, 1, length, length, (2, 2, 64, 64)))
    along, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "context"), PartitionSpec()))
    shardings = {name: whole if name == "params" else along for name in operands}
    shapes = {
        name: jax.tree.map(lambda x, s=shardings[name]: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree)
        for name, tree in operands.items()
    }

    def gradients(operands):
        def out(operands):
            rest = (operands[name] for name in ("query", "key", "value"))
            return pj.attention(*rest, encoding, operands["params"], is_causal=True, implementation="xla_chunked")

        result, pull = jax.vjp(out, operands)
        return pull(result)

    analysis = jax.jit(gradients, out_shardings=(shardings,)).lower(shapes).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes


@pytest.mark.thorough
@pytest.mark.parametrize("encoding", [pj.alibi(), GATED], ids=["alibi", "rope + cope"])
def test_memory_of_a_device_falls_as_one_over_the_number_of_devices(encoding):
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        two, eight = (bytes_of_a_device(encoding, context) for context in (2, 8))
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert two / eight == pytest.approx(4, rel=0.15)


def test_chunks_past_which_every_row_is_saturated_are_plain(monkeypatch):
    """Gates near one: after twelve keys a row is saturated, and only the chunk left of its own may have tiles to count in."""
    operands = make_operands(GATED, 1, 1024, 1024, (2, 1, 16, 16), gates="near 1")
    query, key, value, params = (operands[name] for name in ("query", "key", "value", "params"))
    call = prepare(query, key, value, GATED, params, is_causal=True)
    seen, outputs = [], forward.outputs

    def spy(plan, x):
        out, saved = outputs(plan, x)
        places = x.query_positions[0, 0], x.key_positions[0, 0]
        tiles = x.key_positions.shape[1] // plan.columns
        jax.debug.callback(lambda plain, *at: seen.append((*map(int, at), int(tiles - plain.min()))), saved[1], *places)
        return out, saved

    monkeypatch.setattr(forward, "outputs", spy)
    around = Ring(1, 2, bare=True)  # callbacks want it so
    jax.block_until_ready(jax.jit(around)(call))
    jax.effects_barrier()
    counted = {(queries // 256, keys // 256): tiles for queries, keys, tiles in seen if keys <= queries}
    assert len(counted) == 4 + 3 + 2 + 1
    assert all((tiles > 0) == (queries - keys <= 1) for (queries, keys), tiles in counted.items()), counted
