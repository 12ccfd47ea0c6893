"""Tests whether the results of language_code.py and extrapolation.py after 800 to 1,000 steps persist in longer training.

    python experiments/more_steps.py                  # source code of Python's standard library; under 15 minutes on two cores
    python experiments/more_steps.py --scale paper    # the models of extrapolation.py; GPUs, days

There are no published numbers to compare with. The test sets and the recipe are those of extrapolation.py.
"""

import argparse
import dataclasses
from collections.abc import Mapping

import extrapolation
import language_code
from common import markdown
from contrasts import Claim, cell
from extrapolation import MARGIN, at, windowed
from trained import Found, Part, main, tuned

from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet
from posjax.lab.source import Source

ENCODINGS = ("rope", "alibi", "rope + cope(64)")
COLUMNS = (at(1), windowed(1))
STEPS = (400, 800, 1600, 3200)


def tests(config: Config, source: Source) -> dict[str, EvalSet]:
    every = extrapolation.tests(config, source)
    return {column: every[column] for column in COLUMNS}


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = extrapolation.recipe(options)
    if options.scale == "paper":
        return {"main": Part(tuned(dataclasses.replace(config, steps=4 * config.steps), ENCODINGS), tests, seeds=3)}
    config = dataclasses.replace(config, steps=STEPS[-1], checkpoint_every=800)
    pairs = [(spec, "rope", column) for spec in ENCODINGS[1:] for column in COLUMNS]
    claims = [
        Claim(first, second, column, MARGIN, steps=None if steps == STEPS[-1] else steps)
        for first, second, column in pairs
        for steps in STEPS
    ]
    return {"main": Part(tuned(config, ENCODINGS, language_code.RATES), tests, claims=claims)}


def table(found: Mapping[str, Found]) -> str:
    one, lines = found["main"], []
    for spec in ENCODINGS:
        rows = one.of(encoding=spec)
        last = one.steps(rows)
        for step in sorted(step for step in rows[0]["items"] if step in STEPS or step == last):
            lines.append([spec, f"{step:,}", *(cell(rows, step, column, one.scale, 3) for column in COLUMNS)])
    return markdown(["encoding", "steps", *COLUMNS], lines)


if __name__ == "__main__":
    main("more_steps", __doc__, parts, table, {"--data": "stdlib, tfds:NAME, or a file or folder of text"})
