"""Memory of a device for attention over 131,072 tokens, forward and backward, cut over 1, 2, 4 and 8 devices; compiled, not run.

    python experiments/context_memory.py        # some minutes on two CPU cores

Eight heads of 128 channels in bfloat16, causal, one sequence; the compiler is that of CPUs. Counted are a device's shares of query,
key, value, the result and all their gradients, and what comes and goes. experiments/results/context_memory.json.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from common import write  # beside this one
from jax.sharding import NamedSharding, PartitionSpec

import posjax as pj
from posjax.bench.results import print_table
from posjax.sharding import make_mesh

LENGTH, HEADS, WIDTH = 131_072, 8, 128
ENCODINGS = {
    "rope + cope(64)": pj.chain(pj.rope(), pj.cope(64)),
    "cope(64)": pj.cope(64),
    "alibi": pj.alibi(),
    "t5": pj.t5(),
}


def measure(encoding: pj.PositionalEncoding, context: int) -> dict[str, int]:
    mesh = make_mesh(context, context=context)
    cut = NamedSharding(mesh, PartitionSpec(None, "context"))
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, WIDTH), jnp.bfloat16, sharding=cut)
    params = encoding.init(jax.random.key(0), pj.Dims(HEADS, WIDTH, HEADS * WIDTH, LENGTH))

    def step(query, key, value, params):
        def call(*args):
            return pj.attention(*args[:3], encoding, args[3], is_causal=True, implementation="xla_chunked")

        out, back = jax.vjp(call, query, key, value, params)
        return out, back(out)  # as of a loss that is half the sum of squares

    stats = jax.jit(step, out_shardings=(cut, (cut, cut, cut, None))).lower(x, x, x, params).compile().memory_analysis()
    return dict(
        context=context,
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
    )


def main() -> None:
    rows = [dict(encoding=name) | measure(encoding, n) for name, encoding in ENCODINGS.items() for n in (1, 2, 4, 8)]
    lines = []
    for name in ENCODINGS:
        sums = [r["argument_bytes"] + r["output_bytes"] + r["temporary_bytes"] for r in rows if r["encoding"] == name]
        lines.append([name, *(f"{size / 2**20:,.0f}" for size in sums)])
    print_table("MiB of a device", ["encoding", "context 1", "2", "4", "8"], lines, [])
    write("context_memory", rows)


if __name__ == "__main__":
    main()
