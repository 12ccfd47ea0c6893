"""Flip-flop language modelling: the other seven shapes of the table in CoPE's paper (arXiv:2405.18719).

    python experiments/flip_flop_shapes.py                  # under fifteen minutes on two cores
    python experiments/flip_flop_shapes.py --scale paper    # one GPU, hours

The task and the recipe are those of flip_flop.py, which has the eighth shape. The small scale has strings of 32 tokens, 500 steps
and four seeds. These show whether a shape learns the task, not which encoding is better: no claim rests on this table.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from contrasts import cell
from flip_flop import SETS, encodings, name_of, recipe, size, sized
from scoring import strings
from trained import Found, Part, main

from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet
from posjax.lab.source import Source

# (dimension, layers, heads): in and out of the distribution; Abs, RoPE, CoPE. In the order of the paper.
PUBLISHED = {
    (256, 2, 4): ((11.1, 10.6), (5.1, 14.7), (0.0, 13.2)),
    (256, 4, 4): ((6.8, 21.7), (1.8, 20.3), (0.03, 4.9)),
    (256, 2, 2): ((13.9, 31.5), (5.4, 19.8), (0.0, 14.6)),
    (128, 4, 4): ((5.4, 24.8), (0.1, 8.9), (0.2, 33.2)),
    (128, 2, 4): ((0.08, 19.9), (0.1, 18.2), (0.03, 22.3)),
    (128, 4, 2): ((0.07, 16.5), (0.02, 17.3), (0.03, 14.5)),
    (128, 2, 2): ((19.1, 28.6), (14.4, 25.2), (0.02, 24.5)),
}


def shorter(scale: str) -> Config:
    config = recipe(scale)
    return config if scale == "paper" else dataclasses.replace(config, seq_length=32, steps=500, checkpoint_every=500)


def tests(config: Config, source: Source) -> dict[str, EvalSet]:
    drawn = zip(SETS, (source.task, *source.task.variants.values()), strict=True)
    return {name: strings(config, source, task, 2048) for name, task in drawn}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = shorter(options.scale)
    points = [point for shape in PUBLISHED for point in sized(config, encodings(config), size(options.scale, *shape))]
    return {"main": Part(points, tests, seeds=4 if options.scale == "cpu" else 3)}


def table(found: Mapping[str, Found]) -> str:
    one = found["main"]
    scale = "paper" if any(row["settings"]["embed_dim"] == 256 for row in one.rows) else "cpu"
    lines = []
    for published, numbers in PUBLISHED.items():
        shape = size(scale, *published)
        for spec, theirs in zip(encodings(shorter(scale)), numbers, strict=True):
            rows = one.of(encoding=spec, **shape)
            cells = [cell(rows, one.steps(rows), c, one.scale, 2, solved=True) for c in SETS]
            lines.append([name_of(shape), spec, *cells, "{} {}/{}".format(*published), *theirs])
    return markdown(["shape", "encoding", *SETS, "theirs: shape", "in distribution", "out of it"], lines)


if __name__ == "__main__":
    main("flip_flop_shapes", __doc__, parts, table)
