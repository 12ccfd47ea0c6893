"""What the TPU kernel is said to take of VMEM, what is done where that is too much."""

import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax as pj
from posjax.attention import dispatch
from posjax.attention.backends import kernel_call
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.tpu import vmem
from posjax.attention.backends.tpu.backward import backward
from posjax.attention.backends.tpu.blocks import CHIPS, Blocks, Chip, check_blocks
from posjax.attention.backends.tpu.forward import forward
from posjax.attention.call import prepare

MIB = 2**20
GATED = pj.chain(pj.rope(), pj.cope(64))


@contextlib.contextmanager
def on(kind):
    """As where programs are compiled for chips that are not attached."""
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def shapes_of(encoding, length, width, dtype, heads=(2, 2)):
    """Query, key, value and params."""
    query, key = (jax.ShapeDtypeStruct((1, length, n, width), dtype) for n in heads)
    params = jax.eval_shape(lambda: encoding.init(jax.random.key(0), pj.Dims(heads[0], width, None, length, heads[1])))
    return query, key, key, params


def gradients(encoding, implementation="pallas", block_sizes=None):
    def loss(query, key, value, params):
        how = dict(is_causal=True, implementation=implementation, block_sizes=block_sizes)
        return pj.attention(query, key, value, encoding, params, **how).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2, 3))


class Taken(Exception):
    """The call is in the kernel's layout: its plan, and operands' shapes."""


@pytest.fixture
def operands_of(monkeypatch):
    """(encoding, length, width, dtype, **options) -> plan and operands' shapes, as the kernel would get them."""

    def stop(kernels, plan, spec, x):
        raise Taken(plan, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x))

    def find(encoding, *sizes, **options):
        with monkeypatch.context() as patch, pytest.raises(Taken) as caught:
            patch.setattr(kernel_call, "attend", stop)
            jax.eval_shape(gradients(encoding, **options), *shapes_of(encoding, *sizes))
        return caught.value.args

    return find


