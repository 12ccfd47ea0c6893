"""Compiles the attention kernels, forward and backward, for every TPU generation, with no TPU; fails where one does not compile.

    pip install -e '.[tpu-aot]' && python .ci/compile_for_tpu.py
"""

import os
import sys
from pathlib import Path

here = str(Path(__file__).parent)
sys.path.insert(0, here)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])

import jax  # noqa: E402, after its settings
import jax.numpy as jnp  # noqa: E402

import posjax as pj  # noqa: E402
from posjax import aot  # noqa: E402
from posjax.specs import parse_encoding  # noqa: E402

CALLS = [
    dict(spec="rope + cope(64)", length=8192, heads=(4, 2), width=128, dtype="bfloat16", segmented=True),
    dict(spec="t5 + alibi", length=1024, heads=(2, 2), width=64, dtype="float32", soft_cap=30.0),
    dict(spec="identity", length=8192, heads=(2, 2), width=256, dtype="float32"),  # too much for the v4 in tiles of its own size
    dict(spec="tupe(relative=True)", length=1024, heads=(2, 1), width=256, dtype="bfloat16", window=(300, 0)),
]


def call(spec, length, heads, width, dtype, segmented=False, soft_cap=None, window=None):
    """What posjax.aot compiles: gradients of attention, and its arguments."""
    encoding = parse_encoding(spec)
    dims = pj.Dims(heads[0], width, max_length=length, num_kv_heads=heads[1])

    def gradients(segments, *operands):
        def loss(query, key, value, params):
            options = dict(segment_ids=segments if segmented else None, logits_soft_cap=soft_cap)
            options |= dict(local_window_size=window and tuple(window))  # JSON made a list of it
            out = pj.attention(query, key, value, encoding, params, is_causal=True, implementation="pallas", **options)
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2, 3))(*operands)

    query, key = (jax.ShapeDtypeStruct((1, length, n, width), dtype) for n in heads)
    params = jax.eval_shape(lambda: encoding.init(jax.random.key(0), dims))
    return gradients, (jax.ShapeDtypeStruct((1, length), jnp.int32), query, key, key, params)


def main() -> int:
    failed = 0
    for name, generation in aot.GENERATIONS.items():
        reports = aot.compile_all([("compile_for_tpu:call", kwargs) for kwargs in CALLS], generation.topology, schedules=False)
        for kwargs, report in zip(CALLS, reports, strict=True):
            kernels = sorted(kernel.name.split(".")[0] for kernel in report.kernels)
            missing = not any("forward" in k for k in kernels) or not any("backward" in k for k in kernels)
            reason = report.failed or ("the program has no kernel in it" if missing else None)
            print(name, kwargs["spec"], kwargs["dtype"], reason or f"compiled in {report.seconds:.0f} s", flush=True)
            failed += reason is not None
    return failed


if __name__ == "__main__":
    sys.exit(main())
