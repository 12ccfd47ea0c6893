"""Compares the instruction bundles of the TPU kernels under relatives of RoPE with those under RoPE; needs no TPU.

    python experiments/tpu_cost_of_rotation.py        # 5 generations x 5 encodings, forward and backward

The kernels rotate tiles of queries as they load them, and blocks of keys, by cosines and sines that are computed outside. Every
encoding here is a rotation that all heads share, so that the kernels differ only in the numbers that they read: YaRN multiplies
cosines and sines by a gain, M-RoPE and axial RoPE rotate by coordinates of their own in every row of the batch.

A bundle takes one cycle, and the same program always has the same number of bundles. experiments/results/tpu_cost_of_rotation.json
has a row for each generation and encoding: bundles of each variant of the work on a tile (with and without a mask), of one
iteration of the loop around it, and of the whole kernel, forward and backward; and the largest ratio of any of them to that of
RoPE.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import common
import jax
import jax.numpy as jnp
import tyro

import posjax as pj
from posjax.bench.attention import versions
from posjax.bench.schedule import forms_of
from posjax.compile import aot
from posjax.encodings.spec import parse_encoding
from posjax.hardware import GENERATIONS

HEAD_DIM = 128
ROPE = "rope"


@dataclasses.dataclass(frozen=True)
class Rotations:
    """Configures the comparison.

    Attributes:
      chips: TPU generations.
      encodings: encodings that only rotate; they are compared with rope.
      seq_len: tokens of queries and keys.
      batch: rows, each with coordinates of its own.
      heads, kv_heads: number of query heads and of key heads.
    """

    chips: tuple[Literal["v4", "v5e", "v5p", "v6e", "tpu7x"], ...] = ("v4", "v5e", "v5p", "v6e", "tpu7x")
    encodings: tuple[str, ...] = (
        "rope(scaling=yarn_scaling(factor=4.0, original_max_length=2048))",
        "mrope((16, 24, 24))",
        "mrope((16, 24, 24), scaling=yarn_scaling(factor=4.0, original_max_length=2048))",
        "mrope((24, 20, 20), 'interleaved')",
        "axial_rope()",
        "axial_rope(layout='blocks')",
    )
    seq_len: int = 8192
    batch: int = 2
    heads: int = 8
    kv_heads: int = 2


def attention_job(encoding: str, seq_len: int, batch: int, heads: int, kv_heads: int) -> tuple[Callable, tuple]:
    """Returns causal attention with its gradients, and their arguments, for posjax.compile.aot to compile in another process."""
    chosen: Any = parse_encoding(encoding)

    def both(coordinates: Any, cotangent: Any, *operands: Any) -> Any:
        def forward(query: Any, key: Any, value: Any) -> Any:
            at = dict(query_coordinates=coordinates, key_coordinates=coordinates)
            return pj.attention(query, key, value, chosen, {}, is_causal=True, implementation="pallas", **at)

        out, pull = jax.vjp(forward, *operands)
        return out, pull(cotangent)

    query, key = (jax.ShapeDtypeStruct((batch, seq_len, n, HEAD_DIM), jnp.bfloat16) for n in (heads, kv_heads))
    return both, (jax.ShapeDtypeStruct((batch, seq_len, chosen.axes), jnp.int32), query, query, key, key)


def counts(report: aot.Report) -> dict[str, int]:
    """Returns the bundles of the parts of both kernels by name."""
    found: dict[str, int] = {}
    for kernel in report.kernels:
        name = "backward" if "backward" in kernel.name else "forward"
        found[f"{name}, kernel"] = kernel.bundles or 0
        for number, (work, turn, _, whole) in enumerate(forms_of(kernel)):
            if whole:
                found |= {f"{name}, tile {number}": work.bundles, f"{name}, iteration {number}": turn}
    return found


def run(config: Rotations) -> None:
    sizes = {name: getattr(config, name) for name in ("seq_len", "batch", "heads", "kv_heads")}
    rows: list[dict[str, Any]] = []
    for chip in config.chips:
        specs = (ROPE, *config.encodings)
        jobs = [("tpu_cost_of_rotation:attention_job", sizes | {"encoding": spec}) for spec in specs]
        reports = aot.compile_all(jobs, GENERATIONS[chip].topology)
        made = [counts(report) for report in reports]
        for spec, report, bundles in zip(specs, reports, made, strict=True):
            alike = report.failed is None and bundles.keys() == made[0].keys()
            ratio = max(n / made[0][part] for part, n in bundles.items()) if alike else None
            rows.append({"chip": chip, "encoding": spec, "failed": report.failed, "largest_ratio": ratio, "bundles": bundles})
            print(chip, spec, report.failed or bundles, ratio)
        named = {name: version for name, version in versions().items() if name in ("jaxlib", "libtpu")}
        common.write("tpu_cost_of_rotation", rows, sizes=sizes | {"head_dim": HEAD_DIM, "dtype": "bfloat16"}, **named)


if __name__ == "__main__":
    run(tyro.cli(Rotations, description=__doc__))