def taken_by(function, *args):
    """Bytes of the windows, each twice, and scratch of the kernel that a function calls, from its program."""
    found = []

    def search(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append(buffers_of(equation))
                continue
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
            for jaxpr in (getattr(x, "jaxpr", x) for x in inner):
                if hasattr(jaxpr, "eqns"):
                    search(jaxpr)

    search(jax.make_jaxpr(function)(*args).jaxpr)
    return found[0]


def buffers_of(equation):
    """Of a pallas_call; the last two axes of everything stand in whole registers of 8 x 128 numbers of 32 bits."""
    mapping, refs = equation.params["grid_mapping"], [v.aval for v in equation.params["jaxpr"].invars]

    def padded(aval):
        shape, item = [1, 1, *aval.shape], np.dtype(aval.dtype).itemsize
        rows, columns = -(-shape[-2] // (32 // item)) * (32 // item), -(-shape[-1] // 128) * 128
        return math.prod(shape[:-2]) * rows * columns * item

    arrays = refs[mapping.num_index_operands :]
    windows, scratch = arrays[: len(mapping.block_mappings)], arrays[len(mapping.block_mappings) :]
    windows = [aval for aval in windows if "any" not in str(aval.memory_space).lower()]  # what stays in HBM
    return 2 * sum(map(padded, windows)) + sum(padded(aval) for aval in scratch if "vmem" in str(aval.memory_space).lower())


@pytest.mark.parametrize(
    ("encoding", "width", "dtype", "sizes"),
    [
        (pj.identity(), 128, "bfloat16", Blocks(512, 512, 256, 4096)),
        (pj.identity(), 64, "float32", Blocks(256, 512, 256, 1024)),
        (pj.rope(), 128, "float32", Blocks(512, 512, 256, 4096)),
        (pj.t5(32, 128), 128, "bfloat16", Blocks(512, 512, 256, 2048)),
        (GATED, 128, "bfloat16", Blocks(512, 512, 256, 4096)),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_windows_and_scratch_are_counted_as_the_kernels_have_them(encoding, width, dtype, sizes, operands_of):
    with on("TPU v6 lite"):
        plan, x = operands_of(encoding, 4096, width, dtype, block_sizes=sizes)
    assert plan.blocks == sizes
    out, *saved = jax.eval_shape(functools.partial(forward, plan), x)
    kernels = [taken_by(functools.partial(forward, plan), x), taken_by(functools.partial(backward, plan), x, saved, out, saved[0])]
    assert kernels[0] < kernels[1] <= vmem.buffers(plan, x) <= 1.2 * kernels[1]


# (generation, encoding, channels, dtype, blocks, MiB): what the compiler took for the backward pass, or would have.
COMPILED = [
    ("v4", pj.identity(), 128, "bfloat16", (512, 512, 256, 1024), 7.00),
    ("v4", pj.identity(), 128, "bfloat16", (1024, 512, 256, 1024), 10.79),
    ("v4", pj.identity(), 128, "float32", (512, 512, 256, 1024), 11.17),
    ("v4", pj.identity(), 256, "float32", (512, 512, 256, 512), 16.37),
    ("v4", pj.identity(), 256, "float32", (256, 256, 128, 256), 6.70),
    ("v4", pj.identity(), 1024, "float32", (128, 128, 128, 128), 10.98),
    ("v4", pj.identity(), 512, "bfloat16", (256, 256, 128, 256), 7.25),
    ("v4", pj.rope(), 128, "bfloat16", (512, 512, 256, 1024), 9.08),
    ("v4", pj.rope(), 256, "float32", (256, 256, 128, 512), 11.19),
    ("v4", pj.t5(), 128, "bfloat16", (512, 512, 256, 1024), 8.76),
    ("v4", GATED, 128, "bfloat16", (512, 512, 256, 1024), 13.03),
    ("v4", GATED, 128, "float32", (256, 256, 256, 512), 8.44),
    ("v4", pj.cope(128), 128, "bfloat16", (512, 512, 256, 1024), 13.88),
    ("tpu7x", pj.identity(), 256, "float32", (1024, 512, 256, 1024), 27.25),
]


@pytest.mark.parametrize(
    ("generation", "encoding", "width", "dtype", "sizes", "taken"), COMPILED, ids=lambda x: getattr(x, "name", str(x))
)
def test_the_estimate_is_just_above_what_the_compiler_takes(
    generation, encoding, width, dtype, sizes, taken, operands_of, monkeypatch
):
    roomy = dataclasses.replace(CHIPS[generation], vmem=2**40)
    monkeypatch.setattr(tpu, "chip_at_hand", lambda x=None: roomy)
    needed = vmem.needed(*operands_of(encoding, 8192, width, dtype, block_sizes=Blocks(*sizes)))
    assert taken <= needed / MIB <= 1.3 * taken


# What is done about it -----------------------------------------------------------------------------------------------


def test_blocks_shrink_where_those_of_the_chip_would_not_fit(operands_of):
    """In 15 MiB; the compiler needs 7.0 for the first, and 16.4 for the tile of 512 x 512 of the second."""
    with on("TPU v4"):
        assert operands_of(pj.identity(), 4096, 128, "bfloat16")[0].blocks == CHIPS["v4"].sizes
        assert operands_of(pj.identity(), 4096, 256, "float32")[0].blocks[:2] == (256, 512)
    with on("TPU v6 lite"):
        assert operands_of(pj.identity(), 4096, 256, "float32")[0].blocks[:2] == (1024, 512)


@pytest.mark.parametrize("generation", ["v4", "v5e", "tpu7x"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_common_heads_fit_every_chip(generation, width, dtype, operands_of, monkeypatch):
    monkeypatch.setattr(tpu, "chip_at_hand", lambda x=None: CHIPS[generation])
    for encoding in (pj.identity(), GATED, pj.t5(), pj.tupe(relative=True), pj.cope(128)):
        plan, _ = operands_of(encoding, 1024, width, dtype)
        assert plan.blocks.block_q >= 256


@pytest.mark.parametrize(
    "sizes", [*[chip.sizes for chip in CHIPS.values()], Blocks(384, 1536, 512, 4608), Blocks(128, 128, 128, 896)]
)
def test_smaller_blocks_are_blocks(sizes):
    tried = list(vmem.smaller(sizes))
    assert tried[0] == sizes and tried[-1] == Blocks(128, 128, 128, 128)
    assert len(set(tried)) == len(tried)
    for blocks in tried:
        check_blocks(blocks)
        assert all(size <= first for size, first in zip(blocks, sizes, strict=True))


TINY = Chip("tiny", 3 * MIB, True, CHIPS["v6e"].sizes)


@pytest.mark.parametrize(
    ("chip", "encoding", "width", "sizes", "reason"),
    [
        (TINY, pj.identity(), 512, None, r"query has 512 channels and value 512, of which no tile fits 3 MiB of VMEM"),
        (CHIPS["v4"], pj.rope(), 1024, None, r"query has 1024 channels and value 1024, of which no tile fits 15 MiB of VMEM"),
        (TINY, pj.cope(512), 128, None, r"max_position=512 of cope on heads of 128 channels does not fit 3 MiB of VMEM"),
        (
            CHIPS["v6e"],
            pj.identity(),
            128,
            Blocks(1024, 1024, 256, 65536),
            r"block_sizes=Blocks\(.*_resident=65536\) takes about 3\d\d MiB of 100 MiB of VMEM; block_sizes=Blocks\(.*\) fits",
        ),
    ],
    ids=["heads", "rotated heads", "positions", "block sizes"],
)
def test_what_does_not_fit_is_refused_by_name_and_done_by_another(chip, encoding, width, sizes, reason, operands_of, monkeypatch):
    monkeypatch.setattr(tpu, "chip_at_hand", lambda x=None: chip)
    shapes = shapes_of(encoding, 65536, width, "float32")
    with pytest.raises(NotImplementedError, match=f"implementation='pallas' cannot .*{reason}; implementation='xla_chunked' can"):
        jax.eval_shape(gradients(encoding, block_sizes=sizes), *shapes)
    with monkeypatch.context() as patch:
        patch.setattr(tpu, "attention", None)
        jax.eval_shape(gradients(encoding, None, sizes), *shapes)
    dispatch._run.clear_cache()  # equal calls are traced once
    monkeypatch.setattr(tpu, "chip_at_hand", lambda x=None: dataclasses.replace(chip, vmem=2**40))
    assert operands_of(encoding, 65536, width, "float32", implementation=None, block_sizes=sizes)


def test_more_extents_than_scalar_memory_holds_are_refused():
    """The compiler said of the first: 2.75 MiB on a v4, and took a quarter of it."""

    def unsupported_reason(rows, mesh=None, **options):
        arrays = {name: jax.ShapeDtypeStruct((rows, 131072), jnp.int32) for name in options}
        x = jax.ShapeDtypeStruct((rows, 131072, 1, 128), jnp.bfloat16)
        found = []

        def call(x, arrays):
            found.append(tpu.unsupported_reason(prepare(x, x, x, None, None, is_causal=True, **arrays), spec=mesh))

        with on("TPU v4"):
            jax.eval_shape(call, x, arrays)
        return found[0]

    reason = "segment_ids of 64 x 131072 tokens takes 2.8 MiB of 1 MiB of SMEM (fewer on a device fit)"
    assert unsupported_reason(64, segment_ids=True) == reason
    both = unsupported_reason(64, query_positions=True, key_positions=True)
    assert both.startswith("query_positions and key_positions of 64 x 131072 tokens takes 2.8 MiB")
    assert unsupported_reason(16, segment_ids=True) is None
    assert unsupported_reason(64) is None  # rows that are all alike take no more than one
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))
    assert unsupported_reason(64, ShardSpec(mesh, ("data",), ("tensor",)), segment_ids=True) is None
