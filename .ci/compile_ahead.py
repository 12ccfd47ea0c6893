"""Compiles the attention kernels, forward and backward, for every TPU generation or for GPUs, with none of them attached; fails
where one does not compile.

    pip install -e '.[tpu-aot]' && python .ci/compile_ahead.py tpu
    pip install -e '.[gpu-aot]' && python .ci/compile_ahead.py gpu
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

here = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "examples")]
sys.path[:0] = here
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONPATH"] = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])

import jax  # noqa: E402, after its settings
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import posjax as pj  # noqa: E402
from posjax.compile import aot  # noqa: E402
from posjax.encodings.spec import parse_encoding  # noqa: E402
from posjax.hardware import GENERATIONS  # noqa: E402
from posjax.parallel.mesh import make_mesh  # noqa: E402

EXAMPLES = "forgetting_gate:ForgettingGate + root_distance:RootDistance"  # sums of gates, and a function with a learned number
CALLS = {
    "tpu": [
        dict(spec="rope + cope(64)", length=8192, heads=(4, 2), width=128, dtype="bfloat16", segmented=True),
        dict(spec=f"t5 + alibi + {EXAMPLES}", length=1024, heads=(2, 2), width=64, dtype="float32", soft_cap=30.0),
        dict(spec="tupe(relative=True)", length=1024, heads=(2, 1), width=256, dtype="bfloat16", window=(300, 0)),
    ],
    "gpu": [
        dict(spec="rope + cope(64)", length=8192, heads=(4, 2), width=128, dtype="bfloat16", segmented=True),
        dict(spec=f"t5 + alibi + cope(64) + {EXAMPLES}", length=1024, heads=(2, 2), width=64, dtype="float32", soft_cap=30.0),
        dict(spec="tupe(relative=True)", length=1024, heads=(2, 1), width=128, dtype="float16", window=(300, 0)),
    ],
}
MOSAIC = pj.GpuBlocks(block_q=128, block_kv=128, block_kv_count=32, block_q_rows=64, num_warps=8, num_stages=2, lowering="mosaic")
MORE = {"h200": [CALLS["gpu"][0] | dict(blocks=MOSAIC)]}  # on one chip alone
MORE["h200"] += [dict(spec="t5 + alibi", length=1024, heads=(2, 2), width=64, dtype="float16", soft_cap=30.0, blocks=MOSAIC)]
MORE["h200"] += [CALLS["gpu"][0] | dict(context=2)]  # around a ring of devices
MORE["v5e"] = [CALLS["tpu"][0] | dict(context=4)]
WIDE = dict(spec="identity", length=8192, heads=(2, 2), width=256)
MORE["v4"] = [WIDE | dict(dtype="float32")]  # too much for its own tiles
MORE["h200"] += [WIDE | dict(dtype="bfloat16")]
FIRST_TWO = ("v5p", "v6e")  # the other calls are compiled for the generations before and after
TOPOLOGIES = {
    "tpu": {name: generation.topology for name, generation in GENERATIONS.items()},
    "gpu": {name: f"{name}:1x1x2" for name in ("a100", "h200", "b200")},
}
KERNELS = {"tpu": ("forward", "backward"), "gpu": ("forward", "query_plain", "key_plain")}


def call(spec, length, heads, width, dtype, devices, segmented=False, soft_cap=None, window=None, blocks=None, context=1):
    """What posjax.compile.aot compiles: gradients of attention, and its arguments."""
    encoding = parse_encoding(spec)
    dims = pj.Dims(heads[0], width, max_length=length, num_kv_heads=heads[1])

    def gradients(segments, hidden, *operands):
        def loss(query, key, value, params):
            options = dict(segment_ids=segments if segmented else None, logits_soft_cap=soft_cap)
            options |= dict(local_window_size=window and tuple(window))  # JSON made a list of it
            options |= dict(hidden=hidden if encoding.needs_hidden else None)
            options |= dict(block_sizes=blocks and pj.GpuBlocks(*blocks))
            out = pj.attention(query, key, value, encoding, params, is_causal=True, implementation="pallas", **options)
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2, 3))(*operands)

    mesh = make_mesh(context, context=context, devices=devices)
    cut = NamedSharding(mesh, PartitionSpec(None, "context")) if context > 1 else None
    query, key = (jax.ShapeDtypeStruct((1, length, n, width), dtype, sharding=cut) for n in heads)
    params = jax.eval_shape(lambda: encoding.init(jax.random.key(0), dims))
    hidden = jax.ShapeDtypeStruct((1, length, dims.embed_dim), dtype, sharding=cut)
    return gradients, (jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=cut), hidden, query, key, key, params)


def main(kind: str) -> int:
    def compiled(name):
        calls = CALLS[kind][: 2 if name in FIRST_TWO else None] + MORE.get(name, [])
        return calls, aot.compile_all([("compile_ahead:call", kwargs) for kwargs in calls], TOPOLOGIES[kind][name], schedules=False)

    failed = 0
    with ThreadPoolExecutor(2) as pool:  # each compiler is a process of its own
        answers = dict(zip(TOPOLOGIES[kind], pool.map(compiled, TOPOLOGIES[kind]), strict=True))
    for name, (calls, reports) in answers.items():
        for kwargs, report in zip(calls, reports, strict=True):
            found = [kernel.name for kernel in report.kernels]
            wanted = [*KERNELS[kind], *(("query_band", "key_band") if kind == "gpu" and "cope" in kwargs["spec"] else ())]
            wanted = [f"mosaic_{part}" for part in KERNELS[kind]] + wanted[3:] if "blocks" in kwargs else wanted
            missing = [part for part in wanted if not any(part in kernel for kernel in found)]
            reason = report.failed or (f"the program has no kernel named {', '.join(missing)}" if missing else None)
            said = reason or f"compiled in {report.seconds:.0f} s"
            special = [word for option, word in (("blocks", "mosaic"), ("context", "ring")) if option in kwargs]
            print(name, *special, kwargs["spec"], kwargs["dtype"], said, flush=True)
            failed += reason is not None
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
