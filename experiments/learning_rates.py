"""Sweeps the learning rate of every encoding: five rates for text, three for masked words and for the synthetic tasks.

    python experiments/learning_rates.py --only code    # each line under fifteen minutes on two cores
    python experiments/learning_rates.py --only "masked words" "masked words, higher"
    python experiments/learning_rates.py --only flip_flop selective_copy counting

The tuning seeds differ from the final seeds. The recipes are those of language_code.py, tupe.py, flip_flop.py, selective_copy.py
and counting.py with fewer steps; those experiments then train each encoding at the learning rate that is best here.
"""

import argparse
import dataclasses
from collections.abc import Mapping

import counting
import flip_flop
import language_code
import selective_copy
import tupe
from common import markdown
from contrasts import cell
from scoring import excerpts_in_rows
from trained import TUNING_SEEDS, Found, Part, main

from posjax.lab.ablation.sweeps import grid
from posjax.lab.config import Config

TEXT_RATES, RATES, HIGHER = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), (1e-3, 3e-3, 1e-2), (3e-2,)
TEXT = ("rope", "cope(64)", "rope + cope(64)", "alibi", "learned")
MASKED = ("learned", "sinusoidal", "identity", "t5(bidirectional=True)", "tupe", "tupe(relative=True)")


def parts(options: argparse.Namespace) -> dict[str, Part]:
    small = argparse.Namespace(scale="cpu", data=None)

    def swept(config: Config, specs: tuple[str, ...], rates: tuple[float, ...], steps: int, tests) -> Part:
        config = dataclasses.replace(config, steps=steps, checkpoint_every=steps)
        points = grid(config, [("encoding", specs), ("learning_rate", rates)])
        return Part(points, tests, seeds=2, first_seed=TUNING_SEEDS[0])

    def synthetic(module, steps: int, more: tuple[str, ...] = ()) -> Part:
        config = module.recipe("cpu")
        return swept(config, (*module.encodings(config), *more), RATES, steps, module.tests)

    return {
        "code": swept(language_code.recipe(small), TEXT, TEXT_RATES, 600, lambda c, s: {"64": excerpts_in_rows(c, s)}),
        "masked words": swept(tupe.recipe(small), MASKED, RATES, 400, tupe.tests),
        "masked words, higher": swept(tupe.recipe(small), MASKED[3:], HIGHER, 400, tupe.tests),
        "flip_flop": synthetic(flip_flop, 500, ("cope_alibi(slope=1.0)", "alibi")),
        "selective_copy": synthetic(selective_copy, 1000),
        "counting": synthetic(counting, 400),
    }


def table(found: Mapping[str, Found]) -> str:
    tables = []
    for part, one in found.items():
        rates = list(dict.fromkeys(row["settings"]["learning_rate"] for row in one.rows))
        specs = list(dict.fromkeys(row["encoding"] for row in one.rows))
        column = next(iter(one.rows[0]["metrics"][one.about["measure"]]))
        lines = []
        for spec in specs:
            own = {rate: one.of(encoding=spec, learning_rate=rate) for rate in rates}
            lines.append([spec, *(cell(rows, one.steps(rows), column, one.scale, 3) for rows in own.values())])
        lines = [[part if i == 0 else "", *line] for i, line in enumerate(lines)]
        tables.append(markdown([f"{one.about['measure']}, {column}", "encoding", *(f"{rate:g}" for rate in rates)], lines))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main("learning_rates", __doc__, parts, table)
