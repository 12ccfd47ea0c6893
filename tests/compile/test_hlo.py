"""posjax.compile.hlo: what a device does in a run, read from the compiler's text, loops turn by turn."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posjax.compile import hlo
from posjax.compile.hlo import Collective, read_cost

OPTIMIZED = True  # see conftest.py


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


# Loops -------------------------------------------------------------------------------------------------------------------


def chained(turns, unroll=1):
    def function(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0].sum()

    return compiled(jax.grad(function, (0, 1)), shape(48, 32), shape(turns, 32, 32))


@pytest.mark.parametrize("turns", [1, 7])
def test_products_in_loops_count_as_often_as_the_loops_turn(turns):
    """One product forward, two backward, and XLA's own count of the same program without a loop."""
    cost = read_cost(chained(turns).as_text())
    assert cost.flops == turns * 3 * 2 * 48 * 32 * 32
    assert cost.uncounted == 0
    unrolled = chained(turns, unroll=turns)
    assert read_cost(unrolled.as_text()).flops == cost.flops
    assert cost.flops <= unrolled.cost_analysis()["flops"] < 1.2 * cost.flops  # with additions and tanh


def test_a_loop_cuts_out_what_it_reads():
    """Not the whole stack of weights in each of its turns."""
    turns = 50
    cost = read_cost(chained(turns).as_text())
    stack = turns * 32 * 32 * 4
    assert 3 * stack < cost.bytes < 3 * stack + turns * 40 * 48 * 32 * 4


def test_a_loop_of_unknown_length_is_told():
    def function(x, limit):
        return jax.lax.while_loop(lambda s: s[1] < limit, lambda s: (s[0] @ s[0], s[1] + 1.0), (x, 0.0))[0]

    cost = read_cost(compiled(function, shape(16, 16), shape()).as_text())
    assert (cost.uncounted, cost.flops) == (1, 0)


def test_grouped_products():
    cost = read_cost(compiled(lambda x, y: jnp.einsum("bnth,bnsh->bnts", x, y), shape(2, 3, 5, 7), shape(2, 3, 11, 7)).as_text())
    assert cost.flops == 2 * 2 * 3 * 5 * 11 * 7


def test_products_of_cublas():
    numbers = '{"lhs_contracting_dimensions":["0","2"],"rhs_contracting_dimensions":["0","1"]}'
    config = f'{{"gemm_backend_config":{{"dot_dimension_numbers":{numbers}}}}}'
    call = f'custom-call(%x, %y), custom_call_target="__cublas$gemm", backend_config={config}'
    program = f"""ENTRY %main (x: f32[2,5,7], y: f32[2,7,11]) -> f32[5,11] {{
  %x = f32[2,5,7]{{2,1,0}} parameter(0)
  %y = f32[2,7,11]{{2,1,0}} parameter(1)
  ROOT %out = f32[5,11]{{1,0}} {call}
}}
"""
    assert read_cost(program).flops == 2 * 5 * 11 * (2 * 7)


CONVOLUTIONS = [
    # TPUs make products of matrices convolutions; of a window that is wider than the array only what meets it counts.
    ("bf16[8,4]", "bf16[4,16]", "bf16[8,16]", "dim_labels=bf_io->bf", 2 * 8 * 4 * 16),
    ("f32[6,8,4]", "f32[6,4,5]", "f32[6,8,5]", "window={size=6 pad=5_5 rhs_reversal=1}, dim_labels=0bf_0io->0bf", None),
    ("f32[2,9,4]", "f32[3,4,5]", "f32[2,4,5]", "window={size=3 stride=2 pad=1_0}, dim_labels=b0f_0io->b0f", None),
    ("f32[2,3,4]", "f32[2,4,5]", "f32[2,6,5]", "window={size=2 pad=1_1 lhs_dilate=2 rhs_dilate=2}, dim_labels=b0f_0io->b0f", None),
]


