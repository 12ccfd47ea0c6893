"""Flip-flop language modelling: the other seven shapes of the table in CoPE's paper (arXiv:2405.18719).

    python experiments/flip_flop_shapes.py                  # under ten minutes on two cores
    python experiments/flip_flop_shapes.py --scale paper    # one GPU, hours

The task and the recipe are those of flip_flop.py, which has the first shape; the small scale has strings of 32 tokens, so that 105
runs take no longer than its 45.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from flip_flop import COLUMNS, encodings, name_of, recipe, size, sized
from trained import Part, Rows, cell, claims, main, of, values, verdict

from posjax.config import Config

# (dimension, layers, heads): in and out of the distribution; Abs, RoPE, CoPE. In the order of the paper.
PUBLISHED = {
    (256, 2, 4): ((11.1, 10.6), (5.1, 14.7), (0.0, 13.2)),
    (256, 4, 2): ((0.1, 18.0), (0.02, 19.0), (0.0, 3.0)),
    (256, 2, 2): ((13.9, 31.5), (5.4, 19.8), (0.0, 14.6)),
    (128, 4, 4): ((5.4, 24.8), (0.1, 8.9), (0.2, 33.2)),
    (128, 2, 4): ((0.08, 19.9), (0.1, 18.2), (0.03, 22.3)),
    (128, 4, 2): ((0.07, 16.5), (0.02, 17.3), (0.03, 14.5)),
    (128, 2, 2): ((19.1, 28.6), (14.4, 25.2), (0.02, 24.5)),
}


def shorter(scale: str) -> Config:
    config = recipe(scale)
    return config if scale == "paper" else dataclasses.replace(config, seq_length=32)


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = shorter(options.scale)
    points = [point for shape in PUBLISHED for point in sized(config, encodings(config), size(options.scale, *shape))]
    return {"main": Part(points, seeds=5 if options.scale == "cpu" else 3)}


def table(found: Mapping[str, Rows]) -> str:
    scale = "paper" if any(row["settings"]["embed_dim"] == 256 for row in found["main"]) else "cpu"
    absolute, rope, cope = specs = encodings(shorter(scale))
    lines, told = [], []
    for published, numbers in PUBLISHED.items():
        shape = size(scale, *published)
        own = {spec: of(found["main"], encoding=spec, **shape) for spec in specs}
        for (spec, rows), theirs in zip(own.items(), numbers, strict=True):
            lines.append([name_of(shape), spec, *(cell(rows, c, 2) for c in COLUMNS), "{} {}/{}".format(*published), *theirs])
        told += [
            verdict(f"{name_of(shape)}: CoPE below {name}, {c}", values(own[cope], c), values(own[spec], c), " %", 2)
            for name, spec in (("absolute", absolute), ("RoPE", rope))
            for c in COLUMNS
        ]
    heads = ["shape", "encoding", *COLUMNS, "theirs: shape", "in distribution", "out of it"]
    return markdown(heads, lines) + "\n\n" + claims(told)


if __name__ == "__main__":
    main("flip_flop_shapes", __doc__, parts, table)
