"""Memory per device of attention over 131,072 tokens, forward and backward, sharded over 1, 2, 4 and 8 devices; compiled, not run.

    python experiments/context_memory.py                        # plain XLA, compiled for CPUs; some minutes on two CPU cores
    python experiments/context_memory.py --topology v5e:2x4     # the kernels, compiled for chips that are not attached; likewise

One causal sequence with eight heads of 128 channels in bfloat16. The memory includes a device's shards of query, key, value, the
output and all gradients, and temporary arrays. A single device does not use a ring; a ring of one device is included for
comparison with the larger rings. Writes experiments/results/context_memory.json, or context_memory_v5e.json.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import tyro
from common import write
from jax.sharding import NamedSharding, PartitionSpec

import posjax as pj
from posjax.attention.backends.ring import attention as ring
from posjax.attention.backends.ring.context import Context
from posjax.attention.backends.shards import ShardSpec
from posjax.attention.call import prepare
from posjax.bench.results import print_table
from posjax.compile import aot
from posjax.parallel.mesh import make_mesh

LENGTH, HEADS, WIDTH = 131_072, 8, 128
ENCODINGS = {
    "rope + cope(64)": pj.chain(pj.rope(), pj.cope(64)),
    "cope(64)": pj.cope(64),
    "alibi": pj.alibi(),
    "t5": pj.t5(),
}
CASES = {"no ring": (1, False)} | {str(context): (context, True) for context in (1, 2, 4, 8)}


@dataclasses.dataclass(frozen=True)
class Where:
    """Configures the target of the compilation.

    Attributes:
      topology: topology of eight TPU chips; needs posjax[tpu-aot]. None: CPUs.
    """

    topology: str | None = None


def step(
    encoding: str, context: int, is_ring: bool, is_chunked: bool, devices: Sequence[Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the function to compile and its arguments."""
    applied = ENCODINGS[encoding]
    mesh = make_mesh(context, context=context, devices=devices)
    cut = NamedSharding(mesh, PartitionSpec(None, "context"))
    x = jax.ShapeDtypeStruct((1, LENGTH, HEADS, WIDTH), jnp.bfloat16, sharding=cut)
    params = jax.eval_shape(lambda: applied.init(jax.random.key(0), pj.Dims(HEADS, WIDTH, HEADS * WIDTH, LENGTH)))
    implementation = "xla_chunked" if is_chunked else None

    def both(query, key, value, params):
        def call(*args):
            if is_ring and context == 1:  # posjax.attention never uses a ring of one device
                prepared = prepare(*args[:3], applied, args[3], is_causal=True)
                kernel = "xla" if is_chunked else "tpu"
                return ring.attention(prepared, Context(ShardSpec(mesh), "context"), kernel=kernel)
            return pj.attention(*args[:3], applied, args[3], is_causal=True, implementation=implementation)

        out, back = jax.vjp(call, query, key, value, params)
        return out, back(out)  # the gradients of half the sum of squares

    return jax.jit(both, out_shardings=(cut, (cut, cut, cut, None))), (x, x, x, params)


def on_cpus(case: dict[str, Any]) -> dict[str, int]:
    function, args = step(**case, is_chunked=True, devices=jax.devices())
    stats = function.lower(*args).compile().memory_analysis()
    return {kind: getattr(stats, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp")}


def main(where: Where) -> None:
    cases = [dict(encoding=name, context=n, is_ring=is_ring) for name in ENCODINGS for n, is_ring in CASES.values()]
    if where.topology is None:
        memories = [on_cpus(case) for case in cases]
    else:
        jobs = [("context_memory:step", case | dict(is_chunked=False)) for case in cases]
        reports = aot.compile_all(jobs, where.topology, schedules=False)
        if failed := [report.failed for report in reports if report.failed is not None]:
            sys.exit(f"{len(failed)} of {len(jobs)} calls failed to compile; the first error is: {failed[0]}")
        memories = [report.memory for report in reports]
    kinds = {"argument": "argument_bytes", "output": "output_bytes", "temp": "temporary_bytes"}
    sizes = [{to: memory[kind] for kind, to in kinds.items()} for memory in memories]
    lines = []
    for name in ENCODINGS:
        sums = [sum(size.values()) for case, size in zip(cases, sizes, strict=True) if case["encoding"] == name]
        lines.append([name, *(f"{total / 2**20:,.0f}" for total in sums)])
    print_table("MiB per device", ["encoding", *CASES], lines, [])
    rows = [case | size for case, size in zip(cases, sizes, strict=True)]
    if where.topology is None:
        write("context_memory", rows)
    else:
        write(f"context_memory_{where.topology.partition(':')[0]}", rows, compiled_for=where.topology)


if __name__ == "__main__":
    main(tyro.cli(Where, description=__doc__))