@pytest.mark.parametrize(("image", "kernel", "out", "attributes", "known"), CONVOLUTIONS)
def test_convolutions(image, kernel, out, attributes, known):
    text = f"ENTRY %main (x: {image}) -> {out} {{\n  %x = {image} parameter(0)\n  %w = {kernel} parameter(1)\n"
    text += f"  ROOT %c = {out} convolution(%x, %w), {attributes}\n}}\n"
    found = read_cost(text).flops
    if known is None:  # place by place
        window = attributes.partition("{")[2].partition("}")[0]
        fields = dict(part.split("=") for part in window.split())
        size, stride = int(fields["size"]), int(fields.get("stride", 1))
        spread, dilated = int(fields.get("lhs_dilate", 1)), int(fields.get("rhs_dilate", 1))
        labels = attributes.rpartition("dim_labels=")[2]
        image_dims, out_dims = (hlo._dims(text) for text in (image, out))
        at, to = labels.partition("_")[0].index("0"), labels.rpartition(">")[2].index("0")
        low = int(fields["pad"].split("_")[0])
        real = set(range(0, image_dims[at] * spread, spread))
        pairs = sum(o * stride + k * dilated - low in real for o in range(out_dims[to]) for k in range(size))
        rest = math.prod(n for i, n in enumerate(out_dims) if i != to)
        known = 2 * pairs * rest * 4
    assert found == known


# Collectives -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "tensor"))


def over(mesh, function, turns=None):
    spec = PartitionSpec("data", "tensor")

    def whole(x):
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)

    def looped(x):
        return jax.lax.scan(lambda x, _: (whole(x) * 0.5, None), x, length=turns)[0]

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, spec))
    return read_cost(compiled(whole if turns is None else looped, x).as_text(), dict(mesh.shape)).collectives


LOCAL = 8 * 16 * 4  # bytes of a device's part


@pytest.mark.parametrize("axes", [("data",), ("tensor",), ("data", "tensor")])
def test_sums_over_axes(mesh, axes):
    (one,) = over(mesh, lambda x: jax.lax.psum(x, axes))
    assert (one.kind, one.axes, one.count, one.bytes) == ("all-reduce", axes, 1, LOCAL)
    assert "psum" in one.op_names[0]


def test_a_collective_in_a_loop(mesh):
    (one,) = over(mesh, lambda x: jax.lax.psum(x, "tensor"), turns=11)
    assert (one.count, one.bytes, one.largest) == (11, 11 * LOCAL, LOCAL)


def test_all_kinds(mesh):
    def moves(x):
        x = jax.lax.all_gather(x, "tensor", axis=1, tiled=True)
        x = jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)
        x = jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])
        x = jax.lax.ppermute(x, "data", [(0, 0), (1, 1)])  # moves nothing
        return jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True)

    found = {(one.kind, one.axes): one.bytes for one in over(mesh, moves)}
    assert found == {
        ("all-gather", ("tensor",)): 4 * LOCAL,
        ("reduce-scatter", ("tensor",)): 4 * LOCAL,
        ("collective-permute", ("data",)): LOCAL,
        ("all-to-all", ("tensor",)): LOCAL,
    }


GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": ("tensor",),
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "replica_groups={}": ("data", "tensor"),
    "replica_groups=[2,4]<=[8]": ("tensor",),
    "replica_groups=[4,2]<=[2,4]T(1,0)": ("data",),
    "replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}": ("tensor",),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}": ("data",),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1','axis_0'}": ("data", "tensor"),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": ("tensor",),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}": ("data",),
    "replica_groups=mesh['a'=2,'b'=4], device_ids=([0,4,1,5,2,6,3,7]) {'a'}": ("tensor",),
    "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}": ("tensor",),
    "": (),
}


@pytest.mark.parametrize(("attributes", "axes"), GROUPS.items())
def test_groups_of_devices(attributes, axes):
    assert hlo._axes(attributes, {"data": 2, "tensor": 4}) == axes


