"""The TPU kernel, interpreted on the CPU, equals dense attention; what it refuses; which programs contain it.

An interpreted kernel takes seconds to compile, one that counts 15 of them. So the tests that always run ask much of few programs;
those marked ``thorough`` ask one thing each: ``pytest -m thorough --dist load tests/attention/backends/test_tpu.py``.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import kernel_calls
import numpy as np
import pytest
import suite
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
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
    on_a_mesh,
    packed,
    saturating,
    shapes,
    stacked,
)
from suite import (
    normal,
)

import posjax as pj
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.tpu.blocks import CHIPS, Blocks

SMALL = Blocks(block_q=128, block_kv=128, block_kv_count=128, block_kv_resident=1024)
STREAMED = Blocks(128, 128, 128, block_kv_resident=128)
LARGE = Blocks(256, 256, 128, 512)  # groups of queries and strips within a tile, two tiles held at a time
ONE_CORE = pltpu.InterpretParams(detect_races=True)
TWO_CORES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=0)  # which share the parallel grid axes
thorough = pytest.mark.thorough


@pytest.fixture(autouse=True)
def no_races(capfd):
    """Races raise in newer versions of jax, and are printed in older ones."""
    yield
    pltpu.reset_tpu_interpret_mode_state()  # which an exception leaves behind
    assert "RACE DETECTED" not in capfd.readouterr().out


# Calls ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """The kernel on a chip. Equal ones are one program."""

    tile: Blocks = SMALL
    chip: str = "v6e"
    interpret: pltpu.InterpretParams = ONE_CORE

    def __call__(self, call):
        return tpu.attention(call, block_sizes=self.tile, chip=CHIPS[self.chip], interpret=self.interpret)


def check(encoding, tile=SMALL, chip="v6e", interpret=ONE_CORE, **call):
    return kernel_calls.check(Interpreted(tile, chip, interpret), encoding, **call)


# What always runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["mixed", *(pytest.param(gates, marks=thorough) for gates in (None, "near 0", "near 1"))])
def test_everything_at_once(gates):
    """Of keys that come in blocks."""
    kernel_calls.everything_at_once(Interpreted(STREAMED), gates)


@pytest.mark.thorough
def test_bfloat16_within_its_rounding_of_float32_on_the_same_inputs():
    check(GATED, dtype="bfloat16", is_causal=True)


@thorough
def test_queries_beyond_the_keys_in_both_directions_on_two_cores_that_do_not_race():
    check(pj.tupe(relative=True, num_buckets=8, max_distance=30), interpret=TWO_CORES, length=140, keys=100, heads=(2, 2, 16, 8))


@pytest.mark.parametrize("races", [True, False])
def test_the_detector_sees_races(races, capfd):
    """Both cores write the first block; or each its own."""

    def body(x, out):
        out[...] = x[...]

    kernel = pl.pallas_call(
        body,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0 if races else i, 0)),
        out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=TWO_CORES,
    )
    try:
        kernel(jnp.ones((16, 128))).block_until_ready()
        found = capfd.readouterr().out
    except RuntimeError as error:
        found = str(error)
        capfd.readouterr()
    assert ("RACE DETECTED" in found) == races


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


@thorough
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_of_data_and_tensor_axes(kind):
    on_a_mesh(kind, pj.t5(6, 8), 2, 20)


# What it refuses, and where it is ------------------------------------------------------------------------------------

REFUSED = {
    "a mask": (pj.identity(), {}, {"mask": np.ones((LONG, LONG), bool)}, "mask is an array"),
    "float16": (pj.identity(), {"dtype": "float16"}, {}, "query has dtype float16"),
    "wide heads": (pj.identity(), {"width": 1032}, {}, "query has 1032 channels"),
    "gates of their own": (pj.cope(4, gates="keys"), {}, {}, "encoding has a bias that the kernel does not evaluate"),
    "another bias": (pj.chain(pj.rope(), pj.cope_alibi()), {}, {}, "encoding has a bias that the kernel does not evaluate"),
    "many positions": (pj.cope(513), {}, {}, "max_position=513"),
    "many buckets": (pj.t5(128, 256), {}, {}, "num_buckets=128"),
    "cope twice": (pj.chain(pj.cope(4), pj.cope(8)), {}, {}, "encoding counts by gates twice"),
    "a second, larger table": (pj.chain(pj.t5(6, 8), pj.t5(66, 200)), {}, {}, "encoding reads a second table of more than 64"),
}


@pytest.mark.parametrize(("encoding", "sizes", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_do_is_refused_by_name_and_done_by_another(encoding, sizes, options, reason):
    operands = shapes(encoding, **sizes)
    with pytest.raises(NotImplementedError, match=f"implementation='pallas' .*{reason}.*'xla_chunked'"):
        jax.eval_shape(functools.partial(loss, encoding=encoding, implementation="pallas", **options), operands)
    program = jax.jit(functools.partial(loss, encoding=encoding, **options)).trace(operands)
    assert "tpu_custom_call" not in program.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("implementation", "encoding"),
    [("pallas", pj.rope()), (None, pj.rope()), (None, pj.chain(pj.rope(), pj.cope(8))), (None, pj.t5(127, 256))],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_programs_for_a_tpu_contain_it_wherever_they_are_lowered(implementation, encoding):
    gradient = jax.jit(jax.grad(functools.partial(loss, encoding=encoding, implementation=implementation), allow_int=True))
    texts = [gradient.trace(shapes(encoding)).lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu")]
    for name in ("posjax_attention_forward", "posjax_attention_backward"):
        assert name in texts[0]
    assert [text.count("tpu_custom_call") for text in texts] == [2, 0]


def test_a_program_for_a_cpu_is_made_without_tracing_the_kernel(monkeypatch):
    """Which takes ten times as long as all the rest."""
    encoding = pj.chain(pj.rope(), pj.cope(9))  # no other test has it, so no cache

    def program_id(axis):
        raise RuntimeError("the kernel is traced")

    monkeypatch.setattr(pl, "program_id", program_id)
    gradient = jax.jit(jax.grad(functools.partial(loss, encoding=encoding), allow_int=True)).trace(shapes(encoding))
    gradient.lower(lowering_platforms=("cpu",))
    with pytest.raises(RuntimeError, match="the kernel is traced"):
        gradient.lower(lowering_platforms=("tpu",))


def test_short_calls_are_dense_unless_the_kernel_is_asked_for():
    def calls(length, implementation):
        function = jax.jit(functools.partial(loss, encoding=pj.rope(), implementation=implementation))
        program = function.trace(shapes(pj.rope(), length))
        return program.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")

    assert [calls(128, None), calls(129, None), calls(128, "pallas")] == [0, 1, 1]


def test_block_sizes_of_the_call():
    """Blocks of another size give the same numbers, and stand in the program, also where no implementation is named."""
    operands = make_operands(pj.alibi(), 1, 200, 200, (1, 1, 16, 16))
    small, large = pj.Blocks(128, 128, 128, 128), pj.Blocks(256, 256, 128, 256)
    out = [loss(operands, pj.alibi(), implementation="pallas", block_sizes=sizes) for sizes in (small, large, None)]
    np.testing.assert_allclose(out, [loss(operands, pj.alibi(), implementation="xla")] * 3, rtol=1e-4)

    for implementation, sizes in itertools.product(("pallas", None), (small, large)):
        program = jax.make_jaxpr(functools.partial(loss, encoding=pj.alibi(), implementation=implementation, block_sizes=sizes))
        assert set(re.findall(r"\bBlocks\(.*?\)", str(program(operands)))) == {str(sizes)}


# One thing each ------------------------------------------------------------------------------------------------------


@thorough
@pytest.mark.parametrize("case", DISTINCT, ids=lambda case: case.name)
def test_every_encoding(case):
    check(case.encoding, is_causal=case.encoding.needs_causal, heads=(4, 2, 8, 8))


@pytest.mark.parametrize("case", [case for case in suite.CASES if case not in KNOWN], ids=lambda case: case.name)
def test_encodings_that_it_does_not_know(case):
    with pytest.raises(NotImplementedError, match="encoding has a bias that the kernel does not evaluate"):
        jax.eval_shape(functools.partial(loss, encoding=case.encoding, implementation="pallas"), shapes(case.encoding))


@thorough
@pytest.mark.parametrize(
    ("last", "per_head", "gates"),
    [(6, True, "near 0"), (6, True, "mixed"), (64, False, "near 1"), (150, False, "near 0"), (150, False, "mixed")],
)
def test_cope_where_gates_saturate(last, per_head, gates):
    check(saturating(last, per_head), gates=gates, length=200, heads=(2, 2, 16, 16), is_causal=True)


@thorough
@pytest.mark.parametrize("gates", [None, "near 1", "mixed", "by group"])
def test_groups_strips_and_blocks_of_several_tiles(gates):
    """In one tile of 256 queries one group saturates and the other does not."""
    check(EVERYTHING, tile=LARGE, length=520, heads=(1, 1, 16, 16), gates=gates, is_causal=True)


@thorough
@pytest.mark.parametrize(("last", "gates"), [(4, "small"), (40, "small and large"), (40, "by group")])
def test_strips_in_which_queries_pass_few_cells_and_many(last, gates):
    """Two pieces to a strip, two groups to a pair; counts that stop to matter within small gates, or go on."""
    tile = Blocks(256, 512, 256, 512)
    check(counted(last), tile=tile, length=600, keys=700, gates=gates, is_causal=True, arrays=packed(1, 600, 700))


@functools.cache
def counted(last):
    return pj.chain(pj.rope(theta=1e6), pj.cope(last), pj.alibi())


@thorough
def test_small_gates_in_bfloat16():
    tile = Blocks(512, 512, 256, 512)
    check(pj.cope(12), dtype="bfloat16", tile=tile, length=600, heads=(1, 1, 16, 16), gates="small", is_causal=True)


@thorough
@pytest.mark.parametrize("gates", [None, "small"])
def test_small_gates_under_a_soft_cap(gates):
    check(pj.cope(12), tile=LARGE, length=520, heads=(1, 1, 16, 16), gates=gates, is_causal=True, logits_soft_cap=5.0)


@thorough
@pytest.mark.parametrize("gates", [None, "mixed", "small"])
def test_a_chip_that_does_not_look_up_along_sublanes(gates):
    check(GATED, chip="v4", gates=gates, is_causal=True)


CALLS = {
    "a window to both sides": (pj.alibi(), dict(length=300, local_window_size=(70, 20))),
    "a window to the right": (pj.t5(8, 30, bidirectional=True), dict(length=200, local_window_size=(None, 0))),
    "packed in both directions": (pj.rope(), dict(batch=2, length=300, arrays=packed(2, 300, 300), logits_soft_cap=2.0, scale=0.3)),
    "tupe + cope, packed": (
        pj.chain(pj.tupe(relative=True), pj.cope(12, per_head=True)),
        dict(is_causal=True, batch=2, keys=150, arrays=packed(2, 140, 150)),
    ),
    "blocks of keys, both directions": (
        pj.chain(pj.rope(pairing="interleaved"), pj.t5(8, 30, bidirectional=True)),
        dict(tile=STREAMED, length=140, keys=384, scale=0.3),
    ),
    "blocks of keys that a window leaves out": (
        pj.cope(12),
        dict(tile=STREAMED, length=500, heads=(1, 1, 16, 16), is_causal=True, local_window_size=(100, None)),
    ),
    "blocks of keys in bfloat16 and a learned scale": (
        pj.cope(64, per_head=True),  # without rotations, whose rounding moves counts to other slopes
        dict(tile=STREAMED, length=384, dtype="bfloat16", scale=0.2, is_causal=True),
    ),
    "bfloat16 in both directions": (pj.tupe(relative=True), dict(dtype="bfloat16")),
    "two cores that count": (GATED, dict(interpret=TWO_CORES, heads=(2, 2, 16, 16), is_causal=True)),
    "two cores, blocks of keys": (pj.t5(6, 8), dict(interpret=TWO_CORES, tile=STREAMED, batch=2, length=300, is_causal=True)),
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
    "the chip's own blocks": (GATED, dict(tile=CHIPS["v6e"].sizes, length=600, heads=(1, 1, 16, 16), is_causal=True)),
}


@thorough
@pytest.mark.parametrize(("encoding", "call"), CALLS.values(), ids=CALLS)
def test_calls(encoding, call):
    check(encoding, **call)


def one_loss(operands, segments, encoding=GATED):
    query, key, value, params = (operands[name] for name in ("query", "key", "value", "params"))
    options = dict(is_causal=True, segment_ids=segments, implementation="pallas")
    return (pj.attention(query, key, value, encoding, params, **options) * normal(4, *query.shape)).sum()


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
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_and_what_counts(kind, kv_heads):
    """A mesh that cuts four heads in two parts, of which there is one key head, or two for each part."""
    on_a_mesh(kind, pj.chain(pj.tupe(), pj.cope(6, per_head=kv_heads == 4)), kv_heads, 40)
