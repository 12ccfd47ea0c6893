"""Flip-flop language modelling: ALiBi and the variants of CoPE's paper (arXiv:2405.18719), including longer strings.

    python experiments/flip_flop_variants.py                  # under fifteen minutes on two cores
    python experiments/flip_flop_variants.py --scale paper    # one GPU

The task, the recipe and the tests are those of flip_flop.py. A penalty on the number of tokens that are not ignored finds the last
write at any distance; a penalty on the number of all tokens does not.
"""

import argparse
import dataclasses
from collections.abc import Mapping

from common import markdown
from contrasts import Claim, cell
from flip_flop import LONGER, MARGIN, RATES, SETS, recipe, tests
from trained import Found, Part, main, tuned

from posjax.lab.config import Config

PUBLISHED = {  # dimension 256, 4 layers, 4 heads: in and out of the distribution
    "cope_mlp": (0.03, 5.9),
    "cope in the first layer": (0.9, 24.3),
    "cope_alibi, slope 1": (0.0, 11.4),
    "cope_alibi, slope 1/4": (0.0, 8.7),
    "cope_alibi, slope 1/16": (0.0, 17.1),
    "cope_alibi, learned": (0.0, 11.4),
}
MAIN = ("rope", "alibi", "cope_alibi(slope=1.0)")


def variants(config: Config) -> dict[str, str]:
    """Returns {name in the paper: encoding} of the published rows."""
    slopes = {"1": "1.0", "1/4": "0.25", "1/16": "0.0625"}
    first = f"cope({min(64, config.seq_length)})" + " / identity" * (config.num_layers - 1)
    return {
        "cope_mlp": "cope_mlp(64)" if config.seq_length == 512 else "cope_mlp(16)",
        "cope in the first layer": first,
        **{f"cope_alibi, slope {name}": f"cope_alibi(slope={value})" for name, value in slopes.items()},
        "cope_alibi, learned": "cope_alibi(learned=True)",
    }


def parts(options: argparse.Namespace) -> dict[str, Part]:
    config = recipe(options.scale)
    others = tuple(spec for spec in variants(config).values() if spec not in MAIN)
    if options.scale == "paper":
        return {"main": Part(tuned(config, MAIN), tests, seeds=3), "variants": Part(tuned(config, others), tests, seeds=3)}
    rope, alibi, counted = MAIN
    claims = [Claim(counted, rope, column, MARGIN) for column in (*SETS, *LONGER)]
    claims += [Claim(alibi, rope, column, MARGIN) for column in LONGER]
    shorter = dataclasses.replace(config, steps=700)
    return {
        "main": Part(tuned(config, MAIN, RATES), tests, seeds=8, claims=claims),
        "variants": Part(tuned(shorter, others), tests, seeds=4),
    }


def table(found: Mapping[str, Found]) -> str:
    scale = "paper" if found["main"].about["config"]["seq_length"] == 512 else "cpu"
    names = {spec: name for name, spec in variants(recipe(scale)).items()}
    lines = []
    for one in found.values():
        for spec in dict.fromkeys(row["encoding"] for row in one.rows):
            rows, name = one.of(encoding=spec), names.get(spec, spec)
            cells = [cell(rows, one.steps(rows), c, one.scale, 2, solved=True) for c in (*SETS, *LONGER)]
            lines.append([name, f"{one.steps(rows):,}", *cells, *PUBLISHED.get(name, ("-", "-"))])
    heads = ["encoding", "steps", *SETS, *LONGER, "theirs, 256 4/4, T = 512: in distribution", "out of it"]
    return markdown(heads, lines)


if __name__ == "__main__":
    main("flip_flop_variants", __doc__, parts, table)