PROGRAM = """\
HloModule jit_f

%all-reduce-scatter (input: bf16[8,4]) -> bf16[4,4] {
  %all-reduce.5 = bf16[8,4]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=6, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[4,4]{1,0} dynamic-slice(%all-reduce.5, %a, %b), dynamic_slice_sizes={4,4}
}

%async_collective_fusion.1 (p: f32[8,4]) -> f32[16,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %ag.1 = f32[16,4]{1,0:S(1)} all-gather(%p), channel_id=2, replica_groups=[2,2]<=[4], frontend_attributes={chain_id="0"}
}

%cond (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(22), backend_config={"flag_configs":[]}
  %at = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %y = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %begun = f32[16,4]{1,0} fusion(%y), kind=kCustom, calls=%async_collective_fusion.1
  %ag.2 = f32[16,4]{1,0} all-gather(%y), channel_id=2, replica_groups=[2,2]<=[4], frontend_attributes={chain_id="0"}
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%n, %y)
}

ENTRY %main (x: bf16[8,4]) -> bf16[4,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %q = pred[3]{0} parameter(1)
  %v = (s32[], f32[8,4]{1,0}) parameter(2)
  %loop = (s32[], f32[8,4]{1,0}) while(%v), condition=%cond, body=%body
  %y = bf16[40,4]{1,0} parameter(3)
  %start = (bf16[40,4]{1,0}, bf16[40,4]{1,0}, u32[]{:S(2)}, u32[]) collective-permute-start(%y), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
  %done = bf16[40,4]{1,0} collective-permute-done(%start)
  %sum = (pred[3]{0}, bf16[8,4]) all-reduce(%q, %x), channel_id=4, replica_groups={{0,2},{1,3}}, to_apply=%or
  ROOT %fusion = bf16[4,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(f)/g"}
}
"""


def test_what_a_program_for_tpus_moves():
    """A loop whose length stands in its condition, a reduce-scatter as they have it, a gather that stands in two fusions."""
    cost = read_cost(PROGRAM, {"data": 2, "tensor": 2})
    gathered, permuted = 16 * 4 * 4, 40 * 4 * 2
    assert cost.collectives == (
        Collective("all-gather", ("tensor",), 22, 22 * gathered, gathered, overlapped_bytes=22 * gathered),
        Collective("all-reduce", ("data",), 1, 3 + 64, 3 + 64),
        Collective("collective-permute", ("tensor",), 1, permuted, permuted, overlapped_bytes=permuted),
        Collective("reduce-scatter", ("tensor",), 1, 64, 64, op_names=("jit(f)/g",)),
    )
    assert cost.uncounted == 0


def test_what_lies_elsewhere_does_not_move():
    assert hlo.size_of("(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[4]{0:S(1)}, pred[5], s4[3])") == 12 + 5 + 2


PARTS = """HloModule parts
%cut (a: f32[1,32,8], at: s32[]) -> f32[8] {
  %a = f32[1,32,8]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %rows = f32[32,8]{1,0} bitcast(%a)
  %row = f32[1,8]{1,0} dynamic-slice(%rows, %at, %zero), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%row)
}
%add_to_one (b: f32[32,8], a: f32[1,32,8], at: s32[]) -> f32[32,8] {
  %b = f32[32,8]{1,0} parameter(0)
  %a = f32[1,32,8]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[8]{0} fusion(%a, %at), kind=kLoop, calls=%cut
  %more = f32[1,8]{1,0} bitcast(%row)
  %old = f32[1,8]{1,0} dynamic-slice(%b, %at, %zero), dynamic_slice_sizes={1,8}
  %sum = f32[1,8]{1,0} add(%old, %more)
  ROOT %new = f32[32,8]{1,0} dynamic-update-slice(%b, %sum, %at, %zero)
}
ENTRY %main (a: f32[1,32,8], b: f32[32,8], at: s32[]) -> f32[32,8] {
  %a = f32[1,32,8]{2,1,0} parameter(0)
  %b = f32[32,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %out = f32[32,8]{1,0} fusion(%b, %a, %at), kind=kLoop, calls=%add_to_one
}
"""


def test_a_row_of_one_array_added_to_a_row_of_another_moves_rows():
    """Cut in a fusion within the fusion, and read and written in place."""
    assert read_cost(PARTS).bytes == 3 * 8 * 4 + 4  # and the index
    whole = PARTS.replace("ROOT %new = f32[32,8]{1,0} dynamic-update-slice(%b, %sum", "ROOT %new = f32[32,8]{1,0} other(%b, %sum")
    assert read_cost(whole).bytes == 2 * 32 * 8 * 4 + 8 * 4 + 4


