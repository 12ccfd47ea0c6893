"""The Mosaic GPU kernels, interpreted on the CPU, equal dense attention and do not race; what they refuse."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import kernel_calls
import numpy as np
import pytest
from kernel_calls import DISTINCT, EVERYTHING, GATED, D, all_agree, compiled, loss, make_operands, packed, shapes, stacked
from suite import (
    normal,
)

import posjax as pj
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.gpu import blocks as gpu_blocks
from posjax.attention.backends.gpu.blocks import GpuBlocks, blocks_for, check_gpu_blocks, mosaic_unsupported_reason
from posjax.attention.call import prepare

TILE = GpuBlocks(block_q=128, block_kv=128, block_kv_count=32, block_q_rows=64, num_warps=8, num_stages=2, lowering="mosaic")
thorough = pytest.mark.thorough
interpreted = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="older jax does not interpret these kernels")


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """The kernels, which raise an error where they race."""

    tile: GpuBlocks = TILE

    def __call__(self, call: Any) -> Any:
        from jax.experimental.pallas import mosaic_gpu

        return gpu.attention(call, block_sizes=self.tile, interpret=mosaic_gpu.InterpretGPUParams(detect_races=True))


def check(encoding, dtype="float16", tile=TILE, **call):
    return kernel_calls.check(Interpreted(tile), encoding, dtype=dtype, **call)


@interpreted
@thorough
@pytest.mark.parametrize("gates", [None, "mixed"])
def test_everything_at_once(gates):
    kernel_calls.everything_at_once(Interpreted(), gates, dtype="float16")


@interpreted
def test_tiles_that_take_turns_in_shared_memory():
    check(pj.identity(), length=520, heads=(1, 1, 16, 16), is_causal=True)


@interpreted
@pytest.mark.parametrize("races", [True, False])
def test_the_detector_sees_races(races):
    """Two warpgroups that write to one place, or each to its own."""
    from jax.experimental.pallas import mosaic_gpu

    def body(x, out):
        place = 0 if races else jax.lax.axis_index("group")
        out[place] = x[place]

    params = mosaic_gpu.InterpretGPUParams(detect_races=True)
    kernel = mosaic_gpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32), num_threads=2, thread_name="group", interpret=params
    )
    if races:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
            kernel(jnp.ones((2, 128)))
    else:
        assert kernel(jnp.ones((2, 128))).sum() == 256


# One thing each ------------------------------------------------------------------------------------------------------


@interpreted
@thorough
@pytest.mark.parametrize("name", ["alibi", "t5 bidirectional", "tupe r", "cope + t5"])
def test_every_kind_of_encoding(name):
    """What others do before or after the kernels, tests of the Triton kernels see."""
    encoding = next(case.encoding for case in DISTINCT if case.name == name)
    check(encoding, length=200, is_causal=encoding.needs_causal, heads=(4, 2, 8, 8))


CALLS = {
    "bfloat16": (GATED, dict(dtype="bfloat16", is_causal=True)),
    "a window to both sides": (pj.alibi(), dict(length=300, local_window_size=(70, 20))),
    "packed in both directions": (pj.rope(), dict(batch=2, length=300, arrays=packed(2, 300, 300), logits_soft_cap=2.0, scale=0.3)),
    "small gates, most of a row counted": (pj.cope(64), dict(gates="small", length=300, is_causal=True)),
    "wide values": (pj.chain(pj.cope(12), pj.alibi()), dict(heads=(4, 1, 8, 136), is_causal=True)),
    "one query": (GATED, dict(length=1, keys=150, arrays={"query_positions": jnp.asarray([149])}, is_causal=True)),
    "more stages than tiles": (pj.t5(8, 30), dict(tile=TILE._replace(num_stages=4), keys=300, heads=(1, 1, 16, 16))),
}


@interpreted
@thorough
@pytest.mark.parametrize(("encoding", "call"), CALLS.values(), ids=CALLS)
def test_calls(encoding, call):
    check(encoding, **call)


@interpreted
@thorough
def test_two_runs_agree_bit_for_bit():
    operands = make_operands(EVERYTHING, 1, 140, 140, (4, 2, 16, 16))
    operands |= {name: operands[name].astype(jnp.float16) for name in ("query", "key", "value")}
    given = normal(5, 1, 140, D), normal(4, 1, 140, 4, 16), {}
    runs = [compiled(EVERYTHING, (("is_causal", True),), Interpreted())(operands, *given) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *runs)


@interpreted
@thorough
def test_vmap():
    def one_loss(operands, segments):
        query, key, value = (operands[name].astype(jnp.float16) for name in ("query", "key", "value"))
        call = prepare(query, key, value, GATED, operands["params"], is_causal=True, segment_ids=segments)
        return (Interpreted()(call).astype(jnp.float32) * normal(4, *query.shape)).sum()

    operands, segments, want = stacked()
    all_agree(jax.jit(jax.vmap(jax.grad(one_loss)))(operands, segments), operands, want, 2.0**-6)


# What they refuse, and where they are --------------------------------------------------------------------------------


def test_blocks_that_they_do_not_have():
    check_gpu_blocks(TILE)
    for wrong, message in (
        (TILE._replace(block_q=64, block_q_rows=32), "block_q=128, block_kv=128 and block_q_rows=64"),
        (TILE._replace(block_kv=256), "block_kv=128"),
        (TILE._replace(lowering="cuda"), "lowering of block_sizes must be triton or mosaic"),
    ):
        with pytest.raises(ValueError, match=message):
            check_gpu_blocks(wrong)


REFUSED = {
    "float32": (90, "float32", 64, 0, TILE, "bfloat16 and float16"),
    "Ampere": (80, "bfloat16", 64, 0, TILE, "compute capability 9.0"),
    "Blackwell": (100, "bfloat16", 64, 0, TILE, "compute capability 9.0"),
    "wide heads": (90, "bfloat16", 160, 0, TILE, "144 channels"),
    "a large table": (90, "bfloat16", 64, 65, TILE, "64 biases"),
    "many stages": (90, "float16", 128, 0, TILE._replace(num_stages=4), "of 226 KiB of shared memory"),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_they_cannot_do(call, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    *call, reason = call
    assert reason in mosaic_unsupported_reason(*call)
    assert mosaic_unsupported_reason(90, "bfloat16", 144, 64, TILE) is None
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "jax 0.11.2 or later" in mosaic_unsupported_reason(90, "bfloat16", 64, 0, TILE)


@pytest.mark.parametrize("counts", [False, True])
def test_the_table_gives_them_only_to_calls_that_they_can_do(counts, monkeypatch):
    """Wherever their line stands in the table."""
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert blocks_for(90, "bfloat16", 128, counts).lowering == "triton"
    table = sorted(gpu_blocks._TABLE, key=lambda line: line["lowering"])
    monkeypatch.setattr(gpu_blocks, "_TABLE", table)
    assert blocks_for(90, "bfloat16", 128, counts) == TILE
    for other in ((90, "float32", 64), (80, "bfloat16", 64), (100, "bfloat16", 64), (90, "bfloat16", 160)):
        assert blocks_for(*other, counts).lowering == "triton"


def distance(differences, args):
    return -args * jnp.abs(differences[0])


def both(queries, keys, args):
    return -args * jnp.abs(queries[0] - keys[0])


POSITIONS = jnp.zeros((1, 1, 8))
PAIRS = {  # whether they evaluate them
    "a function of the distance": (pj.Bias(pj.Pair(distance, args=jnp.ones(2), learned=False)), True),
    "learned": (pj.Bias(pj.Pair(distance, args=jnp.ones(2))), False),
    "of both positions": (pj.Bias(pj.Pair(both, args=jnp.ones(2), relative=False, learned=False)), False),
    "of two numbers": (pj.Bias(pj.Pair(distance, args=jnp.ones((2, 2)), learned=False)), False),
    "of features": (pj.Bias(pj.Pair(distance, (POSITIONS,), (POSITIONS,), args=jnp.ones(2), learned=False)), False),
    "read by a network": (pj.Bias(pj.Pair(distance, args=jnp.ones(2)), pj.Hinges(*[jnp.ones((2, 3))] * 3)), False),
}


@pytest.mark.parametrize(("bias", "can"), PAIRS.values(), ids=PAIRS)
def test_pairs(bias, can, monkeypatch):
    """Those that they do not evaluate are refused by name, and go to the others where no block sizes are given."""
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(gpu, "capability", lambda: 90)
    x = jnp.zeros((1, 8, 2, 136), jnp.bfloat16)
    call = prepare(x, x, x, None, None).replace(biases=(bias,))
    assert gpu.default_blocks(call).lowering == ("mosaic" if can else "triton")
    assert gpu.unsupported_reason(call) is None
    reason = gpu.unsupported_reason(call, block_sizes=TILE)
    assert reason is None if can else "functions of the distance of two positions with one number per head" in reason


@pytest.mark.parametrize(("dtype", "why"), [("bfloat16", "mosaic could, too"), ("float32", "mosaic cannot: it takes bfloat16")])
def test_the_log_says_once_which_kernels_run_and_why(dtype, why, caplog, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(gpu, "capability", lambda: 90)
    caplog.set_level("INFO", logger="posjax")
    gpu._log_lowering.cache_clear()
    for length in (200, 210):
        program = jax.jit(functools.partial(loss, encoding=pj.alibi(), implementation="pallas"))
        program.trace(shapes(pj.alibi(), length, dtype=dtype)).lower(lowering_platforms=("cuda",))
    (said,) = caplog.messages
    assert "compute capability 9.0 takes lowering='triton'" in said
    assert why in said


def test_a_call_that_asks_for_them_in_vain_is_told_why(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(NotImplementedError, match=r"block_sizes has lowering='mosaic': it .*lowering='triton' can"):
        jax.eval_shape(functools.partial(loss, encoding=pj.rope(), implementation="pallas", block_sizes=TILE), shapes(pj.rope()))