# A program whose collectives can be told in advance ----------------------------------------------------------------------


@functools.cache
def step_of(mesh_text, **fields):
    from posjax.lab.run import abstract_step

    jitted, (state, batch) = abstract_step(
        "pretrain_125m", jax.devices(), mesh=mesh_text, batch_size=8, compute_dtype="float32", **fields
    )
    sizes = batch["tokens"].sharding.mesh.shape
    return read_cost(jitted.lower(state, batch).compile().as_text(), sizes), state, dict(sizes)


def weights_of(state):
    """Bytes of all layers' matrices, of the embedding, and of the rest."""
    flat = jax.tree_util.tree_flatten_with_path(state.params)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): 4 * leaf.size for path, leaf in flat}
    layers = sum(size for name, size in named.items() if name.startswith("layers/") and name.endswith("kernel"))
    return layers, named["token_embedding/embedding"], {n: s for n, s in named.items() if "scale" in n or "cope" in n}


@pytest.mark.thorough
@pytest.mark.parametrize("mesh_text", ["data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_a_train_step_has_the_collectives_of_its_design(mesh_text):
    """The 125 million of pretrain_125m on 8 devices, remat "attention", in float32. CPUs sum and cut where TPUs scatter.

    fsdp         7 matrices of each layer are put together forward and again backward, and the embedding once
    data, fsdp   gradients are summed over both, those of a layer as one, and once all else
    tensor       each layer sums activations [b, T, D] behind attention and behind the MLP, the former once more, for the backward
                 pass computes it again; and gradients: of query, key, value as one, of up and gate as one
    """
    length, layers, width = 256, 12, 768
    cost, state, mesh = step_of(mesh_text, seq_length=length)
    matrices, embedding, small = weights_of(state)
    tensor = mesh["tensor"]
    found = {(one.kind, one.axes): (one.count, one.bytes) for one in cost.collectives}
    rows = tuple(axis for axis in ("data", "fsdp") if mesh[axis] > 1)

    assert found.pop(("all-gather", ("fsdp",))) == (2 * 7 * layers + 1, (2 * matrices + embedding) // tensor)
    assert {kind for kind, _ in found} == {"all-reduce"}

    activations = 8 // (mesh["data"] * mesh["fsdp"]) * length * width * 4
    per_token = activations // width
    cope = layers * small.pop("encoding/0/cope/embedding")
    if tensor > 1:
        # 2 forward, 1 again, 3 + 2 backward as two; of the embedding and of the logits' gradient; of the loss, for each token, the
        # highest logit, the sum, and the target's; two of the gradient's norm, a few numbers.
        count, size = found.pop(("all-reduce", ("tensor",)))
        assert count == 5 * layers + 2 + 3 + 2
        assert size - (8 * layers + 2) * activations - 3 * per_token in range(0, 200)
        # CoPE's embedding is one for all heads.
        assert found.pop(("all-reduce", (*rows, "tensor"))) == (layers, cope)
        cope = 0
    # The embedding's gradient is of its rows and of the logits. The gradient's norm is summed over those who have parts of it.
    count, size = found.pop(("all-reduce", rows))
    of_norm = rows == ("fsdp",)
    assert count == layers + 1 + of_norm
    assert size - (matrices + 2 * embedding) // tensor - sum(small.values()) - cope in range(0, 200)
    if not of_norm:
        assert found.pop(("all-reduce", ("fsdp",)))[0] == 1
    assert not found


def test_every_combination_of_axes_is_told_apart():
    sizes = {"a": 2, "b": 3, "c": 2}
    ids = np.arange(12).reshape(2, 3, 2)
    for count in range(1, 4):
        for axes in itertools.combinations(range(3), count):
            moved = np.moveaxis(ids, axes, range(3 - count, 3)).reshape(-1, math.prod(ids.shape[axis] for axis in axes))
            text = "replica_groups={" + ",".join("{" + ",".join(map(str, group)) + "}" for group in moved) + "}"
            assert hlo._axes(text, sizes) == tuple("abc"[axis] for axis in axes)
